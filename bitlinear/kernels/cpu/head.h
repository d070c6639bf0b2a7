// Products for the head of a model: rows of int8 or bf16 times one token.
//
// Bound: memory. Each weight is read once, one row after the other, which the hardware prefetcher
// follows: no prefetch was faster, and rows side by side were slower. The loops are plain, and
// every compiler makes vectors from them; of int8 GCC makes products of pairs (vpmaddwd, with VNNI
// vpdpwssd). Two cores of Zen 4, 128256 x 2560: int8 10.3 ms, 32 GB/s of 30 to 50 measured (torch's
// _weight_int8pack_mm 17); bf16 18.8 ms, 35 GB/s (F.linear 32, torch.mv 36).
#pragma once

#include <stdint.h>
#include <string.h>

#include "convert.h"
#include "portable_half.h"

namespace bitlinear {

constexpr int64_t kHeadRows = 64;  // that are rounded together

// Products whose sum fits int32, of any int8 and int16: 256 * 128 * 32768 = 2^30.
constexpr int64_t kInt8Chunk = 256;

inline int64_t dot_int8(const int8_t* w, const int16_t* q, int64_t K) {
  const auto dot = [=](int64_t begin, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = begin; k < begin + count; ++k) sum += static_cast<int16_t>(w[k]) * q[k];
    return sum;
  };
  int64_t sum = 0;
  int64_t k = 0;
  for (; k + kInt8Chunk <= K; k += kInt8Chunk) sum += dot(k, kInt8Chunk);
  return sum + dot(k, K - k);
}

// Lane j adds the products of k = j, j + 64, ...
inline float dot_bf16(const uint16_t* w, const float* x, int64_t K) {
  constexpr int kLanes = 64;
  float lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += float_from_bf16(w[k + j]) * x[k + j];
  }
  float sums[kLanes];  // a copy: `lanes` stays in registers
  memcpy(sums, lanes, sizeof(sums));
  for (int64_t j = 0; j < K - k; ++j) sums[j] += float_from_bf16(w[k + j]) * x[k + j];
  return add_halves<kLanes>(sums);
}

// y[n] = product(n), rounded to the dtype of y.
template <class Product>
void store_products(int64_t rows, void* y, int y_dtype, const Product& product) {
  for (int64_t n = 0; n < rows; n += kHeadRows) {
    const int64_t count = rows - n < kHeadRows ? rows - n : kHeadRows;
    float buffer[kHeadRows];
    float* const out = y_dtype == BITLINEAR_F32 ? static_cast<float*>(y) + n : buffer;
    for (int64_t i = 0; i < count; ++i) out[i] = product(n + i);
    if (out == buffer) store_halves<PortableHalf>(buffer, count, y, y_dtype, n);
  }
}

void int8_rows(const int8_t* w, int64_t rows, int64_t K, const int16_t* q, float s_x,
               const float* s_w, void* y, int y_dtype) {
  store_products(rows, y, y_dtype, [=](int64_t n) {
    return static_cast<float>(dot_int8(w + n * K, q, K)) * (s_x * s_w[n]);
  });
}

void bf16_rows(const uint16_t* w, int64_t rows, int64_t K, const float* x, void* y, int y_dtype) {
  store_products(rows, y, y_dtype, [=](int64_t n) { return dot_bf16(w + n * K, x, K); });
}

}  // namespace bitlinear
