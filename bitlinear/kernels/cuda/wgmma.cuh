// y = epilogue(q @ w^T) for many tokens on sm_90a, by warpgroup matrix multiplication.
//
// The weights are the operand in registers. As in the GEMV, lanes load packed bytes directly into
// the fragments; here they are shifted and masked, because one accumulator serves all planes. So
// weights never pass through shared memory. The activations do: one thread copies a tile of tokens
// at a time, which the quantiser has stored in the order of the tensor cores. One or two warpgroups
// multiply. They store the sums of a tile in shared memory and continue with the block's next tile,
// while three warps write y from the sums. If there are fewer tiles than multiprocessors, two
// warpgroups share a tile along K, or the blocks of a cluster do, which add their sums through
// distributed shared memory.
//
// A block over time (t: tile; s: slice of 256 values of k; -> time):
//
//   copier      |q t0s0|q t0s1|q t0s2|q t1s0|q t1s1|...                      1 thread
//   consumers          |mma t0s0|mma t0s1|mma t0s2|store t0|mma t1s0|...     1 or 2 warpgroups
//   their loads |w t0s0|w t0s1|w t0s2|w t1s0|w t1s1|...                      into registers
//   storers                                                |write y of t0|   3 warps
//
//   full[stage]    copier -> consumers: the activations of a stage have arrived
//   empty[stage]   consumers -> copier: no product reads the stage any more
//   sums_full      consumers -> storers: the sums of a tile are in shared memory
//   sums_empty     storers -> consumers: y is written, the sums can be overwritten
//
// The consumers themselves write the last tile of a block, after the sum over the cluster.
//
// Bound for many tokens: the tensor cores. 8192 x 8192 with M = 4096 is 550 G operations, 278 us at
// the peak of an H100. It takes 330 us there (1670 Top/s), after 37 us for the quantiser, which is
// bound by its 100 MB. In turns with cuBLAS, which heats the chip, quantiser and product together
// take 438 us. Per 256 values of k, a tile of 256 x 128 needs 2050 to 2150 cycles, of which the
// tensor cores are busy for 2048; meanwhile it fetches 32 KB of activations and 16 KB of weights,
// 24 bytes per cycle. More tokens and fewer rows would fetch more, because a weight has a quarter
// of the bytes. Between two tiles the tensor cores wait for 2500 cycles: 1200 store the sums, the
// rest passes until the next product runs. The last tile of a block is written 4000 cycles after
// its sums are ready.
//
// With short rows the warps that write y decide. Products read and write their sums in registers,
// so they and other instructions take turns: while y is written a product takes 1.6 times as long.
// 2048 x 768 with M = 16384 takes 61 us, 12000 cycles a tile, of which the products need 6150; with
// two warps that write, 4 values at a time instead of 8, it took 82.
//
// Bound for few tokens: a product of a warpgroup takes 70 cycles, where the tensor cores need 8 to
// 32, because reading its fragment from registers takes about 50. Two warpgroups side by side take
// 58 cycles for each product with 64 tokens, so they gain little: with tiles of 256 rows 28672 x
// 8192 takes 39.5 us with M = 64 and 33 with M = 32 (45 and 38 in two rounds of 128 rows). Two
// warpgroups that share K instead take the place of a cluster, or of half of one: on an H200 4096 x
// 4096 with M = 64 takes 9.1 us in one block for a tile, 8.6 in clusters of two, and 10.3 in
// clusters of two with tiles of 128 rows. Each of the two adds the sums of half of the tokens; one
// that adds all, after the other has stored them, takes 0.4 us longer. Such a tile leaves registers
// and shared memory to the quantiser: 4096 x 4096 with M = 128 takes 9.7 us instead of 10.8.
//
// A product with 128 tokens takes 64 cycles in any case, so tiles of 64 rows and 128 tokens, whose
// two warpgroups share K, lose nothing to the registers: 4096 x 4096 with M = 256 takes 12.4 us (in
// tiles of 128 rows and 64 tokens 13.1), 4096 x 14336 with M = 128, in clusters of two, 20.6
// (22.5).
//
// Tried, and not faster: activations copied to both blocks of a cluster with different rows; four
// warpgroups in tiles of 128 rows, of which two share K (2560 x 2560 with M = 256 takes 0.4 us
// longer); fewer registers for tiles of 128 rows (0.4 us longer).
//
// 1024 x 1024 with M = 64 takes 4.6 us: 1.4 for the quantiser, 0.7 until its results arrive, 1.2
// for the products, 0.8 for the end of the tile, the rest for the launches.
//
// Tiles of 96 tokens are for sizes that tiles of 128 tokens divide badly: 2560 x 6912 with M = 1024
// takes 42.8 us in 80 tiles of 256 x 128 on 132 multiprocessors, and 35.3 us in 110 tiles of 256 x
// 96.
//
// 168 registers (176 or 178 in tiles of one warpgroup, 128 in those that leave room), up to 228 KB
// of shared memory: one block fills a multiprocessor. Only wgmma_groups.cu spills, in one tile. By
// the profiler the tensor cores are busy in 90 % of the cycles of 8192 x 8192 with M = 4096, at 1.2
// instructions per cycle, and in 73 % of 4096 x 4096 with M = 1024.
//
// Each tile has two instances, in files of their own so that they compile side by side: wgmma.cu
// for a single weight without a residual and tokens of 8 bits, and wgmma_general.cu for all else,
// whose lookups of weights and whose residuals take time and registers.
#pragma once

