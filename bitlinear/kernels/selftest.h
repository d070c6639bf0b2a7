// Compares a kernel variant with a reference: the numerics of README.md, in the plainest code.
//
// check_case runs one shape with one kind of data and returns the first difference. selftest.cpp
// runs over 100 cases after every build; the native driver in tests/ runs thousands, under
// sanitizers and emulators. Every buffer is a heap block of exactly the promised size, so a
// sanitizer sees each byte that is read or written beyond it. The operands and the expected results
// also serve the CUDA kernels (cuda/selftest.cuh).
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "abi.h"
#include "float_environment.h"
#include "portability.h"

namespace bitlinear {
namespace selftest {

enum class Data { kRandom, kLargestSums, kZero, kNonFinite, kSubnormal };

struct Case {
  int64_t M, N, K;
  int dtype;  // of x, bias and y
  bool bias;
  bool per_channel;
  Data data;
  int64_t n_begin;                  // the variant computes columns [n_begin, N) and writes no other
  bool flushes_subnormals = false;  // the calling thread flushes subnormal numbers to zero
  int64_t act_bits = 8;
  int activation = BITLINEAR_NO_GATE;
  bool norm = false;
  bool residual = false;
  int64_t weights = 1;  // on CUDA: the rows are divided among so many weights
};

// A random generator of our own, so that every machine runs the same cases.
struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  float uniform() { return static_cast<float>(next()) * 0x1p-30f - 1.0f; }  // [-1, 1)
};

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

inline std::string describe(const Case& c) {
  return "M=" + std::to_string(c.M) + " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K) +
         " dtype=" + std::to_string(c.dtype) + " bias=" + std::to_string(c.bias) +
         " per_channel=" + std::to_string(c.per_channel) +
         " data=" + std::to_string(static_cast<int>(c.data)) +
         " n_begin=" + std::to_string(c.n_begin) +
         " flushes=" + std::to_string(c.flushes_subnormals) +
         " act_bits=" + std::to_string(c.act_bits) + " activation=" + std::to_string(c.activation) +
         " norm=" + std::to_string(c.norm) + " residual=" + std::to_string(c.residual) +
         " weights=" + std::to_string(c.weights);
}

// The operands of a case. They follow from the seed, so every kernel gets the same.
struct Operands {
  Operands(const Case& c, uint64_t seed);

  int64_t x_width() const { return (shape.activation == BITLINEAR_NO_GATE ? 1 : 2) * shape.K; }
  bitlinear_prologue prologue() const {
    return {shape.activation, shape.norm ? norm_weight.data() : nullptr, shape.dtype, norm_eps};
  }

