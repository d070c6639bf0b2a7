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

// Scales and bias of the rows of a tile that one of kThreads threads writes: four rows of one
// weight in each of kParts equal parts of the tile, the first one row n. Construct it early, so
// that its loads are done when the tile ends.
template <int kRows, int kThreads, int kRowParts = 1>
struct TileRows {
  static constexpr int kParts = kRowParts, kPartRows = kRows / kParts;
  static constexpr int kGroups = kPartRows / 4;        // of threads; a group has all rows
  static constexpr int kSpan = kRows - kPartRows + 4;  // from the first row to the last one
  static_assert(kThreads % kGroups == 0, "each group has all rows");
  int64_t n;
  int row, group;
  int count;  // rows of the weight from n on, at most kSpan
  RowScale scales[kParts][4];

  TileRows() = default;
  __device__ TileRows(const bitlinear_cuda_weight& weight, int64_t n_begin, int thread)
      : row(thread % kGroups * 4), group(thread / kGroups) {
    n = n_begin + row;
    count = static_cast<int>(minimum<int64_t>(kSpan, weight.end - n));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = minimum(n + part * kPartRows + i, weight.end - 1);
        scales[part][i] = RowScale(weight, at - weight.begin);
      }
    }
  }
};

// Writes some tokens of a tile of a weight that begins with row m of q. load_codes(token, row)
// returns the sums of a row of q of the tile with four rows of weights from `row` on, of codes or,
// with groups, int64 sums for dequantize(); s_x and q_sum belong to the rows of q. A thread reads
// kBatch times four sums before it stores the first ones, because the compiler moves no load across
// a store. kIsPlain: tokens have 8 bits, and there is no residual.
template <int kBatch = 4, bool kIsPlain = false, int kRows, int kThreads, int kParts,
          class LoadCodes>
__device__ inline void write_tile(const bitlinear_cuda_task& task,
                                  const bitlinear_cuda_weight& weight,
                                  const TileRows<kRows, kThreads, kParts>& rows, int64_t m,
                                  const TokenRange& tokens, const float* s_x, const int32_t* q_sum,
                                  const LoadCodes& load_codes) {
  if (rows.count <= 0) return;
  constexpr int kPartRows = rows.kPartRows;
  float bias[kParts][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < 4; ++j) bias[part][j] = rows.scales[part][j].bias(weight);
  }
  const bool has_residual = !kIsPlain && task.residual != nullptr;
  const int step = tokens.step * (kThreads / rows.kGroups);
  const int64_t pitch = step * task.N;

  const auto write = [&](auto zero, auto is_whole, auto token_rows) {
    using Y = decltype(zero);
    using Four = decltype(round_to_vector(Y{}, bias[0]));
    constexpr int kTokenRows = decltype(token_rows)::value;
    constexpr int kTokenSums = kTokenRows * kParts;
    constexpr int kTokens = kBatch > kTokenSums ? kBatch / kTokenSums : 1;  // of a batch
    const int end = tokens.rows / kTokenRows;
    int token = tokens.first + rows.group * tokens.step;
    Y* y = static_cast<Y*>(task.y) + (m / kTokenRows + token) * task.N + rows.n;
    for (; token < end; token += kTokens * step, y += kTokens * pitch) {
      decltype(load_codes(0, 0).x) codes[kTokens][kParts][4][kTokenRows];
      int32_t q[kTokens][kTokenRows];
      float s[kTokens];
      uint32_t residual[kTokens][kParts][4];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int first = (token + i * step < end ? token + i * step : token) * kTokenRows;
        s[i] = s_x[first];
        if (has_residual) {
          const int64_t at = (m + first) / kTokenRows * task.N + rows.n;
#pragma unroll
          for (int j = 0; j < 4 * kParts; ++j) {
            const int row = j / 4 * kPartRows + j % 4;
            residual[i][j / 4][j % 4] =
                load_bits(task.residual, task.residual_dtype,
                          at + (decltype(is_whole)::value ? row : minimum(row, rows.count - 1)));
          }
        }
#pragma unroll
        for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const auto four = load_codes(first + r, rows.row + part * kPartRows);
            codes[i][part][0][r] = four.x;
            codes[i][part][1][r] = four.y;
            codes[i][part][2][r] = four.z;
            codes[i][part][3][r] = four.w;
          }
          q[i][r] = q_sum[first + r];
        }
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          float values[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            values[j] = dequantize(codes[i][part][j], q[i], s[i], rows.scales[part][j].s_w);
            values[j] = __fadd_rn(values[j], bias[part][j]);
            if (has_residual) {
              values[j] =
                  __fadd_rn(values[j], float_from_bits(residual[i][part][j], task.residual_dtype));
            }
          }
          const Four four = round_to_vector(zero, values);
          if (token + i * step < end) {
            Y* const out = y + i * pitch + part * kPartRows;
            if constexpr (decltype(is_whole)::value) {
              *reinterpret_cast<Four*>(out) = four;
            } else {
              store_partial(out, four, rows.count - part * kPartRows);
            }
          }
        }
      }
    }
  };
  with_token_rows<kIsPlain>(task, [&](auto token_rows) {
    with_dtype(task.y_dtype, [&](auto zero) {
      // Then the address is a multiple of the vector size.
      if (rows.count >= rows.kSpan && task.N % 4 == 0 && rows.n % 4 == 0) {
        write(zero, std::true_type{}, token_rows);
      } else {
        write(zero, std::false_type{}, token_rows);
      }
    });
  });
}

}  // namespace cuda
}  // namespace bitlinear