#include <cuda.h>

#include "epilogue.cuh"
#include "groups.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kStorers = 96;  // threads of the warpgroup that does not multiply

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
  // With `a` in shared memory, too. Without `adds`, d may hold anything.
  static __device__ void run(int32_t (&d)[32], uint64_t a, uint64_t b, bool adds) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, add;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  }
};
template <>
struct Wgmma<96> {
  static __device__ void run(int32_t (&d)[48], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, add;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47])
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

// Makes the compiler write the register before the following instructions.
__device__ inline void fence_operand(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
// Set the number of registers of each thread of this warpgroup from here on.
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

// Reads, in the shared memory of block `rank` of this cluster, the address that `p` has in this
// block.
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
__device__ inline uint64_t make_descriptor(uint32_t address) {
  constexpr uint64_t kAtomBytes = 1024;
  return uint64_t{(address & 0x3FFFFu) >> 4} | uint64_t{1} << 16 | (kAtomBytes >> 4) << 32 |
         uint64_t{1} << 62;
}

// The index of the sum of a row and a token of a tile in shared memory. A warp writes 8 rows for
// every other of 8 tokens at a time: the exclusive or spreads them over the banks, and keeps groups
// of four rows contiguous.
template <int kRows>
__device__ inline int index_of_sum(int token, int row) {
  return token * kRows + (row ^ (token & 6) * 4);
}

// A tile, and the block that computes it: one or two warpgroups that multiply, each with one or two
// blocks of 64 rows, and one warpgroup that copies and stores. Two warpgroups have different rows;
// or, if kTileHalves is 2, the same rows, and each has every second slice. With scales of groups
// the two blocks of a warpgroup are the high and the low bytes of the same 64 rows.
template <int kWarpgroups, int kRowBlocks, int kTileTokens, bool kIsGeneralTile,
          int kTileHalves = 1, bool kHasGroups = false>
struct Tile {
  static_assert(kWarpgroups % kTileHalves == 0, "a warpgroup has one half");
  static_assert(!kHasGroups || kRowBlocks == 2, "two bytes");
  // For several weights, with a residual, or with tokens of 16 bits.
  static constexpr bool kIsGeneral = kIsGeneralTile;
  static constexpr bool kGrouped = kHasGroups;
  static constexpr int kBlocks = kRowBlocks, kTokens = kTileTokens, kHalves = kTileHalves;
  static constexpr int kLastTokens = kTokens;  // see Share
  static constexpr int kSumRows = 64 * kRowBlocks * kWarpgroups / kHalves;
  static constexpr int kRows = kGrouped ? kSumRows / 2 : kSumRows;
  // Blocks of weights that a warpgroup reads.
  static constexpr int kReadBlocks = kGrouped ? 1 : kRowBlocks;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kStageBytes = kTokens * kSliceValues;
  static constexpr int kSumBytes = kTokens * kSumRows * 4;
  static constexpr int kStageBudget = 224 * 1024 - kSumBytes;  // bytes for stages
  static constexpr int kMostStages = kStageBudget / kStageBytes;
  // Whether a block of eight warps of the quantiser finds registers and shared memory beside it:
  // then each of the two kernels starts while the other one still runs.
  static constexpr bool kLeavesRoom =
      kWarpgroups == 2 && kHalves == 2 && kTokens == 64 && !kIsGeneral && !kGrouped;
  static constexpr int kWantedStages = kLeavesRoom ? 6 : 8;
  // A stage belongs to one half.
  static constexpr int kStages =
      kMostStages < kWantedStages ? kMostStages / kHalves * kHalves : kWantedStages;
  static constexpr int kSharedBytes = kStages * kStageBytes + kSumBytes + 1024;
  // Slices of weights in flight, in registers.
  static constexpr int kPrefetched =
      kTokens > 32 ? (kRowBlocks == 1 ? 2 : 1) : (kSumRows == 256 ? 3 : 4);
  // A product that adds to the same sums as the previous one waits for it. With few tokens the wait
  // is long, so even and odd steps have their own sums.
  static constexpr int kAccumulatorSets = kTokens < 128 && kRowBlocks == 1 ? 2 : 1;
  // Steps in flight, each with its own fragments.
  static constexpr int kDepth = kRowBlocks == 1 ? 4 : 2;
  // It has no registers for what the end of the last tile needs.
  static constexpr bool kLoadsRowsLate =
      kLeavesRoom || (kIsGeneral && kTokens == 128 && (kSumRows == 256 || kGrouped));
  // Two warpgroups that multiply need registers of the third. Registers per thread, after the
  // change:
  static constexpr bool kReallocatesRegisters = kWarpgroups == 2;
  static constexpr int kProducerRegisters = kLeavesRoom ? 80 : kIsGeneral ? 104 : 88;
  static constexpr int kConsumerRegisters = kLeavesRoom ? 152 : kIsGeneral ? 200 : 208;
  // The compiler gives a thread as many registers as so many threads of a multiprocessor can have.
  static constexpr int kBoundThreads = kLeavesRoom ? 512 : kThreads;

  // The first of the sums' rows for a row of the tile: of the high bytes; the low ones are 64
  // further.
  static __device__ int sum_row(int row) { return kGrouped ? row + row / 64 * 64 : row; }
};

// The work of a block: its part of K, in every step-th tile from first_tile on.
//
// If T::kLastTokens is half of a tile's tokens, the tiles of a last round that would occupy at most
// half of the blocks are cut in two, from tile whole_ on.
template <class T>
struct Share {
  const bitlinear_cuda_task& task_;
  int tiles, row_tiles_, first_tile, step;
  int slice_begin, slice_end;
  int whole_;

  __device__ Share(const bitlinear_cuda_task& task, int splits)
      : task_(task),
        row_tiles_(T::kIsGeneral ? row_tiles<T::kRows>(task)
                                 : static_cast<int>(ceil_div<int64_t>(task.N, T::kRows))),
        first_tile(static_cast<int>(blockIdx.x) / splits),
        step(static_cast<int>(gridDim.x) / splits) {
    tiles = row_tiles_ * static_cast<int>(ceil_div<int64_t>(task.M, T::kTokens));
    const int slices = static_cast<int>(ceil_div<int64_t>(task.K, kSliceValues));
    const int split = static_cast<int>(blockIdx.x) % splits;
    slice_begin = slices * split / splits;
    slice_end = slices * (split + 1) / splits;
    if constexpr (kCutsLast) {
      const int last = tiles % step;
      whole_ = 2 * last <= step ? tiles - last : tiles;
      tiles += tiles - whole_;
    }
  }
  __device__ bool is_half(int tile) const { return kCutsLast && tile >= whole_; }
  __device__ int64_t row_of(int tile) const {
    const int row_tile = whole_tile(tile) % row_tiles_;
    return T::kIsGeneral ? row_of_tile<T::kRows>(task_, row_tile) : int64_t{row_tile} * T::kRows;
  }
  __device__ const bitlinear_cuda_weight& weight_of(int tile) const {
    return T::kIsGeneral ? weight_at(task_, row_of(tile)) : task_.weights[0];
  }
  __device__ int64_t token_of(int tile) const {
    const int64_t first = int64_t{whole_tile(tile) / row_tiles_} * T::kTokens;
    return is_half(tile) ? first + (tile - whole_) % 2 * T::kLastTokens : first;
  }
  __device__ bool is_last(int tile) const { return tile + step >= tiles; }

 private:
  static constexpr bool kCutsLast = T::kLastTokens < T::kTokens;
  // The tile, or the one of which it is a half.
  __device__ int whole_tile(int tile) const {
    return is_half(tile) ? whole_ + (tile - whole_) / 2 : tile;
  }
};

// The packed bytes that a thread reads of a slice: rows g and g + 8 of each block of 64 rows.
template <class T>
struct Weights {
  uint4 low[T::kReadBlocks], high[T::kReadBlocks];
};

// The same with scales of groups. A thread's bytes of a row have two multipliers, one for each half
// of them.
template <int kWarpgroups, int kRowBlocks, int kTileTokens, bool kIsGeneral, int kTileHalves>
struct Weights<Tile<kWarpgroups, kRowBlocks, kTileTokens, kIsGeneral, kTileHalves, true>> {
  uint4 low[1], high[1];
  uint16_t low_multipliers[2], high_multipliers[2];
};

// The fragments of the products of a slice. In step (p, j) a thread multiplies plane p of half j of
// its bytes.
template <class T>
class Fragments {
 public:
  __device__ explicit Fragments(const Weights<T>& weights) : weights_(weights) {}
  __device__ void make(int p, int j, uint32_t (&fragments)[T::kBlocks][4]) const {
#pragma unroll
    for (int r = 0; r < T::kBlocks; ++r) {
      const uint4 &low = weights_.low[r], &high = weights_.high[r];
      fragments[r][0] = (j == 0 ? low.x : low.z) >> 2 * p & 0x03030303u;
      fragments[r][1] = (j == 0 ? high.x : high.z) >> 2 * p & 0x03030303u;
      fragments[r][2] = (j == 0 ? low.y : low.w) >> 2 * p & 0x03030303u;
      fragments[r][3] = (j == 0 ? high.y : high.w) >> 2 * p & 0x03030303u;
    }
  }

 private:
  const Weights<T>& weights_;
};

template <int kWarpgroups, int kRowBlocks, int kTileTokens, bool kIsGeneral, int kTileHalves>
class Fragments<Tile<kWarpgroups, kRowBlocks, kTileTokens, kIsGeneral, kTileHalves, true>> {
  using T = Tile<kWarpgroups, kRowBlocks, kTileTokens, kIsGeneral, kTileHalves, true>;

 public:
  __device__ explicit Fragments(const Weights<T>& weights) {
    const uint4 &low = weights.low[0], &high = weights.high[0];
    const uint32_t packed[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) codes_[i] = arrange_codes(packed[i]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const GroupTable tables[2] = {GroupTable(weights.low_multipliers[j]),
                                    GroupTable(weights.high_multipliers[j])};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tables_[0][j][i] = tables[i].high;
        tables_[1][j][i] = tables[i].low;
      }
    }
  }
  __device__ void make(int p, int j, uint32_t (&fragments)[2][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragments[r][i] = look_up(tables_[r][j][i % 2], codes_[4 * j + i], p);
      }
    }
  }

 private:
  uint32_t codes_[8];
  uint32_t tables_[2][2][2];  // by byte, half, and row
};

