// y = epilogue(quantize(x) @ w^T) for up to 4 tokens (sm_90 and later): the kernel of decoding,
// bound by reading the weights and, for small layers, by latency.
//
// A block has a range of weight rows. One warp copies them into a ring of stages in shared memory,
// before the predecessor in the stream has ended; only the activations have to wait for it. Eight
// warps multiply. Lanes load packed bytes directly into the fragments of mma.m16n8k32: a packed
// byte masked by 0x03, 0x0C, 0x30 or 0xC0 is an unsigned weight code, 1, 4, 16 or 64 times too
// large, and the activations are stored in the order of k that results. So a fragment costs one AND
// per register, and each mask has its own accumulators, which are shifted at the end.
//
// Bound: reading the weights, at most 3.35 TB/s on an H100. Bound and measured time there, in us:
// 28672 x 8192 (59 MB) 17.5 and 22.7 (2.6 TB/s); 8192 x 8192 5.0 and 7.7; 4096 x 4096 1.3 and 2.9.
// Of these 2.9, 1.2 pass between the end of one call and the first work of the next; the rest
// fetches and quantises the token, multiplies 16 rows after the last weights have arrived, and sums
// over the warps. 95 registers, no spills, one or two blocks per multiprocessor: 13 or 27 % of the
// warps that it can hold. Under the profiler, where no predecessor hides the start, 28672 x 8192
// reads 2.1 TB/s (66 % of the peak) at 1.4 instructions per cycle.
//
// With a prologue every block computes it again, in registers: it is latency, not traffic. One
// token of 2560 takes 2.6 us without, 3.2 with an RMSNorm, and 2560 x 6912 3.4 us without, 7.0 with
// a gate: 45 instructions for each value of silu, and two groups of values in a thread. Three
// products of one input (2560, 640 and 640 rows) take 2.6 us as one launch and 8.2 as three.
//
// Tried, and slower: weights directly into registers; 16 warps; copies of 512 bytes of a row, or of
// whole tiles; only a prefetch into L2 before the predecessor ends.
#include "ampere.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "prologue.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarps = kGemvWarps;  // that multiply; one more warp copies
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kFragmentRows = 16;
constexpr int kMaxStages = 8;

struct Shared {
  Barrier full[kMaxStages], empty[kMaxStages];
  // Partial sums by warp of a split, token and row; double-buffered.
  int32_t partial[2][kWarps * kGemvTokens * (kFragmentRows + 4)];
  uint32_t warp_max[kWarps];
  float norm_sums[kGemvRegisterValues / kWarpValues];
  float s_x[kGemvTokens];
  int32_t q_sum[kGemvTokens];
};
static_assert(sizeof(Shared) <= kGemvStaticBytes, "see heuristics.h");
static_assert(kGemvRegisterValues == kGemvGroups * kGroup * kConsumers, "see heuristics.h");

__device__ inline void sync_consumers() { sync_leading_threads<kConsumers>(); }

// Derived sizes of a call.
struct Sizes {
  int row_bytes, chunk_bytes, chunks, pitch, q_stride;

  __host__ __device__ explicit Sizes(int64_t K)
      : row_bytes(static_cast<int>((K + 3) / 4)),
        chunk_bytes(minimum(row_bytes, kChunkBytes)),
        chunks(ceil_div(row_bytes, chunk_bytes)),
        pitch(row_pitch(row_bytes)),
        q_stride(ceil_div(row_bytes, kSliceBytes) * kSliceValues + kGemvTokenPad) {}
};

// The groups of a token that a thread quantises, at `first` and then every `step` values, all
// before `end`. `member` of `members` warps has them.
struct Part {
  int first, step, end, member, members;
};

// What the quantiser reads: x in its dtype.
template <class X>
struct PlainSource {
  static constexpr bool kFused = false;
  static constexpr int kGroups = kGemvGroups;
  using Values = Group<X>;

  static __device__ void load(const bitlinear_cuda_task& task, int m, const Part& part,
                              Values (&groups)[kGroups], float*) {
    const X* const x = static_cast<const X*>(task.x) + m * task.K;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) groups[i].load(x + part.first + i * part.step);
    }
  }
};

// The fp32 values of the prologue. A single group takes less code, which a kernel of a few
// microseconds has to fetch.
template <int kGroups_>
struct FusedSource {
  static constexpr bool kFused = true;
  static constexpr int kGroups = kGroups_;
  static_assert(kGroups <= kGemvPrologueGroups, "see heuristics.h");
  using Values = FloatGroup;