  Case shape;
  float eps = 1e-6f, norm_eps = 1e-5f;
  int64_t row_bytes;
  Buffer x, bias, norm_weight, residual;
  std::vector<int8_t> t;   // (N, K)
  std::vector<uint8_t> w;  // t, packed
  std::vector<float> s_w;
};

inline Operands::Operands(const Case& c, uint64_t seed)
    : shape(c),
      row_bytes((c.K + 3) / 4),
      x(c.dtype, c.M * x_width()),
      bias(c.dtype, c.N),
      norm_weight(c.dtype, c.K),
      residual(c.dtype, c.M * c.N),
      t(static_cast<size_t>(c.N * c.K)),
      w(static_cast<size_t>(c.N * row_bytes)),
      s_w(static_cast<size_t>(c.per_channel ? c.N : 1)) {
  Random random{seed * 2654435761u + 1};
  // The smallest normal number of the dtype.
  const float tiny = c.dtype == BITLINEAR_F16 ? 0x1p-14f : 0x1p-126f;
  if (c.data == Data::kSubnormal) eps = c.act_bits == 8 ? 2e-36f : 4e-34f;
  for (int64_t i = 0; i < c.M * x_width(); ++i) {
    float value = random.uniform() * 3.0f;
    if (c.data == Data::kLargestSums) value = 1.0f;  // every q is 127, or 32385
    if (c.data == Data::kZero) value = 0.0f;
    // A quarter of the values are normal: subnormal values beside them count too.
    if (c.data == Data::kSubnormal) value *= i % 4 == 0 ? 100 * tiny : 0.3f * tiny;
    x.set(i, value);
  }
  if (c.data == Data::kNonFinite) {
    // The first row gets a NaN or an infinity, depending on the seed; the others stay finite.
    x.set(random.next() % c.K, seed % 3 == 0 ? NAN : (seed % 3 == 1 ? HUGE_VALF : -HUGE_VALF));
  }
  for (int64_t n = 0; n < c.N; ++n) {
    for (int64_t b = 0; b < row_bytes; ++b) {
      uint8_t byte = 0;
      for (int64_t k = 4 * b; k < 4 * b + 4; ++k) {
        int weight = c.data == Data::kLargestSums ? 1 : static_cast<int>(random.next() % 3) - 1;
        if (k >= c.K) {
          weight = 0;
        } else {
          t[n * c.K + k] = static_cast<int8_t>(weight);
        }
        byte = static_cast<uint8_t>(byte << 2 | (weight + 1));
      }
      w[n * row_bytes + b] = byte;
    }
  }
  for (float& scale : s_w) scale = 0.01f + fabsf(random.uniform());
  for (int64_t n = 0; n < c.N; ++n) {
    bias.set(n, random.uniform() * (c.data == Data::kSubnormal ? tiny : 1.0f));
  }
  for (int64_t k = 0; c.norm && k < c.K; ++k) norm_weight.set(k, 1.0f + random.uniform());
  for (int64_t i = 0; c.residual && i < c.M * c.N; ++i) residual.set(i, random.uniform());
}

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

  // Returns "" if `got` is y[m, n] to the bit; else a message.
  std::string compare(int64_t m, int64_t n, float got) const { return compare(m, n, got, y(m, n)); }
  std::string compare(int64_t m, int64_t n, float got, float want) const {
    if (isnan(want) ? isnan(got) : memcmp(&got, &want, sizeof(got)) == 0) return "";
    return "y[" + std::to_string(m) + ", " + std::to_string(n) + "] = " + std::to_string(got) +
           ", expected " + std::to_string(want) + " at " + describe(operands_.shape);
  }

 private:
  float y(int64_t m, int64_t n) const {
    const Case& c = operands_.shape;
    const int8_t* t = operands_.t.data() + n * c.K;
    int64_t acc = 0;
    for (int64_t k = 0; k < c.K; ++k) acc += q_[k] * t[k];
    const volatile float scale = s_x_ * operands_.s_w[c.per_channel ? n : 0];
    volatile float value = static_cast<float>(acc) * scale;
    if (c.bias) value = value + operands_.bias.get(n);
    if (c.residual) value = value + operands_.residual.get(m * c.N + n);
    Buffer rounded(c.dtype, 1);
    rounded.set(0, finite_ ? value : NAN);
    return rounded.get(0);
  }

  const Operands& operands_;
  std::vector<int32_t> q_;
  bool finite_ = true;
  float s_x_;
};

