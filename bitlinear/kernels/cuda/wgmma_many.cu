// y = epilogue(q @ w^T) for very many tokens: tiles of wgmma.cuh whose consumers write y
// themselves.
//
// It serves a single weight without a residual, tokens of 8 bits and values of y of 16 bits. Four
// warpgroups have 64 rows each. They scale their sums in registers and store the rounded values as
// matrices of 8 x 8, which stmatrix transposes to the order of y. The copy engine brings them from
// shared memory to y while the next tile is multiplied. A warp of the producer fetches the scales
// of a tile.
//
// Bound: the tensor cores, or the L2 cache if rows are short. 2048 x 768 with M = 16384 is 52 G
// operations, 26 us at the peak of an H100; its 1024 tiles move 208 KB each between L2 and
// multiprocessors (96 of activations, 48 of weights, 64 of y), 39 us at 5.5 TB/s. It takes 55 us
// with the weights' new order, where tiles of wgmma.cu took 82. In the same order: 768 x 768 24 and
// 31 us, 2048 x 2048 96 and 115, 5632 x 2048 258 and 303.
//
// Why it is faster: products read and write their sums in registers, and take turns with other
// instructions. There, 900 instructions of each scheduler bring the sums of a tile to shared memory
// and 2900 write y from them, and meanwhile products take 1.6 times as long. Here 1600 do both.
//
// A last round of tiles that at most half of the multiprocessors would have is computed in halves
// of 64 tokens, in 0.8 of the time: 2560 x 2560 with M = 4096, 320 tiles on the 132 of an H200,
// takes 51.8 us instead of 55.4, 13824 x 2560 with M = 1024 59.4 instead of 62.1. Two halves of 128
// rows, whose warpgroups share K, save nothing: they read all tokens of the tile twice.
//
// Tried, and slower: a copy for each token (71 us for 2048 x 768); consumers that load the scales,
// because they then wait for these when they need weights (61 us); pairs of warpgroups that lag by
// a slice, so that one scales while the other multiplies (58 us; a copy of y and the loads of the
// next tile already share L2's bandwidth); weights two and three slices ahead (55 and 68 us). Two
// warpgroups of 128 rows take 56 us.
#include "wgmma.cuh"

