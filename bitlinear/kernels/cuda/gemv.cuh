// y = epilogue(quantize(x) @ w^T) for up to 4 tokens (sm_80 and later): the kernel of decoding,
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
// 28672 x 8192 (59 MB) 17.5 and 21.7 (2.7 TB/s); 8192 x 8192 5.0 and 7.6; 4096 x 4096 1.3 and 3.0.
// Of these 3.0, 1.2 pass between the end of one call and the first work of the next; the rest
// fetches and quantises the token, multiplies 16 rows after the last weights have arrived, and sums
// over the warps. 93 to 96 registers, no spills, one or two blocks per multiprocessor: 13 or 27 %
// of the warps that it can hold. Under the profiler, where no predecessor hides the start, 28672 x
// 8192 reads 2.1 TB/s (66 % of the peak) at 1.4 instructions per cycle.
//
// With a prologue every block computes it again, in registers: it is latency, not traffic. The
// products of a decoder's layer, with weights from DRAM, in us, without and with their prologues:
// 3840 x 2560 (N x K) 2.6 and 3.2 with an RMSNorm; 2560 x 2560 2.6 and 3.2 with an RMSNorm and a
// residual; 13824 x 2560 4.3 and 5.0 with an RMSNorm; 2560 x 6912 3.6 and 4.8 with relu2, an
// RMSNorm and a residual. Thirty layers of these four in a graph take 14.2 and 16.9 us a layer;
// reading the weights takes 5.8. In each product 0.6 us pass from the last store to the first load
// of the successor, 0.5 until x has come from L2 (1.2 where each of 132 blocks fetches 27 KB), 0.5
// in the sum of squares with its barrier, two divisions and the root, 0.5 in the maximum and the
// rounding, 0.5 to 1.5 in the multiplications, 0.4 in the sums over the warps and the store. What
// is left: clusters that fetch x once, and a shorter epilogue between two tiles.
//
// Tokens of more than 16384 values (8192 with a prologue) in all are not resident (see
// gemv_tokens.cuh). Then a multiprocessor has one block, with 118 to 168 registers and all of the
// shared memory for its ring, which hides the quantiser in part. Time on an H100 and that of
// quantize.cu with small_batch.cu in the same run, one token: 8192 x 28672 21.9 and 24.9; 5120 x
// 20480 13.2 and 17.3; 2560 x 16448 7.1 and 9.6; 512 x 28672 6.2 and 9.7. After relu2 and an
// RMSNorm 4096 x 14336 takes 10.4 and 12.5, after SiLU 13.0 and 13.4. Several such tokens are left
// to these two, because each block of the GEMV quantises all of them: on an H200 two of 4096 x
// 14336 took 8.5 us and take 7.6, four of 28672 x 8192 22.8 and 19.1.
//
// Before sm_90 no kernel starts early, and cp.async fills the ring. Code for sm_80, run on the H100
// with the shared memory of an A100 (163 KB): 28672 x 8192 22.9 us, 2.6 TB/s; 8192 x 8192 9.4; 4096
// x 4096 4.8; 8192 x 28672 23.4. With 99 KB (RTX 30 and 40): 24.7, 9.3, 4.8 and 27.2. Without an
// early start the bulk copies are as fast: 24.4, 9.5, 5.0. mma.cu with its quantiser takes 33.5,
// 12.3 and (2560 x 6912, here 5.0) 8.8. It has not run on such a device. There the bound is memory:
// 28672 x 8192 29 us on an A100 (2.0 TB/s, of which others have measured 1.55: 38), 58 on an RTX
// 4090 (1.0 TB/s); a multiprocessor has to copy 14 or 8 bytes per ns, here it copies 19. Registers
// (no spills): 88 to 96, or 118 to 168.
//
// A few warps hide little latency, and they wait for their own instructions. With one kernel for
// each log_split and a branch for each value of a gate, the layer took 24.1 us: code that runs once
// is fetched once, from far away, and the four products displaced each other's. So log_split is an
// argument, all products with a prologue of one dtype share a kernel, and a branch is outside of a
// loop, not in it.
//
// Tried, and slower: weights directly into registers; 16 warps; copies of 512 bytes of a row, or of
// whole tiles; only a prefetch into L2 before the predecessor ends. With a prologue: values in
// shared memory and loops that are not unrolled, where the registers suffice; 72 registers for
// three blocks; the activations of unused columns not loaded; the weights of the norm loaded before
// the gate is computed; one tile of 105 rows instead of two, faster alone but slower in the chain,
// where a stage waits for all of them. For tokens that are not resident: a gate computed again in
// each pass (8192 x 28672 after SiLU 43.6 us instead of 39.4, 4096 x 14336 after relu2 and an
// RMSNorm 12.1 instead of 10.4); rings of 96 KB (8192 x 28672 24.5 instead of 21.9). Before sm_90:
// low tiles in four stages instead of tiles of 32 rows in two (28672 x 8192 27.6 instead of 24.7).
#pragma once