// Checks the functions for training on row m of x, as weights and then as activations. Returns ""
// or the first difference.
inline std::string check_training(const bitlinear_kernel_table& kernels, const Operands& operands,
                                  int64_t m, const Expected& expected) {
  const Case& c = operands.shape;
  const std::string where = " of row " + std::to_string(m) + " at " + describe(c);
  Buffer row(c.dtype, c.K);
  memcpy(row.data(), operands.x.data() + m * static_cast<int64_t>(row.size()), row.size());
  std::vector<float> values(static_cast<size_t>(c.K));
  double sum = 0.0;
  for (int64_t k = 0; k < c.K; ++k) {
    values[k] = row.get(k);
    sum += fabs(static_cast<double>(values[k]));
  }
  const Subnormals mode = c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve;
  const double got_sum = [&] {
    const SubnormalScope scope(mode);
    return kernels.sum_magnitudes(row.data(), c.dtype, c.K);
  }();
  const bool sum_is_right = isfinite(sum) ? fabs(got_sum - sum) <= 1e-12 * sum
                            : isnan(sum)  ? isnan(got_sum)
                                          : isinf(got_sum);
  if (!sum_is_right) return "sum_magnitudes is " + std::to_string(got_sum) + where;

  // Any scale would do here; a layer's is max(mean, eps).
  const float s_w = static_cast<float>(sum / static_cast<double>(c.K)) + operands.eps;
  std::vector<uint8_t> packed(static_cast<size_t>(operands.row_bytes), 99);
  Buffer w(c.dtype, c.K), w_scale(c.dtype, 1);
  const float scale = c.data == Data::kSubnormal ? 0x1p-140f : 0.3f;
  w_scale.set(0, scale);
  std::vector<int8_t> q(static_cast<size_t>(c.K * bitlinear_rows_per_token(c.act_bits)), 99);
  float s_x = 0.0f;
  {
    const SubnormalScope scope(mode);
    kernels.pack_row(row.data(), c.dtype, c.K, s_w, packed.data());
    kernels.expand_row(packed.data(), c.K, scale, w.data(), c.dtype);
    kernels.quantize_in_order(row.data(), c.dtype, c.K, operands.eps, c.act_bits, q.data(), &s_x);
  }
  for (int64_t k = 0; k < 4 * operands.row_bytes; ++k) {
    const int code = packed[k / 4] >> (6 - 2 * (k % 4)) & 3;
    const volatile float quotient = k < c.K ? values[k] / s_w : 0.0f;
    const float rounded = nearbyintf(quotient);
    const float wanted = isnan(rounded) ? 0 : rounded > 1 ? 1 : rounded < -1 ? -1 : rounded;
    if (code - 1 != wanted || (k < c.K && w.get(k) != w_scale.get(0) * wanted)) {
      return "weight " + std::to_string(k) + " is packed as " + std::to_string(code) + where;
    }
  }

  for (int64_t k = 0; k < c.K; ++k) {
    int16_t value = q[k];
    if (c.act_bits == 16) memcpy(&value, q.data() + 2 * k, sizeof(value));
    if (value != expected.q(k)) return "q in order, " + std::to_string(k) + where;
  }
  if (!expected.is_scale(s_x)) return "s_x in order is " + std::to_string(s_x) + where;
  return "";
}

