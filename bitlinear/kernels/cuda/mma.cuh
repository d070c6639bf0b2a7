// y = epilogue(q @ w^T) for many tokens, with the tensor cores of sm_80 and later.
//
// A block computes a tile of y. It copies blocks of 256 values of k (64 packed bytes of each weight
// row, 256 bytes of each token) through a ring of stages in shared memory. From there lanes load 16
// bytes at a time, which already have the order of the fragments of mma.m16n8k32: a packed byte
// shifted by 0, 2, 4 or 6 and masked is an unsigned weight code, and the quantiser stores the
// activations in four planes to match. In small tiles warps share k, so that small problems have
// more blocks.
//
// Bound: cycles of a multiprocessor for 256 values of k of a tile of 256 x 128.
//   Products: 4096 at the rate of an A100, 2048 at the peak of an H100 (which only
//     wgmma reaches, not mma.sync).
//   Shared memory: 1280. Each warp loads 8 + 32 chunks per lane, for 64 rows x 64 tokens.
//   Shifts and masks: 908. Seven instructions for four registers of weights, which serve 64 tokens.
//   Issue: 1224. Of the 612 instructions of a warp 256 are mma.
//   Copies: 48 KB, or 12 (A100) to 24 bytes per cycle. A row has a quarter of the bytes of a
//     token, so a tile has more rows than tokens.
// So large products are bound by the tensor cores: 8192 x 8192 with M = 4096 (550 G operations) by
// 881 us on an A100 and 278 us on an H100, where its 117 MB (bf16) take 39 us. With few tokens the
// bound is reading w; but each block also fetches all of K for its tokens, through L2.
//
// Measured on an H100 (where the other kernels leave it only unaligned rows), in us with the
// quantiser, 4096 x 4096: 6.3 for M = 1, 6.7 for 16, 11.5 for 64, 17.5 for 256, 45.8 for 1024. By
// the profiler 8192 x 8192 with M = 4096 takes 627 us (877 Top/s): mma.sync runs in 69 % of the
// cycles, at 1.2 instructions per cycle and 13 % of the warps. For 4096 x 4096 with M = 1024 it
// runs in 65 %.
//
// Registers per thread (nvcc 13.0, sm_80 / sm_90a; no spills), shared memory and blocks per
// multiprocessor (of 164 / 228 KB):
//   256 x 128: 255 / 251, 145 KB, 1 / 1      64 x 32: 128 / 128, 96 KB, 1 / 2
//   128 x 128: 151 / 151,  81 KB, 1 / 1      32 x 16: 128 / 128, 72 KB, 2 / 2
//   128 x 64:  150 / 151,  97 KB, 1 / 1
// All but the first fit the 99 KB of sm_86, sm_89 and sm_120.
#pragma once

#include <math.h>

#include <iterator>

#include "ampere.cuh"
#include "epilogue.cuh"
#include "groups.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 16;  // bytes that a thread copies or loads at a time

// The tile of a block, divided among its warps along rows and tokens; warps that are left divide k.
// A warp has kRowParts parts of 16 rows times kTokenParts parts of 8 tokens, with four accumulators
// each. With scales of groups two parts are the high and the low bytes of the same 16 rows.
template <int kRowWarps_, int kTokenWarps_, int kRowParts_, int kTokenParts_, int kStages_,
          int kBlocksPerSm_, bool kGrouped_ = false>
struct Tile {
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_;
  static constexpr int kRowParts = kRowParts_, kTokenParts = kTokenParts_;
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kReadParts = kGrouped ? kRowParts / 2 : kRowParts;  // of weights
  static constexpr int kRows = kRowWarps * kReadParts * 16;
  static constexpr int kSumRows = kRowWarps * kRowParts * 16;
  static constexpr int kTokens = kTokenWarps * kTokenParts * 8;
  static constexpr int kDepth = kWarps / (kRowWarps * kTokenWarps);  // blocks of k in a stage
  static_assert(kTokens % 16 == 0 && (kRows % 64 == 0 || 64 % kRows == 0), "see copy_stage()");
  static_assert(kTokenParts % 2 == 0, "see multiply()");

