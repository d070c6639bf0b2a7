// GEMV: a few tokens against many weight rows, which are read as packed bytes.
//
// In a vector of packed bytes w, the masks 0xC0, 0x30, 0x0C, 0x03 leave the codes of k = 0, 1, 2, 3
// (mod 4), 64, 16, 4 and 1 times too large. The quantiser stores the activations in the same four
// planes. So each plane is one dot product with its own accumulator, and the factors are shifted
// away once at the end: weights are neither shifted nor shuffled.
//
// Bound: per vector of packed bytes 1 load and 4 ANDs, which all tokens share, and 4 dot products
// per token. AVX512-VNNI starts two ANDs or two dot products a cycle: 64 bytes take 4 cycles for
// one token (45 GB/s per core at 2.8 GHz) and 10 for four. Weights beyond the cache are bound by
// memory bandwidth. Reached on two cores of a Xeon: 28672 x 8192, one token, all of the measured
// bandwidth of memory (43.9 GB/s); 4096 x 4096, whose weights just overflow the L2 caches, 42 to 58
// GB/s of 96. Four tokens on one core: 0.74 of the dot product's peak, where 0.8 is the bound (16
// of 20 instructions).
//
// On two cores of a Zen 4, which start one dot product a cycle, 4 tokens reach 650 to 710 of 920
// Gop/s. Tried there, and not faster: one more shift of the weights, so that two planes share an
// accumulator, in tiles of 4 x 2, 6 x 1 and 8 x 1 tokens and rows.
#pragma once

#include <stdint.h>

#include "../integers.h"
#include "epilogue.h"

