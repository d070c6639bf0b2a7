// From integer sums to the output: y = float(acc) * (s_x * s_w) + bias, each operation rounded to
// fp32 on its own and in this order, then one rounding to the output dtype.
#pragma once

#include <stdint.h>

#include "convert.h"

namespace bitlinear {

constexpr int64_t kEpilogueColumns = 64;

// Writes y[m, n : n + count] for count <= kEpilogueColumns. `codes` holds sum_k c * q with the
// codes c = t + 1, so one subtraction of sum_k q gives sum_k t * q.
template <class V>
inline void epilogue(const bitlinear_task& task, int64_t m, int64_t n, int64_t count,
                     const int32_t* codes) {
  float out[kEpilogueColumns];
  float bias_buffer[kEpilogueColumns];
  const float s_x = task.s_x[m];
  const int32_t q_sum = task.q_sum[m];
  if (task.s_w_stride == 0) {
    const float scale = s_x * task.s_w[0];
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i] - q_sum) * scale;
  } else {
    const float* s_w = task.s_w + n;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<float>(codes[i] - q_sum) * (s_x * s_w[i]);
    }
  }
  if (task.bias != nullptr) {
    const float* bias = as_floats<V>(task.bias, task.bias_dtype, n, count, bias_buffer);
    for (int64_t i = 0; i < count; ++i) out[i] += bias[i];
  }
  store_floats<V>(out, count, task.y, task.y_dtype, m * task.y_stride + n);
}

}  // namespace bitlinear
