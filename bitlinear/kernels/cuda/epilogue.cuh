// How a tile of y is written from its sums in shared memory.
#pragma once

#include "common.cuh"

namespace bitlinear {
namespace cuda {

__device__ inline int4 add(const int4& a, const int4& b) {
  return make_int4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Tokens of a tile: every step-th.
struct Tokens {
  int first, step, end;
};

// Writes y from row n and token m on, for kRows rows, by the first kThreads threads of a block.
// codes_of(token, row) has the sums of four rows of the tile, from `row` on; s_x and q_sum those of
// the tile's tokens. A thread keeps to four rows, so that it reads their scales and biases once.
template <int kRows, int kThreads, class CodesOf>
__device__ inline void write_tile(const bitlinear_cuda_task& task, int64_t n, int64_t m,
                                  const Tokens& tokens, const float* s_x, const int32_t* q_sum,
                                  const CodesOf& codes_of) {
  constexpr int kGroups = kRows / 4;
  const int row = static_cast<int>(threadIdx.x) % kGroups * 4;
  const int count = static_cast<int>(least<int64_t>(4, task.N - n - row));
  if (count <= 0) return;
  n += row;
  float s_w[4] = {}, bias[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    s_w[i] = task.s_w[(n + i) * task.s_w_stride];
    if (task.bias != nullptr) bias[i] = load_as_float(task.bias, task.bias_dtype, n + i);
  }
  const bool has_bias = task.bias != nullptr;
  with_type(task.y_dtype, [&](auto zero) {
    auto* const y = static_cast<decltype(zero)*>(task.y);
    const int step = tokens.step * (kThreads / kGroups);
#pragma unroll 4
    for (int token = tokens.first + static_cast<int>(threadIdx.x) / kGroups * tokens.step;
         token < tokens.end; token += step) {
      const int4 codes = codes_of(token, row);
      const int32_t q = q_sum[token];
      const float s = s_x[token];
      float values[4] = {dequantize(codes.x, q, s, s_w[0]), dequantize(codes.y, q, s, s_w[1]),
                         dequantize(codes.z, q, s, s_w[2]), dequantize(codes.w, q, s, s_w[3])};
      if (has_bias) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = __fadd_rn(values[i], bias[i]);
      }
      store_four(y, (m + token) * task.N + n, values, count);
    }
  });
}

}  // namespace cuda
}  // namespace bitlinear