// Reads a thread's weights slice by slice, one tile after the other. Each tile is padded with zeros
// to a multiple of kPrefetched slices.
template <class T>
class WeightReader {
 public:
  __device__ WeightReader(const bitlinear_cuda_task& task, const Share<T>& share)
      : task_(task), share_(share), row_bytes_((task.K + 3) / 4) {
    start_tile(share.first_tile);
  }
  __device__ Weights<T> read() {
    const int64_t offset = int64_t{slice_} * kSliceBytes + 16 * (threadIdx.x % 4);
    const int64_t end = tile_ < share_.tiles && slice_ < share_.slice_end ? row_bytes_ : 0;
    Weights<T> weights;
#pragma unroll
    for (int r = 0; r < T::kReadBlocks; ++r) {
      weights.low[r] = load_chunk<true>(low_[r], offset, end);
      weights.high[r] = load_chunk<true>(high_[r], offset, end);
    }
    if constexpr (T::kGrouped) read_multipliers(offset, weights);
    slice_ += T::kHalves;
    // Both halves have as many slices, the last ones perhaps beyond the end.
    const int begin = slice_ - half();
    if (begin >= share_.slice_end &&
        (begin - share_.slice_begin) % (T::kPrefetched * T::kHalves) == 0) {
      start_tile(tile_ + share_.step);
    }
    return weights;
  }
  // The first of this thread's rows in a tile.
  static __device__ int first_row() {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    return (T::kHalves == 1 ? warp / 4 * (64 * T::kReadBlocks) : 0) + warp % 4 * 16 + g;
  }
  // The first of this thread's slices, which are T::kHalves apart.
  static __device__ int half() { return T::kHalves == 1 ? 0 : static_cast<int>(threadIdx.x) / 128; }

