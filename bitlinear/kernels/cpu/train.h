// The functions for training other than the product: quantise and pack weights, and expand both
// operands for the gradients. Plain loops, as in quantize.h.
#pragma once

#include <stdint.h>

#include "quantize.h"

namespace bitlinear {

template <class V>
double sum_magnitudes(const void* w, int dtype, int64_t K) {
  constexpr int64_t kChunk = kQuantizeChunk, kLanes = 16;
  static_assert(kChunk % kLanes == 0, "a chunk must hold whole rounds of the lanes");
  float floats[kChunk];
  double sums[kLanes] = {};
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    const float* chunk = as_floats<V>(w, dtype, k, count, floats);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += static_cast<double>(bits_float(float_bits(chunk[i + lane]) & 0x7FFFFFFFu));
      }
    }
    for (; i < count; ++i) {
      sums[i % kLanes] += static_cast<double>(bits_float(float_bits(chunk[i]) & 0x7FFFFFFFu));
    }
  }
  double sum = 0.0;
  for (const double lane : sums) sum += lane;
  return sum;
}

template <class V>
void pack_row(const void* w, int dtype, int64_t K, float s_w, uint8_t* packed) {
  constexpr int64_t kChunk = kQuantizeChunk;
  float floats[kChunk];
  // w / s_w rounds to 1 if it exceeds 1/2 (1/2 itself rounds to even, 0). A quotient of floats
  // exceeds 1/2 exactly if w exceeds s_w / 2, and that product is exact.
  const float half = 0.5f * s_w;
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    const float* chunk = as_floats<V>(w, dtype, k, count, floats);
    alignas(64) uint8_t codes[kChunk];
    for (int64_t i = 0; i < count; ++i) {
      codes[i] = static_cast<uint8_t>(1 + (chunk[i] > half) - (chunk[i] < -half));
    }
    const int64_t bytes = (count + 3) / 4;
    for (int64_t i = count; i < 4 * bytes; ++i) codes[i] = 1;
    for (int64_t b = 0; b < bytes; ++b) {
      uint32_t word;
      memcpy(&word, codes + 4 * b, sizeof(word));
      // Byte 0, the first value, goes to the top.
      packed[k / 4 + b] = static_cast<uint8_t>(word << 6 | word >> 4 | word >> 14 | word >> 24);
    }
  }
}

inline void expand_floats(const uint8_t* packed, int64_t K, float s_w, float* w) {
  const auto value = [&](int64_t b, int j) {
    return s_w * static_cast<float>((packed[b] >> (6 - 2 * j) & 3) - 1);
  };
  for (int64_t b = 0; b < K / 4; ++b) {
    for (int j = 0; j < 4; ++j) w[4 * b + j] = value(b, j);
  }
  for (int64_t k = K / 4 * 4; k < K; ++k) w[k] = value(k / 4, static_cast<int>(k % 4));
}

template <class V>
void expand_row(const uint8_t* packed, int64_t K, float s_w, void* w, int dtype) {
  if (dtype == BITLINEAR_F32) return expand_floats(packed, K, s_w, static_cast<float*>(w));
  constexpr int64_t kChunk = kQuantizeChunk;
  float floats[kChunk];
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    expand_floats(packed + k / 4, count, s_w, floats);
    store_halves<V>(floats, count, w, dtype, k);
  }
}

template <class V, class Integer>
float quantize_integers(const void* x, int dtype, int64_t K, float eps, Integer* q) {
  const float s_x =
      quantize<V, Integer>(x, dtype, K, eps, [&](int64_t k, int64_t count, const Integer* row) {
        memcpy(q + k, row, static_cast<size_t>(count) * sizeof(Integer));
      });
  if (s_x != s_x) memset(q, 0, static_cast<size_t>(K) * sizeof(Integer));
  return s_x;
}

template <class V>
void quantize_in_order(const void* x, int dtype, int64_t K, float eps, int64_t act_bits, void* q,
                       float* s_x) {
  *s_x = act_bits == 8 ? quantize_integers<V>(x, dtype, K, eps, static_cast<int8_t*>(q))
                       : quantize_integers<V>(x, dtype, K, eps, static_cast<int16_t*>(q));
}

}  // namespace bitlinear
