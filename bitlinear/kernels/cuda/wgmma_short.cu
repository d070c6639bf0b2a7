// y = epilogue(q @ w^T) for up to 1024 inputs and many tokens on sm_90a: weights are decoded into
// shared memory while the quantiser, the kernel before this one in the stream, still runs.
//
// It serves a single weight without a residual and tokens of 8 bits. A block has one tile and four
// warpgroups, which first decode all weights of the tile to bytes. When the quantiser has ended,
// one thread copies all tokens of the tile, and each warpgroup multiplies 64 rows by 64 tokens:
// over all of K, or over a part of it if the tile has fewer than four such squares. The sums of the
// parts are added when y is written.
//
// 64 registers for a thread, of which there are 512, leave half of the registers to blocks of the
// quantiser on the same multiprocessor, so each of the two kernels starts while the other one runs.
//
// Bound: 1024 x 1024 with M = 512 is 1.1 G operations, 0.6 us at the peak of an H100; its 128 tiles
// read 8.4 MB of activations from L2, 1.5 us at 5.5 TB/s. In a graph of 64 calls, which share x and
// y, it takes 5.25 us on an H200 (6.05 in tiles of wgmma.cu), and 6.25 with M = 1024 (7.3). Of the
// 5.25 us 1.9 pass in the quantiser, 0.4 until this kernel may read its results, 1.0 until the
// first tokens are in shared memory, 0.4 in the products, 0.4 with the sums, 0.6 while y is
// written, and the rest until the next quantiser may begin. An instruction of wgmma takes 32 cycles
// with both operands in shared memory, and 60 to 100 with one in registers.
//
// Tried: to load the weights before the wait and to decode them after it (5.8 us); tokens copied to
// both blocks of a cluster of two (as fast with M = 512, 0.1 us slower with 1024); tiles of 64 rows
// and 128 tokens (0.1 us slower).
#include "wgmma.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kHalfBytes = kSliceValues / 2;  // of half a slice of a row or a token

template <int kRowParts_, int kTokenParts_>
struct ShortTile {
  static constexpr int kRowParts = kRowParts_, kTokenParts = kTokenParts_;
  static constexpr int kRows = 64 * kRowParts, kTokens = 64 * kTokenParts;
  static constexpr int kSplits = 4 / (kRowParts * kTokenParts);  // warpgroups that share K
  static constexpr int kThreads = 4 * 128;
  static constexpr int kSums = kRows * kTokens;
};

// Stores the weights of a tile in the order in which the quantiser stores tokens: half slices of
// rows of 128 bytes, which are two planes, in the swizzle of wgmma.
template <class T>
__device__ inline void decode_rows(const bitlinear_cuda_task& task, int64_t n, int slices,
                                   uint8_t* codes) {
  // A thread decodes a part of a row, in every kStep-th slice: of 64 bytes every fourth word, which
  // become 16 bytes of each plane.
  constexpr int kStep = T::kThreads / 4 / T::kRows, kMost = kShortInputs / kSliceValues / kStep;
  const int part = threadIdx.x % 4, row = threadIdx.x / 4 % T::kRows;
  const int first = threadIdx.x / 4 / T::kRows;
  const int row_bytes = static_cast<int>((task.K + 3) / 4);
  // Rows beyond the last one are computed from it, and not stored.
  const uint8_t* const packed = task.weights[0].w + minimum(n + row, task.N - 1) * row_bytes;
  uint32_t words[kMost][4];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int offset = (first + i * kStep) * kSliceBytes + 16 * j + 4 * part;
      words[i][j] = offset < row_bytes ? *reinterpret_cast<const uint32_t*>(packed + offset) : 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int slice = first + i * kStep;
    if (slice >= slices) break;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int plane = step ^ (row & 1);  // odd rows in another order, against bank conflicts
      const auto code = [&](int j) { return words[i][j] >> 2 * plane & 0x03030303u; };
      uint8_t* const out = codes + ((2 * slice + step / 2) * T::kRows + row) * kHalfBytes;
      *reinterpret_cast<uint4*>(out + ((plane % 2 * 4 + part) ^ row % 8) * 16) =
          make_uint4(code(0), code(1), code(2), code(3));
    }
  }
}