#include "ampere.cuh"
#include "gemv_groups.cuh"
#include "gemv_tokens.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarps = kGemvWarps;  // that multiply; one more warp copies
constexpr int kThreads = kConsumers + 32;
constexpr int kFragmentRows = 16;
constexpr int kMaxStages = 12;

struct Shared {
  Barrier full[kMaxStages], empty[kMaxStages];
  union {
    // Partial sums by warp of a split, token and row; double-buffered. int64 with groups.
    alignas(8) int32_t partial[2][kWarps * kGemvTokens * (kFragmentRows + 4)];
    float norm_sums[kGemvNormSums];  // before them
  };
  Tokens tokens;
};
static_assert(sizeof(Shared) <= kGemvStaticBytes, "see heuristics.h");
// A resident token has a sum for each group of a warp, and supports() limits the others.
static_assert(kWarpValues == kGemvNormValues && kGemvPrologueGroups * kWarps <= kGemvNormSums,
              "see heuristics.h");

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

// Scale, bias and residuals of a row of weights. The addresses are computed before the predecessor
// has ended. The values stay as they are in memory, so that no thread waits for them before it
// needs them.
template <int kTokens, bool kIsPlain>
struct Row {
  const float* s_w_address;
  const char *bias_address, *residual_address;
  int bias_dtype;  // negative: none
  float s_w;
  uint32_t bias_bits, residual_bits[kTokens];

  __device__ void locate(const bitlinear_cuda_task& task, int64_t n) {
    const bitlinear_cuda_weight& weight = weight_at<kIsPlain>(task, n);
    const int64_t row = n - weight.begin;
    s_w_address = weight.s_w + row * weight.s_w_stride;
    const bool has_bias = weight.bias != nullptr;
    bias_dtype = has_bias ? weight.bias_dtype : -1;
    // Without a bias, any address will do: a branch would wait for the loads.
    bias_address = has_bias ? static_cast<const char*>(weight.bias) +
                                  row * (bias_dtype == BITLINEAR_F32 ? 4 : 2)
                            : reinterpret_cast<const char*>(s_w_address);
    compute_now(s_w_address);
    compute_now(bias_address);
    compute_now(bias_dtype);
    if constexpr (!kIsPlain) {
      residual_address = static_cast<const char*>(task.residual) +
                         n * (task.residual_dtype == BITLINEAR_F32 ? 4 : 2);
      compute_now(residual_address);
    }
  }
  __device__ void load(const bitlinear_cuda_task& task, int tokens) {
    s_w = *s_w_address;
    bias_bits = load_bits(bias_address, bias_dtype, 0);
    const bool has_residual = !kIsPlain && task.residual != nullptr;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (has_residual && m < tokens) {
        residual_bits[m] = load_bits(residual_address, task.residual_dtype, m * task.N);
      }
    }
  }
  __device__ float bias() const {
    return bias_dtype < 0 ? -0.0f : float_from_bits(bias_bits, bias_dtype);
  }
};

