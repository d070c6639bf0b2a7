// The expected results of a product: the numerics of README.md, in the plainest code.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

#include "../abi.h"
#include "operands.h"

namespace bitlinear {
namespace selftest {

// The prologue, as prologue.py specifies it. Volatile: excess precision or contraction would merge
// two roundings.
inline float reference_exp(float z) {
  z = fmaxf(fminf(z, 88.0f), -86.0f);
  volatile float scaled = z * 1.44269504f;
  const float n = nearbyintf(scaled);
  volatile float r = n * 0.693359375f;
  r = z - r;
  volatile float low = n * -2.12194440e-4f;
  r = r - low;
  volatile float p = 1.9875691500e-4f;
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * r;
    p = p + coefficient;
  }
  volatile float square = r * r;
  p = p * square;
  p = p + r;
  p = p + 1.0f;
  return ldexpf(p, static_cast<int>(n));
}

inline float reference_gate(int activation, float a, float b) {
  volatile float gated;
  if (activation == BITLINEAR_SILU) {
    gated = reference_exp(-a) + 1.0f;
    gated = a / gated;
  } else {
    gated = isnan(a) || a > 0.0f ? a : 0.0f;
    gated = gated * gated;
  }
  gated = gated * b;
  return gated;
}

// The sum of squares of values[begin : begin + size], in pairs; those beyond the end are 0.
inline float reference_sum(const std::vector<float>& values, size_t begin, size_t size) {
  if (begin >= values.size()) return 0.0f;
  volatile float sum = values[begin] * values[begin];
  if (size == 1) return sum;
  sum = reference_sum(values, begin, size / 2);
  sum = sum + reference_sum(values, begin + size / 2, size / 2);
  return sum;
}

// What token m is quantised from.
inline std::vector<float> reference_values(const Operands& operands, int64_t m) {
  const Case& c = operands.shape;
  std::vector<float> values(static_cast<size_t>(c.K));
  for (int64_t k = 0; k < c.K; ++k) {
    const float a = operands.x.get(m * operands.x_width() + k);
    values[k] =
        c.activation == BITLINEAR_NO_GATE
            ? a
            : reference_gate(c.activation, a, operands.x.get(m * operands.x_width() + c.K + k));
  }
  if (!c.norm) return values;
  size_t size = 1;
  while (size < values.size()) size *= 2;
  volatile float factor = reference_sum(values, 0, size) / static_cast<float>(c.K);
  factor = factor + operands.norm_eps;
  factor = sqrtf(factor);
  factor = 1.0f / factor;
  for (int64_t k = 0; k < c.K; ++k) {
    volatile float normed = values[k] * factor;
    normed = normed * operands.norm_weight.get(k);
    values[k] = normed;
  }
  return values;
}

// Scales of groups as integers times a power of two, as groups.py specifies it.
inline float reference_unit(const float* s_w, int64_t groups) {
  float largest = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    if (!isfinite(s_w[g])) return NAN;
    largest = fmaxf(largest, fabsf(s_w[g]));
  }
  int exponent = 0;
  frexpf(largest, &exponent);
  return ldexpf(1.0f, exponent - 15 < -126 ? -126 : exponent - 15);
}

inline int64_t reference_multiplier(float s_w, float unit) {
  if (isnan(unit)) return 0;
  return static_cast<int64_t>(fmin(nearbyint(static_cast<double>(s_w) / unit), 32767.0));
}

// Returns "" if `got` is `want` to the bit; else a message. They are y[m, n].
inline std::string compare_output(const Case& c, int64_t m, int64_t n, float got, float want) {
  if (isnan(want) ? isnan(got) : memcmp(&got, &want, sizeof(got)) == 0) return "";
  return "y[" + std::to_string(m) + ", " + std::to_string(n) + "] = " + std::to_string(got) +
         ", expected " + std::to_string(want) + " at " + describe(c);
}

// The expected results of token m.
class Expected {
 public:
  Expected(const Operands& operands, int64_t m)
      : operands_(operands), q_(static_cast<size_t>(operands.shape.K)) {
    const int64_t K = operands.shape.K;
    const std::vector<float> values = reference_values(operands, m);
    float absmax = operands.eps;
    for (const float value : values) {
      finite_ = finite_ && isfinite(value);
      absmax = fabsf(value) > absmax ? fabsf(value) : absmax;
    }
    const float max = operands.shape.act_bits == 8 ? 127.0f : 254.0f * 127.0f + 127.0f;
    const float inv = max / absmax;
    s_x_ = absmax / max;
    for (int64_t k = 0; k < K; ++k) {
      // Volatile: excess precision or contraction would merge the two roundings.
      const volatile float scaled = values[k] * inv;
      const float rounded = nearbyintf(scaled);
      q_[k] = finite_
                  ? static_cast<int32_t>(rounded > max ? max : (rounded < -max ? -max : rounded))
                  : 0;
    }
  }

  int32_t q(int64_t k) const { return q_[k]; }
  bool is_scale(float s_x) const { return finite_ ? s_x == s_x_ : isnan(s_x); }

  float y(int64_t m, int64_t n) const {
    const Case& c = operands_.shape;
    const int8_t* t = operands_.t.data() + n * c.K;
    const float* s_w = operands_.s_w.data() + n * operands_.s_w_stride();
    int64_t acc = 0;
    float unit = *s_w;
    if (c.group_size == 0) {
      for (int64_t k = 0; k < c.K; ++k) acc += q_[k] * t[k];
    } else {
      unit = reference_unit(s_w, operands_.groups());
      for (int64_t k = 0; k < c.K; ++k) {
        acc += q_[k] * t[k] * reference_multiplier(s_w[k / c.group_size], unit);
      }
    }
    const volatile float scale = s_x_ * unit;
    volatile float value = static_cast<float>(acc) * scale;
    if (c.bias) value = value + operands_.bias.get(n);
    if (c.residual) value = value + operands_.residual.get(m * c.N + n);
    Buffer rounded(c.dtype, 1);
    rounded.set(0, finite_ ? value : NAN);
    return rounded.get(0);
  }

 private:
  const Operands& operands_;
  std::vector<int32_t> q_;
  bool finite_ = true;
  float s_x_;
};

// A case with its operands and its expected results, for all kernels that it is run by.
struct Example {
  Example(const Case& c, uint64_t case_seed)
      : seed(case_seed), operands(c, case_seed), y(c.dtype, c.M * c.N) {
    for (int64_t m = 0; m < c.M; ++m) {
      const Expected expected(operands, m);
      for (int64_t n = 0; n < c.N; ++n) y.set(m * c.N + n, expected.y(m, n));
    }
  }

  uint64_t seed;
  Operands operands;
  Buffer y;
};

}  // namespace selftest
}  // namespace bitlinear