  static constexpr int kQBytes = kDepth * kTokens * kSliceValues;  // of a stage
  static constexpr int kWBytes = kDepth * kRows * kSliceBytes;
  static constexpr int kStageBytes = kQBytes + kWBytes;
  // In the end the sums overwrite the stages: (kDepth, kTokens, kPitch). The pitch spreads both the
  // scattered writes and the vector reads over all banks.
  static constexpr int kPitch = kSumRows + 4;
  // The row of the sums for a row of the tile: of the high bytes; the low ones are 16 further.
  static __device__ int sum_row(int row) { return kGrouped ? row + row / 16 * 16 : row; }
  static constexpr int kRingBytes = kStages * kStageBytes > kDepth * kTokens * kPitch * 4
                                        ? kStages * kStageBytes
                                        : kDepth * kTokens * kPitch * 4;
  static constexpr int kSharedBytes = kRingBytes + kTokens * 8;  // s_x and q_sum of the tokens
};

// The next chunks that a thread copies: of every 16th token and of every 64th row, from its first
// ones on.
struct Source {
  const int8_t* q;
  int q_stride;
  int tokens;  // tokens that exist, from the first one of this thread on
  const uint8_t* w;
  int row_bytes;
  int rows;
  int w_left;  // bytes of the rows, from w on
  int blocks;  // of k that are left
};

// Starts copying the next kDepth blocks of k to a stage. Shared memory: q as (kDepth, kTokens, 256)
// with the planes of odd tokens swapped in pairs, then w as (kDepth, kRows, 64). So eight lanes
// that load the chunks of one plane, for two tokens or rows, have no bank conflict.
template <class Tile, bool kAligned>
__device__ inline void copy_stage(Source& source, uint8_t* stage) {
  const int thread = threadIdx.x;
  uint8_t* const q_stage = stage + (thread ^ thread / 16 % 2 * 4) * kChunk;
#pragma unroll
  for (int i = 0; i < Tile::kQBytes / kChunk / kThreads; ++i) {
    const int token = 16 * i % Tile::kTokens, depth = 16 * i / Tile::kTokens;
    copy_async(q_stage + i * kThreads * kChunk,
               source.q + token * source.q_stride + depth * kSliceValues,
               token < source.tokens && (Tile::kDepth == 1 || depth < source.blocks));
  }
  uint8_t* const w_stage = stage + Tile::kQBytes + thread * kChunk;
  // Unrolled loads of single bytes would need too many registers.
#pragma unroll(kAligned ? 8 : 1)
  for (int i = 0; i < Tile::kWBytes / kChunk / kThreads; ++i) {
    const int row = 64 * i % Tile::kRows, offset = 64 * i / Tile::kRows * kSliceBytes;
    const uint8_t* const w = source.w + row * source.row_bytes;
    uint8_t* const to = w_stage + i * kThreads * kChunk;
    if constexpr (kAligned) {
      copy_async(to, w + offset, row < source.rows && offset < source.w_left);
    } else {
      *reinterpret_cast<uint4*>(to) =
          load_chunk<false>(w, offset, row < source.rows ? source.w_left : 0);
    }
  }
  source.q += Tile::kDepth * kSliceValues;
  source.w += Tile::kDepth * kSliceBytes;
  source.w_left -= Tile::kDepth * kSliceBytes;
  source.blocks -= Tile::kDepth;
}

__device__ inline uint4 load_shared(const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); }

template <class Tile>
using Sums = int32_t[Tile::kRowParts][Tile::kTokenParts][4];

// The multipliers of the rows of a lane, with scales of groups.
template <class Tile>
struct Multipliers {
  const int16_t* rows[Tile::kReadParts][2];  // rows g and g + 8 of each part

  // `last` is the last row of the weight, of all rows as `first` is.
  __device__ Multipliers(const bitlinear_cuda_task& task, int64_t first, int64_t last) {
#pragma unroll
    for (int r = 0; r < Tile::kReadParts; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[r][i] = multipliers_of(task, minimum(first + 16 * r + 8 * i, last));
      }
    }
  }
};

