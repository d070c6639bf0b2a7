// y = epilogue(quantize(x) @ w^T) for layers of up to 1024 inputs (sm_80 and later), in one kernel.
// Every block quantises the tokens that it needs again: that costs less than a second kernel and
// the wait between the two.
//
// A block has a tile of rows and tokens. It copies the rows into shared memory before the
// predecessor in the stream has ended, then quantises the tokens into shared memory, both in the
// order of the fragments of mma.m16n8k32, and multiplies.
//
// Bound for few tokens: latency. 512 x 256 with M = 64 takes 2.1 us on an H100 (nn.Linear in bf16:
// 3.4). Of these, 1.2 pass between the end of one call and the first work of the next, as in the
// GEMV; then x comes from L2, is quantised, multiplied and written, one step after the other.
//
// Bound for many tokens: the products, 16 cycles of a quarter of a multiprocessor each, and the
// instructions of the quantiser, 340 for 32 lanes of 32 values. They take 2.0 and 0.3 us of the 5.1
// us of 512 x 256 with M = 4096 (bf16: 5.5). So the plan takes the smallest tiles that all
// multiprocessors can run at once: with twice the tokens in a tile, 512 x 512 with M = 64 takes 3.4
// instead of 2.7 us. Registers (no spills): 96 in tiles of 64 and 128 rows, 126 and 197 in tiles of
// 256 and 512. Two blocks per multiprocessor; one of the last tile.
//
// Tried, and slower: weights directly into registers; 16 warps; 3 blocks; twice as many lanes per
// token, which does not reduce the reductions and divisions; allow_successor() before the wait, as
// in the other kernels; the products of wgmma.cuh with 64 tokens in a block of 16 warps: 1024 x
// 1024 with M = 512 7.8 us on an H200, where the quantiser and wgmma take 6.0 and this kernel 6.4,
// because a multiprocessor quantises its 64 tokens in 3.1 us. Blocks of a cluster could share them.
#include "ampere.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 16;  // bytes that a thread copies or loads at a time
constexpr int kSliceGroups = kSliceValues / kGroup;
constexpr int kGroupsInRegisters = 2;  // groups of a token that a lane keeps
static_assert(kSmallLayerInputs == kGroupsInRegisters * kGroup * 32, "a warp has all of a token");

// A tile, divided among the warps along rows and tokens. A warp has kRowParts parts of 16 rows
// times kTokenParts parts of 8 tokens.
template <int kRowWarps_, int kRowParts_, int kTokenParts_>
struct Tile {
  static constexpr int kRowWarps = kRowWarps_, kRowParts = kRowParts_, kTokenParts = kTokenParts_;
  static constexpr int kRows = 16 * kRowParts * kRowWarps;
  static constexpr int kTokens = 8 * kTokenParts * (kWarps / kRowWarps);
  static constexpr int kPitch = small_layer_sum_pitch(kRows);
  static constexpr int kBlocks = kRowParts == 4 ? 1 : 2;  // of a multiprocessor
};

// The offset of a plane of a slice of a token of the tile, as in Layout::kFragments.
__device__ inline int plane_offset(int token, int slices, int slice, int plane) {
  return ((token / 8 * slices + slice) * 4 + plane) * 512 + token % 8 * 64;
}

