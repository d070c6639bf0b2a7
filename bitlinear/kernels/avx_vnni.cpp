// AVX-VNNI: the dot product of AVX512-VNNI on 256-bit vectors, VEX-encoded. Intel from Alder Lake
// on (also where AVX-512 is fused off), AMD from Zen 5 on.
#include "vnni.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Ymm : X86Ymm {
  static constexpr int kGemvRows = 2;
  static constexpr int kTokens = 4;
  static constexpr int kTileRows = 2;

  static Bytes zero() { return _mm256_setzero_si256(); }
  static Bytes bytes_of(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  static Bytes dot(Bytes sum, Bytes codes, Bytes plane) {
    return _mm256_dpbusd_avx_epi32(sum, codes, plane);
  }
  template <int kBits>
  static Bytes shift_right(Bytes a) {
    return _mm256_srai_epi32(a, kBits);
  }
  static Bytes add(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
};

constexpr bitlinear_kernel_table kTable = make_table<Vnni<Ymm>>("avx_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
