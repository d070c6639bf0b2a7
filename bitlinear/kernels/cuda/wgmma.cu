// y = epilogue(q @ w^T) for many tokens on sm_90a, by warpgroup matrix multiplication.
//
// The weights are the operand in registers: as in the GEMV, lanes load packed bytes straight into
// the fragments, here shifted down and masked, as one accumulator serves all planes. So weights
// never pass through shared memory; what does are the activations, which one warp copies in, a tile
// of tokens at a time, in the order that the tensor cores want: the quantiser has written them so.
// Two warpgroups multiply. Where there are too few tiles to go round, the blocks of a cluster share
// one along K and add up their sums through each other's shared memory.
//
// What bounds it, for many tokens: the tensor cores. 8192 x 8192 with M = 4096 is 550 G operations,
// 278 us at the peak of an H100, and takes 374 us there (1470 Top/s) with 37 us before it for the
// quantiser, which is bound by its 100 MB. Per 256 values of k, a tile of 256 x 128 keeps the
// tensor cores busy for 2048 cycles, while it fetches 32 KB of activations and 16 KB of weights, 24
// bytes per cycle: with more tokens and fewer rows it would be more, as a weight is a quarter of
// the size. Shifts and masks: 112 of each warp, a fifth of those cycles. Not hidden: the end of a
// tile, as one block fills a multiprocessor (168 registers, no spills, up to 200 KB).
// With few tokens a product takes some 50 cycles where 8 to 32 would do, and weights arrive by few
// loads at a time: 8192 x 8192 takes 21 us at M = 64, of which reading the weights is 5.5.
#include "epilogue.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarpgroups = 2;  // that multiply; one more copies
constexpr int kConsumers = 128 * kWarpgroups;
constexpr int kThreads = kConsumers + 128;

template <int kTokens>
struct Wgmma;