  // All consumers call this, also those without a token: they synchronise.
  static __device__ void load(const bitlinear_cuda_task& task, int m, const Part& part,
                              Values (&groups)[kGroups], float* norm_sums) {
    const bitlinear_prologue& prologue = task.prologue;
    const bool is_gate = prologue.activation != BITLINEAR_NO_GATE;
    const int64_t begin = (is_gate ? 2 * m : m) * task.K;  // of the token
    RawGroup a[kGroups], b[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int k = part.first + i * part.step;
      if (k < part.end) {
        a[i].load(task.x, task.x_dtype, begin + k);
        if (is_gate) b[i].load(task.x, task.x_dtype, begin + task.K + k);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      groups[i] = {};
      if (part.first + i * part.step < part.end) {
        groups[i] = apply_gate(prologue.activation, a[i], b[i], task.x_dtype);
      }
    }
    if (prologue.norm_weight == nullptr) return;
    RawGroup weights[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int k = part.first + i * part.step;
      if (k < part.end) weights[i].load(prologue.norm_weight, prologue.norm_dtype, k);
    }
    float* const sums = norm_sums + m * part.members * kGroups;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float sum = warp_sum_of_squares(groups[i]);
      if (threadIdx.x % 32 == 0) sums[i * part.members + part.member] = sum;
    }
    sync_consumers();
    const float factor = norm_factor<kGemvPrologueValues>(prologue, sums, task.K);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) {
        normalize(groups[i], weights[i], prologue.norm_dtype, factor);
      }
    }
  }
};

// Quantises all tokens at once, each to kTokenRows rows of q. Each token has its share of the
// warps, which keep the values in registers between the maximum and the rounding.
template <class Source, int kTokenRows>
__device__ inline void quantize_tokens(const bitlinear_cuda_task& task, int q_stride, int8_t* q,
                                       Shared& shared) {
  constexpr int kGroups = Source::kGroups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = static_cast<int>(task.M) / kTokenRows, K = static_cast<int>(task.K);
  const int log_share = tokens > 2 ? 1 : tokens > 1 ? 2 : 3;
  const int m = warp >> log_share, member = warp & ((1 << log_share) - 1);
  const int first = (member * 32 + lane) * kGroup;
  const int step = (32 << log_share) * kGroup;
  const int end = m < tokens ? K : 0;

  typename Source::Values groups[kGroups];
  Source::load(task, m, {first, step, end, member, 1 << log_share}, groups, shared.norm_sums);
  uint32_t absmax = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (first + i * step < end) absmax = max(absmax, groups[i].magnitude_bits());
  }
  absmax = warp_reduce_max(absmax);
  if (lane == 0) shared.warp_max[warp] = absmax;
  sync_consumers();

  if (m < tokens) {
    absmax = warp_reduce_max(shared.warp_max[(m << log_share) + (lane & ((1 << log_share) - 1))]);
    const TokenScale<kTokenRows> scale(absmax, task.eps);
    int32_t sums[kTokenRows] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int k = first + i * step;
      if (k >= q_stride - kGemvTokenPad) break;
      float values[kGroup] = {};
      if (k < end) groups[i].convert(values);
      uint32_t planes[kTokenRows][4];
      quantize_group(values, scale.inv, planes, sums);
#pragma unroll
      for (int r = 0; r < kTokenRows; ++r) {
        uint32_t* block = reinterpret_cast<uint32_t*>(q + (m * kTokenRows + r) * q_stride +
                                                      k / kSliceValues * kSliceValues);
#pragma unroll
        for (int p = 0; p < 4; ++p) block[16 * p + k / kGroup % 16] = planes[r][p];
      }
    }
#pragma unroll
    for (int r = 0; r < kTokenRows; ++r) {
      const int32_t sum = warp_reduce_add(sums[r]);
      if (lane == 0) atomicAdd(&shared.q_sum[m * kTokenRows + r], sum);
      if (first == 0) shared.s_x[m * kTokenRows + r] = scale.s_x;
    }
  }
  sync_consumers();
}