 private:
  __device__ void start_tile(int tile) {
    tile_ = tile;
    slice_ = share_.slice_begin + half();
    const bitlinear_cuda_weight& weight = share_.weight_of(tile);
    const int64_t first = share_.row_of(tile) - weight.begin + first_row();
    const int64_t last = weight.end - weight.begin - 1;
#pragma unroll
    for (int r = 0; r < T::kReadBlocks; ++r) {
      // Rows beyond the last one are computed from it, and not stored.
      low_[r] = weight.w + minimum(first + 64 * r, last) * row_bytes_;
      high_[r] = weight.w + minimum(first + 64 * r + 8, last) * row_bytes_;
    }
    if constexpr (T::kGrouped) {
      low_multipliers_ = multipliers_of(task_, weight.begin + minimum(first, last));
      high_multipliers_ = multipliers_of(task_, weight.begin + minimum(first + 8, last));
    }
  }
  // Not before the predecessor has ended, which wrote them.
  __device__ void read_multipliers(int64_t offset, Weights<T>& weights) const {
    const auto block = static_cast<int>(offset / (BITLINEAR_GROUP_UNIT / 4));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int group = group_of(task_.groups, block + j);
      weights.low_multipliers[j] = low_multipliers_[group];
      weights.high_multipliers[j] = high_multipliers_[group];
    }
  }

  const bitlinear_cuda_task& task_;
  const Share<T>& share_;
  int64_t row_bytes_;
  int tile_, slice_;
  const uint8_t* low_[T::kReadBlocks];
  const uint8_t* high_[T::kReadBlocks];
  const int16_t *low_multipliers_, *high_multipliers_;  // with groups
};

