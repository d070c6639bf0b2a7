// Shared by neon_dotprod.cpp and neon_i8mm.cpp: the vocabulary of NEON with sdot, which multiplies
// signed bytes and adds every four products to an int32 lane.
#pragma once

#include "gemm_groups.h"
#include "gemm_panel.h"
#include "neon.h"
#include "vocabulary.h"

namespace bitlinear {
namespace {

struct NeonDot : NeonBytes {
  static constexpr int kGemvTokens = 2;
  static constexpr int kGemvRows = 4;
  static constexpr int kPanelTokens = 4;
  static constexpr int kPanelStrips = 6;
  static constexpr int64_t kPanelDepth = 512;  // 12 KB of codes, 2 KB of activations: an L1 cache
  static constexpr bool kPackedPanels = false;
  static constexpr int kFetchingRows = 16;
  // By instructions per 64 packed bytes and token with groups of 128: four tokens of 1024 x 1024
  // take 88 and by the GEMV 97, 64 tokens of 4096 x 1024 51 and 80. Six strips take 57: GCC 12
  // spills sums.
  static constexpr int64_t kGroupGemmTokens = 4;
  static constexpr int kGroupTokens = kPanelTokens;
  static constexpr int kGroupStrips = 5;
  static constexpr int64_t kGroupDepth = kPanelDepth;

  // With the intrinsic GCC adds register moves and spills (GCC 12: 142 instructions for a tile of
  // 96 sdot, where 126 are enough).
  static int32x4_t dot(int32x4_t sum, Bytes codes, Bytes plane) {
    BITLINEAR_GCC_ASM(sum = vdotq_s32(sum, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(plane)),
                      "sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(codes), "w"(plane));
    return sum;
  }

  struct PlaneSum {
    static constexpr int64_t kFlush = kNeverFlush;
    int32x4_t by16 = vdupq_n_s32(0), by4 = vdupq_n_s32(0), by1 = vdupq_n_s32(0);
    void add(Bytes w, const Bytes (&q)[4]) {
      // Shifted, because sdot would take the byte 0x80 as negative. So this plane shares the sum
      // by1.
      by1 = dot(by1, vshrq_n_u8(w, 6), q[0]);
      by16 = dot(by16, vandq_u8(w, vdupq_n_u8(0x30)), q[1]);
      by4 = dot(by4, vandq_u8(w, vdupq_n_u8(0x0C)), q[2]);
      by1 = dot(by1, vandq_u8(w, vdupq_n_u8(0x03)), q[3]);
    }
    void flush() {}
    // Every lane is a multiple of its plane's factor: the shifts are exact.
    int32x4_t lanes() const { return vsraq_n_s32(vsraq_n_s32(by1, by16, 4), by4, 2); }
  };

  struct GroupSum {
    static constexpr int64_t kFlush = kNeverFlush;
    Ints sum = vdupq_n_s32(0);
    void add(Bytes w, const Bytes (&q)[4], Ints start, Ints factors) {
      PlaneSum block;
      block.by1 = start;
      block.add(w, q);
      sum = add_products(sum, block.lanes(), factors);
    }
    void flush() {}
    Ints lanes() const { return sum; }
  };

  static Bytes zero() { return vdupq_n_u8(0); }
  static Bytes broadcast_byte(uint8_t value) { return vdupq_n_u8(value); }
  // Four consecutive activations, copied to every lane.
  static Bytes broadcast_quad(const int8_t* p) {
    int32_t quad;
    memcpy(&quad, p, sizeof(quad));
    return vreinterpretq_u8_s32(broadcast_int(quad));
  }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints add_products(Ints sum, Ints lanes, Ints factors) {
    return vmlaq_s32(sum, lanes, factors);
  }
  static Bytes codes(Bytes w, int shift) {
    const Bytes mask = vdupq_n_u8(3);
    switch (shift) {
      case 6:
        return vshrq_n_u8(w, 6);
      case 4:
        return vandq_u8(vshrq_n_u8(w, 4), mask);
      case 2:
        return vandq_u8(vshrq_n_u8(w, 2), mask);
      default:
        return vandq_u8(w, mask);
    }
  }
};

}  // namespace
}  // namespace bitlinear
