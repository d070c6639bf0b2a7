// AVX-VNNI: the dot product of AVX512-VNNI on 256-bit vectors, VEX-encoded. Intel from Alder Lake
// on (which has AVX-512 fused off), AMD from Zen 5 on.
#include "gemm_groups.h"
#include "gemm_panel.h"
#include "vnni.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Ymm : X86Ymm {
  static constexpr int kGemvTokens = 3;  // 3 tokens * 4 planes = 12 sums; 4 registers remain
  static constexpr int kGemvRows = 2;

  static Bytes zero() { return _mm256_setzero_si256(); }
  static Bytes broadcast_byte(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Bytes bitwise_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  // Bits of one byte enter the next one: mask the result.
  static Bytes shift_bytes_right(Bytes a, int bits) { return _mm256_srli_epi16(a, bits); }
  static Bytes dot(Bytes sum, Bytes codes, Bytes plane) {
    // The intrinsic costs GCC register moves, as in avx512.h.
    BITLINEAR_GCC_ASM(sum = _mm256_dpbusd_avx_epi32(sum, codes, plane),
                      "%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "xm"(plane));
    return sum;
  }
  template <int kBits>
  static Bytes shift_right(Bytes a) {
    return _mm256_srai_epi32(a, kBits);
  }
  static Bytes add(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
  static Bytes add_products(Bytes sum, Bytes lanes, Bytes factors) {
    // A lane fits 16 bits, and the upper half of a factor is 0.
    BITLINEAR_GCC_ASM(sum = _mm256_dpwssd_avx_epi32(sum, lanes, factors),
                      "%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(lanes), "xm"(factors));
    return sum;
  }
};

struct AvxVnni : Vnni<Ymm> {
  // Fitted on one core of a Xeon VM; "Refit a constant" in ../README.md has the command.
  static constexpr int64_t kGemmTokens = 21;
  static constexpr int64_t kGemvOverhead = 12;
  static constexpr int kPanelTokens = 6;
  static constexpr int kPanelStrips = 2;
  static constexpr int64_t kPanelDepth = 1024;
  static constexpr int kDecodingTokens = 3;
  static constexpr int kFetchingRows = 16;
  static constexpr int64_t kGroupGemmTokens = 9;  // as AVX512-VNNI's

  static constexpr int kGroupTokens = 6;
  static constexpr int kGroupStrips = 2;
  static constexpr int64_t kGroupDepth = 512;
};

constexpr bitlinear_kernel_table kTable =
    make_table<AvxVnni, PanelGemm<AvxVnni>, GroupProduct<AvxVnni, GroupGemm<AvxVnni>>>("avx_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
