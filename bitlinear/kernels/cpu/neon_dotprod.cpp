// NEON with the dot product of bytes: Armv8.2 with FEAT_DotProd, such as Cortex-A55 and A76,
// Neoverse N1 and Apple's M1.
//
// Not timed: no Arm machine was available. Instructions per 64 packed bytes and token, which are
// 256 multiplications (`python -m scripts.dev.instruction_mix`): the GEMV takes 42, of which 36
// read, mask and multiply. bitnet.cpp's sequence takes 48 without reading activations. The panel
// takes 21, of which 16 are sdot.
#include "neon_dotprod.h"

#include <type_traits>

namespace bitlinear {
namespace {

struct NeonDotprod : NeonDot {
  // Fitted to the instructions of whole calls, for rows of 16 to 1024 packed bytes (`python -m
  // scripts.dev.instruction_count`).
  static constexpr int64_t kGemmTokens = 4;
  static constexpr int64_t kGemvOverhead = 1;
  static constexpr int kDecodingTokens = 3;
};

// As DotTile, but sdot takes its four bytes from any lane of a register: one load of activations
// serves four steps, and no broadcast is needed.
struct LaneTile {
  // All lanes of `codes` times the four bytes in lane kLane of `quads`. Assembly for the reason
  // given in neon_dotprod.h.
  template <int kLane>
  static int32x4_t dot(int32x4_t sum, uint8x16_t codes, int8x16_t quads) {
    BITLINEAR_GCC_ASM(sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(codes), quads, kLane),
                      "sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(codes), "w"(quads),
                      "i"(kLane));
    return sum;
  }

  template <int kTokens, int kStrips>
  static void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t bytes,
                       int32_t* sums, bool accumulate) {
    int32x4_t tile[kTokens][kStrips] = {};
    // Four steps (one plane of a block) at a time. A partial block is padded with zeros.
    const int64_t steps = ceil_div(bytes, NeonDot::kWidth) * NeonDot::kWidth;
    for (int64_t step = 0; step < steps; step += 4) {
      int8x16_t quads[kTokens];
      for (int m = 0; m < kTokens; ++m) quads[m] = vld1q_s8(q + m * q_stride);
      const auto multiply_step = [&](auto i) {
        for (int s = 0; s < kStrips; ++s) {
          const uint8x16_t strip = vld1q_u8(codes);
          for (int m = 0; m < kTokens; ++m) {
            tile[m][s] = dot<decltype(i)::value>(tile[m][s], strip, quads[m]);
          }
          codes += NeonDot::kWidth;
        }
      };
      multiply_step(std::integral_constant<int, 0>());
      multiply_step(std::integral_constant<int, 1>());
      multiply_step(std::integral_constant<int, 2>());
      multiply_step(std::integral_constant<int, 3>());
      q += 16;
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int s = 0; s < kStrips; ++s) {
        int32_t* out = sums + m * Panel<NeonDotprod>::kBlockRows + 4 * s;
        vst1q_s32(out, accumulate ? vaddq_s32(tile[m][s], vld1q_s32(out)) : tile[m][s]);
      }
    }
  }
};

constexpr bitlinear_kernel_table kTable =
    make_table<NeonDotprod, PanelGemm<NeonDotprod, RegisterTiles<NeonDotprod, LaneTile>>,
               GroupProduct<NeonDot, GroupGemm<NeonDot>>>("neon_dotprod");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