// Prefetches into L2 what the kernel reads after the wait, in case it lies in memory only.
__device__ inline void prefetch_operands(const bitlinear_cuda_task& task, const float* s_w) {
  // One lane of a warp: many requests for one line wait for each other.
  if (threadIdx.x % 32 == 0) prefetch_line(s_w);
  const bitlinear_prologue& prologue = task.prologue;
  if (prologue.norm_weight == nullptr || threadIdx.x > 1) return;
  // Each block has one or two lines of the norm's weight.
  const int bytes = static_cast<int>(task.K) * (prologue.norm_dtype == BITLINEAR_F32 ? 4 : 2);
  const int line = (blockIdx.x + threadIdx.x * gridDim.x) % ceil_div(bytes, kLineBytes);
  prefetch_line(static_cast<const char*>(prologue.norm_weight) + line * kLineBytes);
}

// The transport of weights into the ring. For each stage a warp calls start_stage(), which returns
// when `empty` has completed, and then copy_rows(): the first `bytes` bytes of `rows` rows, of
// which row(r) is the address. `full` completes when all of them have arrived.
#if __CUDA_ARCH__ >= 900
// The copy engine copies a row at a time and counts its bytes.
constexpr int kCopyArrivals = 1;

__device__ inline void start_stage(Barrier& empty, uint32_t parity, Barrier& full, int bytes) {
  if (threadIdx.x % 32 == 0) {
    empty.wait(parity);
    full.arrive_expecting(bytes);
  }
  __syncwarp();
}
template <class Row>
__device__ inline void copy_rows(uint8_t* to, int pitch, int rows, int bytes, Barrier& full,
                                 const Row& row) {
  for (int r = threadIdx.x % 32; r < rows; r += 32) copy_bulk(to + r * pitch, row(r), bytes, full);
}
__device__ inline void end_copies() {}  // the block lives until its consumers have seen them
#else
// The lanes copy one row at a time, 16 bytes each; a lane arrives when its copies have ended.
constexpr int kCopyArrivals = 32;

// Each lane waits by itself: the race checker follows no order through another lane.
__device__ inline void start_stage(Barrier& empty, uint32_t parity, Barrier&, int) {
  empty.wait(parity);
}
template <class Row>
__device__ inline void copy_rows(uint8_t* to, int pitch, int rows, int bytes, Barrier& full,
                                 const Row& row) {
  constexpr int kStep = 16 * 32;
  static_assert(kChunkBytes == 2 * kStep, "a lane copies at most twice");
  const int lane = threadIdx.x % 32, offset = 16 * lane;
  const bool once = offset < bytes, twice = offset + kStep < bytes;
  to += offset;
  for (int first = 0; first < rows; first += 32) {
    // The address of a row takes many instructions, so each lane computes one.
    const auto mine = reinterpret_cast<uint64_t>(row(minimum(first + lane, rows - 1)));
    const int count = minimum(rows - first, 32);
#pragma unroll 4
    for (int r = 0; r < count; ++r, to += pitch) {
      const auto* const from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, mine, r)) + offset;
      if (once) copy_async(to, from, true);
      if (twice) copy_async(to + kStep, from + kStep, true);
    }
  }
  full.arrive_after_copies();
}
// PTX does not say that copies outlive their thread.
__device__ inline void end_copies() {
  commit_copies();
  wait_for_copies<0>();
}
#endif

// The blocks of a multiprocessor among which its registers are divided. Code for sm_120 would spill
// a prologue in half of them; there the shared memory (99 KB) suffices for one block anyway, unless
// rows are short.
#if __CUDA_ARCH__ >= 1200
constexpr int kPrologueBlocks = 1;
#else
constexpr int kPrologueBlocks = 2;
#endif
template <class Source, int kTokenRows, int kParts>
constexpr int kBlocks = !Source::kResident || (Source::kFused && kTokenRows == 2 && kParts > 0) ? 1
                        : Source::kFused ? kPrologueBlocks
                                         : 2;

