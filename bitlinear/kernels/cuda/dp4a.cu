// y = epilogue(q @ w^T) with the dot product of four bytes, for any shape on any device that has
// dp4a (sm_61 and later). The fallback for devices older than sm_80: simple before fast.
//
// Bound for many tokens: issuing instructions, of which dp4a is two thirds; the others shift and
// mask. Measured on an H100, in us, with the quantiser: 4096 x 4096 takes 5.9 for one token, 32 for
// 16, 84 for 64 and 327 for 1024 (105 Top/s; by the profiler at 2.75 instructions per cycle of 4).
// One token of 8192 x 8192 takes 9.4, or 1.8 TB/s. Up to 128 registers, no spills.
#include "groups.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// The codes at bits 2p of four packed bytes; they are multiplied with one word of plane p.
__device__ inline int32_t extract_codes(uint32_t packed, int p) {
  return static_cast<int32_t>(packed >> 2 * p & 0x03030303u);
}

// Sums of codes or, with groups, of multiples of weights.
template <bool kGrouped>
using Sum = std::conditional_t<kGrouped, int64_t, int32_t>;

// Multiplies 16 packed bytes by the 64 values of a token that belong to them.
__device__ inline void add_products(const uint4& packed, const uint4 (&planes)[4], int32_t& sum) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint4& q = planes[p];
    sum = __dp4a(extract_codes(packed.x, p), static_cast<int32_t>(q.x), sum);
    sum = __dp4a(extract_codes(packed.y, p), static_cast<int32_t>(q.y), sum);
    sum = __dp4a(extract_codes(packed.z, p), static_cast<int32_t>(q.z), sum);
    sum = __dp4a(extract_codes(packed.w, p), static_cast<int32_t>(q.w), sum);
  }
}

// With the multipliers of both halves, each 32 weights.
__device__ inline void add_products(const uint4& packed, const uint4 (&planes)[4],
                                    const int2& multipliers, int64_t& sum) {
  constexpr int32_t kMinusOnes = -1;  // for each code: t is the code minus 1
  int32_t first = 0, second = 0;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint4& q = planes[p];
    const auto add = [&](uint32_t codes, uint32_t values, int32_t& half) {
      half = __dp4a(extract_codes(codes, p), static_cast<int32_t>(values), half);
      half = __dp4a(kMinusOnes, static_cast<int32_t>(values), half);
    };
    add(packed.x, q.x, first);
    add(packed.y, q.y, first);
    add(packed.z, q.z, second);
    add(packed.w, q.w, second);
  }
  sum += int64_t{multipliers.x} * first + int64_t{multipliers.y} * second;
}

// The multipliers for 16 packed bytes of a row.
__device__ inline int2 load_multipliers(const bitlinear_cuda_groups& groups, const int16_t* row,
                                        int64_t offset) {
  const auto block = static_cast<int>(offset / (BITLINEAR_GROUP_UNIT / 4));
  return make_int2(row[group_of(groups, block)], row[group_of(groups, block + 1)]);
}

// The value of the thread that is half a warp further.
__device__ inline int32_t shift_down(int32_t value) { return __shfl_down_sync(~0u, value, 16); }
__device__ inline int64_t shift_down(int64_t value) {
  return __shfl_down_sync(~0u, static_cast<long long>(value), 16);
}

// Writes the token whose first row of q is m.
template <class Code, int kTokenRows>
__device__ inline void store(const bitlinear_cuda_task& task, const Activations& activations,
                             int64_t m, int64_t n, const Code (&codes)[kTokenRows]) {
  const bitlinear_cuda_weight& weight = weight_at(task, n);
  const RowScale scale(weight, n - weight.begin);
  float value = dequantize(codes, activations.q_sum + m, activations.s_x[m], scale.s_w);
  value = __fadd_rn(value, scale.bias(weight));
  const int64_t index = m / kTokenRows * task.N + n;
  if (task.residual != nullptr) {
    value = __fadd_rn(value, load_as_float(task.residual, task.residual_dtype, index));
  }
  with_dtype(task.y_dtype, [&](auto zero) {
    using Y = decltype(zero);
    static_cast<Y*>(task.y)[index] = from_float<Y>(value);
  });
}

