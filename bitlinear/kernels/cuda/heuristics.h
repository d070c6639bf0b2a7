// Chooses the CUDA kernel of a product and its plan. Pure functions of the device and the sizes,
// without CUDA's headers, tested by tests/kernels/test_cuda_heuristics.py.
//
// Constants are fitted to times on one H100 80 GB; for wgmma, for small batches and for the choice
// of the GEMV on one H200 (torch 2.11, 2026-11). Refit: `python -m scripts.bench --device cuda
// --grid floor --modes cold`; bitlinear_cuda_force() runs one kernel alone.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "../integers.h"
#include "task.h"

namespace bitlinear {
namespace cuda {

struct Device {
  int capability;  // of the compiled code that runs on it: 10 * major + minor, for example 90
  bool has_wgmma;  // the code was compiled for sm_90a
  int multiprocessors;
  int shared_bytes;  // the maximum of a block
  int index;         // of the device, as CUDA counts
};

struct Shape {
  int64_t M, N, K;            // M counts rows of q
  bool x_aligned, w_aligned;  // every row of x, or of w, starts at a multiple of 16 bytes
  int64_t weights = 1;        // of the product; they have N rows together
  bool has_prologue = false;
  int64_t rows_per_token = 1;  // 2 with activations of 16 bits
  // The tokens are quantised already, in the order of x; and each starts at a multiple of 16 bytes.
  bool is_quantized = false, q_aligned = false;
  int64_t group_size = 0;  // weights along K that share a scale; 0: all of them
  bool for_many = false;   // whether wgmma_many.cu serves such products
  bool for_short = false;  // whether wgmma_short.cu does, if rows are short