// The sums of a thread: for each block of rows, and each set of accumulators.
template <class T, int kTokens = T::kTokens>
using Sums = int32_t[T::kBlocks * T::kAccumulatorSets][kTokens / 2];

// The copier: brings the activations of the block's tiles into the stages.
template <class T>
__device__ inline void copy_tokens(const Share<T>& share, const Activations& activations,
                                   const CUtensorMap& in_order, uint8_t* stages, Barrier* full,
                                   Barrier* empty) {
  constexpr int kHalfBytes = T::kStageBytes / 2;
  RingPosition ring(T::kStages);
  for (int tile = share.first_tile; tile < share.tiles; tile += share.step) {
    const int64_t group = share.token_of(tile) / 8;
    // A map has boxes of whole tiles.
    const bool is_cut = share.is_half(tile) && activations.q != nullptr;
    const int bytes = is_cut ? kHalfBytes / 2 : kHalfBytes;
    for (int slice = share.slice_begin; slice < share.slice_end; ++slice, ring.advance()) {
      Barrier& barrier = full[ring.stage];
      empty[ring.stage].wait(ring.parity ^ 1);
      barrier.arrive_expecting(2 * bytes);
      for (int half = 0; half < 2; ++half) {
        uint8_t* const stage = stages + ring.stage * T::kStageBytes + half * kHalfBytes;
        const int64_t half_slice = 2 * int64_t{slice} + half;
        if (activations.q == nullptr) {
          copy_tile(stage, in_order, static_cast<int>(half_slice) * (kSliceValues / 2),
                    static_cast<int>(8 * group), barrier);
        } else {
          copy_bulk(stage, activations.q + (half_slice * activations.token_groups + group) * 1024,
                    bytes, barrier);
        }
      }
    }
  }
}

// Adds the products of the block's part of K of a tile, from stage `ring` on, to the sums.
template <class T, int kTokens = T::kTokens>
__device__ inline void multiply(const Share<T>& share, WeightReader<T>& reader,
                                Weights<T> (&prefetched)[T::kPrefetched], uint8_t* stages,
                                Barrier* full, Barrier* empty, RingPosition ring,
                                Sums<T, kTokens>& sums) {
  constexpr int kBlocks = T::kBlocks;
  const int lane = threadIdx.x % 32;
  int previous = -1;
  uint32_t a[T::kDepth][kBlocks][4];
  for (int first = share.slice_begin; first < share.slice_end;
       first += T::kPrefetched * T::kHalves) {
#pragma unroll
    for (int ahead = 0; ahead < T::kPrefetched; ++ahead) {
      const Weights<T> weights = prefetched[ahead];
      prefetched[ahead] = reader.read();
      if (first + ahead * T::kHalves + reader.half() >= share.slice_end) continue;
      const Fragments<T> fragments(weights);
      full[ring.stage].wait(ring.parity);
      const uint32_t base = shared_address(stages + ring.stage * T::kStageBytes);
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const int p = step / 2, j = step % 2;
        fragments.make(p, j, a[step % T::kDepth]);
#pragma unroll
        for (auto& fragment : a[step % T::kDepth]) {
#pragma unroll
          for (uint32_t& word : fragment) fence_operand(word);
        }
        const uint64_t b =
            make_descriptor(base + p / 2 * (T::kStageBytes / 2) + p % 2 * 64 + j * 32);
        wgmma_fence();
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          Wgmma<kTokens>::run(sums[r * T::kAccumulatorSets + step % T::kAccumulatorSets],
                              a[step % T::kDepth][r], b);
        }
        wgmma_commit();
        wgmma_wait<T::kDepth - 1>();
        // No step of the previous stage is in flight any more.
        if (step == T::kDepth - 2 && previous >= 0 && lane == 0) empty[previous].arrive();
      }
      previous = ring.stage;
      ring.advance(T::kHalves);
    }
  }
  wgmma_wait<0>();
  if (lane == 0 && previous >= 0) empty[previous].arrive();
}

