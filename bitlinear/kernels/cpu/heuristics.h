// Chooses the form of a product and divides a call among threads. Pure functions of the sizes,
// tested by tests/kernels/test_heuristics.py.
#pragma once

#include <stdint.h>

#include "../abi.h"
#include "../integers.h"

namespace bitlinear {

// Whether the GEMM is faster than the GEMV for M tokens. The GEMV reads packed bytes directly, and
// sums across lanes once per row and token, which costs as much as `gemv_overhead` vectors of
// packed bytes. The GEMM decodes each packed byte once. For long rows the GEMM is faster from
// gemm_tokens on, for short rows earlier. The README of the kernels says how both constants are
// refitted.
constexpr bool prefer_gemm(int64_t M, int64_t vectors_per_row, int64_t gemm_tokens,
                           int64_t gemv_overhead) {
  return M > 1 && M * (vectors_per_row + gemv_overhead) >= gemm_tokens * vectors_per_row;
}

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` nearly equal parts of [0, size), cut at multiples of `unit`.
constexpr Range part_of(int64_t size, int64_t unit, int64_t index, int64_t parts) {
  const int64_t units = ceil_div(size, unit);
  const int64_t begin = index * units / parts * unit;
  const int64_t end = (index + 1) * units / parts * unit;
  return {minimum(begin, size), minimum(end, size)};
}

// The size of the largest of those parts.
constexpr int64_t largest_part(int64_t size, int64_t unit, int64_t parts) {
  return minimum(ceil_div(ceil_div(size, unit), parts) * unit, size);
}

// The output (M, N) is cut into tokens x rows rectangles, one per thread.
struct Grid {
  int64_t tokens, rows;
};

// Whether a product is large enough for several threads. Waking them costs about 0.7 us a thread
// (GNU OpenMP, spinning; 2 to 16 threads of a Sapphire Rapids VM), and one thread multiplies about
// 45 KB of packed bytes by a token in a microsecond. Refit: `python -m scripts.bench --threads 1 2
// 4 8 16`.
constexpr bool pays_for_threads(int64_t packed_bytes_times_tokens, int64_t threads) {
  constexpr int64_t kBytesPerThread = 24 * 1024;
  return threads > 1 &&
         packed_bytes_times_tokens * (threads - 1) >= kBytesPerThread * threads * threads;
}

// The grid whose largest part is cheapest by the variant's costs. Of equal grids, the one with the
// fewest cuts between tokens: each of these cuts reads the weights once more.
constexpr Grid choose_grid(int64_t M, int64_t N, int64_t row_bytes, int64_t threads,
                           const bitlinear_costs& costs) {
  if (!pays_for_threads(M * N * row_bytes, threads)) return {1, 1};
  const int64_t token_units = ceil_div(M, costs.token_unit);
  const int64_t row_units = ceil_div(N, costs.row_unit);
  Grid best = {1, 1};
  int64_t lowest = INT64_MAX;
  for (int64_t tokens = 1; tokens <= threads && tokens <= token_units; ++tokens) {
    const int64_t rows = minimum(threads / tokens, row_units);
    const int64_t part_tokens = ceil_div(token_units, tokens) * costs.token_unit;
    const int64_t part_rows = ceil_div(row_units, rows) * costs.row_unit;
    const int64_t cost = (part_tokens + costs.per_row) * (part_rows + costs.per_token);
    if (cost < lowest) {
      lowest = cost;
      best = {tokens, rows};
    }
  }
  return best;
}

// The output, cut for threads that are not equally fast: a thread begins with the pieces of a part
// of a grid, and takes pieces of others when these are done. A piece is about a block of the
// kernel, so that it costs no more than in a whole part.
struct Pieces {
  Grid grid;
  int64_t of_part;  // the number of pieces of a part; the last ones of a small part can be empty
  int64_t rows;     // of a piece

  constexpr int64_t count() const { return grid.tokens * grid.rows * of_part; }
};

constexpr Pieces choose_pieces(int64_t M, int64_t N, int64_t row_bytes, int64_t threads,
                               const bitlinear_costs& costs) {
  constexpr int64_t kMostOfPart = 16;
  const Grid grid = choose_grid(M, N, row_bytes, threads, costs);
  if (grid.tokens * grid.rows == 1) return {grid, 1, N};
  const int64_t rows = largest_part(N, costs.row_unit, grid.rows);
  const int64_t most = minimum(ceil_div(rows, costs.blocks.rows), kMostOfPart);
  const int64_t piece = round_up(ceil_div(rows, most), costs.blocks.unit);
  return {grid, ceil_div(rows, piece), piece};
}

struct Rectangle {
  Range tokens, rows;
};

// Piece `index` of an output (M, N). The pieces of a part follow each other.
constexpr Rectangle piece_of(int64_t M, int64_t N, const bitlinear_costs& costs,
                             const Pieces& pieces, int64_t index) {
  const int64_t part = index / pieces.of_part, piece = index % pieces.of_part;
  const Grid& grid = pieces.grid;
  const Range tokens = part_of(M, costs.token_unit, part / grid.rows, grid.tokens);
  const Range rows = part_of(N, costs.row_unit, part % grid.rows, grid.rows);
  const int64_t begin = minimum(rows.begin + piece * pieces.rows, rows.end);
  return {tokens, {begin, minimum(begin + pieces.rows, rows.end)}};
}

// The number of parts in which M tokens of K values are quantised, before the product in `pieces`
// pieces. If the product wakes the threads anyway, a part costs a barrier, as much as some 500
// values. Else a value costs as much as four packed bytes.
constexpr int64_t choose_quantize_parts(int64_t M, int64_t K, int64_t threads, int64_t pieces) {
  const bool divide = pieces > 1 ? M * K >= 512 * threads : pays_for_threads(4 * M * K, threads);
  return divide ? minimum(M, threads) : 1;
}

// Whether each thread quantises all M tokens of K values for itself, instead of `quantize_parts`
// parts of them for all threads. Then nobody waits, and no thread fetches lines that another core
// wrote, which can take as long as to quantise. So it pays if the other threads had nothing to do
// meanwhile; or if it is little more work, compared with a barrier or with the N products of each
// value. Larger tokens would displace weights in every L2 cache, and take much memory.
constexpr bool each_quantizes(const Pieces& pieces, int64_t quantize_parts, int64_t M, int64_t K,
                              int64_t N, int64_t threads, bool is_plain) {
  constexpr int64_t kFewValues = 8 * 1024, kManyRows = 1024, kMostValues = 256 * 1024;
  if (pieces.count() == 1 || pieces.grid.tokens > 1 || M * K > kMostValues) return false;
  if (quantize_parts == 1) return true;
  const int64_t others = threads - 1;
  return is_plain && (M * K * others <= kFewValues * threads || N >= kManyRows * others);
}

}  // namespace bitlinear