namespace bitlinear {
namespace cuda {
namespace {

// A tile of 256 rows, by four warpgroups that multiply and one that copies.
template <int kTileTokens>
struct ManyTile : Tile<4, 1, kTileTokens, false> {
  using Base = Tile<4, 1, kTileTokens, false>;
  static constexpr int kPrefetched = 1, kDepth = 2, kAccumulatorSets = 1;
  static constexpr int kLastTokens = kTileTokens == 128 ? 64 : kTileTokens;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 112;
  // Of y, in shared memory: the 64 rows of a warpgroup, token by token.
  static constexpr int kGroupBytes = 128 * kTileTokens;
  static constexpr int kStageBudget = 220 * 1024 - 4 * kGroupBytes;
  static constexpr int kStages = kStageBudget / Base::kStageBytes;
  static constexpr int kSharedBytes = kStages * Base::kStageBytes + 4 * kGroupBytes + 1024;
};

__device__ inline void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

// Stores four matrices of 8 x 8 values of 16 bits, transposed. Each lane has the address of a row:
// lanes 0 to 7 have the rows of the first matrix.
__device__ inline void store_transposed(uint32_t address, const uint32_t (&matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

// Copies a tile out of shared memory, to column x and row y of the map on. What lies outside the
// map is not written.
__device__ inline void copy_tile_out(const CUtensorMap& map, int x, int y, const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
          &map),
      "r"(x), "r"(y), "r"(shared_address(shared))
      : "memory");
}
__device__ inline void commit_copies_out() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until this thread's copies have read shared memory.
__device__ inline void wait_for_copies_out() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

template <class Y>
__device__ inline uint32_t round_pair(float first, float second) {
  const Y pair[2] = {from_float<Y>(first), from_float<Y>(second)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// What the end of a tile needs. One warp fetches it, because a consumer would wait for these loads
// when it needs weights.
template <class T>
struct Scales {
  alignas(8) float s_x[T::kTokens];
  alignas(8) int32_t q_sum[T::kTokens];
  float s_w[T::kRows], bias[T::kRows];

  __device__ void fetch(const bitlinear_cuda_task& task, const Activations& activations, int64_t m,
                        int64_t n) {
    const int lane = threadIdx.x % 32;
    const bitlinear_cuda_weight& weight = task.weights[0];
#pragma unroll
    for (int i = lane; i < T::kTokens; i += 32) {
      const int64_t token = minimum(m + i, task.M - 1);
      s_x[i] = activations.s_x[token];
      q_sum[i] = activations.q_sum[token];
    }
#pragma unroll 2
    for (int i = lane; i < T::kRows; i += 32) {
      const RowScale row(weight, minimum(n + i, task.N - 1));
      s_w[i] = row.s_w;
      bias[i] = row.bias(weight);
    }
  }
};

// Scales a warpgroup's sums, and stores them as values of y from `out` on.
template <class T, class Y, int kTokens>
__device__ inline void store_values(const Sums<T, kTokens>& sums, const Scales<T>& scales,
                                    int first_row, uint8_t* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, pair = 2 * (lane % 4);
  // This lane's row of a matrix: token lane % 8 of the first or second 8 tokens, and rows 0 to 7 or
  // 8 to 15 of the warp. The swizzle of the copy: 16 bytes at a time, exclusive or with the token.
  const int chunk = (2 * warp + lane / 8 % 2) ^ lane % 8;
  const uint32_t address = shared_address(out) + (lane / 16 * 8 + lane % 8) * 128 + chunk * 16;
  const float s_w[] = {scales.s_w[first_row], scales.s_w[first_row + 8]};
  const float bias[] = {scales.bias[first_row], scales.bias[first_row + 8]};
#pragma unroll
  for (int first = 0; first < kTokens; first += 16) {
    uint32_t matrices[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows 0 to 7, 8 to 15, and the same of the next 8 tokens
      const int token = first + i / 2 * 8 + pair, half = i % 2;
      const float2 s = *reinterpret_cast<const float2*>(scales.s_x + token);
      const int2 q = *reinterpret_cast<const int2*>(scales.q_sum + token);
      const int32_t* const two = sums[0] + first / 2 + 2 * i;
      const float a = dequantize({two[0]}, &q.x, s.x, s_w[half]);
      const float b = dequantize({two[1]}, &q.y, s.y, s_w[half]);
      matrices[i] = round_pair<Y>(__fadd_rn(a, bias[half]), __fadd_rn(b, bias[half]));
    }
    store_transposed(address + first * 128, matrices);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    wgmma_many_kernel(const __grid_constant__ bitlinear_cuda_task task,
                      const __grid_constant__ Activations activations,
                      const __grid_constant__ CUtensorMap in_order,
                      const __grid_constant__ CUtensorMap y) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  __shared__ Barrier full[T::kStages], empty[T::kStages], scales_full, scales_empty;
  __shared__ Scales<T> scales;
  uint8_t* const stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
  const Share<T> share(task, 1);

  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      full[s].init(1);
      empty[s].init(T::kConsumers / 32);
    }
    scales_full.init(32);
    scales_empty.init(T::kConsumers);
    publish_barriers();
  }
  __syncthreads();
  allow_successor();
  if (threadIdx.x >= T::kConsumers) {
    shrink_registers<T::kProducerRegisters>();
    wait_for_predecessor();
    if (threadIdx.x == T::kConsumers) {
      copy_tokens<T>(share, activations, in_order, stages, full, empty);
    } else if (threadIdx.x / 32 == T::kConsumers / 32 + 1) {
      uint32_t parity = 1;
      for (int tile = share.first_tile; tile < share.tiles; tile += share.step, parity ^= 1) {
        scales_empty.wait(parity);
        scales.fetch(task, activations, share.token_of(tile), share.row_of(tile));
        scales_full.arrive();
      }
    }
    return;
  }

  grow_registers<T::kConsumerRegisters>();
  const int group = static_cast<int>(threadIdx.x) / 128, thread = threadIdx.x % 128;
  uint8_t* const out = stages + T::kStages * T::kStageBytes + group * T::kGroupBytes;
  WeightReader<T> reader(task, share);
  Weights<T> prefetched[] = {reader.read()};
  wait_for_predecessor();

  RingPosition ring(T::kStages);
  uint32_t parity = 0;
  const auto compute = [&](int tile, auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    Sums<T, kTokens> sums = {};
    multiply<T, kTokens>(share, reader, prefetched, stages, full, empty, ring, sums);
    ring.advance(share.slice_end);

    wait_for_copies_out();  // of the previous tile
    sync_warpgroup(group);
    scales_full.wait(parity);
    if (task.y_dtype == BITLINEAR_F16) {
      store_values<T, __half, kTokens>(sums, scales, reader.first_row(), out);
    } else {
      store_values<T, __nv_bfloat16, kTokens>(sums, scales, reader.first_row(), out);
    }
    scales_empty.arrive();
    publish_to_async_proxy();
    sync_warpgroup(group);
    if (thread == 0) {
      const int m = static_cast<int>(share.token_of(tile));
      const int n = static_cast<int>(share.row_of(tile)) + group * 64;
      for (int first = 0; first < kTokens; first += T::kLastTokens) {
        copy_tile_out(y, n, m + first, out + first * 128);
      }
      commit_copies_out();
    }
  };
  int tile = share.first_tile;
#pragma unroll 1
  for (; tile < share.tiles && !share.is_half(tile); tile += share.step, parity ^= 1) {
    compute(tile, std::integral_constant<int, T::kTokens>{});
  }
  if (T::kLastTokens < T::kTokens && tile < share.tiles) {
    compute(tile, std::integral_constant<int, T::kLastTokens>{});
  }
  wait_for_copies_out();  // shared memory ends with the block
#endif
}

template <class T>
cudaError_t launch_many(const Call& call, const Activations& activations) {
  const bitlinear_cuda_task& task = call.task;
  const int64_t tiles = ceil_div<int64_t>(task.N, T::kRows) * ceil_div<int64_t>(task.M, T::kTokens);
  Activations q = activations;
  CUtensorMap in_order, y;
  cudaError_t error = map_tokens(task, T::kTokens, &q, &in_order);
  if (error != cudaSuccess) return error;
  error = map_matrix(CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, task.y, task.M, task.N, T::kLastTokens, &y);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(minimum<int64_t>(tiles, call.device.multiprocessors));
  const LaunchConfig config = {dim3(blocks), T::kThreads, T::kSharedBytes};
  return launch_kernel<wgmma_many_kernel<T>>(config, call, task, q, in_order, y);
}

}  // namespace

bool wgmma_many_serves(const bitlinear_cuda_task& task) {
  // N: the copy engine writes rows that start at multiples of 16 bytes.
  return is_plain_product(task) && task.groups.size == 0 && task.y_dtype != BITLINEAR_F32 &&
         task.N % 8 == 0;
}

cudaError_t wgmma_many(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  return plan.tokens == 96 ? launch_many<ManyTile<96>>(call, q)
                           : launch_many<ManyTile<128>>(call, q);
}

}  // namespace cuda
}  // namespace bitlinear