// Stores a warpgroup's sums of a tile. Two warpgroups that share K add theirs, each for half of the
// tokens: it first stores the other half's sums for the other warpgroup.
template <class T>
__device__ inline void store_tile_sums(const Sums<T>& sums, int first_row, int half, int32_t* out) {
  constexpr int kSums = T::kTokens / 2 / T::kHalves;  // of a thread and a block of rows, at the end
  const int tig = threadIdx.x % 4;
  const auto at = [&](int r, int i, int part) -> int32_t& {
    const int token = part * (T::kTokens / T::kHalves) + i / 4 * 8 + 2 * tig + i % 2;
    return out[index_of_sum<T::kSumRows>(token, first_row + 64 * r + i % 4 / 2 * 8)];
  };
  const auto sum = [&](int r, int i) {
    const int32_t even = sums[r * T::kAccumulatorSets][i];
    return T::kAccumulatorSets == 1 ? even : even + sums[(r + 1) * T::kAccumulatorSets - 1][i];
  };
  if constexpr (T::kHalves == 2) {
#pragma unroll
    for (int r = 0; r < T::kBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        at(r, i, 1 - half) = half == 0 ? sum(r, kSums + i) : sum(r, i);
      }
    }
    sync_leading_threads<T::kConsumers>();
  }
#pragma unroll
  for (int r = 0; r < T::kBlocks; ++r) {
    int32_t others[kSums] = {};  // all loaded before the first store: the compiler moves no load
    if constexpr (T::kHalves == 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) others[i] = at(r, i, half);
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int32_t mine = half == 0 ? sum(r, i) : sum(r, kSums * (T::kHalves - 1) + i);
      at(r, i, half) = mine + others[i];
    }
  }
}

// Adds the sums of the other blocks of the cluster to this block's sums, for every splits-th
// token, with all of its rows of q.
template <class T>
__device__ inline void add_cluster_sums(const TileRows<T::kRows, T::kConsumers>& rows,
                                        int32_t* sums, int split, int splits, int token_rows) {
  const int step = T::kConsumers / rows.kGroups;
#pragma unroll 4
  for (int i = rows.group; i < T::kTokens / splits; i += step) {
    const int token = (i / token_rows * splits + split) * token_rows + i % token_rows;
#pragma unroll
    for (int byte = 0; byte < (T::kGrouped ? 2 : 1); ++byte) {
      int32_t* const sum_of_rows =
          sums + index_of_sum<T::kSumRows>(token, T::sum_row(rows.row) + 64 * byte);
      int4 sum = *reinterpret_cast<int4*>(sum_of_rows);
      for (int rank = 0; rank < splits; ++rank) {
        if (rank != split) sum = add(sum, load_remote(sum_of_rows, rank));
      }
      *reinterpret_cast<int4*>(sum_of_rows) = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kBoundThreads, 1)
    wgmma_kernel(const __grid_constant__ bitlinear_cuda_task task,
                 const __grid_constant__ Activations activations,
                 const __grid_constant__ CUtensorMap in_order, int splits) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kTokens = T::kTokens, kBlocks = T::kBlocks, kConsumers = T::kConsumers;
  extern __shared__ uint8_t dynamic[];
  __shared__ Barrier full[T::kStages], empty[T::kStages], sums_full, sums_empty;
  __shared__ float s_x[kTokens];
  __shared__ int32_t q_sum[kTokens];
  uint8_t* const stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
  int32_t* const sums_out = reinterpret_cast<int32_t*>(stages + T::kStages * T::kStageBytes);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Share<T> share(task, splits);

  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      full[s].init(1);
      empty[s].init(kConsumers / 32 / T::kHalves);
    }
    sums_full.init(kConsumers);
    sums_empty.init(kStorers);
    publish_barriers();
  }
  __syncthreads();
  allow_successor();

  // Writes a tile of y, or every step-th of its tokens.
  const auto write = [&](auto batch, const auto& rows, int tile, int first, int step) {
    const int64_t m = share.token_of(tile);
    const int tokens = static_cast<int>(minimum<int64_t>(task.M - m, kTokens));
    const auto load_sums = [&](int token, int row) {
      const auto load = [&](int sum_row) {
        return *reinterpret_cast<const int4*>(sums_out + index_of_sum<T::kSumRows>(token, sum_row));
      };
      const int first_row = T::sum_row(row);
      if constexpr (T::kGrouped) {
        return join_bytes(load(first_row), load(first_row + 64), q_sum[token]);
      } else {
        return load(first_row);
      }
    };
    constexpr int kBatch = T::kGrouped ? 2 : decltype(batch)::value;
    write_tile<kBatch, !T::kIsGeneral>(task, share.weight_of(tile), rows, m, {first, step, tokens},
                                       s_x, q_sum, load_sums);
  };

  if (warp >= kConsumers / 32) {
    if constexpr (T::kReallocatesRegisters) shrink_registers<T::kProducerRegisters>();
    wait_for_predecessor();
    const int thread = static_cast<int>(threadIdx.x) - kConsumers;
    if (thread == 0) {
      copy_tokens<T>(share, activations, in_order, stages, full, empty);
    } else if (thread >= 32) {
      uint32_t parity = 0;
      for (int tile = share.first_tile; !share.is_last(tile); tile += share.step, parity ^= 1) {
        // A warp writes a token of a tile of 128 or 256 rows.
        constexpr int kParts = T::kRows == 256 ? 2 : 1;
        const TileRows<T::kRows, kStorers, kParts> rows(share.weight_of(tile), share.row_of(tile),
                                                        thread - 32);
        sums_full.wait(parity);
        constexpr int kBatch = T::kIsGeneral ? 4 / kParts : 8;
        write(std::integral_constant<int, kBatch>{}, rows, tile, 0, 1);
        sums_empty.arrive();
      }
    }
    return;
  }

  if constexpr (T::kReallocatesRegisters) grow_registers<T::kConsumerRegisters>();
  WeightReader<T> reader(task, share);
  Weights<T> prefetched[T::kPrefetched];
  if constexpr (T::kGrouped) wait_for_predecessor();  // it wrote the multipliers
