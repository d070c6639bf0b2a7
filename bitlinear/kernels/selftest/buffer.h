// Numbers of any dtype in exact heap blocks, rounded by code of its own.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <vector>

#include "../abi.h"

namespace bitlinear {
namespace selftest {

// A 16-bit format: a sign, an exponent and a fraction.
struct Half {
  int fraction_bits, bias;
};
inline Half half_format(int dtype) { return dtype == BITLINEAR_F16 ? Half{10, 15} : Half{7, 127}; }

// Rounds with real numbers, unlike the kernels' conversions: to the nearest multiple of the last
// place.
inline uint16_t reference_half(float x, Half format) {
  const int infinity = 0x7FFF >> format.fraction_bits << format.fraction_bits;
  const int sign = signbit(x) ? 0x8000 : 0;
  if (isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (format.fraction_bits - 1));
  if (isinf(x)) return static_cast<uint16_t>(sign | infinity);
  const double magnitude = fabs(static_cast<double>(x));
  if (magnitude == 0.0) return static_cast<uint16_t>(sign);
  int exponent = 0;
  frexp(magnitude, &exponent);
  // Subnormal numbers share the last place of the smallest normal number.
  const int lowest = 1 - format.bias;
  const int leading = exponent - 1 < lowest ? lowest : exponent - 1;
  const double significand = nearbyint(ldexp(magnitude, format.fraction_bits - leading));
  // A carry into the next binade is a carry into the exponent.
  const int bits = ((leading - lowest) << format.fraction_bits) + static_cast<int>(significand);
  return static_cast<uint16_t>(sign | (bits < infinity ? bits : infinity));
}

inline float reference_float(uint16_t h, Half format) {
  const int largest = 0x7FFF >> format.fraction_bits;
  const int exponent = h >> format.fraction_bits & largest;
  const int fraction = h & ((1 << format.fraction_bits) - 1);
  const int whole = exponent == 0 ? fraction : fraction + (1 << format.fraction_bits);
  const int power = (exponent == 0 ? 1 : exponent) - format.bias - format.fraction_bits;
  double value = ldexp(whole, power);
  if (exponent == largest) value = fraction == 0 ? HUGE_VAL : static_cast<double>(NAN);
  return static_cast<float>((h & 0x8000) != 0 ? -value : value);
}

// A buffer of `count` numbers of a dtype, in a heap block of exactly that size.
class Buffer {
 public:
  Buffer(int dtype, int64_t count)
      : dtype_(dtype), bytes_(static_cast<size_t>(count) * (dtype == BITLINEAR_F32 ? 4 : 2)) {}
  void set(int64_t i, float x) {
    if (dtype_ == BITLINEAR_F32) {
      memcpy(bytes_.data() + 4 * i, &x, 4);
    } else {
      const uint16_t h = reference_half(x, half_format(dtype_));
      memcpy(bytes_.data() + 2 * i, &h, 2);
    }
  }
  float get(int64_t i) const {
    if (dtype_ == BITLINEAR_F32) {
      float x;
      memcpy(&x, bytes_.data() + 4 * i, 4);
      return x;
    }
    uint16_t h;
    memcpy(&h, bytes_.data() + 2 * i, 2);
    return reference_float(h, half_format(dtype_));
  }
  int dtype() const { return dtype_; }
  uint8_t* data() { return bytes_.data(); }
  const uint8_t* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  int dtype_;
  std::vector<uint8_t> bytes_;
};

inline std::vector<float> floats_of(const Buffer& buffer) {
  std::vector<float> floats(buffer.size() / (buffer.dtype() == BITLINEAR_F32 ? 4 : 2));
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = buffer.get(static_cast<int64_t>(i));
  return floats;
}

}  // namespace selftest
}  // namespace bitlinear