// kLogSplit: log2 of the number of warps that share 16 rows, along K. kTokenRows: the rows of q of
// a token. "Tokens" below counts rows of q.
template <class Source, int kLogSplit, int kTokenRows>
__global__ void __launch_bounds__(kThreads, 2)
    gemv_kernel(const __grid_constant__ bitlinear_cuda_task task, int stages) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSplit = 1 << kLogSplit;
  constexpr int kTileRows = gemv_tile_rows(kLogSplit);
  constexpr int kRowPitch = kTileRows + 4;  // of the partial sums
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;

  const Sizes sizes(task.K);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = static_cast<int>(task.M);
  const int64_t n_begin = task.N * blockIdx.x / gridDim.x;
  const int rows = static_cast<int>(task.N * (blockIdx.x + 1) / gridDim.x - n_begin);
  const int tiles = ceil_div(rows, kTileRows);
  const int stage_bytes = kTileRows * sizes.pitch;

  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < stages; ++s) {
      shared.full[s].init(1);
      shared.empty[s].init(kConsumers);
    }
    publish_barriers();
  }
  if (threadIdx.x < kGemvTokens) shared.q_sum[threadIdx.x] = 0;
  __syncthreads();
  allow_successor();

  if (warp == kWarps) {
    RingPosition ring(stages);
    for (int tile = 0; tile < tiles; ++tile) {
      const int present = minimum(kTileRows, rows - tile * kTileRows);
      for (int c = 0; c < sizes.chunks; ++c, ring.advance()) {
        const int begin = c * sizes.chunk_bytes;
        const int bytes = minimum(sizes.chunk_bytes, sizes.row_bytes - begin);
        Barrier& full = shared.full[ring.stage];
        if (lane == 0) {
          shared.empty[ring.stage].wait(ring.parity ^ 1);
          full.arrive_expecting(present * bytes);
        }
        __syncwarp();
        for (int row = lane; row < present; row += 32) {
          const int64_t n = n_begin + tile * kTileRows + row;
          copy_bulk(dynamic + ring.stage * stage_bytes + row * sizes.pitch,
                    weight_row(task, n, sizes.row_bytes) + begin, bytes, full);
        }
      }
    }
    return;
  }

  wait_for_predecessor();
  // Thread r mod 256 writes row r of the block; it has loaded scale, bias and residual in advance.
  constexpr int kMaxTokens = kGemvTokens / kTokenRows;
  RowScale scale = {};
  uint32_t residual[Source::kFused ? kMaxTokens : 1];
  const auto load_scales = [&](int row) {
    if (row >= rows) return;
    scale = RowScale(task, n_begin + row);
    if constexpr (Source::kFused) {
      if (task.residual == nullptr) return;
#pragma unroll
      for (int m = 0; m < kMaxTokens; ++m) {
        if (m * kTokenRows < tokens) {
          residual[m] = load_bits(task.residual, task.residual_dtype, m * task.N + n_begin + row);
        }
      }
    }
  };
  // A prologue needs the registers first.
  if constexpr (!Source::kFused) load_scales(threadIdx.x);
  int8_t* const q = reinterpret_cast<int8_t*>(dynamic + stages * stage_bytes);
  quantize_tokens<Source, kTokenRows>(task, sizes.q_stride, q, shared);
  if constexpr (Source::kFused) load_scales(threadIdx.x);

  const int g = lane / 4, tig = lane % 4;
  const int group = warp >> kLogSplit, member = warp & (kSplit - 1);
  // Columns beyond the last token repeat the first one, at no cost, and are dropped.
  const int8_t* const my_q = q + (g < tokens ? g : 0) * sizes.q_stride + 16 * tig;
  const uint8_t* const my_w = dynamic + (group * kFragmentRows + g) * sizes.pitch + 16 * tig;
  RingPosition ring(stages);
  for (int tile = 0; tile < tiles; ++tile) {
    int32_t sums[4][4] = {};
    for (int c = 0; c < sizes.chunks; ++c, ring.advance()) {
      const int bytes = minimum(sizes.chunk_bytes, sizes.row_bytes - c * sizes.chunk_bytes);
      shared.full[ring.stage].wait(ring.parity);
#pragma unroll(Source::kFused&& kTokenRows == 2 ? 1 : 2)
      for (int s = member; s < ceil_div(bytes, kSliceBytes); s += kSplit) {
        const uint8_t* w = my_w + ring.stage * stage_bytes + s * kSliceBytes;
        const uint4 low = *reinterpret_cast<const uint4*>(w);
        const uint4 high = *reinterpret_cast<const uint4*>(w + 8 * sizes.pitch);
        const int8_t* slice = my_q + (c * (kChunkBytes / kSliceBytes) + s) * kSliceValues;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const uint4 b = *reinterpret_cast<const uint4*>(slice + 64 * p);
          const uint32_t mask = 0x03030303u << 2 * p;
          mma_u8s8(sums[p], low.x & mask, high.x & mask, low.y & mask, high.y & mask, b.x, b.y);
          mma_u8s8(sums[p], low.z & mask, high.z & mask, low.w & mask, high.w & mask, b.z, b.w);
        }
      }
      shared.empty[ring.stage].arrive();
    }

    int32_t* const partial = shared.partial[tile % 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * tig + i % 2, row = group * kFragmentRows + g + 8 * (i / 2);
      if (token < tokens) {
        partial[(member * tokens + token) * kRowPitch + row] =
            sums[0][i] + (sums[1][i] >> 2) + (sums[2][i] >> 4) + (sums[3][i] >> 6);
      }
    }
    sync_consumers();
    const int row = (threadIdx.x - tile * kTileRows) & (kConsumers - 1);
    if (row < kTileRows && tile * kTileRows + row < rows) {
      const int64_t n = n_begin + tile * kTileRows + row;
      const float bias = scale.bias(task, n);
      with_dtype(task.y_dtype, [&](auto zero) {
        using Y = decltype(zero);
#pragma unroll(Source::kFused ? kMaxTokens : 1)
        for (int token = 0; token < kMaxTokens; ++token) {
          const int m = token * kTokenRows;
          if (m >= tokens) break;
          int32_t codes[kTokenRows] = {};
#pragma unroll
          for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
            for (int v = 0; v < kSplit; ++v) {
              codes[r] += partial[(v * tokens + m + r) * kRowPitch + row];
            }
          }
          float value = dequantize(codes, shared.q_sum + m, shared.s_x[m], scale.s_w);
          value = __fadd_rn(value, bias);
          if (task.residual != nullptr) {
            const int dtype = task.residual_dtype;
            const int64_t index = token * task.N + n;
            value = __fadd_rn(
                value, Source::kFused ? float_from_bits(residual[Source::kFused ? token : 0], dtype)
                                      : load_as_float(task.residual, dtype, index));
          }
          static_cast<Y*>(task.y)[token * task.N + n] = from_float<Y>(value);
        }
      });
      load_scales(tile * kTileRows + row + kConsumers);
    }
  }