  constexpr int64_t tokens() const { return M / rows_per_token; }
};

// Packed bytes of a weight row that the tensor-core kernels multiply at a time: 16 for each of the
// four lanes that share a row in a fragment.
constexpr int kSliceBytes = 64;
constexpr int kSliceValues = 4 * kSliceBytes;

// With scales of groups the kernels for tiles multiply by the two bytes of a multiplier, and sum
// these in 32 bits: at most 255 * 127 for an input.
constexpr int64_t kMaxGroupedInputs = 65536;

// Tokens that the workspace has room for: whole tiles, so that a kernel can read all of its last
// tile.
constexpr int64_t padded_tokens(int64_t M) {
  if (M <= 64) return M <= 32 ? 32 : 64;
  const int64_t of_96 = round_up(M, 96), of_128 = round_up(M, 128);
  return of_96 > of_128 ? of_96 : of_128;
}

// ----------------------------------------------------------------------------- the quantiser

// Warps of a block, at most: more do not fit the registers of a multiprocessor.
constexpr int kQuantizerWarps = 32;
constexpr int kPrologueWarps = 16;  // the same with a prologue, which needs more registers
constexpr int kQuantizerGroups =
    2;  // groups of 16 values that a thread keeps between the two passes

struct QuantizerPlan {
  int warps;   // warps that share a token
  int tokens;  // tokens of a block
};

constexpr QuantizerPlan plan_quantizer(const Device& device, int64_t M, int64_t K,
                                       bool has_prologue = false) {
  // If registers have room for all tokens at once, a thread gets one group, for latency; otherwise
  // two, for fewer rounds. With enough warps it gets no other groups, and reads all values once.
  constexpr int64_t kBlockWarps = 8;
  const int64_t most_warps = has_prologue ? kPrologueWarps : kQuantizerWarps;
  const bool one_round = M * ceil_div(K, 16 * 32) <= most_warps * device.multiprocessors;
  const int64_t groups = one_round ? 1 : kQuantizerGroups;
  const int64_t warps = minimum(ceil_div(K, groups * 16 * 32), most_warps);
  // Blocks of several tokens cost fewer starts, as long as all multiprocessors have a block. The
  // number is a power of two, because the workspace has room for a multiple of 32 tokens.
  int tokens = 1;
  while (2 * tokens * warps <= kBlockWarps && 2 * tokens * device.multiprocessors <= M) tokens *= 2;
  return {static_cast<int>(warps), tokens};
}

// ---------------------------------------------------------------------- the ring of weights

// The GEMV and the small-batch kernel copy weights into a ring in shared memory. This is the
// maximum of bytes of a row in a stage: shorter copies are bound by their number.
constexpr int kChunkBytes = 1024;

// Rows an odd multiple of 64 bytes apart have no bank conflicts among the rows of a fragment.
constexpr int row_pitch(int64_t row_bytes) {
  return static_cast<int>((minimum(row_bytes, kChunkBytes) + 63) / 64 * 64 | 64);
}

// ----------------------------------------------------------------------- the scales of groups

// Values of k, at least, whose products have sums of their own in the kernels that keep the sums of
// groups apart.
constexpr int kPartValues = 64;
// A block of the GEMV and of the small-batch kernel has the multipliers of its rows in shared
// memory: so many words for each row, an odd number, which spreads rows over the banks.
constexpr int multiplier_pitch(int64_t groups) { return static_cast<int>(groups | 1); }

// ------------------------------------------------------------------------------------- GEMV

constexpr int kGemvTokens = 4;  // rows of q
constexpr int kGemvWarps = 8;   // warps that multiply, each 16 rows at a time
// The GEMV quantises the tokens itself. If they are short enough it keeps them in registers
// meanwhile: groups of 16 values per thread.
constexpr int64_t kGemvGroupValues = 16 * 32 * kGemvWarps;  // of all threads: a group each
constexpr int kGemvGroups = 4;
constexpr int64_t kGemvRegisterValues = kGemvGroups * kGemvGroupValues;
// With a prologue the groups are fp32, and more than two do not fit the registers.
constexpr int kGemvPrologueGroups = 2;
constexpr int64_t kGemvPrologueValues = kGemvPrologueGroups * kGemvGroupValues;
// The norm of tokens that do not stay in registers has static shared memory for the sums of squares
// of so many blocks of 512 values. On today's devices the fp32 values, in shared memory too, end at
// 72 blocks.
constexpr int64_t kGemvNormSums = 128;
constexpr int64_t kGemvNormValues = 512;  // of a sum
constexpr int kGemvTokenPad = 64;         // between tokens in shared memory, against bank conflicts
// The maximum of its static shared memory (the compiler adds a little of its own).
constexpr int kGemvStaticBytes = 5632;

// Rows of a stage, which holds a chunk of each.
constexpr int gemv_tile_rows(int log_split) { return 16 * kGemvWarps >> log_split; }

constexpr int64_t gemv_stage_bytes(int64_t row_bytes, int log_split) {
  return int64_t{gemv_tile_rows(log_split)} * row_pitch(row_bytes);
}

// Each token has the same share of the threads, one of a power of two: of three tokens a quarter.
constexpr int64_t gemv_shares(int64_t tokens) {
  int64_t shares = 1;
  while (shares < tokens) shares *= 2;
  return shares;
}

// The values of all threads.
constexpr int64_t gemv_values(int64_t tokens, int64_t K) { return gemv_shares(tokens) * K; }

// Whether the tokens stay in registers while they are quantised. These are the values of x: a token
// of 16 bits has as many as one of 8 bits.
constexpr bool are_resident(const Shape& shape) {
  return gemv_values(shape.tokens(), shape.K) <=
         (shape.has_prologue ? kGemvPrologueValues : kGemvRegisterValues);
}

// Shared memory for the fp32 values of a prologue whose tokens are not resident: whole chunks.
constexpr int64_t gemv_stash_bytes(int64_t tokens, int64_t K) {
  return 4 * round_up(gemv_values(tokens, K), kGemvPrologueValues);
}

// The sums of squares for the norm of such tokens. Threads without a token store some, too.
constexpr int64_t gemv_norm_sums(int64_t tokens, int64_t K) {
  return gemv_shares(tokens) * ceil_div(K, kGemvNormValues);
}

constexpr int kGemvGroupTokens = 2;  // rows of q, at most, with scales of groups
// Bytes for the multipliers, the units of the rows, the sums of q, and zeros.
constexpr int64_t gemv_group_bytes(const Shape& shape, int64_t blocks) {
  if (shape.group_size == 0) return 0;
  const int64_t pitch = multiplier_pitch(ceil_div(shape.K, shape.group_size));
  const int64_t parts = shape.M * (round_up(shape.K, kSliceValues) / kPartValues);
  constexpr int64_t kSlack = 16;  // for values beyond K
  const int64_t words = parts + ceil_div(shape.N, blocks) * (pitch + 1);
  return round_up(kSliceValues + 4 * words + kSlack, 16);
}

// The shared memory that is left for a ring of stages if there are so many blocks.
constexpr int64_t gemv_room(const Device& device, const Shape& shape, bool resident,
                            int64_t blocks) {
  const int64_t activations = shape.M * (round_up(shape.K, kSliceValues) + kGemvTokenPad);
  const int64_t stash =
      shape.has_prologue && !resident ? gemv_stash_bytes(shape.tokens(), shape.K) : 0;
  return device.shared_bytes - kGemvStaticBytes - activations - stash -
         gemv_group_bytes(shape, blocks);
}

// So many blocks on each multiprocessor, of at least eight rows; more that come later, if their
// groups would take too much memory.
constexpr int64_t gemv_blocks(const Device& device, const Shape& shape, int64_t resident) {
  constexpr int64_t kBlockRows = 8, kMostGroupBytes = 64 * 1024;
  const int64_t most = ceil_div(shape.N, kBlockRows);
  int64_t blocks = device.multiprocessors * resident;
  while (blocks < most && gemv_group_bytes(shape, blocks) > kMostGroupBytes) {
    blocks += device.multiprocessors;
  }
  return minimum(most, blocks);
}

struct GemvPlan {
  int blocks;
  int log_split;  // 1, 2 or 3: log2 of the number of warps, of 8, that share 16 rows along K
  int ring_bytes;
  bool resident;
};

constexpr GemvPlan plan_gemv(const Device& device, const Shape& shape) {
  // One block per multiprocessor leaves room for a block of the successor, which loads weights
  // meanwhile (sm_90). If the weights of a block exceed its ring, two blocks keep more loads in
  // flight. Tokens that are not resident need the registers of two blocks.
  constexpr int64_t kRing = 96 * 1024, kRingOfTwo = 70 * 1024;
  const bool overlaps = device.capability >= 90;
  const bool resident = are_resident(shape);
  const int64_t row_bytes = ceil_div(shape.K, 4);
  const int64_t blocks_of_two = gemv_blocks(device, shape, 2);
  const int64_t room_of_two = gemv_room(device, shape, resident, blocks_of_two);
  const bool two = overlaps && resident &&
                   shape.N * row_bytes > device.multiprocessors * (kRing + 10 * 1024) &&
                   2 * (device.shared_bytes - room_of_two + kRingOfTwo) <= device.shared_bytes;
  const int64_t blocks = two ? blocks_of_two : gemv_blocks(device, shape, 1);
  const int64_t room = gemv_room(device, shape, resident, blocks);
  const int64_t ring_bytes = two ? kRingOfTwo : overlaps && resident ? minimum(kRing, room) : room;

  // Tall tiles need fewer barriers. A tile is at most as tall as the rows of a block, and the ring
  // must hold four stages (two of the middle height before sm_90), or all stages that the block
  // fills.
  const int64_t rows = ceil_div(shape.N, blocks);
  const int64_t chunks = ceil_div(row_bytes, kChunkBytes);
  int log_split = 3;
  for (int candidate = 2; candidate >= 1; --candidate) {
    const int64_t tile_rows = gemv_tile_rows(candidate);
    const int64_t filled = ceil_div(rows, tile_rows) * chunks;
    const int64_t enough = overlaps || candidate == 1 ? 4 : 2;
    const int64_t held = filled < 2 ? 2 : minimum(filled, enough);
    if (rows > tile_rows / 2 && held * gemv_stage_bytes(row_bytes, candidate) <= ring_bytes) {
      log_split = candidate;
    }
  }
  return {static_cast<int>(blocks), log_split, static_cast<int>(ring_bytes), resident};
}

// ------------------------------------------------------------------------------- small batch

constexpr int kSmallBatchTokens = 32;
constexpr int kSmallBatchWarps = 8;  // warps that multiply; they share K
constexpr int kSmallBatchStageRows = 16;
constexpr int kSmallBatchStages = 16;  // at most
// The maximum of its static shared memory (the compiler adds a little of its own).
constexpr int kSmallBatchStaticBytes = 1024;

// With groups, matrices of 8 rows x 16 bytes are read: rows an odd multiple of 16 bytes apart have
// no bank conflicts.
constexpr int small_batch_pitch(int64_t row_bytes, bool has_groups) {
  return has_groups ? round_up(static_cast<int>(minimum(row_bytes, kChunkBytes)), 64) + 16
                    : row_pitch(row_bytes);
}
constexpr int64_t small_batch_stage_bytes(int64_t row_bytes, bool has_groups) {
  return int64_t{kSmallBatchStageRows} * small_batch_pitch(row_bytes, has_groups);
}

// Each warp stores its sums of a tile in shared memory; the padding spreads them over the banks.
constexpr int small_batch_sum_pitch(int row_parts) { return 16 * row_parts + 4; }
constexpr int64_t small_batch_sum_bytes(int row_parts, int token_parts, bool has_groups) {
  const int64_t sums =
      int64_t{kSmallBatchWarps} * 8 * token_parts * small_batch_sum_pitch(row_parts);
  return sums * (has_groups ? 8 : 4);
}

// The multipliers and units of the rows of a block.
constexpr int64_t small_batch_group_bytes(const Shape& shape, int64_t rows) {
  if (shape.group_size == 0) return 0;
  return 4 * rows * (multiplier_pitch(ceil_div(shape.K, shape.group_size)) + 1);
}

struct SmallBatchPlan {
  int row_parts;    // of a tile, 16 weight rows each: 1 or 2
  int token_parts;  // 8 tokens each: 1, 2 or 4
  int blocks;
  int stages;
};

constexpr int small_batch_token_parts(int64_t M) { return M <= 8 ? 1 : M <= 16 ? 2 : 4; }

// Whether there is such a tile, and whether two blocks with tiles of so many tokens have registers
// on a multiprocessor. Totals of groups need the registers of another part.
constexpr bool has_small_batch_tile(int row_parts, int token_parts, bool has_groups) {
  return !has_groups || row_parts * token_parts <= 4;
}
constexpr bool has_registers_for_two(int token_parts, bool has_groups) {
  return token_parts <= (has_groups ? 1 : 2);
}

constexpr int64_t small_batch_shared_bytes(const Shape& shape, const SmallBatchPlan& plan) {
  const bool has_groups = shape.group_size > 0;
  return plan.stages * small_batch_stage_bytes(ceil_div(shape.K, 4), has_groups) +
         small_batch_sum_bytes(plan.row_parts, plan.token_parts, has_groups) +
         small_batch_group_bytes(shape, ceil_div(shape.N, plan.blocks));
}

// Whether a tile's parts are in the ring at once. Without groups they always are.
constexpr bool has_room(const SmallBatchPlan& plan) { return plan.stages >= plan.row_parts; }

// The plan for one or two blocks on a multiprocessor.
constexpr SmallBatchPlan plan_small_batch(const Device& device, const Shape& shape, bool two) {
  const int token_parts = small_batch_token_parts(shape.M);
  const int64_t row_bytes = ceil_div(shape.K, 4);
  const int64_t multiprocessors = device.multiprocessors;
  const bool has_groups = shape.group_size > 0;
  // Two blocks leave no registers for the next call's quantiser. It starts early where one of them
  // is missing.
  const int64_t most_blocks = two ? 2 * multiprocessors - multiprocessors / 32 : multiprocessors;
  // A part takes as long with fewer rows, so rows are whole parts.
  int64_t rows = kSmallBatchStageRows * ceil_div(shape.N, kSmallBatchStageRows * most_blocks);
  if (has_groups) {
    // Multipliers of about a quarter of the memory; more blocks come later.
    constexpr int64_t kFewestRows = 8;
    const int64_t group_bytes = device.shared_bytes / (two ? 8 : 4);
    int64_t most_rows = group_bytes / small_batch_group_bytes(shape, 1);
    if (most_rows > kSmallBatchStageRows) most_rows -= most_rows % kSmallBatchStageRows;
    if (most_rows < kFewestRows) most_rows = kFewestRows;
    rows = minimum(minimum(rows, most_rows), shape.N);
  }
  const bool high = rows > kSmallBatchStageRows && has_small_batch_tile(2, token_parts, has_groups);
  int row_parts = high ? 2 : 1;
  // Whole tiles, because each fetches the activations again.
  if (high) rows = round_up(rows, int64_t{2 * kSmallBatchStageRows});
  int64_t blocks = ceil_div(shape.N, rows);
  // The next quantiser's blocks for many tokens would gather on a few multiprocessors without a
  // block. So these get one, too.
  const bool crowds = token_parts == 4 && !high && !has_groups;
  if (crowds && 16 * blocks > 15 * most_blocks) blocks = most_blocks;

  constexpr int64_t kReservedBytes = 1024;  // that the system reserves for every block
  const int64_t shared =
      two ? (device.shared_bytes + kReservedBytes) / 2 - kReservedBytes : device.shared_bytes;
  const auto stages_beside = [&](int parts) {
    const int64_t others = kSmallBatchStaticBytes + small_batch_group_bytes(shape, rows) +
                           small_batch_sum_bytes(parts, token_parts, has_groups);
    return (shared - others) / small_batch_stage_bytes(row_bytes, has_groups);
  };
  if (high && stages_beside(2) < 2) row_parts = 1;
  const int64_t needed = ceil_div(rows, kSmallBatchStageRows) * ceil_div(row_bytes, kChunkBytes);
  const int64_t stages = minimum(minimum(stages_beside(row_parts), needed), kSmallBatchStages);
  return {row_parts, token_parts, static_cast<int>(blocks), static_cast<int>(stages)};
}

// Two blocks on a multiprocessor hide each other's latency, if they have registers and room.
constexpr SmallBatchPlan plan_small_batch(const Device& device, const Shape& shape) {
  if (has_registers_for_two(small_batch_token_parts(shape.M), shape.group_size > 0)) {
    const SmallBatchPlan plan = plan_small_batch(device, shape, true);
    if (has_room(plan)) return plan;
  }
  return plan_small_batch(device, shape, false);
}

// ------------------------------------------------------------------------------- small layer

constexpr int kSmallLayerInputs = 1024;  // at most

struct SmallLayerPlan {
  int rows;    // of a tile of weights
  int tokens;  // of a tile
};
constexpr SmallLayerPlan kSmallLayerTiles[] = {{64, 16},  {128, 16}, {64, 32},
                                               {128, 32}, {256, 32}, {512, 32}};
// The maximum of its static shared memory (the compiler adds a little of its own).
constexpr int kSmallLayerStaticBytes = 512;

// The sums of a tile in shared memory, by token; the padding spreads them over the banks.
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

// The smallest tile that gives each multiprocessor at most one tile; else the largest tile.
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
  int rows;               // of a tile of weights: 64, 128 or 256
  int tokens;             // of a tile: 32, 64, 96 or 128
  int halves;             // 2: two warpgroups of a block share its part of K
  int splits;             // blocks of a cluster that share a tile along K: 1, 2, 4 or 8
  bool is_short = false;  // wgmma_short.cu computes it
};

// The tiles, with their costs in nanoseconds on an H200.
struct WgmmaTile {
  int rows, tokens, halves;
  int64_t slice_cost, block_cost;
};
constexpr WgmmaTile kWgmmaTiles[] = {
    {64, 32, 1, 370, 370},   {64, 64, 1, 470, 200},    {64, 64, 2, 320, 600},
    {64, 128, 2, 470, 940},  {128, 32, 1, 440, 260},   {128, 64, 1, 510, 640},
    {128, 96, 1, 570, 1350}, {128, 128, 1, 660, 1960}, {256, 32, 1, 570, 1500},
    {256, 64, 1, 790, 1450}, {256, 96, 1, 1040, 3600}, {256, 128, 1, 1180, 4200}};

// Whether wgmma_many.cu computes this plan, of a product that it serves.
constexpr bool is_many_tile(const WgmmaPlan& plan) {
  return plan.rows == 256 && plan.tokens >= 96 && plan.splits == 1;
}
// The cost of its tiles, of tile_cost in other kernels. It takes 7/8 of the time for 96 tokens; and
// for 128 it cuts the tiles of a last round that occupies at most half of the multiprocessors,
// which then takes 0.8 of the time. Between two tiles it takes a third of their time.
constexpr int64_t many_cost(const WgmmaPlan& plan, int64_t tiles, int64_t multiprocessors,
                            int64_t tile_cost) {
  constexpr int64_t kNextTileCost = 510;
  if (plan.tokens == 96) tile_cost = tile_cost * 7 / 8;
  const int64_t rounds = ceil_div(tiles, multiprocessors), last = tiles % multiprocessors;
  const bool is_cut = plan.tokens == 128 && last > 0 && 2 * last <= multiprocessors;
  return (10 * rounds - (is_cut ? 2 : 0)) * (tile_cost + kNextTileCost) / 10;
}

// Whether the workspace has room for whole tiles.
constexpr bool has_room(const WgmmaTile& tile, int64_t M) {
  return round_up(M, tile.tokens) <= padded_tokens(M);
}

// Whether there is such a tile for scales of groups. It multiplies half as many rows twice.
constexpr bool has_groups(const WgmmaTile& tile) { return tile.rows >= 128 && tile.halves == 1; }

// wgmma_short.cu has tiles of its own. Its four warpgroups multiply 64 rows by 64 tokens each, some
// of them a part of K.
constexpr int kShortInputs = 1024;  // at most
constexpr WgmmaTile kShortTiles[] = {
    {64, 64, 1, 300, 1550}, {128, 64, 1, 400, 1500}, {128, 128, 1, 1000, 1700}};
constexpr int kShortStaticBytes = 1280;  // of its static shared memory, at most

// Dynamic shared memory of a block: the operands, in whose place the sums come later. It is more
// than half of what a multiprocessor has: otherwise two blocks, which start while the previous
// product still runs, would share one multiprocessor, and others would stay empty.
constexpr int64_t short_bytes(int64_t rows, int64_t tokens, int64_t K) {
  constexpr int64_t kAlignment = 1024, kLeast = 114 * 1024;
  const int64_t operands = (rows + tokens) * round_up(K, kSliceValues);
  return kAlignment + (operands > kLeast ? operands : kLeast);
}

// Whether wgmma_short.cu computes a shape in tiles like this one, all at once.
constexpr bool is_short_tile(const Device& device, const Shape& shape, const WgmmaTile& tile) {
  const int64_t tiles = ceil_div(shape.N, tile.rows) * ceil_div(shape.M, tile.tokens);
  const int64_t parts = 4 * 64 * 64 / (tile.rows * tile.tokens);  // of K, half slices at least
  return shape.for_short && shape.K <= kShortInputs && has_room(tile, shape.M) &&
         tiles <= device.multiprocessors &&
         parts * (kSliceValues / 2) <= round_up(shape.K, kSliceValues) &&
         short_bytes(tile.rows, tile.tokens, shape.K) <= device.shared_bytes - kShortStaticBytes;
}

// The cheapest plan by a model of the costs of a block: block_cost to start and to end; slice_cost
// per slice of K (256 values), for the tensor cores or for the transport of operands to them;
// kNextTileCost between two tiles; kClusterCost for a cluster, and kMemberCost for each of its
// blocks. Multiprocessors that a whole number of clusters does not fill stay idle. Fitted to the
// times of 240 shapes with 33 to 16384 tokens on an H200, each by up to 26 plans: the plan chosen
// takes 0.2 % more than the fastest on average, and 6 % at most.
constexpr WgmmaPlan plan_wgmma(const Device& device, const Shape& shape, int max_splits = 8) {
  constexpr int64_t kClusterCost = 3400, kMemberCost = 50, kNextTileCost = 1500;
  const int64_t slices = ceil_div(shape.K, kSliceValues);
  WgmmaPlan best = {64, 32, 1, 1};
  int64_t lowest = INT64_MAX;
  for (const WgmmaTile& tile : kWgmmaTiles) {
    if (!has_room(tile, shape.M) || (shape.group_size > 0 && !has_groups(tile))) continue;
    const int64_t rows = shape.group_size > 0 ? 2 * shape.N : shape.N;
    const int64_t tiles = ceil_div(rows, tile.rows) * ceil_div(shape.M, tile.tokens);
    for (int splits = 1; splits <= max_splits && (splits == 1 || 2 * splits <= slices);
         splits *= 2) {
      const int64_t usable = splits <= 2   ? device.multiprocessors
                             : splits == 4 ? device.multiprocessors * 10 / 11
                                           : device.multiprocessors * 4 / 5;
      if (usable < splits) continue;
      const WgmmaPlan plan = {tile.rows, tile.tokens, tile.halves, splits};
      const int64_t rounds = ceil_div(tiles, usable / splits);
      const int64_t tile_cost = ceil_div(slices, splits) * tile.slice_cost;
      int64_t cost = 0;
      if (splits > 1) {  // a cluster takes one tile
        cost = rounds * (tile_cost + tile.block_cost + kClusterCost + splits * kMemberCost);
      } else if (shape.for_many && is_many_tile(plan)) {
        cost = many_cost(plan, tiles, usable, tile_cost) + tile.block_cost;
      } else {
        cost = rounds * (tile_cost + kNextTileCost) + tile.block_cost;
      }
      if (cost < lowest) {
        lowest = cost;
        best = plan;
      }
    }
  }
  for (const WgmmaTile& tile : kShortTiles) {
    const int64_t cost = slices * tile.slice_cost + tile.block_cost;
    if (cost < lowest && is_short_tile(device, shape, tile)) {
      lowest = cost;
      best = {tile.rows, tile.tokens, 1, 1, true};
    }
  }
  return best;
}

// As plan_wgmma, for a device that can refuse clusters, as a part of one (MIG) or a share of it
// (MPS) does. `runs_clusters(plan)` returns whether it runs the clusters of a plan.
template <class RunsClusters>
constexpr WgmmaPlan plan_wgmma(const Device& device, const Shape& shape,
                               const RunsClusters& runs_clusters) {
  const WgmmaPlan plan = plan_wgmma(device, shape);
  return plan.splits == 1 || runs_clusters(plan) ? plan : plan_wgmma(device, shape, 1);
}

// ------------------------------------------------------------------------------------- choice

// Whether the kernel reads scales of groups that have been split into multipliers and units.
constexpr bool reads_split_scales(int kernel) {
  return kernel == BITLINEAR_CUDA_DP4A || kernel == BITLINEAR_CUDA_MMA ||
         kernel == BITLINEAR_CUDA_WGMMA;
}

// Whether the kernel quantises the tokens itself; then it needs no workspace.
constexpr bool fuses_quantizer(int kernel) {
  return kernel == BITLINEAR_CUDA_GEMV || kernel == BITLINEAR_CUDA_SMALL_LAYER;
}

// Whether the kernels that keep sums of groups apart take the groups of a shape, if it has any.
constexpr bool takes_groups(const Shape& shape) { return shape.group_size % kPartValues == 0; }

// Whether a kernel gives the right result for this shape on this device.
constexpr bool supports(int kernel, const Device& device, const Shape& shape) {
  const bool sums_fit = shape.group_size == 0 || shape.K <= kMaxGroupedInputs;
  switch (kernel) {
    case BITLINEAR_CUDA_DP4A:
      return device.capability >= 61;
    case BITLINEAR_CUDA_GEMV:
      return device.capability >= 80 && shape.w_aligned && shape.x_aligned && !shape.is_quantized &&
             takes_groups(shape) &&
             shape.M <= (shape.group_size > 0 ? kGemvGroupTokens : kGemvTokens) &&
             (!shape.has_prologue || gemv_norm_sums(shape.tokens(), shape.K) <= kGemvNormSums) &&
             gemv_room(device, shape, are_resident(shape), gemv_blocks(device, shape, 1)) >=
                 2 * gemv_stage_bytes(ceil_div(shape.K, 4), 3);
    case BITLINEAR_CUDA_SMALL_BATCH:
      return device.capability >= 90 && takes_groups(shape) && shape.w_aligned &&
             shape.M <= kSmallBatchTokens &&
             (shape.group_size == 0 || has_room(plan_small_batch(device, shape)));
    case BITLINEAR_CUDA_SMALL_LAYER:
      return device.capability >= 80 && shape.group_size == 0 && shape.w_aligned &&
             shape.x_aligned && shape.K <= kSmallLayerInputs && shape.weights == 1 &&
             !shape.has_prologue && !shape.is_quantized;
    case BITLINEAR_CUDA_MMA:
      return device.capability >= 80 && sums_fit;
    case BITLINEAR_CUDA_WGMMA:
      // Beside aligned tokens it reads weights that are rewritten.
      return device.has_wgmma && sums_fit && (shape.w_aligned || shape.q_aligned);
    default:
      return false;
  }
}

// Whether the GEMV, if it supports the shape, is faster than the others on an H200. Each of its
// blocks quantises all tokens. If they have many values, this takes longer than the quantiser and
// the small-batch kernel together. Before sm_90 the alternative is slower. Fitted to tokens of 8
// bits; a token of 16 bits is read and gated as often.
constexpr bool prefers_gemv(const Device& device, const Shape& shape) {
  const int64_t values = gemv_values(shape.tokens(), shape.K);
  if (device.capability < 90) {
    return shape.tokens() == 1 ||
           values <= (shape.has_prologue ? 2 * kGemvPrologueValues : 5 * kGemvRegisterValues);
  }
  const bool has_groups = shape.group_size > 0;
  if (shape.tokens() == 1) {
    // With groups and two rows of q, a block is alone on its multiprocessor.
    return !has_groups || shape.M == 1 || shape.N <= int64_t{64} * device.multiprocessors;
  }
  if (has_groups) return false;
  if (shape.tokens() == 2 || shape.has_prologue) return are_resident(shape);
  return values <= 3 * kGemvGroupValues;
}

// Whether the kernel for small layers, if it supports the shape, is faster than the others on an
// H100. It is as long as a multiprocessor has at most one tile, and for long rows a small tile. The
// GEMV for two tokens or more is slower only for short rows.
constexpr bool prefers_small_layer(const Device& device, const Shape& shape) {
  const SmallLayerPlan tile = plan_small_layer(device, shape);
  if (small_layer_blocks(tile, shape) > device.multiprocessors) return false;
  if (shape.M <= kGemvTokens) return shape.M > 1 && shape.K <= 256;
  // Up to 16 rows of weights for each multiprocessor: the small-batch kernel has one part each.
  const bool has_few_rows =
      device.capability >= 90 && shape.N <= int64_t{kSmallBatchStageRows} * device.multiprocessors;
  const int64_t small_batch = has_few_rows ? kSmallBatchTokens : 16;
  return shape.K <= 512 || (shape.M > small_batch && tile.rows * tile.tokens <= 128 * 16);
}

// The fastest kernel that supports the shape; BITLINEAR_CUDA_AUTO if none does.
constexpr int choose_kernel(const Device& device, const Shape& shape) {
  // With more than 16 tokens and several tiles of rows per block, wgmma fetches the activations
  // fewer times.
  const bool has_few_rows = shape.N <= int64_t{64} * device.multiprocessors;
  const bool is_small = shape.M <= 16 || has_few_rows;
  // With groups that only the kernels for tiles take: a product of wgmma takes as long for 16
  // tokens as for 64.
  const bool suits_mma = shape.group_size > 0 && shape.M <= 16 && has_few_rows;
  for (const int kernel :
       {BITLINEAR_CUDA_SMALL_LAYER, BITLINEAR_CUDA_GEMV, BITLINEAR_CUDA_SMALL_BATCH,
        BITLINEAR_CUDA_WGMMA, BITLINEAR_CUDA_MMA, BITLINEAR_CUDA_DP4A}) {
    if (!supports(kernel, device, shape)) continue;
    if (kernel == BITLINEAR_CUDA_SMALL_LAYER && !prefers_small_layer(device, shape)) continue;
    if (kernel == BITLINEAR_CUDA_GEMV && !prefers_gemv(device, shape)) continue;
    if (kernel == BITLINEAR_CUDA_SMALL_BATCH && !is_small && device.has_wgmma) continue;
    if (kernel == BITLINEAR_CUDA_WGMMA && suits_mma) continue;
    return kernel;
  }
  return BITLINEAR_CUDA_AUTO;
}

}  // namespace cuda
}  // namespace bitlinear
