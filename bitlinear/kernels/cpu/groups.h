// Scales of groups of weights along K, as integers of 15 bits times a power of two, the unit of
// their row. groups.py specifies it.
#pragma once

#include <stdint.h>

#include "convert.h"

namespace bitlinear {

struct ScaleUnit {
  float value;    // NaN if a scale of the row is not finite
  float inverse;  // 0 then

  // At most 2^15 units, if finite, before the bounds; any multiplier, if not. Without branches, so
  // that loops become vector code.
  int32_t multiplier(float scale) const {
    const int32_t exact = round_to_int(scale * inverse);
    const int32_t bounded = exact < 32767 ? exact : 32767;
    return bounded > -32767 ? bounded : -32767;
  }
};

// Of the scales of one row. The largest of them becomes a multiplier from 2^14 on, unless the unit
// would be subnormal.
inline ScaleUnit unit_of(const float* scales, int64_t groups) {
  // As unsigned integers the bits of |x| order finite < infinity < NaN.
  uint32_t largest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t bits = float_bits(scales[g]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7F800000u) return {bits_float(0x7FC00000u), 0.0f};
  const uint32_t exponent = largest >> 23 > 15 ? (largest >> 23) - 14 : 1;
  return {bits_float(exponent << 23), bits_float((254 - exponent) << 23)};
}

// Rounds the scales of a row to those that products compute with.
inline void round_scales(float* scales, int64_t groups) {
  const ScaleUnit unit = unit_of(scales, groups);
  for (int64_t g = 0; g < groups; ++g) {
    scales[g] = static_cast<float>(unit.multiplier(scales[g])) * unit.value;
  }
}

}  // namespace bitlinear