// Launched with 512 threads. The bound of 1024 makes the compiler keep to 64 registers.
template <class T>
__global__ void __launch_bounds__(1024)
    wgmma_short_kernel(const __grid_constant__ bitlinear_cuda_task task,
                       const __grid_constant__ Activations activations) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  __shared__ Barrier full[kShortInputs / kHalfBytes];
  __shared__ float s_x[T::kTokens];
  __shared__ int32_t q_sum[T::kTokens];
  static_assert(sizeof(full) + sizeof(s_x) + sizeof(q_sum) <= kShortStaticBytes,
                "see heuristics.h");
  uint8_t* const codes = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;

  const int row_tiles = static_cast<int>(ceil_div<int64_t>(task.N, T::kRows));
  const int64_t n = int64_t{static_cast<int>(blockIdx.x) % row_tiles} * T::kRows;
  const int64_t m = int64_t{static_cast<int>(blockIdx.x) / row_tiles} * T::kTokens;
  const int slices = static_cast<int>(ceil_div<int64_t>(task.K, kSliceValues));
  const int halves = 2 * slices;
  uint8_t* const q = codes + halves * T::kRows * kHalfBytes;

  if (threadIdx.x == 0) {
    for (Barrier& barrier : full) barrier.init(1);
    publish_barriers();
  }
  allow_successor();
  decode_rows<T>(task, n, slices, codes);
  publish_to_async_proxy();
  __syncthreads();
  wait_for_predecessor();

  if (threadIdx.x == 0) {
    constexpr int kBytes = T::kTokens * kHalfBytes;
    for (int half = 0; half < halves; ++half) {
      full[half].arrive_expecting(kBytes);
      copy_bulk(q + half * kBytes,
                activations.q + (int64_t{half} * activations.token_groups + m / 8) * 1024, kBytes,
                full[half]);
    }
  }
  // Scale and sum of one token, for the end.
  const int64_t token = minimum(m + threadIdx.x % T::kTokens, task.M - 1);
  const float token_scale = activations.s_x[token];
  const int32_t token_sum = activations.q_sum[token];
  const TileRows<T::kRows, T::kThreads> rows(task.weights[0], n, static_cast<int>(threadIdx.x));

  // The same in all lanes, which the compiler must know.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int row_part = group % T::kRowParts;
  const int token_part = group / T::kRowParts % T::kTokenParts;
  const int split = group / (T::kRowParts * T::kTokenParts);
  const int begin = halves * split / T::kSplits, end = halves * (split + 1) / T::kSplits;
  int32_t sums[32];
  int half = begin;
  do {
    const uint32_t a = shared_address(codes + (half * T::kRows + 64 * row_part) * kHalfBytes);
    const uint32_t b = shared_address(q + (half * T::kTokens + 64 * token_part) * kHalfBytes);
    full[half].wait(0);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      Wgmma<64>::run(sums, make_descriptor(a + 32 * step), make_descriptor(b + 32 * step),
                     half > begin || step > 0);
    }
    wgmma_commit();
  } while (++half < end);
  wgmma_wait<0>();
  __syncthreads();  // the sums overwrite the operands

  int32_t* const sums_out = reinterpret_cast<int32_t*>(codes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int first_row = 64 * row_part + 16 * warp + lane / 4;
  const int first_token = 64 * token_part + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int at =
        index_of_sum<T::kRows>(first_token + i / 4 * 8 + i % 2, first_row + i % 4 / 2 * 8);
    sums_out[split * T::kSums + at] = sums[i];
  }
  if (threadIdx.x < T::kTokens) {
    s_x[threadIdx.x] = token_scale;
    q_sum[threadIdx.x] = token_sum;
  }
  __syncthreads();

  const auto load_sums = [&](int token, int row) {
    const int32_t* const first = sums_out + index_of_sum<T::kRows>(token, row);
    int4 sum = *reinterpret_cast<const int4*>(first);
#pragma unroll
    for (int s = 1; s < T::kSplits; ++s) {
      sum = add(sum, *reinterpret_cast<const int4*>(first + s * T::kSums));
    }
    return sum;
  };
  const int tokens = static_cast<int>(minimum<int64_t>(task.M - m, T::kTokens));
  write_tile<2, true>(task, task.weights[0], rows, m, {0, 1, tokens}, s_x, q_sum, load_sums);
#endif
}

template <class T>
cudaError_t launch_short(const Call& call, const Activations& q) {
  const bitlinear_cuda_task& task = call.task;
  LaunchConfig config = {dim3(static_cast<unsigned>(ceil_div<int64_t>(task.N, T::kRows) *
                                                    ceil_div<int64_t>(task.M, T::kTokens))),
                         T::kThreads, static_cast<int>(short_bytes(T::kRows, T::kTokens, task.K))};
  config.prefers_shared = true;
  return launch_kernel<wgmma_short_kernel<T>>(config, call, task, q);
}

}  // namespace

bool wgmma_short_serves(const bitlinear_cuda_task& task) {
  return is_plain_product(task) && task.groups.size == 0;
}

cudaError_t wgmma_short(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  if (plan.rows == 64) return launch_short<ShortTile<1, 1>>(call, q);
  return plan.tokens == 64 ? launch_short<ShortTile<2, 1>>(call, q)
                           : launch_short<ShortTile<2, 2>>(call, q);
}

}  // namespace cuda
}  // namespace bitlinear
