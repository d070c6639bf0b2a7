// y = epilogue(q @ w^T) for up to 32 tokens (sm_90 and later), which quantize.cu has quantised.
//
// As in the GEMV, a block has a range of weight rows, and one warp copies them into a ring in
// shared memory before the predecessor in the stream has ended. Eight warps share K; each has all
// rows and tokens of a tile. So one warp loads each activation once per tile, through L2, and
// directly into registers, because the quantiser stores activations in the order of the fragments.
//
// Bound, for 16 tokens and 4096 x 4096 on an H100: each of 132 multiprocessors fetches all 64 KB of
// the activations, together 8.4 MB through L2, in 1.5 us. mma.m16n8k32 takes 16 cycles of a quarter
// of a multiprocessor, a quarter of what wgmma reaches, together 1.2 us. The quantiser takes 1.4 us
// before. The rest is latency: 5.1 us in all; the GEMV takes 3.05 for one token in the same run.
// 13824 x 2560 takes 6.5 us for 8 tokens and 7.9 for 16 (GEMV 4.3). 28672 x 8192 takes 26 and 30 us
// (22.4; reading the weights 20): there 16 tokens keep the tensor cores busy for 16 us. No spills;
// 96 registers if two blocks share a multiprocessor, up to 160 for one block.
//
// Tried, and slower: activations by bulk copies into shared memory, also by multicast to clusters;
// wgmma, which takes 50 cycles for 64 rows and any number of tokens up to 32; two slices of
// activations in flight instead of one; more than one warp that copies weights; the activations of
// the first tile kept in shared memory for the next ones; the loop of the GEMV for 5 to 8 quantised
// tokens (5.9 us instead of 4.2 for 2560 x 2560).
//
// Also tried: clusters of 2, 4 or 8 blocks that quantise an eighth of the tokens each, send q to
// each other's shared memory, and divide rows, K or both. 16 tokens of 2560 x 2560 took 5.8 us (the
// two kernels 4.4): 3000 cycles to fetch and quantise, 1700 until q has come from the other blocks,
// 1900 to multiply, 400 for the sums, 1300 to write y. A store that counts at a remote barrier
// (st.async) is one transaction each; a release or acquire at the scope of the cluster waits for
// all memory or empties L1; a bulk copy takes some 40 cycles to issue. At most 15 clusters of 8, or
// 30 of 4, run at a time.
#include "ampere.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarps = kSmallBatchWarps;  // that multiply; one more warp copies
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kPartRows = kSmallBatchStageRows;
constexpr int kChunkSlices = kChunkBytes / kSliceBytes;
static_assert(kChunkSlices % kWarps == 0, "a warp's slices are as far apart at the end of a chunk");

template <int kRowParts, int kTokenParts>
struct Tile {
  static constexpr int kRows = kPartRows * kRowParts;
  static constexpr int kTokens = 8 * kTokenParts;
  static constexpr int kPitch = small_batch_sum_pitch(kRowParts);
  static constexpr int kTokensOfThread = ceil_div(kTokens * kRows, kConsumers);  // at most
  // The large tiles need the registers.
  static constexpr int kBlocks = kTokenParts == 4 || kRowParts == 4 ? 1 : 2;
  // Planes with sums of their own, as in the GEMV: they spare shifts of fragments, and products
  // that wait for each other's sums. More tokens leave no registers for them.
  static constexpr int kPlaneSums = kTokenParts == 1 ? 4 : 1;
};

struct Shared {
  Barrier full[kSmallBatchStages], empty[kSmallBatchStages];
  float s_x[kSmallBatchTokens];
  int32_t q_sum[kSmallBatchTokens];
};
static_assert(sizeof(Shared) <= kSmallBatchStaticBytes, "see heuristics.h");

