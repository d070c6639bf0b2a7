// From integer sums to the output: y = float(acc) * (s_x * s_w) + bias, each operation rounded to
// fp32 on its own and in this order, then one rounding to the output dtype.
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
      : task_(task), n_(n), count_(count) {
    for (int64_t i = 0; i < count; ++i) s_w_[i] = task.s_w[(n + i) * task.s_w_stride];
    if (task.bias == nullptr) {
      // Adding -0 changes no value, not even the sign of a zero: one loop serves both cases.
      for (int64_t i = 0; i < count; ++i) bias_[i] = -0.0f;
    } else {
      float buffer[kColumns];
      const float* bias = as_floats<V>(task.bias, task.bias_dtype, n, count, buffer);
      memcpy(bias_, bias, static_cast<size_t>(count) * sizeof(float));
    }
  }

  // Writes row m. `codes` holds sum_k c * q with the codes c = t + 1, so one subtraction of
  // sum_k q gives sum_k t * q.
  void store(int64_t m, const int32_t* codes) const {
    float buffer[kColumns];
    const int64_t begin = m * task_.y_stride + n_;
    float* out = task_.y_dtype == BITLINEAR_F32 ? static_cast<float*>(task_.y) + begin : buffer;
    // A constant number of iterations compiles to vector code without a tail.
    if (count_ == kColumns) {
      scale(m, codes, kColumns, out);
    } else {
      scale(m, codes, count_, out);
    }
    if (out == buffer) store_halves<V>(buffer, count_, task_.y, task_.y_dtype, begin);
  }

 private:
  void scale(int64_t m, const int32_t* codes, int64_t count, float* out) const {
    const float s_x = task_.s_x[m];
    const int32_t q_sum = task_.q_sum[m];
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<float>(codes[i] - q_sum) * (s_x * s_w_[i]) + bias_[i];
    }
  }

  const bitlinear_task& task_;
  const int64_t n_, count_;
  float s_w_[kColumns], bias_[kColumns];
};

}  // namespace bitlinear