// Checks the functions for the head of a model: up to c.N rows of int8 and of bf16. Returns "" or
// the first difference.
inline std::string check_head(const bitlinear_kernel_table& kernels, const Case& c, uint64_t seed) {
  const int64_t N = seed % 16 == 0 && c.K < 100 ? c.N : 1 + c.N % 5;
  Random random{seed * 2654435761u + 2};
  const bool is_largest = c.data == Data::kLargestSums;
  const float special = c.data == Data::kNonFinite ? NAN : 0.0f;
  const auto integer = [&](int32_t largest) {
    if (is_largest) return largest;
    const int32_t value = static_cast<int32_t>(random.next() % (2 * largest + 1)) - largest;
    return c.data == Data::kZero ? 0 : value;
  };
  std::vector<int8_t> w(static_cast<size_t>(N * c.K));
  std::vector<int16_t> q(static_cast<size_t>(c.K));
  std::vector<float> s_w(static_cast<size_t>(N)), x(static_cast<size_t>(c.K));
  Buffer halves(BITLINEAR_BF16, N * c.K);
  const float size = c.data == Data::kSubnormal ? 0x1p-64f : 1.0f;  // of products, its square
  for (int64_t i = 0; i < N * c.K; ++i) {
    w[i] = static_cast<int8_t>(integer(127));
    halves.set(i, random.uniform() * size);
  }
  for (int64_t k = 0; k < c.K; ++k) {
    q[k] = static_cast<int16_t>(integer(32385));
    x[k] = random.uniform() * size;
  }
  x[random.next() % c.K] += special;
  for (float& scale : s_w) scale = 0.01f + fabsf(random.uniform());
  const float s_x = 0.003f + special;

  Buffer y(c.dtype, N), z(c.dtype, N), want(c.dtype, 1);
  {
    const SubnormalScope scope(c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve);
    kernels.int8_rows(w.data(), N, c.K, q.data(), s_x, s_w.data(), y.data(), c.dtype);
    kernels.bf16_rows(reinterpret_cast<const uint16_t*>(halves.data()), N, c.K, x.data(), z.data(),
                      c.dtype);
  }
  const std::vector<float> half_floats = floats_of(halves);
  for (int64_t n = 0; n < N; ++n) {
    int64_t sum = 0;
    float sums[64] = {};
    for (int64_t k = 0; k < c.K; ++k) {
      sum += int64_t{w[n * c.K + k]} * q[k];
      // Volatile: contraction would merge the two roundings.
      const volatile float product = half_floats[n * c.K + k] * x[k];
      sums[k % 64] = sums[k % 64] + product;
    }
    for (int half = 32; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    const volatile float scale = s_x * s_w[n];
    const struct {
      const char* name;
      float value, got;
    } results[] = {{"int8_rows", static_cast<float>(sum) * scale, y.get(n)},
                   {"bf16_rows", sums[0], z.get(n)}};
    for (const auto& result : results) {
      want.set(0, result.value);
      const float expected = want.get(0);
      if (isnan(expected) ? isnan(result.got) : memcmp(&result.got, &expected, 4) == 0) continue;
      return std::string(result.name) + "[" + std::to_string(n) +
             "] = " + std::to_string(result.got) + ", expected " + std::to_string(expected) +
             " at " + describe(c);
    }
  }
  return "";
}

// Checks the functions for attention, with up to 150 keys in parts and a few queries. Returns "" or
// the first difference.
inline std::string check_attention(const bitlinear_kernel_table& kernels, const Case& c,
                                   uint64_t seed) {
  Random random{seed * 2654435761u + 3};
  const int64_t sizes[] = {16, 64, 128, 144, BITLINEAR_MAX_HEAD};
  const int64_t K = c.K < 150 ? c.K : 150, D = sizes[seed / 4 % 5];
  const int64_t rows = 1 + static_cast<int64_t>(seed / 4 % 6);
  Buffer x(BITLINEAR_BF16, rows * D), q(BITLINEAR_BF16, rows * D);
  Buffer keys(BITLINEAR_BF16, K * D), values(BITLINEAR_BF16, K * D), y(BITLINEAR_BF16, D);
  Buffer cos(BITLINEAR_BF16, D), sin(BITLINEAR_BF16, D), rounded(BITLINEAR_BF16, 1);
  std::vector<uint8_t> mask(static_cast<size_t>(K), 1);
  for (Buffer* const buffer : {&x, &keys, &values, &cos, &sin}) {
    const int64_t count = static_cast<int64_t>(buffer->size() / 2);
    for (int64_t i = 0; i < count; ++i) buffer->set(i, random.uniform() * 2.0f);
  }
  if (c.data == Data::kNonFinite) x.set(random.next() % D, NAN);  // in query 0
  if (c.data == Data::kLargestSums) {
    for (int64_t i = 0; i < K * D; ++i) keys.set(i, keys.get(i) * 64.0f);
  }
  for (uint8_t& shown : mask) shown = c.data == Data::kZero ? 0 : random.next() % 3 != 0;
  const bool is_masked = seed / 8 % 2 == 0 || c.data == Data::kZero;

  const Subnormals mode = c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve;
  const auto bits = [](Buffer& buffer) { return reinterpret_cast<uint16_t*>(buffer.data()); };
  const auto round = [&](float value) {
    rounded.set(0, value);
    return rounded.get(0);
  };
  const auto is_near = [](double got, double want, double limit) {
    return isnan(want) ? isnan(got) : fabs(got - want) <= limit;
  };
  {
    const SubnormalScope scope(mode);
    kernels.rotate_heads(bits(x), rows, D, bits(cos), bits(sin), bits(q));
  }
  for (int64_t i = 0; i < rows * D; ++i) {
    const int64_t d = i % D;
    const float other = d < D / 2 ? -x.get(i + D / 2) : x.get(i - D / 2);
    const float want = round(round(x.get(i) * cos.get(d)) + round(other * sin.get(d)));
    if (!is_near(q.get(i), want, 0.0)) return "rotate_heads " + std::to_string(i) + describe(c);
  }

  const int64_t step = BITLINEAR_ATTENTION_TOKENS, parts = (K + step - 1) / step;
  std::vector<bitlinear_attention> tasks(static_cast<size_t>(parts));
  std::vector<float> results(static_cast<size_t>(parts * rows * (D + 2)));
  const float scale = 0.2f;
  for (int64_t p = 0; p < parts; ++p) {
    float* const totals = results.data() + p * rows * (D + 2);
    const int64_t first = p * step, count = K - first < step ? K - first : step;
    tasks[p] = {bits(q),
                rows,
                D,
                bits(keys) + first * D,
                bits(values) + first * D,
                count,
                is_masked ? mask.data() + first : nullptr,
                scale,
                totals + rows * D,
                totals + rows * D + rows,
                totals};
    const SubnormalScope scope(mode);
    kernels.attend(&tasks[p]);
  }
  const std::vector<float> key_floats = floats_of(keys), value_floats = floats_of(values);
  const std::vector<float> queries = floats_of(q);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const query = queries.data() + r * D;
    {
      const SubnormalScope scope(mode);
      kernels.join_parts(tasks.data(), parts, r, bits(y));
    }
    std::vector<double> scores(static_cast<size_t>(K)), want(static_cast<size_t>(D));
    double largest = -HUGE_VAL, sum = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t d = 0; d < D; ++d) scores[k] += double{query[d]} * key_floats[k * D + d];
      scores[k] = is_masked && mask[k] == 0 ? -HUGE_VAL : scores[k] * scale;
      largest = scores[k] > largest ? scores[k] : largest;
    }
    for (int64_t k = 0; k < K; ++k) {
      if (is_masked && mask[k] == 0) continue;
      const double weight = exp(scores[k] - largest);
      sum += weight;
      for (int64_t d = 0; d < D; ++d) want[d] += weight * value_floats[k * D + d];
    }
    for (int64_t d = 0; d < D; ++d) {
      const double exact = sum == 0.0 ? 0.0 : want[d] / sum;
      // bf16 keeps 8 bits. The error of a score is a relative one of its weight.
      const double limit = fabs(exact) / 256 + (c.data == Data::kLargestSums ? 4e-3 : 2e-5);
      if (is_near(y.get(d), exact, limit)) continue;
      return "attention[" + std::to_string(r) + ", " + std::to_string(d) +
             "] = " + std::to_string(y.get(d)) + ", expected " + std::to_string(exact) + " at " +
             describe(c);
    }
  }
  return "";
}