// Quantises the tile's tokens, each to kTokenRows rows of q. Enough lanes share a token for each to
// keep its part in registers between the maximum and the rounding.
template <int kTokenRows, class X>
__device__ inline void quantize_tokens(const bitlinear_cuda_task& task, const X* x, int tokens,
                                       int8_t* q, uint32_t* absmaxes, int32_t* q_sum) {
  const int K = static_cast<int>(task.K);
  const int slices = ceil_div(K, kSliceValues);
  const int log_lanes = K <= 64 ? 1 : K <= 128 ? 2 : K <= 256 ? 3 : K <= 512 ? 4 : 5;
  const int lanes = 1 << log_lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int step = kThreads >> log_lanes;  // tokens at a time
  int token = static_cast<int>(threadIdx.x) >> log_lanes;
  int first = static_cast<int>(threadIdx.x & ~31u) >> log_lanes;  // of the warp

  // Beyond the last token the last one is read again, and its results are dropped. Beyond K the
  // last values are read again; the weights there are 0.
  Group<X> next[kGroupsInRegisters];
  const auto load = [&]() {
    const X* const row = x + int64_t{minimum(token, tokens - 1)} * K;
#pragma unroll
    for (int i = 0; i < kGroupsInRegisters; ++i) {
      next[i].load(row + minimum((lane + i * lanes) * kGroup, K - kGroup));
    }
  };
  constexpr bool kPrefetchNext =
      sizeof(X) == 2;  // this token and the next one fit the registers together
  if (first < tokens) load();
#pragma unroll 1
  while (first < tokens) {
    Group<X> groups[kGroupsInRegisters];
#pragma unroll
    for (int i = 0; i < kGroupsInRegisters; ++i) groups[i] = next[i];
    const int current = token;
    // A tile has room for the tokens of a warp, but not for twice as many rows.
    const bool has_room = kTokenRows == 1 || current < tokens;
    token += step;
    first += step;
    if (kPrefetchNext && first < tokens) load();

    uint32_t absmax = 0;
#pragma unroll
    for (const Group<X>& group : groups) absmax = max(absmax, group.magnitude_bits());
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      if (mask < lanes) absmax = max(absmax, __shfl_xor_sync(~0u, absmax, mask));
    }
    const TokenScale<kTokenRows> scale(absmax, task.eps);
    int32_t sums[kTokenRows] = {};
#pragma unroll
    for (int i = 0; i < kGroupsInRegisters; ++i) {
      const int group = lane + i * lanes;
      float values[kGroup];
      groups[i].convert(values);
      uint32_t planes[kTokenRows][4];
      int32_t group_sums[kTokenRows] = {};
      quantize_group(values, scale.inv, planes, group_sums);
#pragma unroll
      for (int r = 0; r < kTokenRows; ++r) {
        if (group * kGroup < K) sums[r] += group_sums[r];
        if (has_room && (i == 0 || group < slices * kSliceGroups)) {
          int8_t* const word =
              q + plane_offset(current * kTokenRows + r, slices, group / kSliceGroups, 0);
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            *reinterpret_cast<uint32_t*>(word + 512 * p + group % kSliceGroups * 4) = planes[r][p];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        if (mask < lanes) sums[r] += __shfl_xor_sync(~0u, sums[r], mask);
      }
      if (has_room && lane == 0) {
        absmaxes[current * kTokenRows + r] = absmax;
        q_sum[current * kTokenRows + r] = sums[r];
      }
    }
    if (!kPrefetchNext && first < tokens) load();
  }
}

// kIsPlain: for what is_plain_product() says. It has half the code, which a block fetches in 0.2
// us.
template <class T, bool kIsPlain>
__global__ void __launch_bounds__(kThreads, T::kBlocks)
    small_layer_kernel(const __grid_constant__ bitlinear_cuda_task task) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint32_t absmaxes[T::kTokens];
  __shared__ float s_x[T::kTokens];
  __shared__ int32_t q_sum[T::kTokens];
  static_assert(3 * sizeof(s_x) <= kSmallLayerStaticBytes, "see heuristics.h");

  const int row_tiles = static_cast<int>(ceil_div<int64_t>(task.N, T::kRows));  // of one weight
  const int64_t n = int64_t{static_cast<int>(blockIdx.x) % row_tiles} * T::kRows;
  const int64_t m = int64_t{static_cast<int>(blockIdx.x) / row_tiles} * T::kTokens;
  const int tokens = static_cast<int>(minimum<int64_t>(T::kTokens, task.M - m));
  const int row_bytes = static_cast<int>((task.K + 3) / 4);
  const int slices = ceil_div(row_bytes, kSliceBytes), pitch = row_pitch(row_bytes);
  uint8_t* const w = dynamic;
  int8_t* const q = reinterpret_cast<int8_t*>(dynamic + T::kRows * pitch);

  constexpr int kCopiers = kSliceBytes / kChunk;  // of a row
