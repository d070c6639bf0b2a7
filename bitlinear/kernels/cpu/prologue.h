// What a fused product does to a token before it quantises it: a gate, then an RMSNorm. prologue.py
// is the specification; every float operation here is one of its operations.
//
// The values are computed once and stored as fp32, for the passes of the quantiser. The loops are
// plain, as in quantize.h.
#pragma once

#include <math.h>
#include <stdint.h>

#include "convert.h"

namespace bitlinear {

constexpr int64_t kPrologueChunk = 1024;  // values at a time; a power of two

inline float exp_of(float z) {
  z = z < -86.0f ? -86.0f : z;  // a NaN stays
  z = z > 88.0f ? 88.0f : z;
  const float shifted = z * 1.44269504f + kRoundMagic;
  const float n = shifted - kRoundMagic;
  float r = z - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}

// values[i] = activation(a[i]) * b[i].
inline void gate(int activation, const float* a, const float* b, int64_t count, float* values) {
  if (activation == BITLINEAR_SILU) {
    for (int64_t i = 0; i < count; ++i) values[i] = a[i] / (exp_of(-a[i]) + 1.0f) * b[i];
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float positive = a[i] < 0.0f ? 0.0f : a[i];
      values[i] = positive * positive * b[i];
    }
  }
}

// sums[i] = values[2 * i] + values[2 * i + 1].
inline void add_neighbours(const float* __restrict values, int64_t count, float* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = values[2 * i] + values[2 * i + 1];
}

// The sum of squares of a chunk, in pairs, as if it had kPrologueChunk values.
inline float sum_of_squares(const float* values, int64_t count) {
  float even[kPrologueChunk], odd[kPrologueChunk / 2];
  for (int64_t i = 0; i < count; ++i) even[i] = values[i] * values[i];
  int64_t size = 2;  // zeros change no sum of squares
  while (size < count) size *= 2;
  for (int64_t i = count; i < size; ++i) even[i] = 0.0f;
  for (;;) {
    add_neighbours(even, size / 2, odd);
    if (size == 2) return odd[0];
    add_neighbours(odd, size / 4, even);
    if (size == 4) return even[0];
    size /= 4;
  }
}

// The sum of values[0:count] in pairs. Overwrites them.
inline float sum_in_pairs(float* values, int64_t count) {
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 != 0) values[count / 2] = values[count - 1];
  }
  return values[0];
}

// values[0:K] = the token at x[0:K], or x[0:2K] with a gate, as the quantiser reads it.
template <class V>
void apply_prologue(const bitlinear_prologue& prologue, const void* x, int dtype, int64_t K,
                    float* values) {
  constexpr int64_t kChunk = kPrologueChunk;
  const bool is_gate = prologue.activation != BITLINEAR_NO_GATE;
  const bool is_norm = prologue.norm_weight != nullptr;
  float sums[BITLINEAR_MAX_K / kChunk + 1];
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    float buffer[kChunk], other_buffer[kChunk];
    const float* a = as_floats<V>(x, dtype, k, count, buffer);
    if (is_gate) {
      const float* b = as_floats<V>(x, dtype, K + k, count, other_buffer);
      gate(prologue.activation, a, b, count, values + k);
    } else {
      memcpy(values + k, a, static_cast<size_t>(count) * sizeof(float));
    }
    if (is_norm) sums[k / kChunk] = sum_of_squares(values + k, count);
  }
  if (!is_norm) return;
  const float mean = sum_in_pairs(sums, (K + kChunk - 1) / kChunk) / static_cast<float>(K);
  const float factor = 1.0f / sqrtf(mean + prologue.norm_eps);
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t count = K - k < kChunk ? K - k : kChunk;
    float buffer[kChunk];
    const float* weight = as_floats<V>(prologue.norm_weight, prologue.norm_dtype, k, count, buffer);
    for (int64_t i = 0; i < count; ++i) values[k + i] = values[k + i] * factor * weight[i];
  }
}

}  // namespace bitlinear
