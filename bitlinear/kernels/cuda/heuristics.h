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

constexpr int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Tokens that the workspace has room for: whole tiles, so that a kernel may read all of its last.
constexpr int64_t padded_tokens(int64_t M) {
  if (M > 128) return round_up(M, 128);
  int64_t tokens = 16;
  while (tokens < M) tokens *= 2;
  return tokens;
}

// ------------------------------------------------------------------------------------- GEMV

constexpr int64_t kGemvTokens = 8;
// The GEMV keeps the tokens, quantised, in this much shared memory, ...
constexpr int64_t kGemvActivationBytes = 64 * 1024;
// ... and where it quantises them itself, first in registers: groups of 16 values per thread.
constexpr int kGemvGroups = 4;
constexpr int64_t kGemvHeldValues = int64_t{kGemvGroups} * 16 * 256;
// Bytes of a row in a stage of its ring, at most; shorter copies cost more than they carry.
constexpr int kGemvChunkBytes = 1024;

// Rows an odd multiple of 64 bytes apart have no bank conflicts among the rows of a fragment.
constexpr int gemv_row_pitch(int chunk_bytes) { return (chunk_bytes + 63) / 64 * 64 | 64; }

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
  const int64_t row_bytes = (shape.K + 3) / 4;
  const bool streams = shape.N * row_bytes > int64_t{device.multiprocessors} * 106 * 1024;
  const int64_t most_blocks = int64_t{device.multiprocessors} * (streams ? 2 : 1);
  const int64_t least_rows = 8;
  const int64_t row_groups = (shape.N + least_rows - 1) / least_rows;
  const int64_t blocks = row_groups < most_blocks ? row_groups : most_blocks;
  const int ring_bytes = (streams ? 70 : 96) * 1024;

  // Tall tiles end in fewer barriers: as tall as the rows of a block, if four stages fit, or all.
  const int64_t rows = (shape.N + blocks - 1) / blocks;
  const int64_t chunk = row_bytes < kGemvChunkBytes ? row_bytes : kGemvChunkBytes;
  const int64_t chunks = (row_bytes + chunk - 1) / chunk;
  int log_split = 3;
  for (int candidate = 2; candidate >= 1; --candidate) {
    const int64_t tile_rows = 128 >> candidate;
    const int64_t stages = (rows + tile_rows - 1) / tile_rows * chunks;
    const int64_t stage_bytes = tile_rows * gemv_row_pitch(static_cast<int>(chunk));
    const bool fits =
        (stages < 4 ? stages : 4) * stage_bytes <= ring_bytes && 2 * stage_bytes <= ring_bytes;
    if (rows > tile_rows / 2 && fits) log_split = candidate;
  }
  return {fused, static_cast<int>(blocks), log_split, ring_bytes};
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
  const int64_t slices = (shape.K + kSliceValues - 1) / kSliceValues;
  WgmmaPlan best = {1, 16, 1};
  int64_t lowest = INT64_MAX;
  for (int row_blocks = 1; row_blocks <= 2; ++row_blocks) {
    for (int t = 0; t < 4; ++t) {
      for (int splits = 1; splits <= 8 && (splits == 1 || 2 * splits <= slices); splits *= 2) {
        const int64_t tile_rows = 128 * row_blocks;
        const int64_t tiles =
            (shape.N + tile_rows - 1) / tile_rows * ((shape.M + kTokens[t] - 1) / kTokens[t]);
        const int64_t at_once = splits <= 2   ? device.multiprocessors / splits
                                : splits == 4 ? device.multiprocessors * 10 / 11 / splits
                                              : device.multiprocessors * 4 / 5 / splits;
        const int64_t waves =
            (tiles + (at_once < 1 ? 1 : at_once) - 1) / (at_once < 1 ? 1 : at_once);
        const int64_t cost =
            waves * ((slices + splits - 1) / splits * kSliceCost[row_blocks - 1][t] + kBlockCost +
                     (splits > 1 ? kClusterCost : 0));
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
             shape.M * round_up(shape.K, kSliceValues) <= kGemvActivationBytes;
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
  if (shape.M <= 4 && admits(BITLINEAR_CUDA_GEMV, device, shape)) return BITLINEAR_CUDA_GEMV;
  for (const int kernel : {BITLINEAR_CUDA_WGMMA, BITLINEAR_CUDA_MMA, BITLINEAR_CUDA_DP4A}) {
    if (admits(kernel, device, shape)) return kernel;
  }
  return BITLINEAR_CUDA_AUTO;
}

}  // namespace cuda
}  // namespace bitlinear