// 16 packed bytes of a row. All threads take the same branch, so it costs little.
__device__ inline uint4 load_packed(const uint8_t* row, int64_t offset, int64_t row_bytes,
                                    bool aligned) {
  return aligned ? load_chunk<true>(row, offset, row_bytes)
                 : load_chunk<false>(row, offset, row_bytes);
}

// --- Few tokens: a warp for every row of weights ---

template <int kTokens, bool kGrouped>
__global__ void __launch_bounds__(kThreads)
    dp4a_gemv(const bitlinear_cuda_task task, const Activations activations, bool aligned) {
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  allow_successor();
  wait_for_predecessor();
  if (n >= task.N) return;

  const int64_t row_bytes = ceil_div<int64_t>(task.K, 4);
  const uint8_t* const row = weight_row(task, n, row_bytes);
  Sum<kGrouped> sums[kTokens] = {};
  for (int64_t offset = 16 * lane; offset < row_bytes; offset += 16 * 32) {
    const uint4 packed = load_packed(row, offset, row_bytes, aligned);
    const int8_t* block =
        activations.q + offset / kSliceBytes * kSliceValues + offset % kSliceBytes;
    int2 multipliers = {};
    if (kGrouped) multipliers = load_multipliers(task.groups, multipliers_of(task, n), offset);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= task.M) break;
      uint4 planes[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        planes[p] = *reinterpret_cast<const uint4*>(block + m * activations.q_stride + 64 * p);
      }
      if constexpr (kGrouped) {
        add_products(packed, planes, multipliers, sums[m]);
      } else {
        add_products(packed, planes, sums[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) sums[m] = warp_reduce_add(sums[m]);
  with_token_rows(task, [&](auto token_rows) {
    constexpr int kTokenRows = decltype(token_rows)::value;
#pragma unroll
    for (int m = 0; m + kTokenRows <= kTokens; m += kTokenRows) {
      Sum<kGrouped> codes[kTokenRows];
#pragma unroll
      for (int r = 0; r < kTokenRows; ++r) codes[r] = sums[m + r];
      if (lane == m && m < task.M) store(task, activations, m, n, codes);
    }
  });
}

// --- Many tokens: tiles of 64 rows by 16 or 64 tokens, 64 packed bytes at a time ---

constexpr int kTileRows = 64;
constexpr int kSide = 16;  // threads form a square; each has every 16th row and token
constexpr int kRows = kTileRows / kSide;
constexpr int kRowVectors = kSliceBytes / 16;
constexpr int kTokenVectors = kSliceValues / 16;

template <int kTileTokens, bool kGrouped>
__global__ void __launch_bounds__(kThreads)
    dp4a_tiles(const bitlinear_cuda_task task, const Activations activations, bool aligned) {
  constexpr int kTokens = kTileTokens / kSide;
  constexpr int kFetches = kTileTokens * kTokenVectors / kThreads;
  static_assert(kTileRows * kRowVectors == kThreads, "a thread fetches 16 packed bytes");
  // An odd number of 16-byte vectors in a row: eight rows side by side are in different banks.
  __shared__ uint4 w_tile[kTileRows][kRowVectors + 1];
  __shared__ uint4 q_tile[kTileTokens][kTokenVectors + 1];

  const int tiles = row_tiles<kTileRows>(task);
  const int64_t n_begin = row_of_tile<kTileRows>(task, static_cast<int>(blockIdx.x) % tiles);
  const int64_t n_end = weight_at(task, n_begin).end;
  const int64_t m_begin = int64_t{static_cast<int>(blockIdx.x) / tiles} * kTileTokens;
  const int64_t row_bytes = ceil_div<int64_t>(task.K, 4);
  const int64_t slices = ceil_div<int64_t>(row_bytes, kSliceBytes);
  allow_successor();
  wait_for_predecessor();

  // The part of every slice that this thread fetches. Rows and tokens beyond the last one are
  // zeros.
  const int row = threadIdx.x / kRowVectors, row_vector = threadIdx.x % kRowVectors;
  const uint8_t* const w = weight_row(task, n_begin, row_bytes) + row * row_bytes;
  const auto fetch_w = [&](int64_t slice) {
    if (n_begin + row >= n_end) return make_uint4(0, 0, 0, 0);
    return load_packed(w, slice * kSliceBytes + 16 * row_vector, row_bytes, aligned);
  };
  const int token = threadIdx.x / kTokenVectors, token_vector = threadIdx.x % kTokenVectors;
  const auto fetch_q = [&](int64_t slice, int i) {
    const int64_t m = m_begin + token + i * (kThreads / kTokenVectors);
    if (m >= task.M) return make_uint4(0, 0, 0, 0);
    const int8_t* block = activations.q + m * activations.q_stride + slice * kSliceValues;
    return reinterpret_cast<const uint4*>(block)[token_vector];
  };

  const int n = threadIdx.x % kSide, m = threadIdx.x / kSide;
  Sum<kGrouped> sums[kTokens][kRows] = {};
  uint4 next_w = fetch_w(0);
  uint4 next_q[kFetches];
#pragma unroll
  for (int i = 0; i < kFetches; ++i) next_q[i] = fetch_q(0, i);
  for (int64_t slice = 0; slice < slices; ++slice) {
    w_tile[row][row_vector] = next_w;
#pragma unroll
    for (int i = 0; i < kFetches; ++i) {
      q_tile[token + i * (kThreads / kTokenVectors)][token_vector] = next_q[i];
    }
    __syncthreads();
    // Loads of the next slice overlap the products of this one.
    if (slice + 1 < slices) {
      next_w = fetch_w(slice + 1);
#pragma unroll
      for (int i = 0; i < kFetches; ++i) next_q[i] = fetch_q(slice + 1, i);
    }
#pragma unroll 1
    for (int v = 0; v < kRowVectors; ++v) {
      uint4 packed[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) packed[r] = w_tile[n + kSide * r][v];
      int2 multipliers[kRows] = {};
      if constexpr (kGrouped) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = minimum(n_begin + n + kSide * r, n_end - 1);
          multipliers[r] =
              load_multipliers(task.groups, multipliers_of(task, at), slice * kSliceBytes + 16 * v);
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        uint4 planes[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) planes[p] = q_tile[m + kSide * t][kRowVectors * p + v];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if constexpr (kGrouped) {
            add_products(packed[r], planes, multipliers[r], sums[t][r]);
          } else {
            add_products(packed[r], planes, sums[t][r]);
          }
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t out_m = m_begin + m + kSide * t, out_n = n_begin + n + kSide * r;
      // The second half of the warp has the odd rows of q.
      const Sum<kGrouped> next = shift_down(sums[t][r]);
      if (out_m >= task.M || out_n >= n_end) continue;
      if (task.act_bits == 8) {
        const Sum<kGrouped> codes[1] = {sums[t][r]};
        store(task, activations, out_m, out_n, codes);
      } else if (m % 2 == 0) {
        const Sum<kGrouped> codes[2] = {sums[t][r], next};
        store(task, activations, out_m, out_n, codes);
      }
    }
  }
}

template <bool kGrouped>
cudaError_t launch(const Call& call, const Activations& q) {
  const bitlinear_cuda_task& task = call.task;
  const bool aligned = weights_aligned(task);
  const auto make_config = [](int64_t blocks) {
    return LaunchConfig{dim3(static_cast<unsigned>(blocks)), kThreads};
  };
  if (task.M <= 4) {
    const LaunchConfig rows = make_config(ceil_div<int64_t>(task.N, kThreads / 32));
    return task.M == 1 ? launch_kernel<dp4a_gemv<1, kGrouped>>(rows, call, task, q, aligned)
                       : launch_kernel<dp4a_gemv<4, kGrouped>>(rows, call, task, q, aligned);
  }
  // One grid dimension, because y and z end at 65,535 blocks. x ends only where y would fit no
  // memory.
  const int tile_tokens = task.M <= 16 ? 16 : 64;
  const LaunchConfig tiles =
      make_config(row_tiles<kTileRows>(task) * ceil_div<int64_t>(task.M, tile_tokens));
  return tile_tokens == 16 ? launch_kernel<dp4a_tiles<16, kGrouped>>(tiles, call, task, q, aligned)
                           : launch_kernel<dp4a_tiles<64, kGrouped>>(tiles, call, task, q, aligned);
}

}  // namespace

cudaError_t dp4a(const Call& call, const Activations& q) {
  return call.task.groups.size > 0 ? launch<true>(call, q) : launch<false>(call, q);
}

}  // namespace cuda
}  // namespace bitlinear
