// A case of the self-test, and its operands.
#pragma once

#include <math.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "../abi.h"
#include "buffer.h"

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
  int64_t weights = 1;     // on CUDA: the rows are divided among so many weights
  int64_t group_size = 0;  // weights that share a scale; 0: see per_channel
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

inline std::string describe(const Case& c) {
  return "M=" + std::to_string(c.M) + " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K) +
         " dtype=" + std::to_string(c.dtype) + " bias=" + std::to_string(c.bias) +
         " per_channel=" + std::to_string(c.per_channel) +
         " data=" + std::to_string(static_cast<int>(c.data)) +
         " n_begin=" + std::to_string(c.n_begin) +
         " flushes=" + std::to_string(c.flushes_subnormals) +
         " act_bits=" + std::to_string(c.act_bits) + " activation=" + std::to_string(c.activation) +
         " norm=" + std::to_string(c.norm) + " residual=" + std::to_string(c.residual) +
         " group_size=" + std::to_string(c.group_size) + " weights=" + std::to_string(c.weights);
}

// The operands of a case. They follow from the seed, so every kernel gets the same.
struct Operands {
  Operands(const Case& c, uint64_t seed);

  int64_t groups() const {
    return shape.group_size > 0 ? (shape.K + shape.group_size - 1) / shape.group_size : 1;
  }
  // Elements from the scales of a row to those of the next one.
  int64_t s_w_stride() const { return shape.group_size > 0 || shape.per_channel ? groups() : 0; }
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
      s_w(static_cast<size_t>(s_w_stride() > 0 ? c.N * groups() : 1)) {
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
  if (c.group_size > 0) {  // most of them are rounded, some to 0
    for (float& scale : s_w) scale = ldexpf(scale, -static_cast<int>(random.next() % 20));
    if (c.data == Data::kNonFinite)
      s_w[random.next() % s_w.size()] = seed % 2 == 0 ? NAN : HUGE_VALF;
  }
  for (int64_t n = 0; n < c.N; ++n) {
    bias.set(n, random.uniform() * (c.data == Data::kSubnormal ? tiny : 1.0f));
  }
  for (int64_t k = 0; c.norm && k < c.K; ++k) norm_weight.set(k, 1.0f + random.uniform());
  for (int64_t i = 0; c.residual && i < c.M * c.N; ++i) residual.set(i, random.uniform());
}

}  // namespace selftest
}  // namespace bitlinear