namespace bitlinear {

constexpr int64_t kNeverFlush = INT64_MAX;

// Columns of the output that share an epilogue.
constexpr int kGemvColumns = 64;

// Bytes from a load of weights to the prefetch beside it. 3 KB cover the 250 ns that memory takes,
// at 12 GB/s per core; more gives time to find the pages.
constexpr int64_t kGemvPrefetch = 8192;

// Rows that a thread multiplies in some 2 us.
constexpr bitlinear_blocks gemv_blocks(int64_t M, int64_t row_bytes) {
  constexpr int64_t kBlockBytes = 96 * 1024;
  return {round_up(kBlockBytes / (M * row_bytes) + 1, kGemvColumns), kGemvColumns};
}

// totals[m * kRows + r] = the exact sum over all lanes of sums[m][r].
template <class V, int kTokens, int kRows>
inline void add_lanes(const typename V::PlaneSum (&sums)[kTokens][kRows], int32_t* totals) {
  constexpr int kCount = kTokens * kRows;
  const auto lanes = [&](int i) { return sums[i / kRows][i % kRows].lanes(); };
  int i = 0;
  for (; i + 4 <= kCount; i += 4) {
    V::reduce4(lanes(i), lanes(i + 1), lanes(i + 2), lanes(i + 3), totals + i);
  }
  for (; i < kCount; ++i) totals[i] = V::reduce(lanes(i));
}

// codes[m * kGemvColumns + r] (+)= sum_k c[r, k] * q[m, k] over whole blocks of k, for
// consecutive tokens and for weight rows `stride` bytes apart.
template <class V, int kTokens, int kRows>
inline void gemv_tile(const uint8_t* w, int64_t stride, int64_t blocks, const int8_t* q,
                      int64_t q_stride, int32_t* codes, bool accumulate) {
  typename V::PlaneSum sums[kTokens][kRows] = {};
  while (blocks > 0) {
    const int64_t run = minimum(blocks, V::PlaneSum::kFlush);
    for (int64_t i = 0; i < run;) {
      // Several strided streams defeat the hardware prefetcher, so each is prefetched here.
      for (int r = 0; r < kRows; ++r) prefetch_l2(w + r * stride + kGemvPrefetch);
      // Short vectors: one prefetch per cache line.
      const int64_t end = V::kWidth >= 32 ? i + 1 : minimum(i + 64 / V::kWidth, run);
      for (; i < end; ++i) {
        typename V::Bytes packed[kRows];
        for (int r = 0; r < kRows; ++r) packed[r] = V::load(w + r * stride);
        for (int m = 0; m < kTokens; ++m) {
          typename V::Bytes planes[4];
          for (int j = 0; j < 4; ++j) planes[j] = V::load_plane(q + m * q_stride + j * V::kWidth);
          for (int r = 0; r < kRows; ++r) sums[m][r].add(packed[r], planes);
        }
        w += V::kWidth;
        q += 4 * V::kWidth;
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int r = 0; r < kRows; ++r) sums[m][r].flush();
    }
    blocks -= run;
  }
  int32_t totals[kTokens * kRows];
  add_lanes<V>(sums, totals);
  for (int m = 0; m < kTokens; ++m) {
    for (int r = 0; r < kRows; ++r) {
      int32_t& out = codes[m * kGemvColumns + r];
      out = totals[m * kRows + r] + (accumulate ? out : 0);
    }
  }
}

// As gemv_tile, over all of k.
template <class V, int kTokens, int kRows>
inline void gemv_rows(const uint8_t* w, int64_t row_bytes, const int8_t* q, int64_t q_stride,
                      int32_t* codes) {
  const int64_t whole = row_bytes / V::kWidth;
  const int64_t tail = row_bytes - whole * V::kWidth;
  if (whole > 0) gemv_tile<V, kTokens, kRows>(w, row_bytes, whole, q, q_stride, codes, false);
  if (tail > 0) {
    uint8_t last[kRows * V::kWidth];  // a partial block, padded with zeros
    for (int r = 0; r < kRows; ++r) {
      V::store(last + r * V::kWidth, V::load_partial(w + r * row_bytes + whole * V::kWidth, tail));
    }
    gemv_tile<V, kTokens, kRows>(last, V::kWidth, 1, q + whole * 4 * V::kWidth, q_stride, codes,
                                 whole > 0);
  }
}

// Tokens m .. m + kTokens against rows n .. n + count, count <= kGemvColumns.
template <class V, int kTokens>
inline void gemv_columns(const bitlinear_task& task, int64_t m, int64_t n, int64_t count,
                         const Epilogue<V, kGemvColumns>& epilogue) {
  constexpr int kRows = V::kGemvRows > kTokens ? V::kGemvRows / kTokens : 1;
  const int8_t* q = task.q + m * task.q_stride;
  const uint8_t* w = task.w + n * task.row_bytes;
  int32_t codes[kTokens * kGemvColumns];
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    gemv_rows<V, kTokens, kRows>(w + i * task.row_bytes, task.row_bytes, q, task.q_stride,
                                 codes + i);
  }
  for (; i < count; ++i) {
    gemv_rows<V, kTokens, 1>(w + i * task.row_bytes, task.row_bytes, q, task.q_stride, codes + i);
  }
  if constexpr (kTokens % 2 == 0) {
    epilogue.store(m, kTokens, codes, kGemvColumns);
  } else {  // tokens of 8 bits
    for (int t = 0; t < kTokens; ++t) epilogue.store_row(m + t, codes + t * kGemvColumns);
  }
}

// kTokens tokens at a time, then the tail.
template <class V, int kTokens>
inline void gemv_tokens(const bitlinear_task& task, int64_t m, int64_t n, int64_t count,
                        const Epilogue<V, kGemvColumns>& epilogue) {
  for (; m + kTokens <= task.M; m += kTokens) gemv_columns<V, kTokens>(task, m, n, count, epilogue);
  if constexpr (kTokens > 1) {
    if (m < task.M) gemv_tokens<V, kTokens - 1>(task, m, n, count, epilogue);
  }
}

template <class V>
void gemv(const bitlinear_task& task) {
  for (int64_t n = task.n_begin; n < task.n_end; n += kGemvColumns) {
    const int64_t count = minimum(task.n_end - n, kGemvColumns);
    const Epilogue<V, kGemvColumns> epilogue(task, n, count);
    if (task.act_bits == 8) {
      gemv_tokens<V, V::kGemvTokens>(task, 0, n, count, epilogue);
    } else {
      // Both rows of a token at once.
      constexpr int kPairs = V::kGemvTokens > 1 ? V::kGemvTokens / 2 : 1;
      gemv_tokens<V, 2 * kPairs>(task, 0, n, count, epilogue);
    }
  }
}

}  // namespace bitlinear