template <int kRowParts, int kTokenParts>
__global__ void __launch_bounds__(kThreads, (Tile<kRowParts, kTokenParts>::kBlocks))
    small_batch_kernel(const __grid_constant__ bitlinear_cuda_task task,
                       const __grid_constant__ Activations activations, int stages) {
#if __CUDA_ARCH__ >= 900
  using T = Tile<kRowParts, kTokenParts>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = static_cast<int>(task.M);
  const int row_bytes = static_cast<int>((task.K + 3) / 4);
  const int slices = ceil_div(row_bytes, kSliceBytes);
  const int chunks = ceil_div(row_bytes, kChunkBytes);
  const int pitch = row_pitch(row_bytes);
  const int stage_bytes = kPartRows * pitch;
  const int64_t n_begin = task.N * blockIdx.x / gridDim.x;
  const int rows = static_cast<int>(task.N * (blockIdx.x + 1) / gridDim.x - n_begin);
  const int tiles = ceil_div(rows, T::kRows);

  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < stages; ++s) {
      shared.full[s].init(1);
      shared.empty[s].init(kConsumers);
    }
    publish_barriers();
  }
  __syncthreads();
  allow_successor();

  RingPosition ring(stages);
  if (warp == kWarps) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int tile_end = minimum(rows, (tile + 1) * T::kRows);
      for (int begin = 0; begin < row_bytes; begin += kChunkBytes) {
        const int bytes = minimum(kChunkBytes, row_bytes - begin);
        for (int first = tile * T::kRows; first < tile_end; first += kPartRows, ring.advance()) {
          const int present = minimum(kPartRows, tile_end - first);
          Barrier& full = shared.full[ring.stage];
          if (lane == 0) {
            shared.empty[ring.stage].wait(ring.parity ^ 1);
            full.arrive_expecting(present * bytes);
          }
          __syncwarp();
          if (lane < present) {
            copy_bulk(dynamic + ring.stage * stage_bytes + lane * pitch,
                      weight_row(task, n_begin + first + lane, row_bytes) + begin, bytes, full);
          }
        }
      }
    }
    return;
  }

  wait_for_predecessor();
  const int g = lane / 4, tig = lane % 4;
  const int8_t* q[kTokenParts];
