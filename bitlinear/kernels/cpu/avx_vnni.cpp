// AVX-VNNI: the dot product of AVX512-VNNI on 256-bit vectors, VEX-encoded. Intel from Alder Lake
// on (which has AVX-512 fused off), AMD from Zen 5 on.
#include "gemm_panel.h"
#include "vnni.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Ymm : X86Ymm {
  static constexpr int kGemvTokens = 3;  // 3 tokens * 4 planes = 12 sums; 4 registers remain
  static constexpr int kGemvRows = 2;

  static Bytes load_ints(const int32_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
  static void store_ints(int32_t* p, Bytes a) { store(reinterpret_cast<uint8_t*>(p), a); }
  static Bytes zero() { return _mm256_setzero_si256(); }
  static Bytes broadcast_byte(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Bytes bitwise_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  // Bits of one byte enter the next one: mask the result.
  static Bytes shift_bytes_right(Bytes a, int bits) { return _mm256_srli_epi16(a, bits); }
  static Bytes broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
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
  // An 8 x 8 matrix of 32-bit elements.
  static void transpose(Bytes (&rows)[8]) {
    Bytes quads[8];  // quads[4g + c], 128-bit lane l: column 4l + c of rows 4g .. 4g + 3
    for (int g = 0; g < 8; g += 4) {
      const Bytes a = _mm256_unpacklo_epi32(rows[g], rows[g + 1]);
      const Bytes b = _mm256_unpackhi_epi32(rows[g], rows[g + 1]);
      const Bytes c = _mm256_unpacklo_epi32(rows[g + 2], rows[g + 3]);
      const Bytes d = _mm256_unpackhi_epi32(rows[g + 2], rows[g + 3]);
      quads[g] = _mm256_unpacklo_epi64(a, c);
      quads[g + 1] = _mm256_unpackhi_epi64(a, c);
      quads[g + 2] = _mm256_unpacklo_epi64(b, d);
      quads[g + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x20);
      rows[4 + c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x31);
    }
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
};

constexpr bitlinear_kernel_table kTable = make_table<AvxVnni, PanelGemm<AvxVnni>>("avx_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