// log_split: log2 of the number of warps that share 16 rows, along K. kTokenRows: the rows of q of
// a token. "Tokens" below counts rows of q. kParts: with scales of groups the parts of a slice, 2
// or 4, of which each lies in one group; else 0. kIsPlain: for what is_plain_product() says.
template <class Source, int kTokenRows, int kParts, bool kIsPlain>
__global__ void __launch_bounds__(kThreads, (kBlocks<Source, kTokenRows, kParts>))
    gemv_kernel(const __grid_constant__ bitlinear_cuda_task task, int stages, int log_split,
                int group_bytes) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;

  constexpr bool kGrouped = kParts > 0;
  const Sizes sizes(task.K);
  const int split = 1 << log_split;
  const int tile_rows = gemv_tile_rows(log_split);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = static_cast<int>(task.M);
  const int64_t n_begin = task.N * blockIdx.x / gridDim.x;
  const int rows = static_cast<int>(task.N * (blockIdx.x + 1) / gridDim.x - n_begin);
  const int tiles = ceil_div(rows, tile_rows);
  const int stage_bytes = tile_rows * sizes.pitch;

  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < stages; ++s) {
      shared.full[s].init(kCopyArrivals);
      shared.empty[s].init(kConsumers);
    }
    publish_barriers();
  }
  if (threadIdx.x < kGemvTokens) shared.tokens.q_sum[threadIdx.x] = 0;
  __syncthreads();
  allow_successor();

  if (warp == kWarps) {
    RingPosition ring(stages);
    for (int tile = 0; tile < tiles; ++tile) {
      const int present = minimum(tile_rows, rows - tile * tile_rows);
      for (int c = 0; c < sizes.chunks; ++c, ring.advance()) {
        const int begin = c * sizes.chunk_bytes;
        const int bytes = minimum(sizes.chunk_bytes, sizes.row_bytes - begin);
        Barrier& full = shared.full[ring.stage];
        start_stage(shared.empty[ring.stage], ring.parity ^ 1, full, present * bytes);
        const auto row = [&](int r) {
          return weight_row<kIsPlain>(task, n_begin + tile * tile_rows + r, sizes.row_bytes) +
                 begin;
        };
        copy_rows(dynamic + ring.stage * stage_bytes, sizes.pitch, present, bytes, full, row);
      }
    }
    end_copies();
    return;
  }

  // Groups, or two of these three, leave no registers to overlap two slices.
  constexpr bool kIsLarge = kGrouped || Source::kFused + Source::kWide + (kTokenRows == 2) >= 2;
  constexpr int kUnroll = kIsLarge ? 1 : 2;
  // All that needs no token is computed before the wait.
  constexpr int kMaxTokens = kGemvTokens / kTokenRows;
  int8_t* const q =
      reinterpret_cast<int8_t*>(dynamic + stages * stage_bytes + (kGrouped ? group_bytes : 0));
  const Groups<kGrouped ? kParts : 2> groups(task, reinterpret_cast<uint8_t*>(q) - group_bytes,
                                             rows);
  const Quantizer<Source, kTokenRows, kParts> quantizer(task, sizes.q_stride, q,
                                                        kGrouped ? groups.q_sums() : nullptr);
  // Thread r mod 256 writes row r of the block. The quantiser of tokens that are not resident needs
  // the registers, so its row is located later.
  Row<kMaxTokens, kIsPlain> mine;
  const auto locate_row = [&] {
    mine.locate(task, n_begin + minimum(static_cast<int>(threadIdx.x), rows - 1));
  };
  if (Source::kResident) locate_row();
  const int g = lane / 4, tig = lane % 4;
  const int group = warp >> log_split;
  // Every second group numbers its warps backwards: if their shares are unequal, it balances the
  // load.
  const int member = (warp ^ (group % 2 ? split - 1 : 0)) & (split - 1);
  const int sum_pitch = tile_rows + 4;  // of the partial sums
  using Sum = std::conditional_t<kGrouped, int64_t, int32_t>;
  Sum* const partials = reinterpret_cast<Sum*>(shared.partial[0]);
  const int my_token = kGrouped ? tig / 2 : 2 * tig;
  Sum* const my_sums =
      partials + (member * tokens + my_token) * sum_pitch + group * kFragmentRows + g;
  // Columns beyond the last token repeat the first one, at no cost, and are dropped.
  const int8_t* my_q = q + (g < tokens ? g : 0) * sizes.q_stride + 16 * tig + member * kSliceValues;
  const uint8_t* my_w =
      dynamic + (group * kFragmentRows + g) * sizes.pitch + 16 * tig + member * kSliceBytes;
  const bool writes = static_cast<int>(threadIdx.x) < rows;
  if (Source::kFused && Source::kResident && writes) prefetch_operands(task, mine.s_w_address);

  if constexpr (kGrouped) groups.split_scales(n_begin);

  wait_for_predecessor();
  float4* const stash = reinterpret_cast<float4*>(q + tokens * sizes.q_stride);
  quantizer.run(task, sizes.q_stride, shared.norm_sums, stash, shared.tokens, [&] {
    if (!Source::kResident) locate_row();
    if (writes) mine.load(task, tokens / kTokenRows);
  });
  sync_consumers();
  GroupProduct<kGrouped ? kParts : 2> product(task, groups, q, sizes.q_stride, member, log_split);

  RingPosition ring(stages);
  for (int tile = 0; tile < tiles; ++tile) {
    int32_t sums[4][4] = {};
    if constexpr (kGrouped) {
      const int row = tile * tile_rows + group * kFragmentRows + g;
      product.start(groups.multipliers(minimum(row, rows - 1)),
                    groups.multipliers(minimum(row + 8, rows - 1)));
    }
    for (int c = 0; c < sizes.chunks; ++c, ring.advance()) {
      const int bytes = minimum(sizes.chunk_bytes, sizes.row_bytes - c * sizes.chunk_bytes);
      const int slices = (ceil_div(bytes, kSliceBytes) - member + split - 1) >> log_split;
      const uint8_t* w = my_w + ring.stage * stage_bytes;
      const int8_t* slice = my_q + c * (kChunkBytes / kSliceBytes * kSliceValues);
      shared.full[ring.stage].wait(ring.parity);
#pragma unroll(kUnroll)
      for (int s = 0; s < slices; ++s) {
        const uint4 low = *reinterpret_cast<const uint4*>(w);
        const uint4 high = *reinterpret_cast<const uint4*>(w + 8 * sizes.pitch);
        if constexpr (kGrouped) {
          product.add(low, high);
        } else {
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const uint4 b = *reinterpret_cast<const uint4*>(slice + 64 * p);
            const uint32_t mask = 0x03030303u << 2 * p;
            mma_u8s8(sums[p], low.x & mask, high.x & mask, low.y & mask, high.y & mask, b.x, b.y);
            mma_u8s8(sums[p], low.z & mask, high.z & mask, low.w & mask, high.w & mask, b.z, b.w);
          }
        }
        w += kSliceBytes << log_split;
        slice += kSliceValues << log_split;
      }
      shared.empty[ring.stage].arrive();
    }

    const int buffer = tile % 2 * static_cast<int>(sizeof(shared.partial[0]) / sizeof(Sum));
    if constexpr (kGrouped) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t total = product.total(i);
        if (tig % 2 == 0 && my_token < tokens) my_sums[buffer + 8 * i] = total;
      }
    }