// clang-format off
template <>
struct Wgmma<32> {
  static __device__ void run(int32_t (&d)[16], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, add;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
template <>
struct Wgmma<64> {
  static __device__ void run(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
template <>
struct Wgmma<128> {
  static __device__ void run(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
// clang-format on

// Has the register written before what follows.
__device__ inline void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
// The registers of a thread of this warpgroup from here on.
template <int kRegisters>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

__device__ inline void sync_consumers() { sync_first<kConsumers>(); }
__device__ inline void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
}

// Reads the shared memory of block `rank` of this cluster, where this block has `p`.
__device__ inline int4 load_remote(const int32_t* p, int rank) {
  int4 v;
  asm volatile(
      "{\n.reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [remote];\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
}

// The descriptor of the operand at `address`: rows of 128 bytes in atoms of 8, swizzled.
__device__ inline uint64_t describe(uint32_t address) {
  constexpr uint64_t kAtomBytes = 1024;
  return uint64_t{(address & 0x3FFFFu) >> 4} | uint64_t{1} << 16 | (kAtomBytes >> 4) << 32 |
         uint64_t{1} << 62;
}

template <int kRowBlocks, int kTokens>
struct Tile {
  static constexpr int kRows = 64 * kRowBlocks * kWarpgroups;
  static constexpr int kStageBytes = kTokens * kSliceValues;
  static constexpr int kPitch = kRows + 4;  // of the sums, token by token
  static constexpr int kSumBytes = kTokens * kPitch * 4;
  static constexpr int kBlocks = wgmma_pairs(kRowBlocks, kTokens) ? 2 : 1;
  static constexpr int kBudget = kBlocks == 2 ? 96 * 1024 : 200 * 1024;
  static constexpr int kStages = kBudget / kStageBytes < 8 ? kBudget / kStageBytes : 8;
  static constexpr int kSharedBytes =
      (kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes) + 1024;
  // Slices of weights in registers, on their way.
  static constexpr int kAhead = kTokens == 32 && kRowBlocks == 1   ? 3
                                : kTokens == 64 && kRowBlocks == 2 ? 2
                                                                   : 1;
  // Registers of a thread that copies, and of one that multiplies.
  static constexpr int kFew = kBlocks == 2 ? 24 : 40, kMany = kBlocks == 2 ? 104 : 232;
};

template <int kRowBlocks, int kTokens>
__global__ void __launch_bounds__(kThreads, (Tile<kRowBlocks, kTokens>::kBlocks))
    wgmma_kernel(const __grid_constant__ bitlinear_cuda_task task,
                 const __grid_constant__ Activations activations, int splits) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = Tile<kRowBlocks, kTokens>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Barrier full[T::kStages], empty[T::kStages];
  __shared__ float s_x[kTokens];
  __shared__ int32_t q_sum[kTokens];
  uint8_t* const stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_bytes = (task.K + 3) / 4;
  const int slices = static_cast<int>(ceil_div<int64_t>(row_bytes, kSliceBytes));
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int slice_begin = slices * split / splits;
  const int slice_end = slices * (split + 1) / splits;
  const int64_t tile = blockIdx.x / splits;
  const int64_t row_tiles = ceil_div<int64_t>(task.N, T::kRows);
  const int64_t n_begin = tile % row_tiles * T::kRows;
  const int64_t m_begin = tile / row_tiles * kTokens;

  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      full[s].init(1);
      empty[s].init(kWarpgroups * 4);
    }
    publish_barriers();
  }
  __syncthreads();
  allow_successor();

  if (warp >= kWarpgroups * 4) {
    shrink_registers<T::kFew>();
    wait_for_predecessor();
    if (threadIdx.x == kConsumers) {
      RingPosition at(T::kStages);
      for (int slice = slice_begin; slice < slice_end; ++slice, at.advance()) {
        Barrier& barrier = full[at.stage];
        empty[at.stage].wait(at.parity ^ 1);
        barrier.arrive_expecting(T::kStageBytes);
        for (int half = 0; half < 2; ++half) {
          const int8_t* q =
              activations.q +
              ((2 * int64_t{slice} + half) * activations.token_groups + m_begin / 8) * 1024;
          copy_bulk(stages + at.stage * T::kStageBytes + half * (T::kStageBytes / 2), q,
                    T::kStageBytes / 2, barrier);
        }
      }
    }
  } else {
    grow_registers<T::kMany>();
    const int g = lane / 4, tig = lane % 4;
    const int my_row = warp / 4 * (64 * kRowBlocks) + warp % 4 * 16 + g;
    struct Weights {
      uint4 low[kRowBlocks], high[kRowBlocks];  // of rows g and g + 8
    };
    const uint8_t* row_low[kRowBlocks];
    const uint8_t* row_high[kRowBlocks];
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      // Rows beyond the last one are computed from it, and not stored.
      row_low[r] = task.w + least(n_begin + my_row + 64 * r, task.N - 1) * row_bytes;
      row_high[r] = task.w + least(n_begin + my_row + 64 * r + 8, task.N - 1) * row_bytes;
    }
    const auto load = [&](int slice, Weights& weights) {
      const int64_t offset = int64_t{slice} * kSliceBytes + 16 * tig;
      const int64_t end = slice < slice_end ? row_bytes : 0;
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        weights.low[r] = load_chunk<true>(row_low[r], offset, end);
        weights.high[r] = load_chunk<true>(row_high[r], offset, end);
      }
    };
    Weights ring[T::kAhead];
#pragma unroll
    for (int i = 0; i < T::kAhead; ++i) load(slice_begin + i, ring[i]);
    wait_for_predecessor();
    const int tokens = static_cast<int>(least<int64_t>(task.M - m_begin, kTokens));
    if (threadIdx.x < tokens) {
      s_x[threadIdx.x] = activations.s_x[m_begin + threadIdx.x];
      q_sum[threadIdx.x] = activations.q_sum[m_begin + threadIdx.x];
    }

    int32_t sums[kRowBlocks][kTokens / 2];
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[r][i] = 0;
    }
    RingPosition at(T::kStages);
    int previous = -1;
    uint32_t a[2][kRowBlocks][4];
    for (int first = slice_begin; first < slice_end; first += T::kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < T::kAhead; ++ahead) {
        const int slice = first + ahead;
        if (slice >= slice_end) break;
        const Weights weights = ring[ahead];
        load(slice + T::kAhead, ring[ahead]);
        full[at.stage].wait(at.parity);
        const uint32_t base = shared_address(stages + at.stage * T::kStageBytes);
#pragma unroll
        for (int step = 0; step < 8; ++step) {
          const int p = step / 2, j = step % 2;
#pragma unroll
          for (int r = 0; r < kRowBlocks; ++r) {
            const uint4& low = weights.low[r];
            const uint4& high = weights.high[r];
            a[j][r][0] = (j == 0 ? low.x : low.z) >> 2 * p & 0x03030303u;
            a[j][r][1] = (j == 0 ? high.x : high.z) >> 2 * p & 0x03030303u;
            a[j][r][2] = (j == 0 ? low.y : low.w) >> 2 * p & 0x03030303u;
            a[j][r][3] = (j == 0 ? high.y : high.w) >> 2 * p & 0x03030303u;
#pragma unroll
            for (uint32_t& word : a[j][r]) pin(word);
          }
          const uint64_t b = describe(base + p / 2 * (T::kStageBytes / 2) + p % 2 * 64 + j * 32);
          wgmma_fence();
#pragma unroll
          for (int r = 0; r < kRowBlocks; ++r) Wgmma<kTokens>::run(sums[r], a[j][r], b);
          wgmma_commit();
          wgmma_wait<1>();
          // All but the last step is done, so the stage before this one is free.
          if (step == 0 && previous >= 0 && lane == 0) empty[previous].arrive();
        }
        previous = at.stage;
        at.advance();
      }
    }
    wgmma_wait<0>();
    // Every copy has arrived and been used: the stages become the place for the sums.
    sync_consumers();
    int32_t* const out = reinterpret_cast<int32_t*>(stages);
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        const int token = i / 4 * 8 + 2 * tig + i % 2;
        out[token * T::kPitch + my_row + 64 * r + i % 4 / 2 * 8] = sums[r][i];
      }
    }

    // Each block of the cluster finishes its share of the tokens.
    if (splits > 1) {
      sync_cluster();
    } else {
      sync_consumers();
    }

    const auto codes_of = [&](int token, int row) {
      const int32_t* const place = out + token * T::kPitch + row;
      int4 codes = *reinterpret_cast<const int4*>(place);
      for (int s = 1; s < splits; ++s) codes = add(codes, load_remote(place, (split + s) % splits));
      return codes;
    };
    write_tile<T::kRows, kConsumers>(task, n_begin, m_begin, {split, splits, tokens}, s_x, q_sum,
                                     codes_of);
    if (splits > 1) sync_cluster();  // no block may leave while others read its sums
  }
#endif
}

template <int kRowBlocks, int kTokens>
cudaError_t launch(const Call& call, const Activations& q, int splits) {
  using T = Tile<kRowBlocks, kTokens>;
  const bitlinear_cuda_task& task = call.task;
  const int64_t tiles = ceil_div<int64_t>(task.N, T::kRows) * ceil_div<int64_t>(task.M, kTokens);
  const dim3 grid(static_cast<unsigned>(tiles * splits));
  const Launch how = {grid, kThreads, T::kSharedBytes, splits};
  return launch_kernel<wgmma_kernel<kRowBlocks, kTokens>>(how, call, task, q, splits);
}

template <int kRowBlocks>
cudaError_t launch(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  if (plan.tokens == 32) return launch<kRowBlocks, 32>(call, q, plan.splits);
  if (plan.tokens == 64) return launch<kRowBlocks, 64>(call, q, plan.splits);
  return launch<kRowBlocks, 128>(call, q, plan.splits);
}

}  // namespace

cudaError_t wgmma(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  return plan.row_blocks == 1 ? launch<1>(call, q, plan) : launch<2>(call, q, plan);
}

}  // namespace cuda
}  // namespace bitlinear