// Returns "" or the first difference.
inline std::string check_case(const bitlinear_kernel_table& kernels, const Case& c, uint64_t seed) {
  Operands operands(c, seed);

  const int64_t q_stride = bitlinear_q_stride(&kernels, c.K);
  const int64_t token_rows = bitlinear_rows_per_token(c.act_bits);
  std::vector<int8_t> q(static_cast<size_t>(c.M * token_rows * q_stride), 99);
  std::vector<float> s_x(static_cast<size_t>(c.M));
  std::vector<int32_t> q_sum(static_cast<size_t>(c.M * token_rows));
  const int64_t element = c.dtype == BITLINEAR_F32 ? 4 : 2;
  const bitlinear_prologue prologue = operands.prologue();
  std::vector<float> floats(bitlinear_is_plain(&prologue) ? 0 : static_cast<size_t>(c.K));
  const Subnormals mode = c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve;
  for (int64_t m = 0; m < c.M; ++m) {
    const SubnormalScope scope(mode);
    kernels.quantize_row(&prologue, operands.x.data() + m * operands.x_width() * element, c.dtype,
                         c.K, operands.eps, c.act_bits, floats.data(),
                         q.data() + m * token_rows * q_stride, q_stride, &s_x[m],
                         &q_sum[m * token_rows]);
  }
  Buffer y(c.dtype, c.M * c.N);
  const float is_intact = 12345.0f;
  for (int64_t i = 0; i < c.M * c.N; ++i) y.set(i, is_intact);
  bitlinear_task task = {};
  task.act_bits = c.act_bits;
  task.q = q.data();
  task.q_stride = q_stride;
  task.s_x = s_x.data();
  task.q_sum = q_sum.data();
  task.M = c.M * token_rows;
  task.w = operands.w.data();
  task.row_bytes = operands.row_bytes;
  task.s_w = operands.s_w.data();
  task.s_w_stride = c.per_channel ? 1 : 0;
  task.bias = c.bias ? operands.bias.data() : nullptr;
  task.bias_dtype = c.dtype;
  task.residual = c.residual ? operands.residual.data() : nullptr;
  task.residual_dtype = c.dtype;
  task.n_begin = c.n_begin;
  task.n_end = c.N;
  task.y = y.data();
  task.y_stride = c.N;
  task.y_dtype = c.dtype;
  // Exactly the promised length and alignment.
  const int64_t scratch_bytes = kernels.scratch_bytes(task.M, operands.row_bytes);
  void* scratch = allocate_aligned(64, static_cast<size_t>(scratch_bytes));
  if (scratch == nullptr) return "no memory";
  memset(scratch, 99, static_cast<size_t>(scratch_bytes));
  task.scratch = scratch;
  {
    const SubnormalScope scope(mode);
    kernels.linear(&task);
  }
  free_aligned(scratch);

  Buffer never_written(c.dtype, 1);
  never_written.set(0, is_intact);
  for (int64_t m = 0; m < c.M; ++m) {
    const Expected expected(operands, m);
    for (int64_t k = 0; k < c.K; ++k) {
      const int64_t block = k / 4 / kernels.block;
      const int64_t position =
          block * 4 * kernels.block + k % 4 * kernels.block + k / 4 % kernels.block;
      int32_t value = 0;
      for (int64_t r = 0; r < token_rows; ++r) {
        const int32_t part = q[(m * token_rows + r) * q_stride + position];
        if (part == -128) return "a q is -128 at " + describe(c);
        value = BITLINEAR_HIGH_WEIGHT * value + part;
      }
      if (value != expected.q(k)) {
        return "q[" + std::to_string(m) + ", " + std::to_string(k) +
               "] = " + std::to_string(value) + ", expected " + std::to_string(expected.q(k)) +
               " at " + describe(c);
      }
    }
    for (int64_t n = 0; n < c.N; ++n) {
      const float got = y.get(m * c.N + n);
      const std::string difference = n < c.n_begin
                                         ? expected.compare(m, n, got, never_written.get(0))
                                         : expected.compare(m, n, got);
      if (!difference.empty()) return difference;
    }
    if (m >= 2 || !bitlinear_is_plain(&prologue)) continue;  // of those, one row is not finite
    const std::string difference = check_training(kernels, operands, m, expected);
    if (!difference.empty()) return difference;
  }
  if (seed % 4 != 0) return "";  // the references below take long
  const std::string difference = check_head(kernels, c, seed);
  return difference.empty() ? check_attention(kernels, c, seed) : difference;
}

}  // namespace selftest
}  // namespace bitlinear