// The tables of a lane's chunk of each row: one for each half of it.
template <class Tile>
struct Tables {
  uint32_t bytes[Tile::kReadParts][2][2][2];  // by part, byte, half and row

  __device__ Tables(const bitlinear_cuda_groups& groups, const Multipliers<Tile>& multipliers,
                    int block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = group_of(groups, block + half);
#pragma unroll
      for (int r = 0; r < Tile::kReadParts; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const GroupTable table(static_cast<uint16_t>(multipliers.rows[r][i][group]));
          bytes[r][0][half][i] = table.high;
          bytes[r][1][half][i] = table.low;
        }
      }
    }
  }
};
struct NoTables {};

// Adds the product over one block of k. `w`, `q_even` and `q_odd` are the addresses of this lane's
// chunks of the weights, and of the first even and the first odd plane.
template <class Tile, class Tables>
__device__ inline void multiply(const uint8_t* w, const uint8_t* q_even, const uint8_t* q_odd,
                                const Tables& tables, Sums<Tile>& sums) {
  // Rows g and g + 8 of each part: four words of each, in the order of the fragments.
  uint32_t packed[Tile::kReadParts][8];
#pragma unroll
  for (int r = 0; r < Tile::kReadParts; ++r) {
    const uint4 low = load_shared(w + 16 * r * kSliceBytes);
    const uint4 high = load_shared(w + (16 * r + 8) * kSliceBytes);
    const uint32_t words[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) packed[r][i] = Tile::kGrouped ? arrange_codes(words[i]) : words[i];
  }
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    uint32_t a[Tile::kRowParts][8];
#pragma unroll
    for (int r = 0; r < Tile::kRowParts; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (Tile::kGrouped) {
          a[r][i] = look_up(tables.bytes[r / 2][r % 2][i / 4][i % 2], packed[r / 2][i], p);
        } else {
          a[r][i] = packed[r][i] >> 2 * p & 0x03030303u;
        }
      }
    }
    const uint8_t* const q = (p % 2 ? q_odd : q_even) + p / 2 * 2 * kSliceBytes;
    // Two parts at a time, so that the next product of an accumulator does not wait for its
    // previous one.
#pragma unroll
    for (int t = 0; t < Tile::kTokenParts; t += 2) {
      const uint4 b[2] = {load_shared(q + 8 * t * kSliceValues),
                          load_shared(q + 8 * (t + 1) * kSliceValues)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t b0 = half ? b[i].z : b[i].x, b1 = half ? b[i].w : b[i].y;
#pragma unroll
          for (int r = 0; r < Tile::kRowParts; ++r) {
            const uint32_t (&f)[8] = a[r];
            mma_u8s8(sums[r][t + i], f[4 * half], f[4 * half + 1], f[4 * half + 2], f[4 * half + 3],
                     b0, b1);
          }
        }
      }
    }
  }
}

// The position of a block's tile in y, and of a thread's first sums in the tile.
template <class Tile>
struct Position {
  int64_t n, m;
  int rows, tokens;  // of the tile, that exist in y
  int g, tig;        // in fragments: the row or token, and the quarter of its 64 bytes
  int depth, row, token;

  // Consecutive blocks share tokens: a token has four times the bytes of a row.
  __device__ Position(const bitlinear_cuda_task& task, unsigned block, int thread) {
    const unsigned tiles = static_cast<unsigned>(row_tiles<Tile::kRows>(task));
    n = row_of_tile<Tile::kRows>(task, static_cast<int>(block % tiles));
    m = int64_t{block / tiles} * Tile::kTokens;
    rows = static_cast<int>(minimum<int64_t>(Tile::kRows, weight_at(task, n).end - n));
    tokens = static_cast<int>(minimum<int64_t>(Tile::kTokens, task.M - m));
    const int warp = thread / 32;
    g = thread % 32 / 4;
    tig = thread % 4;
    depth = warp / (Tile::kRowWarps * Tile::kTokenWarps);
    row = warp % Tile::kRowWarps * (16 * Tile::kReadParts);
    token = warp / Tile::kRowWarps % Tile::kTokenWarps * (8 * Tile::kTokenParts);
  }
};

