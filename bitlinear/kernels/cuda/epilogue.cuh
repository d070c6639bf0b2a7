// Writes a tile of y from its sums in shared memory.
#pragma once

#include "common.cuh"

namespace bitlinear {
namespace cuda {

__device__ inline int4 add(const int4& a, const int4& b) {
  return make_int4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The tokens first, first + step, ... of a tile with this many rows of q.
struct TokenRange {
  int first, step, rows;
};

// Scales and bias of the rows of a tile that one of kThreads threads writes: four rows from row n
// on, of one weight. Construct it early, so that its loads are done when the tile ends.
template <int kRows, int kThreads>
struct TileRows {
  static constexpr int kGroups = kRows / 4;  // of threads; a group has all rows
  int64_t n;
  int row, group, count;
  RowScale scales[4];

  TileRows() = default;
  __device__ TileRows(const bitlinear_cuda_weight& weight, int64_t n_begin, int thread)
      : row(thread % kGroups * 4), group(thread / kGroups) {
    n = n_begin + row;
    count = static_cast<int>(minimum<int64_t>(4, weight.end - n));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scales[i] = RowScale(weight, minimum(n + i, weight.end - 1) - weight.begin);
    }
  }
};

// Writes some tokens of a tile of a weight that begins with row m of q. load_codes(token, row)
// returns the sums of a row of q of the tile with four rows of weights from `row` on; s_x and q_sum
// belong to the rows of q. A thread reads kBatch tokens before it stores the first one, because the
// compiler moves no load across a store.
template <int kBatch = 4, bool kTakesResidual = true, int kRows, int kThreads, class LoadCodes>
__device__ inline void write_tile(const bitlinear_cuda_task& task,
                                  const bitlinear_cuda_weight& weight,
                                  const TileRows<kRows, kThreads>& rows, int64_t m,
                                  const TokenRange& tokens, const float* s_x, const int32_t* q_sum,
                                  const LoadCodes& load_codes) {
  if (rows.count <= 0) return;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bias[i] = rows.scales[i].bias(weight);
  const bool has_residual = kTakesResidual && task.residual != nullptr;
  const int step = tokens.step * (kThreads / rows.kGroups);
  const int64_t pitch = step * task.N;

  const auto write = [&](auto zero, auto is_whole, auto token_rows) {
    using Y = decltype(zero);
    using Four = decltype(round_to_vector(Y{}, bias));
    constexpr int kTokenRows = decltype(token_rows)::value;
    constexpr int kTokens = kBatch > kTokenRows ? kBatch / kTokenRows : 1;  // of a batch
    const int end = tokens.rows / kTokenRows;
    int token = tokens.first + rows.group * tokens.step;
    Y* y = static_cast<Y*>(task.y) + (m / kTokenRows + token) * task.N + rows.n;
    for (; token < end; token += kTokens * step, y += kTokens * pitch) {
      int32_t codes[kTokens][4][kTokenRows];
      int32_t q[kTokens][kTokenRows];
      float s[kTokens];
      uint32_t residual[kTokens][4];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int first = (token + i * step < end ? token + i * step : token) * kTokenRows;
        s[i] = s_x[first];
        if (has_residual) {
          const int64_t row = (m + first) / kTokenRows * task.N + rows.n;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            residual[i][j] =
                load_bits(task.residual, task.residual_dtype,
                          row + (decltype(is_whole)::value ? j : minimum(j, rows.count - 1)));
          }
        }
#pragma unroll
        for (int r = 0; r < kTokenRows; ++r) {
          const int4 four = load_codes(first + r, rows.row);
          codes[i][0][r] = four.x;
          codes[i][1][r] = four.y;
          codes[i][2][r] = four.z;
          codes[i][3][r] = four.w;
          q[i][r] = q_sum[first + r];
        }
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j] = dequantize(codes[i][j], q[i], s[i], rows.scales[j].s_w);
          values[j] = __fadd_rn(values[j], bias[j]);
          if (has_residual) {
            values[j] = __fadd_rn(values[j], float_from_bits(residual[i][j], task.residual_dtype));
          }
        }
        const Four four = round_to_vector(zero, values);
        if (token + i * step < end) {
          if constexpr (decltype(is_whole)::value) {
            *reinterpret_cast<Four*>(y + i * pitch) = four;
          } else {
            store_partial(y + i * pitch, four, rows.count);
          }
        }
      }
    }
  };
  with_token_rows(task, [&](auto token_rows) {
    with_dtype(task.y_dtype, [&](auto zero) {
      // Then the address is a multiple of the vector size.
      if (rows.count == 4 && task.N % 4 == 0 && rows.n % 4 == 0) {
        write(zero, std::true_type{}, token_rows);
      } else {
        write(zero, std::false_type{}, token_rows);
      }
    });
  });
}

}  // namespace cuda
}  // namespace bitlinear