#pragma unroll
    for (int i = 0; !kGrouped && i < 4; ++i) {
      if (2 * tig + i % 2 < tokens) {
        my_sums[buffer + i % 2 * sum_pitch + 8 * (i / 2)] =
            sums[0][i] + (sums[1][i] >> 2) + (sums[2][i] >> 4) + (sums[3][i] >> 6);
      }
    }
    sync_consumers();
    const int row = (threadIdx.x - tile * tile_rows) & (kConsumers - 1);
    if (row < tile_rows && tile * tile_rows + row < rows) {
      const int64_t n = n_begin + tile * tile_rows + row;
      const Sum* const partial = partials + buffer + row;
      const float s_w = kGrouped ? *groups.unit(tile * tile_rows + row) : mine.s_w;
#pragma unroll
      for (int token = 0; token < kMaxTokens; ++token) {
        const int m = token * kTokenRows;
        if (m >= tokens) break;
        Sum codes[kTokenRows] = {};
#pragma unroll
        for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
          for (int v = 0; v < kWarps; ++v) {
            if (v < split) codes[r] += partial[(v * tokens + m + r) * sum_pitch];
          }
        }
        float value = dequantize(codes, shared.tokens.q_sum + m, shared.tokens.s_x[m], s_w);
        value = __fadd_rn(value, mine.bias());
        if (!kIsPlain && task.residual != nullptr) {
          value = __fadd_rn(value, float_from_bits(mine.residual_bits[token], task.residual_dtype));
        }
        with_dtype(task.y_dtype, [&](auto zero) {
          using Y = decltype(zero);
          static_cast<Y*>(task.y)[token * task.N + n] = from_float<Y>(value);
        });
      }
      const int next = tile * tile_rows + row + kConsumers;
      if (next < rows) {
        mine.locate(task, n_begin + next);
        mine.load(task, tokens / kTokenRows);
      }
    }
  }
