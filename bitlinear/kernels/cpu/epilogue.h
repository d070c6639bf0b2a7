// From integer sums to the output: y = float(acc) * (s_x * s_w) + bias + residual, each operation
// rounded to fp32 on its own and in this order, then one rounding to the output dtype. With
// activations of 16 bits, acc = 254 * high + low. With groups, s_w is the unit of the row's scales.
#pragma once

#include <stdint.h>

#include "convert.h"

namespace bitlinear {

// Columns n .. n + count of the output, count <= kColumns. Scales and bias, which all tokens share,
// are loaded once.
template <class V, int kColumns>
class Epilogue {
 public:
  Epilogue(const bitlinear_task& task, int64_t n, int64_t count)
      : Epilogue(task, n, count, task.s_w + n * task.s_w_stride, task.s_w_stride) {}

  // With the scales of these columns, `stride` apart.
  Epilogue(const bitlinear_task& task, int64_t n, int64_t count, const float* scales,
           int64_t stride = 1)
      : task_(task), n_(n), count_(count) {
    for (int64_t i = 0; i < count; ++i) s_w_[i] = scales[i * stride];
    if (task.bias == nullptr) {
      // Adding -0 changes no value, not even the sign of a zero: one loop serves both cases.
      for (int64_t i = 0; i < count; ++i) bias_[i] = -0.0f;
    } else {
      float buffer[kColumns];
      const float* bias = as_floats<V>(task.bias, task.bias_dtype, n, count, buffer);
      memcpy(bias_, bias, static_cast<size_t>(count) * sizeof(float));
    }
  }

  // Writes the tokens of rows m .. m + rows of q: whole tokens. `codes` holds sum_k c * q with the
  // codes c = t + 1, in rows `stride` apart, so one subtraction of sum_k q gives sum_k t * q.
  void store(int64_t m, int64_t rows, const int32_t* codes, int64_t stride) const {
    if (task_.act_bits == 8) {
      for (int64_t i = 0; i < rows; ++i) store_row(m + i, codes + i * stride);
    } else {
      for (int64_t i = 0; i < rows; i += 2) store_pair(m + i, codes + i * stride, stride);
    }
  }

  // The same with sums of groups: sum_g multiplier[g] * sum_k t * q, which fp64 holds exactly.
  void store(int64_t m, int64_t rows, const double* sums, int64_t stride) const {
    if (task_.act_bits == 8) {
      for (int64_t r = 0; r < rows; ++r) {
        store_token(m + r, [=](int64_t i) { return static_cast<float>(sums[r * stride + i]); });
      }
    } else {
      for (int64_t r = 0; r < rows; r += 2) {
        const double* const high = sums + r * stride;
        store_token((m + r) / 2, [=](int64_t i) {
          return static_cast<float>(BITLINEAR_HIGH_WEIGHT * high[i] + high[stride + i]);
        });
      }
    }
  }

  // Writes the token of row m, with activations of 8 bits.
  void store_row(int64_t m, const int32_t* codes) const {
    const int32_t q_sum = task_.q_sum[m];
    store_token(m, [=](int64_t i) { return static_cast<float>(codes[i] - q_sum); });
  }

  // Writes the token of rows m and m + 1, with activations of 16 bits.
  void store_pair(int64_t m, const int32_t* codes, int64_t stride) const {
    const int32_t high_sum = task_.q_sum[m], low_sum = task_.q_sum[m + 1];
    store_token(m / 2, [=](int64_t i) {
      const double high = codes[i] - high_sum, low = codes[stride + i] - low_sum;
      return static_cast<float>(BITLINEAR_HIGH_WEIGHT * high + low);  // exact before this rounding
    });
  }

 private:
  template <class Product>
  void store_token(int64_t token, const Product& product) const {
    float buffer[kColumns];
    const int64_t begin = token * task_.y_stride + n_;
    float* out = task_.y_dtype == BITLINEAR_F32 ? static_cast<float*>(task_.y) + begin : buffer;
    const float s_x = task_.s_x[token];
    const auto scale = [&](int64_t count) {
      for (int64_t i = 0; i < count; ++i) out[i] = product(i) * (s_x * s_w_[i]) + bias_[i];
    };
    // A constant number of iterations compiles to vector code without a tail.
    if (count_ == kColumns) {
      scale(kColumns);
    } else {
      scale(count_);
    }
    if (task_.residual != nullptr) {
      float residual_buffer[kColumns];
      const float* residual =
          as_floats<V>(task_.residual, task_.residual_dtype, begin, count_, residual_buffer);
      for (int64_t i = 0; i < count_; ++i) out[i] += residual[i];
    }
    if (out == buffer) store_halves<V>(buffer, count_, task_.y, task_.y_dtype, begin);
  }

  const bitlinear_task& task_;
  const int64_t n_, count_;
  float s_w_[kColumns], bias_[kColumns];
};

}  // namespace bitlinear
