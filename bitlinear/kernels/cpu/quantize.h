// The fused activation quantiser: absmax, scale, rounding, plane order and sum of one token.
//
// Two passes over x; the second one finds it in the cache. Memory traffic: x[0:K] is read, 1 byte
// per element is written (2 with 16 bits). The loops are plain: their arithmetic is exact or
// rounded as written (-ffp-contract=off), so every compiler can vectorise it and every variant
// gives the same bits.
#pragma once

#include <stdint.h>

#include "convert.h"
#include "prologue.h"

namespace bitlinear {

constexpr int64_t kQuantizeChunk = 1024;  // values converted to fp32 at a time

// Returns the scale of x[0:K]. Calls `store(k, count, row)` with the quantised values from k on, as
// Integer (int8_t or int16_t); never if the token has a NaN or an infinity.
template <class V, class Integer, class Store>
float quantize(const void* x, int dtype, int64_t K, float eps, const Store& store) {
  // |x * inv| <= 32385 * (1 + 2^-22), which rounds to 32385 (and to 127 in 8 bits), so no clamp is
  // needed.
  constexpr float kMax = sizeof(Integer) == 1 ? 127.0f : 32385.0f;
  constexpr int64_t kChunk = kQuantizeChunk;
  float floats[kChunk];

  // As unsigned integers the bits of |x| order finite < infinity < NaN.
  uint32_t absmax_bits = 0;
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    const float* chunk = as_floats<V>(x, dtype, k, count, floats);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = float_bits(chunk[i]) & 0x7FFFFFFFu;
      absmax_bits = bits > absmax_bits ? bits : absmax_bits;
    }
  }
  if (absmax_bits >= 0x7F800000u) return bits_float(0x7FC00000u);
  const float absmax = bits_float(absmax_bits) > eps ? bits_float(absmax_bits) : eps;
  const float inv = kMax / absmax;

  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    const float* chunk = as_floats<V>(x, dtype, k, count, floats);
    alignas(64) Integer row[kChunk];
    for (int64_t i = 0; i < count; ++i) row[i] = static_cast<Integer>(round_to_int(chunk[i] * inv));
    store(k, count, row);
  }
  return absmax / kMax;
}

// V::split_planes for any instruction set.
template <int64_t kWidth>
int32_t split_planes_plainly(const int8_t* row, int8_t* q) {
  int32_t sum = 0;
  for (int64_t i = 0; i < 4 * kWidth; ++i) sum += row[i];
  // Four values make one 32-bit word; plane j takes byte j of every word.
  uint32_t words[kWidth];
  memcpy(words, row, sizeof(words));
  for (int j = 0; j < 4; ++j) {
    for (int64_t b = 0; b < kWidth; ++b) q[b] = static_cast<int8_t>(words[b] >> (8 * j));
    q += kWidth;
  }
  return sum;
}

// Stores a chunk of a row in planes, and returns its sum. Fills up the last block of `row` and `q`
// with zeros.
template <class V>
int32_t store_planes(int8_t* row, int64_t count, int8_t* q) {
  constexpr int64_t kValues = 4 * V::kWidth;  // of a block: V::kWidth packed bytes
  static_assert(kQuantizeChunk % kValues == 0, "a chunk must hold whole blocks");
  const int64_t filled = (count + kValues - 1) / kValues * kValues;
  memset(row + count, 0, static_cast<size_t>(filled - count));
  int32_t sum = 0;
  for (int64_t i = 0; i < filled; i += kValues) sum += V::split_planes(row + i, q + i);
  return sum;
}

// Splits values of 16 bits: value = 254 * high + low, with both in -127 .. 127.
inline void split(const int16_t* values, int64_t count, int8_t* high, int8_t* low) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t quotient = round_to_int(static_cast<float>(values[i]) * BITLINEAR_HIGH_FACTOR);
    high[i] = static_cast<int8_t>(quotient);
    low[i] = static_cast<int8_t>(values[i] - BITLINEAR_HIGH_WEIGHT * quotient);
  }
}

template <class V>
void quantize_row(const bitlinear_prologue* prologue, const void* x, int dtype, int64_t K,
                  float eps, int64_t act_bits, float* floats, int8_t* q, int64_t q_stride,
                  float* s_x, int32_t* q_sum) {
  if (!bitlinear_is_plain(prologue)) {
    apply_prologue<V>(*prologue, x, dtype, K, floats);
    x = floats;
    dtype = BITLINEAR_F32;
  }
  const int64_t rows = bitlinear_rows_per_token(act_bits);
  for (int64_t r = 0; r < rows; ++r) q_sum[r] = 0;
  if (act_bits == 8) {
    *s_x = quantize<V, int8_t>(x, dtype, K, eps, [&](int64_t k, int64_t count, int8_t* row) {
      q_sum[0] += store_planes<V>(row, count, q + k);
    });
  } else {
    *s_x = quantize<V, int16_t>(x, dtype, K, eps, [&](int64_t k, int64_t count, int16_t* row) {
      alignas(64) int8_t high[kQuantizeChunk], low[kQuantizeChunk];
      split(row, count, high, low);
      q_sum[0] += store_planes<V>(high, count, q + k);
      q_sum[1] += store_planes<V>(low, count, q + q_stride + k);
    });
  }
  if (*s_x == *s_x) return;
  const int64_t values = 4 * int64_t{V::kWidth};
  const size_t bytes = static_cast<size_t>((K + values - 1) / values * values);
  for (int64_t r = 0; r < rows; ++r) memset(q + r * q_stride, 0, bytes);
}

}  // namespace bitlinear
