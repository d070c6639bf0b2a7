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

// The bits of the largest magnitude of a row's scales. As unsigned integers the bits of |x| order
// finite < infinity < NaN.
inline uint32_t largest_bits(const float* scales, int64_t groups) {
  uint32_t largest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t bits = float_bits(scales[g]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// The largest scale of the row becomes a multiplier from 2^14 on, unless the unit would be
// subnormal.
inline ScaleUnit unit_of(uint32_t largest) {
  const bool is_finite = largest < 0x7F800000u;
  const uint32_t exponent = largest >> 23 > 15 ? (largest >> 23) - 14 : 1;
  return {bits_float(is_finite ? exponent << 23 : 0x7FC00000u),
          bits_float(is_finite ? (254 - exponent) << 23 : 0u)};
}

inline ScaleUnit unit_of(const float* scales, int64_t groups) {
  return unit_of(largest_bits(scales, groups));
}

// Rounds the scales of a row to those that products compute with.
inline void round_scales(float* scales, int64_t groups) {
  const ScaleUnit unit = unit_of(scales, groups);
  for (int64_t g = 0; g < groups; ++g) {
    scales[g] = static_cast<float>(unit.multiplier(scales[g])) * unit.value;
  }
}

}  // namespace bitlinear