#endif
}

template <class Source, int kLogSplit, int kTokenRows>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  const Sizes sizes(call.task.K);
  const int stage_bytes = static_cast<int>(gemv_stage_bytes(sizes.row_bytes, kLogSplit));
  const int stages = minimum(plan.ring_bytes / stage_bytes, kMaxStages);
  const int shared_bytes = stages * stage_bytes + static_cast<int>(call.task.M) * sizes.q_stride;
  const LaunchConfig config = {dim3(static_cast<unsigned>(plan.blocks)), kThreads, shared_bytes};
  return launch_kernel<gemv_kernel<Source, kLogSplit, kTokenRows>>(config, call, call.task, stages);
}

template <class Source, int kTokenRows>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  if (plan.log_split == 3) return launch<Source, 3, kTokenRows>(call, plan);
  if (plan.log_split == 2) return launch<Source, 2, kTokenRows>(call, plan);
  return launch<Source, 1, kTokenRows>(call, plan);
}

template <class Source>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  return call.task.act_bits == 8 ? launch<Source, 1>(call, plan) : launch<Source, 2>(call, plan);
}

}  // namespace

cudaError_t gemv(const Call& call, const GemvPlan& plan) {
  const bitlinear_cuda_task& task = call.task;
  const int64_t tokens = task.M / bitlinear_rows_per_token(task.act_bits);
  // Of a token, that all threads quantise at a time.
  const int64_t values = kConsumers / (tokens > 2 ? 4 : tokens) * kGroup;
  if (bitlinear_is_plain(&task.prologue) &&
      (task.residual == nullptr || task.K > kGemvPrologueGroups * values)) {
    return dispatch_dtype(
        task.x_dtype, [&](auto zero) { return launch<PlainSource<decltype(zero)>>(call, plan); });
  }
  return task.K <= values ? launch<FusedSource<1>>(call, plan) : launch<FusedSource<2>>(call, plan);
}

}  // namespace cuda
}  // namespace bitlinear