// blockIdx.x and threadIdx.x, read again. Values derived from them at the start then need no
// registers during the main loop.
__device__ inline unsigned reread_block_index() {
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}
__device__ inline int reread_thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

template <class Tile>
__device__ inline Source first_source(const bitlinear_cuda_task& task,
                                      const Activations& activations,
                                      const Position<Tile>& position) {
  const int token = threadIdx.x / 16, q_offset = threadIdx.x % 16 * kChunk;
  const int row = threadIdx.x / 4 % Tile::kRows, depth = threadIdx.x / 4 / Tile::kRows;
  const int w_offset = depth * kSliceBytes + threadIdx.x % 4 * kChunk;
  const int row_bytes = static_cast<int>((task.K + 3) / 4);
  Source source;
  source.q = activations.q + (position.m + token) * activations.q_stride + q_offset;
  source.q_stride = static_cast<int>(activations.q_stride);
  source.tokens = position.tokens - token;
  source.w = weight_row(task, position.n, row_bytes) + row * row_bytes + w_offset;
  source.row_bytes = row_bytes;
  source.rows = position.rows - row;
  source.w_left = row_bytes - w_offset;
  source.blocks = ceil_div(row_bytes, kSliceBytes);
  return source;
}

// kAligned: the rows of w start at multiples of 16 bytes.
template <class Tile, bool kAligned>
__global__ void __launch_bounds__(kThreads, Tile::kBlocksPerSm)
    mma_kernel(const __grid_constant__ bitlinear_cuda_task task,
               const __grid_constant__ Activations activations) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) uint8_t shared[];
  float* const s_x = reinterpret_cast<float*>(shared + Tile::kRingBytes);
  int32_t* const q_sum = reinterpret_cast<int32_t*>(s_x + Tile::kTokens);
  const Position<Tile> position(task, blockIdx.x, threadIdx.x);
  Source source = first_source(task, activations, position);

  // Prefetches weights while the quantiser still runs.
  if (kAligned && threadIdx.x == 0 && position.m == 0) {
    prefetch_l2(source.w,
                static_cast<uint32_t>(minimum(position.rows * source.row_bytes, 256 * 1024)));
  }
  allow_successor();
  wait_for_predecessor();

#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (source.blocks > 0) copy_stage<Tile, kAligned>(source, shared + s * Tile::kStageBytes);
    commit_copies();
  }
  if (threadIdx.x < position.tokens) {
    s_x[threadIdx.x] = activations.s_x[position.m + threadIdx.x];
    q_sum[threadIdx.x] = activations.q_sum[position.m + threadIdx.x];
  }

  const int w_offset = Tile::kQBytes +
                       (position.depth * Tile::kRows + position.row + position.g) * kSliceBytes +
                       position.tig * kChunk;
  const int q_even = (position.depth * Tile::kTokens + position.token + position.g) * kSliceValues +
                     position.g % 2 * kSliceBytes + position.tig * kChunk;
  Sums<Tile> sums = {};
  int read = 0;
  const int64_t first_row = position.n + position.row + position.g;
  const Multipliers<Tile> multipliers(task, first_row, position.n + position.rows - 1);
  int block = position.depth * (kSliceValues / BITLINEAR_GROUP_UNIT) + 2 * position.tig;
  int blocks_left = ceil_div(source.row_bytes, kSliceBytes) - position.depth;