#endif
}

template <class Source, int kTokenRows, int kParts, bool kIsPlain = false>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  const bitlinear_cuda_task& task = call.task;
  if constexpr (!kIsPlain && Source::kResident && !Source::kFused && kTokenRows == 1 &&
                kParts == 0) {
    if (is_plain_product(task)) {
      return launch<Source, kTokenRows, kParts, true>(call, plan);
    }
  }
  const Sizes sizes(task.K);
  const int stage_bytes = static_cast<int>(gemv_stage_bytes(sizes.row_bytes, plan.log_split));
  const int stages = minimum(plan.ring_bytes / stage_bytes, kMaxStages);
  const bool has_stash = Source::kFused && !Source::kResident;
  Shape shape = {task.M, task.N, task.K, true, true};
  shape.group_size = task.groups.size;
  const int group_bytes = static_cast<int>(gemv_group_bytes(shape, plan.blocks));
  const int shared_bytes =
      stages * stage_bytes + group_bytes + static_cast<int>(task.M) * sizes.q_stride +
      (has_stash ? static_cast<int>(gemv_stash_bytes(task.M / kTokenRows, task.K)) : 0);
  const LaunchConfig config = {dim3(static_cast<unsigned>(plan.blocks)), kThreads, shared_bytes};
  return launch_kernel<gemv_kernel<Source, kTokenRows, kParts, kIsPlain>>(
      config, call, task, stages, plan.log_split, group_bytes);
}

template <class Source, int kParts>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  return call.task.act_bits == 8 ? launch<Source, 1, kParts>(call, plan)
                                 : launch<Source, 2, kParts>(call, plan);
}

template <bool kResident, int kParts>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  const bitlinear_cuda_task& task = call.task;
  if (bitlinear_is_plain(&task.prologue)) {
    return dispatch_dtype(task.x_dtype, [&](auto zero) {
      return launch<PlainSource<decltype(zero), kResident>, kParts>(call, plan);
    });
  }
  return task.x_dtype == BITLINEAR_F32 ? launch<FusedSource<true, kResident>, kParts>(call, plan)
                                       : launch<FusedSource<false, kResident>, kParts>(call, plan);
}

template <int kParts>
cudaError_t launch(const Call& call, const GemvPlan& plan) {
  return plan.resident ? launch<true, kParts>(call, plan) : launch<false, kParts>(call, plan);
}

}  // namespace
}  // namespace cuda
}  // namespace bitlinear
