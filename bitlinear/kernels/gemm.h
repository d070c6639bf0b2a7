// Several tokens against many weight rows.
//
// A tile of kTokens x kRows integer sums lives in registers while K streams by. The packed bytes
// are decoded to codes in registers, 7 instructions per vector, and each of the 4 code vectors
// serves all tokens of the tile: with 8 tokens 32 dot products per decode. Rows are taken in panels
// that fit the L2 cache, so that the packed weights come from memory once.
//
// Bound: the peak rate of the dot product times 32 / 39 (the share of instructions that are dot
// products in the 8-token tile).
#pragma once

#include <stdint.h>

#include "epilogue.h"

namespace bitlinear {

constexpr int64_t kPanelBytes = 128 * 1024;

// Adds one block of K to a tile. `load` reads the packed bytes of a row: whole or partial vectors.
template <class V, int kTokens, int kRows, class Load>
inline void tile_block(const int8_t* q, int64_t q_stride, Load load,
                       typename V::CodeSum (&sums)[kTokens][kRows]) {
  typename V::Bytes w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = load(r);
  for (int j = 0; j < 4; ++j) {
    typename V::Bytes codes[kRows];
    for (int r = 0; r < kRows; ++r) codes[r] = V::codes(w[r], 6 - 2 * j);
    for (int m = 0; m < kTokens; ++m) {
      const typename V::Bytes plane = V::load_plane(q + m * q_stride + j * V::kWidth);
      for (int r = 0; r < kRows; ++r) sums[m][r].add(codes[r], plane);
    }
  }
}

// codes[m * codes_stride + r] = sum_k c[r, k] * q[m, k] for a tile of tokens and rows.
template <class V, int kTokens, int kRows>
inline void gemm_tile(const uint8_t* w, int64_t row_bytes, const int8_t* q, int64_t q_stride,
                      int32_t* codes, int64_t codes_stride) {
  typename V::CodeSum sums[kTokens][kRows] = {};
  const auto flush = [&] {
    for (int m = 0; m < kTokens; ++m) {
      for (int r = 0; r < kRows; ++r) sums[m][r].flush();
    }
  };
  const int64_t whole = row_bytes / V::kWidth;
  int64_t block = 0;
  while (block < whole) {
    const int64_t stop = whole - block > V::CodeSum::kFlush ? block + V::CodeSum::kFlush : whole;
    for (; block < stop; ++block) {
      const uint8_t* bytes = w + block * V::kWidth;
      tile_block<V, kTokens, kRows>(
          q + block * 4 * V::kWidth, q_stride,
          [&](int r) { return V::load(bytes + r * row_bytes); }, sums);
    }
    flush();
  }
  const int64_t tail = row_bytes - whole * V::kWidth;
  if (tail > 0) {
    const uint8_t* bytes = w + whole * V::kWidth;
    tile_block<V, kTokens, kRows>(
        q + whole * 4 * V::kWidth, q_stride,
        [&](int r) { return V::load_partial(bytes + r * row_bytes, tail); }, sums);
    flush();
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int r = 0; r < kRows; ++r) codes[m * codes_stride + r] = sums[m][r].total();
  }
}

// kTokens tokens against rows n .. n + count of one panel.
template <class V, int kTokens, int kRows>
inline void gemm_strip(const bitlinear_task& task, int64_t m, int64_t n, int64_t count) {
  const int8_t* q = task.q + m * task.q_stride;
  for (int64_t done = 0; done < count; done += kEpilogueColumns) {
    const int64_t columns = count - done < kEpilogueColumns ? count - done : kEpilogueColumns;
    const uint8_t* w = task.w + (n + done) * task.row_bytes;
    int32_t codes[kTokens * kEpilogueColumns];
    int64_t i = 0;
    for (; i + kRows <= columns; i += kRows) {
      gemm_tile<V, kTokens, kRows>(w + i * task.row_bytes, task.row_bytes, q, task.q_stride,
                                   codes + i, kEpilogueColumns);
    }
    for (; i < columns; ++i) {
      gemm_tile<V, kTokens, 1>(w + i * task.row_bytes, task.row_bytes, q, task.q_stride, codes + i,
                               kEpilogueColumns);
    }
    for (int t = 0; t < kTokens; ++t) {
      epilogue<V>(task, m + t, n + done, columns, codes + t * kEpilogueColumns);
    }
  }
}

template <class V>
void gemm(const bitlinear_task& task) {
  int64_t panel = kPanelBytes / task.row_bytes / kEpilogueColumns * kEpilogueColumns;
  if (panel < kEpilogueColumns) panel = kEpilogueColumns;
  for (int64_t n = task.n_begin; n < task.n_end; n += panel) {
    const int64_t count = task.n_end - n < panel ? task.n_end - n : panel;
    int64_t m = 0;
    for (; m + V::kTokens <= task.M; m += V::kTokens) {
      gemm_strip<V, V::kTokens, V::kTileRows>(task, m, n, count);
    }
    for (; m + 2 <= task.M; m += 2) gemm_strip<V, 2, V::kTileRows>(task, m, n, count);
    if (m < task.M) gemm_strip<V, 1, V::kTileRows>(task, m, n, count);
  }
}

}  // namespace bitlinear
