// Which CUDA kernel computes a product, and how: pure functions of the device and the sizes,
// without CUDA's headers, tested by tests/kernels/test_cuda_heuristics.py.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "../integers.h"
#include "task.h"

namespace bitlinear {
namespace cuda {

struct Device {
  int capability;  // of the code that runs on it: 10 * major + minor, for example 90
  bool has_wgmma;  // the code was compiled for sm_90a
  int multiprocessors;
  int shared_bytes;  // that a block can have
  int index;         // as CUDA counts
};

struct Shape {
  int64_t M, N, K;
  bool x_aligned, w_aligned;  // every row of x, or of w, starts at a multiple of 16 bytes
};

// Packed bytes that the tensor-core kernels take at a time from a weight row: 16 for each of the
// four lanes that share a row in a fragment.
constexpr int kSliceBytes = 64;
constexpr int kSliceValues = 4 * kSliceBytes;

// Tokens that the workspace has room for: whole tiles, so that a kernel may read all of its last.
constexpr int64_t padded_tokens(int64_t M) {
  if (M <= 64) return M <= 32 ? 32 : 64;
  const int64_t of_96 = round_up(M, 96), of_128 = round_up(M, 128);
  return of_96 > of_128 ? of_96 : of_128;
}

// ----------------------------------------------------------------------------- the quantiser

constexpr int kQuantizerWarps = 32;  // of a block, at most
constexpr int kQuantizerGroups = 2;  // of 16 values, that a thread keeps between the two passes

struct QuantizerPlan {
  int warps;   // that share a token
  int tokens;  // of a block
};

constexpr QuantizerPlan plan_quantizer(const Device& device, int64_t M, int64_t K) {
  // Of few tokens a thread gets one group, as that is soon done; of many two, for more loads at a
  // time. With enough warps it has no others, and so reads all of its values once.
  constexpr int64_t kBlockWarps = 8;
  const int64_t groups = M < 8 * device.multiprocessors ? 1 : kQuantizerGroups;
  const int64_t warps = minimum(ceil_div(K, groups * 16 * 32), kQuantizerWarps);
  // Blocks of several tokens are fewer to start, but all multiprocessors should have one. A power
  // of two, as the workspace has room for a multiple of 32 tokens.
  int tokens = 1;
  while (2 * tokens * warps <= kBlockWarps && 2 * tokens * device.multiprocessors <= M) tokens *= 2;
  return {static_cast<int>(warps), tokens};
}

// ---------------------------------------------------------------------- the ring of weights

// The GEMV and the small-batch kernel fetch weights into a ring in shared memory. Bytes of a row in
// a stage, at most; shorter copies cost more than they carry.
constexpr int kChunkBytes = 1024;

// Rows an odd multiple of 64 bytes apart have no bank conflicts among the rows of a fragment.
constexpr int row_pitch(int64_t row_bytes) {
  return static_cast<int>((minimum(row_bytes, kChunkBytes) + 63) / 64 * 64 | 64);
}

// ------------------------------------------------------------------------------------- GEMV

constexpr int kGemvTokens = 4;
constexpr int kGemvWarps = 8;  // that multiply, each 16 rows at a time
// It quantises the tokens itself, and first holds them in registers: groups of 16 values per
// thread.
constexpr int kGemvGroups = 4;
constexpr int64_t kGemvRegisterValues = int64_t{kGemvGroups} * 16 * 32 * kGemvWarps;
constexpr int kGemvTokenPad = 64;  // between tokens in shared memory, against bank conflicts
// What it declares as shared memory, at most (the compiler adds a little of its own).
constexpr int kGemvStaticBytes = 5632;

// A stage holds a chunk of each of so many rows.
constexpr int gemv_tile_rows(int log_split) { return 16 * kGemvWarps >> log_split; }

constexpr int64_t gemv_stage_bytes(int64_t row_bytes, int log_split) {
  return int64_t{gemv_tile_rows(log_split)} * row_pitch(row_bytes);
}

// The shared memory that is left for a ring of stages.
constexpr int64_t gemv_room(const Device& device, const Shape& shape) {
  const int64_t activations = shape.M * (round_up(shape.K, kSliceValues) + kGemvTokenPad);
  return device.shared_bytes - kGemvStaticBytes - activations;
}

struct GemvPlan {
  int blocks;
  int log_split;  // 1, 2 or 3: the logarithm of how many of 8 warps share 16 rows, along K
  int ring_bytes;
};

constexpr GemvPlan plan_gemv(const Device& device, const Shape& shape) {
  // One block per multiprocessor leaves room for one of the successor's, which loads weights
  // meanwhile. Where a block's weights exceed its ring, two keep more of them under way.
  constexpr int64_t kRing = 96 * 1024, kRingOfTwo = 70 * 1024, kBlockRows = 8;
  const int64_t row_bytes = ceil_div(shape.K, 4);
  const int64_t room = gemv_room(device, shape);
  const bool two = shape.N * row_bytes > device.multiprocessors * (kRing + 10 * 1024) &&
                   2 * (device.shared_bytes - room + kRingOfTwo) <= device.shared_bytes;
  const int64_t blocks =
      minimum(ceil_div(shape.N, kBlockRows), int64_t{device.multiprocessors} * (two ? 2 : 1));
  const int64_t ring_bytes = minimum(two ? kRingOfTwo : kRing, room);

  // Tall tiles end in fewer barriers: as tall as the rows of a block, if the ring holds four
  // stages, or all that the block fills.
  const int64_t rows = ceil_div(shape.N, blocks);
  const int64_t chunks = ceil_div(row_bytes, kChunkBytes);
  int log_split = 3;
  for (int candidate = 2; candidate >= 1; --candidate) {
    const int64_t tile_rows = gemv_tile_rows(candidate);
    const int64_t filled = ceil_div(rows, tile_rows) * chunks;
    const int64_t held = filled < 2 ? 2 : minimum(filled, 4);
    if (rows > tile_rows / 2 && held * gemv_stage_bytes(row_bytes, candidate) <= ring_bytes) {
      log_split = candidate;
    }
  }
  return {static_cast<int>(blocks), log_split, static_cast<int>(ring_bytes)};
}

// ------------------------------------------------------------------------------- small batch

constexpr int kSmallBatchTokens = 32;
constexpr int kSmallBatchWarps = 8;  // that multiply, sharing K
constexpr int kSmallBatchStageRows = 16;
constexpr int kSmallBatchStages = 16;  // at most
// What it declares as shared memory, at most (the compiler adds a little of its own).
constexpr int kSmallBatchStaticBytes = 1024;

constexpr int64_t small_batch_stage_bytes(int64_t row_bytes) {
  return int64_t{kSmallBatchStageRows} * row_pitch(row_bytes);
}

// Each warp leaves its sums of a tile there; the padding spreads them over the banks.
constexpr int small_batch_sum_pitch(int row_parts) { return 16 * row_parts + 4; }
constexpr int64_t small_batch_sum_bytes(int row_parts, int token_parts) {
  return int64_t{kSmallBatchWarps} * 8 * token_parts * small_batch_sum_pitch(row_parts) * 4;
}

struct SmallBatchPlan {
  int row_parts;    // of a tile, 16 weight rows each: 1, 2 or 4
  int token_parts;  // 8 tokens each: 1, 2 or 4
  int blocks;
  int stages;
};

constexpr SmallBatchPlan plan_small_batch(const Device& device, const Shape& shape) {
  const int token_parts = shape.M <= 8 ? 1 : shape.M <= 16 ? 2 : 4;
  const int64_t row_bytes = ceil_div(shape.K, 4);
  // Two blocks on a multiprocessor hide each other's waiting, as long as their rings hold most of
  // the weights, and if possible in the lowest of tiles.
  const bool low = shape.N <= int64_t{2 * kSmallBatchStageRows} * device.multiprocessors;
  const int64_t bytes_for_two = (low ? 115 : 90) * 1024;
  const bool two =
      token_parts <= 2 && shape.N * row_bytes <= device.multiprocessors * bytes_for_two;
  constexpr int64_t kBlockRows = 8;
  const int64_t max_blocks =
      minimum(ceil_div(shape.N, kBlockRows), int64_t{device.multiprocessors} * (two ? 2 : 1));
  const int64_t shared_rows = ceil_div(shape.N, max_blocks);
  // High tiles where there are many rows: the activations are fetched again for each tile.
  int row_parts = shared_rows <= 16 ? 1 : shared_rows <= 64 || token_parts == 4 ? 2 : 4;
  // Whole tiles, for the same reason.
  const int64_t tile_rows = kSmallBatchStageRows * row_parts;
  const int64_t rows =
      shared_rows <= tile_rows || two ? shared_rows : round_up(shared_rows, tile_rows);
  const int64_t blocks = two ? max_blocks : ceil_div(shape.N, rows);

  constexpr int64_t kReservedBytes = 1024;  // for every block, by the system
  const int64_t shared =
      two ? (device.shared_bytes + kReservedBytes) / 2 - kReservedBytes : device.shared_bytes;
  const auto stages_beside = [&](int parts) {
    const int64_t others = kSmallBatchStaticBytes + small_batch_sum_bytes(parts, token_parts);
    return (shared - others) / small_batch_stage_bytes(row_bytes);
  };
  while (row_parts > 1 && stages_beside(row_parts) < row_parts) row_parts /= 2;
  const int64_t needed = ceil_div(rows, kSmallBatchStageRows) * ceil_div(row_bytes, kChunkBytes);
  const int64_t stages = minimum(minimum(stages_beside(row_parts), needed), kSmallBatchStages);
  return {row_parts, token_parts, static_cast<int>(blocks), static_cast<int>(stages)};
}

// ------------------------------------------------------------------------------- small layer

constexpr int kSmallLayerInputs = 1024;  // at most

struct SmallLayerPlan {
  int rows;    // of a tile of weights
  int tokens;  // of a tile
};
constexpr SmallLayerPlan kSmallLayerTiles[] = {{64, 16},  {128, 16}, {64, 32},
                                               {128, 32}, {256, 32}, {512, 32}};
// What it declares as shared memory, at most (the compiler adds a little of its own).
constexpr int kSmallLayerStaticBytes = 512;

// Each token's sums of a tile lie there; the padding spreads them over the banks.
constexpr int small_layer_sum_pitch(int rows) { return rows + 4; }
constexpr int64_t small_layer_bytes(const SmallLayerPlan& tile, int64_t K) {
  const int64_t q_bytes = tile.tokens * round_up(K, kSliceValues);
  const int64_t operands = tile.rows * row_pitch(ceil_div(K, 4)) + q_bytes;
  const int64_t sums = int64_t{4} * tile.tokens * small_layer_sum_pitch(tile.rows);
  return operands > sums ? operands : sums;
}

constexpr int64_t small_layer_blocks(const SmallLayerPlan& tile, const Shape& shape) {
  return ceil_div(shape.N, tile.rows) * ceil_div(shape.M, tile.tokens);
}

// The smallest tile of which a multiprocessor has one at most, or else the largest.
constexpr SmallLayerPlan plan_small_layer(const Device& device, const Shape& shape) {
  SmallLayerPlan plan = kSmallLayerTiles[0];
  for (const SmallLayerPlan& tile : kSmallLayerTiles) {
    if (small_layer_bytes(tile, shape.K) > device.shared_bytes - kSmallLayerStaticBytes) break;
    plan = tile;
    if (small_layer_blocks(tile, shape) <= device.multiprocessors) break;
  }
  return plan;
}

// ------------------------------------------------------------------------------------- wgmma

struct WgmmaPlan {
  int rows;    // of a tile of weights: 64, 128 or 256
  int tokens;  // of a tile: 32, 64, 96 or 128
  int splits;  // blocks of a cluster that share a tile along K: 1, 2, 4 or 8
};

// What there are of tiles, and what they cost, in nanoseconds.
struct WgmmaTile {
  int rows, tokens;
  int64_t slice_cost, block_cost;
};
constexpr WgmmaTile kWgmmaTiles[] = {
    {64, 32, 410, 830},   {64, 64, 400, 1600},   {128, 32, 390, 1690},  {128, 64, 500, 2150},
    {128, 96, 600, 2200}, {128, 128, 650, 3000}, {256, 96, 1070, 3110}, {256, 128, 1150, 4020}};

// Whether the workspace has room for whole tiles.
constexpr bool has_room(const WgmmaTile& tile, int64_t M) {
  return round_up(M, tile.tokens) <= padded_tokens(M);
}

// The cheapest plan by a model of what a block costs, in nanoseconds, fitted to times on an H100:
// so much to start and to end, so much per slice of K (256 values), which the tensor cores or the
// way of the operands to them take, and so much between two tiles. Multiprocessors that a whole
// number of clusters does not fill stay idle.
constexpr WgmmaPlan plan_wgmma(const Device& device, const Shape& shape, int max_splits = 8) {
  constexpr int64_t kClusterCost = 2460, kNextTileCost = 510;
  const int64_t slices = ceil_div(shape.K, kSliceValues);
  WgmmaPlan best = {64, 32, 1};
  int64_t lowest = INT64_MAX;
  for (const WgmmaTile& tile : kWgmmaTiles) {
    if (!has_room(tile, shape.M)) continue;
    const int64_t tiles = ceil_div(shape.N, tile.rows) * ceil_div(shape.M, tile.tokens);
    for (int splits = 1; splits <= max_splits && (splits == 1 || 2 * splits <= slices);
         splits *= 2) {
      const int64_t usable = splits <= 2   ? device.multiprocessors
                             : splits == 4 ? device.multiprocessors * 10 / 11
                                           : device.multiprocessors * 4 / 5;
      if (usable < splits) continue;
      const int64_t rounds = ceil_div(tiles, usable / splits);
      const int64_t tile_cost = ceil_div(slices, splits) * tile.slice_cost;
      // A cluster takes one tile.
      const int64_t cost = splits == 1 ? rounds * (tile_cost + kNextTileCost) + tile.block_cost
                                       : rounds * (tile_cost + tile.block_cost + kClusterCost);
      if (cost < lowest) {
        lowest = cost;
        best = {tile.rows, tile.tokens, splits};
      }
    }
  }
  return best;
}

// The same where the device may refuse clusters, as a part of one (MIG) or a share of it (MPS)
// does: `runs_clusters(plan)` says whether it runs those of a plan.
template <class RunsClusters>
constexpr WgmmaPlan plan_wgmma(const Device& device, const Shape& shape,
                               const RunsClusters& runs_clusters) {
  const WgmmaPlan plan = plan_wgmma(device, shape);
  return plan.splits == 1 || runs_clusters(plan) ? plan : plan_wgmma(device, shape, 1);
}

// ------------------------------------------------------------------------------------- choice

// Whether the kernel quantises the tokens itself, and so needs no workspace.
constexpr bool fuses_quantizer(int kernel) {
  return kernel == BITLINEAR_CUDA_GEMV || kernel == BITLINEAR_CUDA_SMALL_LAYER;
}

// Whether a kernel gives the right result there.
constexpr bool supports(int kernel, const Device& device, const Shape& shape) {
  switch (kernel) {
    case BITLINEAR_CUDA_DP4A:
      return device.capability >= 61;
    case BITLINEAR_CUDA_GEMV: {
      // Each token has the same power-of-two share of the threads.
      int64_t shares = 1;
      while (shares < shape.M) shares *= 2;
      return device.capability >= 90 && shape.w_aligned && shape.x_aligned &&
             shape.M <= kGemvTokens && shares * shape.K <= kGemvRegisterValues &&
             gemv_room(device, shape) >= 2 * gemv_stage_bytes(ceil_div(shape.K, 4), 3);
    }
    case BITLINEAR_CUDA_SMALL_BATCH:
      return device.capability >= 90 && shape.w_aligned && shape.M <= kSmallBatchTokens;
    case BITLINEAR_CUDA_SMALL_LAYER:
      return device.capability >= 80 && shape.w_aligned && shape.x_aligned &&
             shape.K <= kSmallLayerInputs;
    case BITLINEAR_CUDA_MMA:
      return device.capability >= 80;
    case BITLINEAR_CUDA_WGMMA:
      return device.has_wgmma && shape.w_aligned;
    default:
      return false;
  }
}

// Whether the kernel for small layers, where it supports the shape, is faster than the others, by
// times on an H100: as long as a multiprocessor has one tile at most, and of long rows a small one.
// A GEMV for two tokens or more is slower where its rows are short.
constexpr bool prefers_small_layer(const Device& device, const Shape& shape) {
  const SmallLayerPlan tile = plan_small_layer(device, shape);
  if (small_layer_blocks(tile, shape) > device.multiprocessors) return false;
  if (shape.M <= kGemvTokens) return shape.M > 1 && shape.K <= 256;
  return shape.K <= 512 || (shape.M > 16 && tile.rows * tile.tokens <= 128 * 16);
}

// The fastest kernel that supports the shape, or BITLINEAR_CUDA_AUTO where none does.
constexpr int choose_kernel(const Device& device, const Shape& shape) {
  // Beyond 16 tokens, where the activations are fetched for more than one tile of rows, wgmma.cu
  // gets by with less of that.
  const bool is_small = shape.M <= 16 || shape.N <= int64_t{64} * device.multiprocessors;
  for (const int kernel :
       {BITLINEAR_CUDA_SMALL_LAYER, BITLINEAR_CUDA_GEMV, BITLINEAR_CUDA_SMALL_BATCH,
        BITLINEAR_CUDA_WGMMA, BITLINEAR_CUDA_MMA, BITLINEAR_CUDA_DP4A}) {
    if (!supports(kernel, device, shape)) continue;
    if (kernel == BITLINEAR_CUDA_SMALL_LAYER && !prefers_small_layer(device, shape)) continue;
    if (kernel == BITLINEAR_CUDA_SMALL_BATCH && !is_small && device.has_wgmma) continue;
    return kernel;
  }
  return BITLINEAR_CUDA_AUTO;
}

}  // namespace cuda
}  // namespace bitlinear
