// Shared by the NEON vocabularies: vectors of 16 bytes, and the fp16 conversions of Armv8.0.
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace bitlinear {
namespace {

struct NeonBytes {
  static constexpr int64_t kWidth = 16;
  using Bytes = uint8x16_t;

  static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  static Bytes load_plane(const int8_t* p) { return vreinterpretq_u8_s8(vld1q_s8(p)); }
  static Bytes load_partial(const uint8_t* p, int64_t n) {
    uint8_t bytes[16] = {};
    memcpy(bytes, p, static_cast<size_t>(n));
    return vld1q_u8(bytes);
  }
  static void store(uint8_t* p, Bytes a) { vst1q_u8(p, a); }
  static int32_t split_planes(const int8_t* row, int8_t* q) {
    const int8x16x4_t planes = vld4q_s8(row);
    int16x8_t sum = vdupq_n_s16(0);
    for (int j = 0; j < 4; ++j) {
      vst1q_s8(q + 16 * j, planes.val[j]);
      sum = vpadalq_s8(sum, planes.val[j]);
    }
    return vaddlvq_s16(sum);
  }

  using Ints = int32x4_t;
  static int32_t as_start(int32_t value) { return value; }
  static int32_t as_factor(int32_t value) { return value; }
  static Ints broadcast_int(int32_t value) { return vdupq_n_s32(value); }
  static Ints load_ints(const int32_t* p) { return vld1q_s32(p); }
  static void store_ints(int32_t* p, Ints a) { vst1q_s32(p, a); }
  static Ints choose(const int32_t* p, Ints indices) {
    // Byte i of the index of a lane is 4 * index + i.
    const uint8x16_t bytes = vreinterpretq_u8_u32(
        vmlaq_n_u32(vdupq_n_u32(0x03020100u), vreinterpretq_u32_s32(indices), 0x04040404u));
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(load_ints(p)), bytes));
  }
  static Ints low_half(Ints a) { return vandq_s32(a, vdupq_n_s32(0xFFFF)); }
  static Ints high_half(Ints a) { return vshrq_n_s32(a, 16); }

  static int32_t reduce(int32x4_t sum) { return vaddvq_s32(sum); }
  static void reduce4(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d, int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }
  // A 4 x 4 matrix of 32-bit elements.
  static void transpose(Bytes (&rows)[4]) {
    const auto pair = [&](int r) {
      return vtrnq_u32(vreinterpretq_u32_u8(rows[r]), vreinterpretq_u32_u8(rows[r + 1]));
    };
    const uint32x4x2_t top = pair(0), bottom = pair(2);
    for (int c = 0; c < 2; ++c) {
      const uint64x2_t a = vreinterpretq_u64_u32(top.val[c]);
      const uint64x2_t b = vreinterpretq_u64_u32(bottom.val[c]);
      rows[c] = vreinterpretq_u8_u64(vzip1q_u64(a, b));
      rows[c + 2] = vreinterpretq_u8_u64(vzip2q_u64(a, b));
    }
  }

  static void floats_from_fp16(const uint16_t* half, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) widen(half + i, out + i);
    if (i < count) {
      const size_t rest = static_cast<size_t>(count - i);
      uint16_t last[8] = {};
      float floats[8];
      memcpy(last, half + i, rest * sizeof(uint16_t));
      widen(last, floats);
      memcpy(out + i, floats, rest * sizeof(float));
    }
  }

  static void fp16_from_floats(const float* floats, int64_t count, uint16_t* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) narrow(floats + i, out + i);
    if (i < count) {
      const size_t rest = static_cast<size_t>(count - i);
      float last[8] = {};
      uint16_t half[8];
      memcpy(last, floats + i, rest * sizeof(float));
      narrow(last, half);
      memcpy(out + i, half, rest * sizeof(uint16_t));
    }
  }

 private:
  // Both convert eight values.
  static void widen(const uint16_t* half, float* out) {
    const float16x8_t eight = vreinterpretq_f16_u16(vld1q_u16(half));
    vst1q_f32(out, vcvt_f32_f16(vget_low_f16(eight)));
    vst1q_f32(out + 4, vcvt_high_f32_f16(eight));
  }
  static void narrow(const float* floats, uint16_t* out) {
    const float16x4_t low = vcvt_f16_f32(vld1q_f32(floats));
    vst1q_u16(out, vreinterpretq_u16_f16(vcvt_high_f16_f32(low, vld1q_f32(floats + 4))));
  }
};

}  // namespace
}  // namespace bitlinear
