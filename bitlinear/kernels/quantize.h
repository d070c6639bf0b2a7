// The fused activation quantiser: absmax, scale, rounding, plane order and sum of one token.
//
// Two sweeps over x, which the first one leaves in the cache: x[0:K] is read, 1 byte per element is
// written. Plain loops: the arithmetic is exact or rounded as written (-ffp-contract=off), so every
// compiler may vectorise it and every variant gives the same bits.
#pragma once

#include <stdint.h>

#include "convert.h"

namespace bitlinear {

// Adding 1.5 * 2^23 leaves a float with no fraction bits: the sum is rounded to the nearest
// integer, ties to even, and that integer can be read off its low mantissa bits. Exact for |x| <
// 2^22.
constexpr float kRoundMagic = 12582912.0f;

// |x * inv| <= 127 * (1 + 2^-22), which rounds to 127: the clamp of the numerics never acts.
inline int32_t round_to_int(float x) {
  return static_cast<int32_t>(float_bits(x + kRoundMagic) - float_bits(kRoundMagic));
}

template <class V>
void quantize_row(const void* x, int dtype, int64_t K, float eps, int8_t* q, float* s_x,
                  int32_t* q_sum) {
  constexpr int64_t kBlock = V::kWidth;    // packed bytes, so values per plane
  constexpr int64_t kValues = 4 * kBlock;  // values per block
  constexpr int64_t kChunk = 1024;         // values converted to fp32 at a time
  static_assert(kChunk % kValues == 0, "a chunk must hold whole blocks");
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
  const int64_t padded = (K + kValues - 1) / kValues * kValues;
  if (absmax_bits >= 0x7F800000u) {
    memset(q, 0, static_cast<size_t>(padded));
    *s_x = bits_float(0x7FC00000u);
    *q_sum = 0;
    return;
  }
  const float absmax = bits_float(absmax_bits) > eps ? bits_float(absmax_bits) : eps;
  const float inv = 127.0f / absmax;

  int32_t sum = 0;
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    const float* chunk = as_floats<V>(x, dtype, k, count, floats);
    alignas(64) int8_t row[kChunk];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t value = round_to_int(chunk[i] * inv);
      sum += value;
      row[i] = static_cast<int8_t>(value);
    }
    const int64_t filled = (count + kValues - 1) / kValues * kValues;
    memset(row + count, 0, static_cast<size_t>(filled - count));
    // Four values make one 32-bit word; plane j takes byte j of every word.
    for (int64_t base = 0; base < filled; base += kValues) {
      uint32_t words[kBlock];
      memcpy(words, row + base, sizeof(words));
      int8_t* block = q + k + base;
      for (int64_t b = 0; b < kBlock; ++b) block[0 * kBlock + b] = static_cast<int8_t>(words[b]);
      for (int64_t b = 0; b < kBlock; ++b) {
        block[1 * kBlock + b] = static_cast<int8_t>(words[b] >> 8);
      }
      for (int64_t b = 0; b < kBlock; ++b) {
        block[2 * kBlock + b] = static_cast<int8_t>(words[b] >> 16);
      }
      for (int64_t b = 0; b < kBlock; ++b) {
        block[3 * kBlock + b] = static_cast<int8_t>(words[b] >> 24);
      }
    }
  }
  *s_x = absmax / 127.0f;
  *q_sum = sum;
}

}  // namespace bitlinear