#pragma unroll
  for (int t = 0; t < kTokenParts; ++t) {
    // Columns beyond the last token repeat it, and are dropped.
    const int m = minimum(8 * t + g, tokens - 1);
    q[t] = activations.q + word_offset<Layout::kFragments>(activations, m, 0, 0, 4 * tig);
  }
  uint4 b[4][kTokenParts];  // of a slice, by plane
  const auto load_plane = [&](int slice, int p) {
#pragma unroll
    for (int t = 0; t < kTokenParts; ++t) {
      b[p][t] = *reinterpret_cast<const uint4*>(q[t] + (4 * slice + p) * 512);
    }
  };
  if (warp < slices) {
#pragma unroll
    for (int p = 0; p < 4; ++p) load_plane(warp, p);
  }
  if (threadIdx.x < tokens) {
    shared.s_x[threadIdx.x] = activations.s_x[threadIdx.x];
    shared.q_sum[threadIdx.x] = activations.q_sum[threadIdx.x];
  }

  int32_t* const partial = reinterpret_cast<int32_t*>(dynamic + stages * stage_bytes);
  const int row = threadIdx.x % T::kRows;  // that this thread writes
  for (int tile = 0; tile < tiles; ++tile) {
    const int left = rows - tile * T::kRows;
    const int64_t n = n_begin + tile * T::kRows + row;
    RowScale scale = {};
    uint32_t residual[T::kTokensOfThread];
    if (row < left) {
      const bitlinear_cuda_weight& weight = weight_at(task, n);
      scale = RowScale(weight, n - weight.begin);
      if (task.residual != nullptr) {
        const int step = token_rows_of(task);
#pragma unroll
        for (int i = 0; i < T::kTokensOfThread; ++i) {
          const int m = threadIdx.x / T::kRows + i * (kConsumers / T::kRows);
          if (m * step < tokens) {
            residual[i] = load_bits(task.residual, task.residual_dtype, m * task.N + n);
          }
        }
      }
    }

    const int parts = minimum(kRowParts, ceil_div(left, kPartRows));
    int32_t sums[T::kPlaneSums][kRowParts][kTokenParts][4] = {};
    int slice = warp;
    for (int c = 0; c < chunks; ++c) {
      const uint8_t* w[kRowParts];
      RingPosition ready = ring;
#pragma unroll
      for (int r = 0; r < kRowParts; ++r) {
        if (r < parts) {
          shared.full[ready.stage].wait(ready.parity);
          w[r] = dynamic + ready.stage * stage_bytes + g * pitch + 16 * tig;
          ready.advance();
        } else {
          w[r] = w[0];  // computed again, and dropped
        }
      }
      const int end = minimum(slices, (c + 1) * kChunkSlices);
#pragma unroll 1
      for (; slice < end; slice += kWarps) {
        const int offset = (slice - c * kChunkSlices) * kSliceBytes;
        uint4 low[kRowParts], high[kRowParts];
#pragma unroll
        for (int r = 0; r < kRowParts; ++r) {
          low[r] = *reinterpret_cast<const uint4*>(w[r] + offset);
          high[r] = *reinterpret_cast<const uint4*>(w[r] + offset + 8 * pitch);
        }
        const bool last = slice + kWarps >= slices;  // of the tile, for this warp
        const int next = last ? warp : slice + kWarps;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          constexpr uint32_t kCodes = 0x03030303u;
          const auto code = [&](uint32_t word) {
            return T::kPlaneSums == 4 ? word & kCodes << 2 * p : word >> 2 * p & kCodes;
          };
          auto& plane_sums = sums[T::kPlaneSums == 4 ? p : 0];
#pragma unroll
          for (int r = 0; r < kRowParts; ++r) {
#pragma unroll
            for (int t = 0; t < kTokenParts; ++t) {
              mma_u8s8(plane_sums[r][t], code(low[r].x), code(high[r].x), code(low[r].y),
                       code(high[r].y), b[p][t].x, b[p][t].y);
              mma_u8s8(plane_sums[r][t], code(low[r].z), code(high[r].z), code(low[r].w),
                       code(high[r].w), b[p][t].z, b[p][t].w);
            }
          }
          if (!last || tile + 1 < tiles) load_plane(next, p);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowParts; ++r) {
        if (r < parts) {
          shared.empty[ring.stage].arrive();
          ring.advance();
        }
      }
    }

#pragma unroll
    for (int p = 1; p < T::kPlaneSums; ++p) {
#pragma unroll
      for (int r = 0; r < kRowParts; ++r) {
#pragma unroll
        for (int t = 0; t < kTokenParts; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[0][r][t][i] += sums[p][r][t][i] >> 2 * p;
        }
      }
    }
    store_sums<T::kPitch>(partial + (warp * T::kTokens + 2 * tig) * T::kPitch + g, sums[0]);
    sync_leading_threads<kConsumers>();
    if (row < left) {
      const float bias = scale.bias(weight_at(task, n));
      with_token_rows(task, [&](auto token_rows) {
        constexpr int kTokenRows = decltype(token_rows)::value;
        with_dtype(task.y_dtype, [&](auto zero) {
          using Y = decltype(zero);
          const int first = threadIdx.x / T::kRows * kTokenRows;
#pragma unroll
          for (int i = 0; i < T::kTokensOfThread; ++i) {
            const int m = first + i * (kConsumers / T::kRows * kTokenRows);
            if (m >= tokens) break;
            int32_t codes[kTokenRows] = {};
#pragma unroll
            for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
              for (int v = 0; v < kWarps; ++v) {
                codes[r] += partial[(v * T::kTokens + m + r) * T::kPitch + row];
              }
            }
            float value = dequantize(codes, shared.q_sum + m, shared.s_x[m], scale.s_w);
            value = __fadd_rn(value, bias);
            if (task.residual != nullptr) {
              value = __fadd_rn(value, float_from_bits(residual[i], task.residual_dtype));
            }
            static_cast<Y*>(task.y)[m / kTokenRows * task.N + n] = from_float<Y>(value);
          }
        });
      });
    }
    if (tile + 1 < tiles) sync_leading_threads<kConsumers>();
  }
#endif
}

template <int kRowParts, int kTokenParts>
cudaError_t launch(const Call& call, const Activations& q, const SmallBatchPlan& plan) {
  const int64_t stage_bytes = small_batch_stage_bytes(ceil_div<int64_t>(call.task.K, 4));
  const int64_t shared_bytes =
      plan.stages * stage_bytes + small_batch_sum_bytes(kRowParts, kTokenParts);
  const LaunchConfig config = {dim3(static_cast<unsigned>(plan.blocks)), kThreads,
                               static_cast<int>(shared_bytes)};
  return launch_kernel<small_batch_kernel<kRowParts, kTokenParts>>(config, call, call.task, q,
                                                                   plan.stages);
}

}  // namespace

cudaError_t small_batch(const Call& call, const Activations& q, const SmallBatchPlan& plan) {
  switch (10 * plan.row_parts + plan.token_parts) {
    case 11:
      return launch<1, 1>(call, q, plan);
    case 12:
      return launch<1, 2>(call, q, plan);
    case 14:
      return launch<1, 4>(call, q, plan);
    case 21:
      return launch<2, 1>(call, q, plan);
    case 22:
      return launch<2, 2>(call, q, plan);
    case 24:
      return launch<2, 4>(call, q, plan);
    case 42:
      return launch<4, 2>(call, q, plan);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace bitlinear
