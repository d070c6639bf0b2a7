// Conversions between fp32, its bits, integers and the 16-bit types. bf16 is integer arithmetic
// that every compiler vectorises. fp16 comes from the vocabulary V: F16C, NEON, or portable_half.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../abi.h"

namespace bitlinear {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Adding 1.5 * 2^23 leaves a float with no fraction bits: the sum is rounded to the nearest
// integer, ties to even, and its low mantissa bits hold that integer. Exact for |x| < 2^22.
constexpr float kRoundMagic = 12582912.0f;

// |x| < 2^22.
inline int32_t round_to_int(float x) {
  return static_cast<int32_t>(float_bits(x + kRoundMagic) - float_bits(kRoundMagic));
}

inline float float_from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN becomes the quiet NaN, as torch does.
inline uint16_t bf16_from_float(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Adds the upper half of the lanes to the lower half, until one is left. (A loop over the halves
// would go through memory.)
template <int kLanes>
inline float add_halves(float* lanes) {
  if constexpr (kLanes == 1) {
    return lanes[0];
  } else {
    for (int j = 0; j < kLanes / 2; ++j) lanes[j] += lanes[j + kLanes / 2];
    return add_halves<kLanes / 2>(lanes);
  }
}

// The floats x[begin : begin + count] of any input dtype. fp32 values are returned in place; others
// are converted into `buffer`.
template <class V>
inline const float* as_floats(const void* x, int dtype, int64_t begin, int64_t count,
                              float* buffer) {
  if (dtype == BITLINEAR_F32) return static_cast<const float*>(x) + begin;
  const uint16_t* half = static_cast<const uint16_t*>(x) + begin;
  if (dtype == BITLINEAR_F16) {
    V::floats_from_fp16(half, count, buffer);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = float_from_bf16(half[i]);
  }
  return buffer;
}

// y[begin : begin + count] = floats, rounded once to a 16-bit dtype.
template <class V>
inline void store_halves(const float* floats, int64_t count, void* y, int dtype, int64_t begin) {
  uint16_t* half = static_cast<uint16_t*>(y) + begin;
  if (dtype == BITLINEAR_F16) {
    V::fp16_from_floats(floats, count, half);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = bf16_from_float(floats[i]);
  }
}

}  // namespace bitlinear
