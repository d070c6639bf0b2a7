// Conversions between fp32 and fp16 in integer arithmetic, for instruction sets that have no
// instructions for them. A vocabulary inherits PortableHalf, as scalar.cpp does.
#pragma once

#include <stdint.h>

#include "convert.h"

namespace bitlinear {
namespace {

struct PortableHalf {
  static void floats_from_fp16(const uint16_t* half, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_from_fp16(half[i]);
  }
  static void fp16_from_floats(const float* floats, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = fp16_from_float(floats[i]);
  }

 private:
  static float float_from_fp16(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // Read as fp32 the exponent is 112 too small; the product is exact, subnormals included.
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
  }

  static uint16_t fp16_from_float(float x) {
    const uint32_t bits = float_bits(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 rounds up to infinity
    if (magnitude < 0x38800000u) {
      // Subnormal: an addition with 0.5 as the larger operand rounds at 2^-24, ties to even.
      return sign | static_cast<uint16_t>(float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u);
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xFFFu + odd) >> 13);
  }
};

}  // namespace
}  // namespace bitlinear