#pragma unroll 1
  for (int row = threadIdx.x / kCopiers; row < T::kRows; row += kThreads / kCopiers) {
    // Rows beyond the last one are computed from it, and not stored.
    const uint8_t* const source = task.weights[0].w + minimum(n + row, task.N - 1) * row_bytes;
    const int chunk = threadIdx.x % kCopiers * kChunk;
#pragma unroll 1
    for (int offset = chunk; offset < slices * kSliceBytes; offset += kSliceBytes) {
      copy_async(w + row * pitch + offset, source + offset, offset < row_bytes);
    }
  }
  commit_copies();
  // In this order, because waiting blocks of several kernels would fill some multiprocessors and
  // slow each other down.
  wait_for_predecessor();
  allow_successor();

  with_token_rows<kIsPlain>(task, [&](auto token_rows) {
    constexpr int kTokenRows = decltype(token_rows)::value;
    with_dtype(task.x_dtype, [&](auto zero) {
      const auto* const x = static_cast<const decltype(zero)*>(task.x) + m / kTokenRows * task.K;
      quantize_tokens<kTokenRows>(task, x, tokens / kTokenRows, q, absmaxes, q_sum);
    });
  });
  const bitlinear_cuda_weight& weight = task.weights[0];
  const TileRows<T::kRows, kThreads> rows(weight, n, static_cast<int>(threadIdx.x));
  wait_for_copies<0>();
  __syncthreads();

  if (threadIdx.x < tokens) {
    const uint32_t absmax = absmaxes[threadIdx.x];
    s_x[threadIdx.x] = kIsPlain || task.act_bits == 8 ? TokenScale<1>(absmax, task.eps).s_x
                                                      : TokenScale<2>(absmax, task.eps).s_x;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, tig = lane % 4;
  const int first_row = warp % T::kRowWarps * (16 * T::kRowParts);
  const int first_token = warp / T::kRowWarps * (8 * T::kTokenParts);
  int32_t sums[T::kRowParts][T::kTokenParts][4] = {};
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    uint4 low[T::kRowParts], high[T::kRowParts];
#pragma unroll
    for (int r = 0; r < T::kRowParts; ++r) {
      const uint8_t* const packed =
          w + (first_row + 16 * r + g) * pitch + slice * kSliceBytes + kChunk * tig;
      low[r] = *reinterpret_cast<const uint4*>(packed);
      high[r] = *reinterpret_cast<const uint4*>(packed + 8 * pitch);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const auto code = [&](uint32_t word) { return word >> 2 * p & 0x03030303u; };
      uint4 b[T::kTokenParts];
#pragma unroll
      for (int t = 0; t < T::kTokenParts; ++t) {
        const int8_t* const plane = q + plane_offset(first_token + 8 * t, slices, slice, p);
        b[t] = *reinterpret_cast<const uint4*>(plane + kChunk * lane);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < T::kRowParts; ++r) {
          const uint4 &l = low[r], &h = high[r];
          const uint32_t a[4] = {code(half ? l.z : l.x), code(half ? h.z : h.x),
                                 code(half ? l.w : l.y), code(half ? h.w : h.y)};
#pragma unroll
          for (int t = 0; t < T::kTokenParts; ++t) {
            mma_u8s8(sums[r][t], a[0], a[1], a[2], a[3], half ? b[t].z : b[t].x,
                     half ? b[t].w : b[t].y);
          }
        }
      }
    }
  }

  __syncthreads();  // the sums overwrite the operands
  int32_t* const codes = reinterpret_cast<int32_t*>(dynamic);
  store_sums<T::kPitch>(codes + (first_token + 2 * tig) * T::kPitch + first_row + g, sums);
  __syncthreads();
  constexpr int kTokensOfThread = T::kTokens * T::kRows / 4 / kThreads;
  constexpr int kBatch = kTokensOfThread < 4 ? kTokensOfThread : 4;
  const auto load_codes = [&](int token, int row) {
    return *reinterpret_cast<const int4*>(codes + token * T::kPitch + row);
  };
  write_tile<kBatch, kIsPlain>(task, weight, rows, m, {0, 1, tokens}, s_x, q_sum, load_codes);
}

template <class T>
cudaError_t launch(const Call& call, const SmallLayerPlan& plan) {
  const Shape shape = {call.task.M, call.task.N, call.task.K, true, true};
  const LaunchConfig config = {dim3(static_cast<unsigned>(small_layer_blocks(plan, shape))),
                               kThreads, static_cast<int>(small_layer_bytes(plan, shape.K))};
  return is_plain_product(call.task)
             ? launch_kernel<small_layer_kernel<T, true>>(config, call, call.task)
             : launch_kernel<small_layer_kernel<T, false>>(config, call, call.task);
}

}  // namespace

cudaError_t small_layer(const Call& call, const SmallLayerPlan& plan) {
  const auto matches = [&](int rows, int tokens) {
    return plan.rows == rows && plan.tokens == tokens;
  };
  if (matches(64, 16)) return launch<Tile<4, 1, 1>>(call, plan);
  if (matches(64, 32)) return launch<Tile<4, 1, 2>>(call, plan);
  if (matches(128, 16)) return launch<Tile<8, 1, 2>>(call, plan);
  if (matches(128, 32)) return launch<Tile<8, 1, 4>>(call, plan);
  if (matches(256, 32)) return launch<Tile<8, 2, 4>>(call, plan);
  if (matches(512, 32)) return launch<Tile<8, 4, 4>>(call, plan);
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace bitlinear