#pragma unroll
  for (auto& weights : prefetched) weights = reader.read();
  if constexpr (!T::kGrouped) wait_for_predecessor();

  const int last =
      share.first_tile + (share.tiles - 1 - share.first_tile) / share.step * share.step;
  using Rows = TileRows<T::kRows, kConsumers>;
  Rows rows;
  if (!T::kLoadsRowsLate) rows = Rows(share.weight_of(last), share.row_of(last), threadIdx.x);
  const int half = reader.half();
  RingPosition tile_ring(T::kStages);
  uint32_t parity = 1;
  for (int tile = share.first_tile; tile < share.tiles; tile += share.step, parity ^= 1) {
    // Scale and sum of one token, for the end of the tile.
    const int64_t m = share.token_of(tile) + threadIdx.x;
    const float token_scale = activations.s_x[minimum(m, task.M - 1)];
    const int32_t token_sum = activations.q_sum[minimum(m, task.M - 1)];

    Sums<T> sums = {};
    RingPosition ring = tile_ring;
    ring.advance(half);
    multiply<T>(share, reader, prefetched, stages, full, empty, ring, sums);
    tile_ring.advance(share.slice_end - share.slice_begin);

    sums_empty.wait(parity);
    store_tile_sums<T>(sums, T::sum_row(reader.first_row()), half, sums_out);
    if (threadIdx.x < kTokens) {
      s_x[threadIdx.x] = token_scale;
      q_sum[threadIdx.x] = token_sum;
    }
    if (!share.is_last(tile)) sums_full.arrive();
  }

  if (T::kLoadsRowsLate) rows = Rows(share.weight_of(last), share.row_of(last), threadIdx.x);
  // All consumers write the last tile. Each block of a cluster writes its share of the tokens.
  const int split = static_cast<int>(blockIdx.x) % splits;
  if (splits > 1) {
    sync_cluster();
    add_cluster_sums<T>(rows, sums_out, split, splits, task.act_bits == 8 ? 1 : 2);
    sync_cluster();  // no block may leave while others read its sums
  } else {
    sync_leading_threads<kConsumers>();
  }
  write(std::integral_constant<int, 4>{}, rows, last, split, splits);
#endif
}

template <class T>
LaunchConfig launch_config(int64_t blocks, int splits) {
  return {dim3(static_cast<unsigned>(blocks)), T::kThreads, T::kSharedBytes, splits};
}

// The map of a matrix of rows x columns for tiles of 128 bytes of some rows, with the swizzle of
// wgmma.
inline cudaError_t map_matrix(CUtensorMapDataType type, int value_bytes, const void* matrix,
                              int64_t rows, int64_t columns, int tile_rows, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encode> cached;  // the driver's function: this library does not link to it
  Encode encode = cached.load();
  if (encode == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &answer);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &answer);
