// Which CUDA kernel computes a product, and how: pure functions of the device and the sizes,
// without CUDA's headers, tested by tests/kernels/test_cuda_heuristics.py.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "task.h"

namespace bitlinear {
namespace cuda {

struct Device {
  int capability;  // of the code that runs on it: 10 * major + minor, for example 90
  bool has_wgmma;  // the code was compiled for sm_90a
  int multiprocessors;
  int shared_bytes;  // that a block can have
};

struct Shape {
  int64_t M, N, K;
  bool x_aligned, w_aligned;  // every row of x, or of w, starts at a multiple of 16 bytes
};

// Packed bytes that the tensor-core kernels take at a time from a weight row: 16 for each of the
// four lanes that share a row in a fragment.
constexpr int kSliceBytes = 64;
constexpr int kSliceValues = 4 * kSliceBytes;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tokens that the workspace has room for: whole tiles, so that a kernel may read all of its last.
constexpr int64_t padded_tokens(int64_t M) {
  if (M > 128) return round_up(M, 128);
  int64_t tokens = 16;
  while (tokens < M) tokens *= 2;
  return tokens;
}

// ------------------------------------------------------------------------------------- GEMV

constexpr int kGemvTokens = 8;
constexpr int kGemvWarps = 8;  // that multiply, each 16 rows at a time
// The GEMV keeps the tokens, quantised, in this much shared memory, ...
constexpr int64_t kGemvActivationBytes = 64 * 1024;
// ... and where it quantises them itself, first in registers: groups of 16 values per thread.
constexpr int kGemvGroups = 4;
constexpr int64_t kGemvHeldValues = int64_t{kGemvGroups} * 16 * 32 * kGemvWarps;
// Bytes of a row in a stage of its ring, at most; shorter copies cost more than they carry.
constexpr int kGemvChunkBytes = 1024;
constexpr int kGemvTokenPad = 64;  // between tokens in shared memory, against bank conflicts
// What it declares as shared memory, at most (the compiler adds a little of its own).
constexpr int kGemvStaticBytes = 10752;

// Rows an odd multiple of 64 bytes apart have no bank conflicts among the rows of a fragment.
constexpr int gemv_row_pitch(int chunk_bytes) { return (chunk_bytes + 63) / 64 * 64 | 64; }

// A stage holds a chunk of each of so many rows.
constexpr int gemv_tile_rows(int log_split) { return 16 * kGemvWarps >> log_split; }

constexpr int64_t gemv_stage_bytes(int64_t row_bytes, int log_split) {
  const int chunk = static_cast<int>(least(row_bytes, kGemvChunkBytes));
  return int64_t{gemv_tile_rows(log_split)} * gemv_row_pitch(chunk);
}

// The shared memory that is left for a ring of stages.
constexpr int64_t gemv_room(const Device& device, const Shape& shape) {
  const int64_t activations = shape.M * (round_up(shape.K, kSliceValues) + kGemvTokenPad);
  return device.shared_bytes - kGemvStaticBytes - activations;
}

struct GemvPlan {
  bool fused;  // the GEMV quantises x itself
  int blocks;
  int log_split;  // 1, 2 or 3: the logarithm of how many of 8 warps share 16 rows, along K
  int ring_bytes;
};

constexpr GemvPlan plan_gemv(const Device& device, const Shape& shape) {
  // Each token has the same power-of-two share of the threads.
  int64_t shares = 1;
  while (shares < shape.M) shares *= 2;
  const bool fused = shape.x_aligned && shape.K % 16 == 0 && shares * shape.K <= kGemvHeldValues;

  // One block per multiprocessor leaves room for one of the successor's, which loads weights
  // meanwhile. Where a block's weights exceed its ring, two keep more of them under way.
  constexpr int64_t kRing = 96 * 1024, kRingOfTwo = 70 * 1024, kBlockRows = 8;
  const int64_t row_bytes = ceil_div(shape.K, 4);
  const int64_t room = gemv_room(device, shape);
  const bool two = shape.N * row_bytes > device.multiprocessors * (kRing + 10 * 1024) &&
                   2 * (device.shared_bytes - room + kRingOfTwo) <= device.shared_bytes;
  const int64_t blocks =
      least(ceil_div(shape.N, kBlockRows), int64_t{device.multiprocessors} * (two ? 2 : 1));
  const int64_t ring_bytes = least(two ? kRingOfTwo : kRing, room);

  // Tall tiles end in fewer barriers: as tall as the rows of a block, if the ring holds four
  // stages, or all that the block fills.
  const int64_t rows = ceil_div(shape.N, blocks);
  const int64_t chunks = ceil_div(row_bytes, kGemvChunkBytes);
  int log_split = 3;
  for (int candidate = 2; candidate >= 1; --candidate) {
    const int64_t tile_rows = gemv_tile_rows(candidate);
    const int64_t filled = ceil_div(rows, tile_rows) * chunks;
    const int64_t held = filled < 2 ? 2 : least(filled, 4);
    if (rows > tile_rows / 2 && held * gemv_stage_bytes(row_bytes, candidate) <= ring_bytes) {
      log_split = candidate;
    }
  }
  return {fused, static_cast<int>(blocks), log_split, static_cast<int>(ring_bytes)};
}

// ------------------------------------------------------------------------------------- wgmma

struct WgmmaPlan {
  int row_blocks;  // of 64 weight rows, for each of two warpgroups: 1 or 2
  int tokens;      // of a tile: 16, 32, 64 or 128
  int splits;      // blocks of a cluster that share a tile along K: 1, 2, 4 or 8
};

// The cheapest plan by a model of what a block costs, in nanoseconds on an H100: so much to start
// and to end, and so much per slice of K (256 values), which the tensor cores or the way of the
// operands to them take. Multiprocessors that a whole number of clusters does not fill stay idle.
constexpr WgmmaPlan plan_wgmma(const Device& device, const Shape& shape) {
  constexpr int kTokens[] = {16, 32, 64, 128};
  constexpr int64_t kSliceCost[2][4] = {{650, 700, 750, 950}, {950, 1000, 1150, 1400}};
  constexpr int64_t kBlockCost = 4500, kClusterCost = 2000;
  const int64_t slices = ceil_div(shape.K, kSliceValues);
  WgmmaPlan best = {1, 16, 1};
  int64_t lowest = INT64_MAX;
  for (int row_blocks = 1; row_blocks <= 2; ++row_blocks) {
    for (int t = 0; t < 4; ++t) {
      if (padded_tokens(shape.M) % kTokens[t] != 0) continue;
      for (int splits = 1; splits <= 8 && (splits == 1 || 2 * splits <= slices); splits *= 2) {
        const int64_t usable = splits <= 2   ? device.multiprocessors
                               : splits == 4 ? device.multiprocessors * 10 / 11
                                             : device.multiprocessors * 4 / 5;
        if (usable < splits) continue;
        const int64_t tiles = ceil_div(shape.N, 128 * row_blocks) * ceil_div(shape.M, kTokens[t]);
        const int64_t block_cost = ceil_div(slices, splits) * kSliceCost[row_blocks - 1][t] +
                                   kBlockCost + (splits > 1 ? kClusterCost : 0);
        const int64_t cost = ceil_div(tiles, usable / splits) * block_cost;
        if (cost < lowest) {
          lowest = cost;
          best = {row_blocks, kTokens[t], splits};
        }
      }
    }
  }
  return best;
}

// ------------------------------------------------------------------------------------- choice

// Whether a kernel gives the right result there.
constexpr bool admits(int kernel, const Device& device, const Shape& shape) {
  switch (kernel) {
    case BITLINEAR_CUDA_DP4A:
      return device.capability >= 61;
    case BITLINEAR_CUDA_GEMV:
      return device.capability >= 90 && shape.w_aligned && shape.M <= kGemvTokens &&
             shape.M * round_up(shape.K, kSliceValues) <= kGemvActivationBytes &&
             gemv_room(device, shape) >= 2 * gemv_stage_bytes(ceil_div(shape.K, 4), 3);
    case BITLINEAR_CUDA_MMA:
      return device.capability >= 80;
    case BITLINEAR_CUDA_WGMMA:
      return device.has_wgmma && shape.w_aligned;
    default:
      return false;
  }
}

// The fastest kernel that admits the shape, or BITLINEAR_CUDA_AUTO where none does.
constexpr int choose_kernel(const Device& device, const Shape& shape) {
  // Beyond four tokens reading them from shared memory takes longer than reading the weights.
  if (shape.M <= 4 && admits(BITLINEAR_CUDA_GEMV, device, shape)) return BITLINEAR_CUDA_GEMV;
  for (const int kernel : {BITLINEAR_CUDA_WGMMA, BITLINEAR_CUDA_MMA, BITLINEAR_CUDA_DP4A}) {
    if (admits(kernel, device, shape)) return kernel;
  }
  return BITLINEAR_CUDA_AUTO;
}

}  // namespace cuda
}  // namespace bitlinear
