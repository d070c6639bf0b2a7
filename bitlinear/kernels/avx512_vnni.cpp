// AVX512-VNNI: Intel from Cascade Lake / Ice Lake on, AMD from Zen 4 on.
#include "vnni.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Zmm : X86Half {
  static constexpr int64_t kWidth = 64;
  static constexpr int kGemvRows = 4;
  static constexpr int kTokens = 8;
  static constexpr int kTileRows = 2;
  using Bytes = __m512i;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load_plane(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load_partial(const uint8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p);
  }
  static Bytes codes(Bytes w, int shift) { return both(_mm512_srli_epi16(w, shift), bytes_of(3)); }

  static Bytes zero() { return _mm512_setzero_si512(); }
  static Bytes bytes_of(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  static Bytes dot(Bytes sum, Bytes codes, Bytes plane) {
    return _mm512_dpbusd_epi32(sum, codes, plane);
  }
  template <int kBits>
  static Bytes shift_right(Bytes a) {
    return _mm512_srai_epi32(a, kBits);
  }
  static Bytes add(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
  static int32_t reduce(Bytes a) { return _mm512_reduce_add_epi32(a); }
};

constexpr bitlinear_kernel_table kTable = make_table<Vnni<Zmm>>("avx512_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