#pragma unroll 1
  for (; blocks_left > -position.depth; blocks_left -= Tile::kDepth) {
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // the stage has arrived, and no thread reads the previous one any more
    const int before = (read == 0 ? Tile::kStages * Tile::kStageBytes : read) - Tile::kStageBytes;
    if (source.blocks > 0) copy_stage<Tile, kAligned>(source, shared + before);
    commit_copies();
    if (Tile::kDepth == 1 || blocks_left > 0) {
      const uint8_t* const stage = shared + read;
      const auto add = [&](const auto& tables) {
        multiply<Tile>(stage + w_offset, stage + q_even, stage + (q_even ^ kSliceBytes), tables,
                       sums);
      };
      if constexpr (Tile::kGrouped) {
        add(Tables<Tile>(task.groups, multipliers, block));
        block += Tile::kDepth * (kSliceValues / BITLINEAR_GROUP_UNIT);
      } else {
        add(NoTables{});
      }
    }
    read = read == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : read + Tile::kStageBytes;
  }

  __syncthreads();
  const Position<Tile> end_position(task, reread_block_index(), reread_thread_index());
  const bitlinear_cuda_weight& weight = weight_at(task, end_position.n);
  const TileRows<Tile::kRows, kThreads> rows(weight, end_position.n, threadIdx.x);
  int32_t* const codes = reinterpret_cast<int32_t*>(shared);
  int32_t* const thread_codes =
      codes +
      (end_position.depth * Tile::kTokens + end_position.token + 2 * end_position.tig) *
          Tile::kPitch +
      Tile::sum_row(end_position.row) + end_position.g;
  store_sums<Tile::kPitch>(thread_codes, sums);
  __syncthreads();
  const auto load_sums = [&](int token, int row) {
    int4 sum = make_int4(0, 0, 0, 0);
#pragma unroll
    for (int depth = 0; depth < Tile::kDepth; ++depth) {
      sum = add(sum, *reinterpret_cast<const int4*>(
                         codes + (depth * Tile::kTokens + token) * Tile::kPitch + row));
    }
    return sum;
  };
  const auto load_codes = [&](int token, int row) {
    const int first = Tile::sum_row(row);
    if constexpr (Tile::kGrouped) {
      return join_bytes(load_sums(token, first), load_sums(token, first + 16), q_sum[token]);
    } else {
      return load_sums(token, first);
    }
  };
  write_tile(task, weight, rows, end_position.m, {0, 1, end_position.tokens}, s_x, q_sum,
             load_codes);
#endif
}

template <class Tile, bool kAligned>
cudaError_t launch(const Call& call, const Activations& q) {
  const int64_t blocks =
      row_tiles<Tile::kRows>(call.task) * ceil_div<int64_t>(call.task.M, Tile::kTokens);
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), kThreads, Tile::kSharedBytes};
  return launch_kernel<mma_kernel<Tile, kAligned>>(config, call, call.task, q);
}

template <class Tile>
cudaError_t launch(const Call& call, const Activations& q) {
  const bool aligned = weights_aligned(call.task);
  return aligned ? launch<Tile, true>(call, q) : launch<Tile, false>(call, q);
}

struct Candidate {
  int rows, products, tokens, shared_bytes;  // products: as many rows as are multiplied
  cudaError_t (*launch)(const Call&, const Activations&);
};
template <class Tile>
constexpr Candidate candidate() {
  return {Tile::kRows, Tile::kSumRows, Tile::kTokens, Tile::kSharedBytes, launch<Tile>};
}
// The tile with the fewest cycles per value of k, by a model fitted to times on an H100. A
// multiprocessor needs as many rounds as it gets tiles. In each round the products hide only a part
// of the loads. Refit: `python -m scripts.bench --device cuda`, with
// bitlinear_cuda_force(BITLINEAR_CUDA_MMA).
template <int kCount>
const Candidate& choose_tile(const Candidate (&candidates)[kCount], int64_t M, int64_t N,
                             const Device& device) {
  constexpr float kProductsPerCycle = 2500, kBytesPerCycle = 80;
  const Candidate* best = std::end(candidates) - 1;
  float best_cost = INFINITY;
  for (const Candidate& tile : candidates) {
    if (tile.shared_bytes > device.shared_bytes) continue;
    const int64_t tiles = ceil_div<int64_t>(M, tile.tokens) * ceil_div<int64_t>(N, tile.rows);
    const int64_t rounds = ceil_div<int64_t>(tiles, device.multiprocessors);
    const float cost = static_cast<float>(rounds) *
                       (static_cast<float>(tile.tokens * tile.products) / kProductsPerCycle +
                        static_cast<float>(tile.tokens + tile.rows / 4) / kBytesPerCycle);
    if (cost < best_cost) {
      best = &tile;
      best_cost = cost;
    }
  }
  return *best;
}

}  // namespace
}  // namespace cuda
}  // namespace bitlinear
