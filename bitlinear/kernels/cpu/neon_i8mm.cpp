// NEON with the product of 8-bit matrices: FEAT_I8MM, such as Neoverse V1 and N2, Cortex-X2 and
// A710, Apple's M2. One smmla multiplies two tokens by two rows, eight k deep: twice the work of an
// sdot. A GEMV would leave half of it idle, and uses sdot.
//
// Not timed: no Arm machine was available. Instructions per 64 packed bytes and token, which are
// 256 multiplications (`python -m scripts.dev.instruction_mix`): the panel takes 13.5, of which 8
// are smmla.
#include "neon_dotprod.h"

namespace bitlinear {
namespace {

struct NeonI8mm : NeonDot {
  // Fitted to the instructions of whole calls, for rows of 16 to 1024 packed bytes (`python -m
  // scripts.dev.instruction_count`).
  static constexpr int64_t kGemmTokens = 4;
  static constexpr int64_t kGemvOverhead = 2;
  static constexpr int kDecodingTokens = 4;

  // Of each pair of steps, one vector holds rows 0 and 1 of the strip, eight codes each; the other
  // holds rows 2 and 3.
  static void transpose(Bytes (&rows)[4]) {
    const uint64x2_t a = vreinterpretq_u64_u8(rows[0]), b = vreinterpretq_u64_u8(rows[1]);
    const uint64x2_t c = vreinterpretq_u64_u8(rows[2]), d = vreinterpretq_u64_u8(rows[3]);
    rows[0] = vreinterpretq_u8_u64(vzip1q_u64(a, b));
    rows[1] = vreinterpretq_u8_u64(vzip1q_u64(c, d));
    rows[2] = vreinterpretq_u8_u64(vzip2q_u64(a, b));
    rows[3] = vreinterpretq_u8_u64(vzip2q_u64(c, d));
  }
};

// As DotTile, with the tokens in pairs. The last token of an odd number is paired with itself.
struct MatrixTile {
  // sum (2 tokens, 2 rows) += tokens (2, 8) times rows (2, 8) transposed. Assembly for the reason
  // given in neon_dotprod.h.
  static int32x4_t multiply_matrices(int32x4_t sum, int8x16_t tokens, int8x16_t rows) {
    BITLINEAR_GCC_ASM(sum = vmmlaq_s32(sum, tokens, rows),
                      "smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(tokens), "w"(rows));
    return sum;
  }

  template <int kTokens, int kStrips>
  static void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t bytes,
                       int32_t* sums, bool accumulate) {
    constexpr int kPairs = (kTokens + 1) / 2;
    constexpr int64_t kStep = kStrips * NeonI8mm::kWidth;
    int32x4_t tile[kPairs][kStrips][2] = {};  // (2 tokens, 2 rows) each
    // 16 values of k (one plane of a block) at a time. A partial block is padded with zeros.
    const int64_t steps = ceil_div(bytes, NeonI8mm::kWidth) * NeonI8mm::kWidth;
    for (int64_t step = 0; step < steps; step += 4) {
      int8x16_t pairs[kPairs][2];  // (2 tokens, 8 k) each
      for (int p = 0; p < kPairs; ++p) {
        const int8_t* first = q + 2 * p * q_stride;
        const int8_t* second = first + (2 * p + 1 < kTokens ? q_stride : 0);
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(first));
        const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(second));
        pairs[p][0] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
        pairs[p][1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
      }
      for (int i = 0; i < 2; ++i) {
        for (int s = 0; s < kStrips; ++s) {
          for (int half = 0; half < 2; ++half) {
            const int8x16_t rows = vreinterpretq_s8_u8(
                vld1q_u8(codes + (2 * i + half) * kStep + s * NeonI8mm::kWidth));
            for (int p = 0; p < kPairs; ++p) {
              tile[p][s][half] = multiply_matrices(tile[p][s][half], pairs[p][i], rows);
            }
          }
        }
      }
      codes += 4 * kStep;
      q += 16;
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int s = 0; s < kStrips; ++s) {
        const int64x2_t top = vreinterpretq_s64_s32(tile[m / 2][s][0]);
        const int64x2_t bottom = vreinterpretq_s64_s32(tile[m / 2][s][1]);
        const int32x4_t rows =
            vreinterpretq_s32_s64(m % 2 == 0 ? vzip1q_s64(top, bottom) : vzip2q_s64(top, bottom));
        int32_t* out = sums + m * Panel<NeonI8mm>::kBlockRows + s * Panel<NeonI8mm>::kLanes;
        vst1q_s32(out, accumulate ? vaddq_s32(rows, vld1q_s32(out)) : rows);
      }
    }
  }
};

constexpr bitlinear_kernel_table kTable =
    make_table<NeonI8mm, PanelGemm<NeonI8mm, RegisterTiles<NeonI8mm, MatrixTile>>,
               GroupProduct<NeonDot, GroupGemm<NeonDot>>>("neon_i8mm");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