#endif
    if (error != cudaSuccess) return error;
    if (found == nullptr) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode>(found);
    cached.store(encode);
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch = static_cast<cuuint64_t>(columns * value_bytes);
  const cuuint32_t tile[] = {static_cast<cuuint32_t>(128 / value_bytes),
                             static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(matrix), sizes, &pitch, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Makes a kernel read tokens in order, (M, K), through a map for tiles of this many tokens: then
// q->q is null. Other layouts need no map.
inline cudaError_t map_tokens(const bitlinear_cuda_task& task, int tokens, Activations* q,
                              CUtensorMap* map) {
  *map = {};
  if (q->token_groups != 0) return cudaSuccess;
  const cudaError_t error =
      map_matrix(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, q->q, task.M, q->q_stride, tokens, map);
  q->q = nullptr;
  return error;
}

template <class T>
cudaError_t launch(const Call& call, const Activations& activations, int splits) {
  const bitlinear_cuda_task& task = call.task;
  int64_t tiles = row_tiles<T::kRows>(task) * ceil_div<int64_t>(task.M, T::kTokens);
  // A block computes one tile after the other; a cluster only one.
  if (splits == 1) tiles = minimum<int64_t>(tiles, call.device.multiprocessors);
  Activations q = activations;
  CUtensorMap in_order;
  const cudaError_t error = map_tokens(task, T::kTokens, &q, &in_order);
  if (error != cudaSuccess) return error;
  return launch_kernel<wgmma_kernel<T>>(launch_config<T>(tiles * splits, splits), call, task, q,
                                        in_order, splits);
}

// Queried once per device, tile and number of splits.
template <class T>
bool runs_clusters(const Device& device, int splits) {
  enum Answer { kUnknown, kYes, kNo };
  static std::atomic<int> answers[kCachedDevices][9];
  const auto query = [&] {
    return has_room_for_cluster<wgmma_kernel<T>>(launch_config<T>(splits, splits), device);
  };
  if (device.index >= kCachedDevices) return query();
  std::atomic<int>& answer = answers[device.index][splits];
  if (answer.load() == kUnknown) answer.store(query() ? kYes : kNo);
  return answer.load() == kYes;
}

// Calls `f` with the tile of a plan for scales of groups. Two warpgroups share the rows of the low
// tiles, because one alone takes longer for a product.
template <class Result, class F>
Result with_group_tile(const WgmmaPlan& plan, Result unknown, const F& f) {
  const auto matches = [&](int rows, int tokens) {
    return plan.rows == rows && plan.tokens == tokens && plan.halves == 1;
  };
  if (matches(128, 32)) return f(Tile<2, 2, 32, true, 2, true>{});
  if (matches(128, 64)) return f(Tile<2, 2, 64, true, 2, true>{});
  if (matches(128, 96)) return f(Tile<2, 2, 96, true, 2, true>{});
  if (matches(128, 128)) return f(Tile<2, 2, 128, true, 2, true>{});
  if (matches(256, 32)) return f(Tile<2, 2, 32, true, 1, true>{});
  if (matches(256, 64)) return f(Tile<2, 2, 64, true, 1, true>{});
  if (matches(256, 96)) return f(Tile<2, 2, 96, true, 1, true>{});
  if (matches(256, 128)) return f(Tile<2, 2, 128, true, 1, true>{});
  return unknown;
}

// Calls `f` with the tile of a plan.
template <bool kIsGeneral, class Result, class F>
Result with_tile(const WgmmaPlan& plan, Result unknown, const F& f) {
  const auto matches = [&](int rows, int tokens, int halves = 1) {
    return plan.rows == rows && plan.tokens == tokens && plan.halves == halves;
  };
  if (matches(64, 32)) return f(Tile<1, 1, 32, kIsGeneral>{});
  if (matches(64, 64)) return f(Tile<1, 1, 64, kIsGeneral>{});
  if (matches(64, 64, 2)) return f(Tile<2, 1, 64, kIsGeneral, 2>{});
  if (matches(64, 128, 2)) return f(Tile<2, 1, 128, kIsGeneral, 2>{});
  if (matches(128, 32)) return f(Tile<2, 1, 32, kIsGeneral>{});
  if (matches(128, 64)) return f(Tile<2, 1, 64, kIsGeneral>{});
  if (matches(128, 96)) return f(Tile<2, 1, 96, kIsGeneral>{});
  if (matches(128, 128)) return f(Tile<2, 1, 128, kIsGeneral>{});
  if (matches(256, 32)) return f(Tile<2, 2, 32, kIsGeneral>{});
  if (matches(256, 64)) return f(Tile<2, 2, 64, kIsGeneral>{});
  if (matches(256, 96)) return f(Tile<2, 2, 96, kIsGeneral>{});
  if (matches(256, 128)) return f(Tile<2, 2, 128, kIsGeneral>{});
  return unknown;
}

template <bool kIsGeneral>
cudaError_t launch(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  return with_tile<kIsGeneral>(plan, cudaErrorInvalidValue, [&](auto tile) {
    return launch<decltype(tile)>(call, q, plan.splits);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace bitlinear
