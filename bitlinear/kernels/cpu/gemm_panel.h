// Panel GEMM: many tokens against many weight rows, for instruction sets with a dot product of four
// bytes (VNNI, sdot, AMX).
//
// A panel of weight rows is decoded once into bytes that all tokens share. Vector `step` of a strip
// of kLanes rows holds four codes of row r in lane r. k has the order of the quantised activations,
// so a step broadcasts the four consecutive bytes q[4 * step ...]: it needs no shuffle, and every
// lane of an accumulator is an output. A tile of kPanelTokens x kPanelStrips accumulators stays in
// registers for a whole slice of k.
//
// Bound: the peak rate of the dot product (AVX512-VNNI at 2.8 GHz: 720 Gop/s per core). The loop
// has 24 dot products, 11 loads and 4 others: 12 cycles if two dot products start in each. Decoding
// costs about as much as 3 tokens. Reached on one core of an idle Xeon at 4096 x 4096: 71 % for M =
// 16, 87 % for M = 32, 100 % for M = 256. The rest is decoding.
//
// A packed panel holds packed bytes in this order, and the tile masks them. That makes decoding
// cheaper, and adds a mask to every kPanelTokens dot products: for CPUs that have other units for
// it. Tried on a Zen 4 to make it cheaper still, and 1 to 2 % slower: transposing with masked loads
// of 16 bytes in place of half of the shuffles.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "../integers.h"
#include "epilogue.h"

namespace bitlinear {

template <class V>
struct Panel {
  static constexpr int kLanes = V::kWidth / 4;  // rows of a strip
  static constexpr int64_t kRows = V::kPanelStrips * kLanes;
  static constexpr int64_t kBytes = V::kPanelDepth / 4;  // packed bytes of a row decoded at a time
  // A block of the output, whose sums stay in memory between slices of k. The activations of one
  // slice stay in the L2 cache for all panels of the block.
  static constexpr int64_t kBlockTokens = 256;
  static constexpr int64_t kBlockRows = 192;
  static_assert(kBlockRows % kRows == 0, "a block must hold whole panels");

  alignas(64) uint8_t codes[kRows * V::kPanelDepth / (V::kPackedPanels ? 4 : 1)];
  alignas(64) int32_t sums[kBlockTokens][kBlockRows];
};

// Decodes `bytes` packed bytes of up to kLanes rows into every kStrips-th vector of `codes`; rows
// beyond the last one become zeros. A packed panel gets the transposed bytes as they are.
// Prefetches the bytes that lie `ahead`.
template <class V, int kStrips, bool kPacked = V::kPackedPanels>
inline void decode_strip(const uint8_t* w, int64_t row_bytes, int64_t rows, int64_t bytes,
                         int64_t ahead, uint8_t* codes) {
  constexpr int kLanes = Panel<V>::kLanes;
  for (int64_t begin = 0; begin < bytes; begin += V::kWidth) {
    typename V::Bytes words[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const uint8_t* packed = w + r * row_bytes + begin;
      // So many strided streams defeat the hardware prefetcher.
      if (begin % 64 == 0 && r < rows) prefetch_l2(packed + ahead);
      words[r] = r >= rows                    ? V::zero()
                 : bytes - begin >= V::kWidth ? V::load(packed)
                                              : V::load_partial(packed, bytes - begin);
    }
    V::transpose(words);  // words[i] now holds packed bytes 4i .. 4i + 3 of every row
    for (int j = 0; j < (kPacked ? 1 : 4); ++j) {
      for (int i = 0; i < kLanes; ++i) {
        V::store(codes, kPacked ? words[i] : V::codes(words[i], 6 - 2 * j));
        codes += kStrips * V::kWidth;
      }
    }
  }
}

// sums (+)= tile.
template <class V, int kTokens, int kStrips>
inline void store_tile(const typename V::Bytes (&tile)[kTokens][kStrips], int32_t* sums,
                       bool accumulate) {
  for (int m = 0; m < kTokens; ++m) {
    for (int s = 0; s < kStrips; ++s) {
      int32_t* out = sums + m * Panel<V>::kBlockRows + s * Panel<V>::kLanes;
      V::store_ints(out, accumulate ? V::add(tile[m][s], V::load_ints(out)) : tile[m][s]);
    }
  }
}

// sums[m, strip * kLanes + lane] (+)= sum_k c * q over the slice of k that was decoded.
template <class V>
struct DotTile {
  template <int kTokens, int kStrips>
  static void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t bytes,
                       int32_t* sums, bool accumulate) {
    constexpr int kLanes = Panel<V>::kLanes;
    typename V::Bytes tile[kTokens][kStrips] = {};
    // The last block of k can be partial: then only the first ceil(r / 4) steps of each of its
    // planes have codes, r being its packed bytes (# multiplied, . skipped):
    //
    //   |<----- whole blocks ------>|<----------- the partial block ----------->|
    //   |                           | plane 0 | plane 1 | plane 2 | plane 3     |
    //   |###########################|###......|###......|###......|###..........|
    //     range 0                     range 1   range 2   range 3   range 4
    //
    // One loop serves all five ranges, because compilers keep the tile in registers only if one
    // loop uses it.
    const int64_t whole = bytes / V::kWidth * V::kWidth;
    const int64_t tail = (bytes - whole + 3) / 4;
    for (int range = 0; range < 5; ++range) {
      const int64_t first = range == 0 ? 0 : whole + (range - 1) * kLanes;
      const int64_t steps = range == 0 ? whole : tail;
      const uint8_t* code = codes + first * kStrips * V::kWidth;
      const int8_t* quad = q + first * 4;
      // Unrolled, because a core that runs two threads issues only three instructions of each per
      // cycle.
      BITLINEAR_UNROLL_4
      for (int64_t step = 0; step < steps; ++step) {
        typename V::Bytes strip[kStrips];
        for (int s = 0; s < kStrips; ++s) strip[s] = V::load(code + s * V::kWidth);
        for (int m = 0; m < kTokens; ++m) {
          const typename V::Bytes activations = V::broadcast_quad(quad + m * q_stride);
          for (int s = 0; s < kStrips; ++s) tile[m][s] = V::dot(tile[m][s], strip[s], activations);
        }
        code += kStrips * V::kWidth;
        quad += 4;
      }
    }
    store_tile<V>(tile, sums, accumulate);
  }
};

// The same for a packed panel. A mask leaves the codes of one plane, 64, 16, 4 or 1 times too large
// as in gemv.h. The planes follow each other, the largest factor first, and the sums so far are
// divided by four in between: exactly, as they are multiples of it.
template <class V>
struct PackedTile {
  template <int kTokens, int kStrips>
  static void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t bytes,
                       int32_t* sums, bool accumulate) {
    typename V::Bytes tile[kTokens][kStrips] = {};
    // Four steps at a time, so that no second loop uses the tile: compilers would spill it. The
    // last steps can have zeros.
    const int64_t groups = ceil_div(bytes, 16);
    for (int plane = 0; plane < 4; ++plane) {
      for (int m = 0; m < kTokens; ++m) {
        for (int s = 0; s < kStrips; ++s) tile[m][s] = V::template shift_right<2>(tile[m][s]);
      }
      const typename V::Bytes mask = V::broadcast_byte(0xC0 >> (2 * plane));
      const uint8_t* code = codes;
      const int8_t* quad = q + plane * V::kWidth;
      for (int64_t group = 0; group < groups; ++group) {
        for (int step = 0; step < 4; ++step) {
          typename V::Bytes strip[kStrips];
          for (int s = 0; s < kStrips; ++s) {
            strip[s] = V::bitwise_and(V::load(code + s * V::kWidth), mask);
          }
          for (int m = 0; m < kTokens; ++m) {
            const typename V::Bytes activations = V::broadcast_quad(quad + m * q_stride);
            for (int s = 0; s < kStrips; ++s) {
              tile[m][s] = V::dot(tile[m][s], strip[s], activations);
            }
          }
          code += kStrips * V::kWidth;
          quad += 4;
        }
        const bool is_last_of_block = (group + 1) % (V::kWidth / 16) == 0;
        quad += is_last_of_block ? 3 * V::kWidth : 0;
      }
    }
    store_tile<V>(tile, sums, accumulate);
  }
};

// Computes the sums of a panel in tiles of registers: of kPanelTokens tokens, and a smaller one for
// the tokens that are left. Tile multiplies one tile, as DotTile does. The AMX variant has AmxTiles
// instead.
template <class V, class Tile>
struct RegisterTiles {
  template <int kStrips, int kTokens = V::kPanelTokens>
  void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t tokens,
                int64_t bytes, int32_t* sums, bool accumulate) {
    int64_t m = 0;
    for (; m + kTokens <= tokens; m += kTokens) {
      Tile::template multiply<kTokens, kStrips>(codes, q + m * q_stride, q_stride, bytes,
                                                sums + m * Panel<V>::kBlockRows, accumulate);
    }
    if constexpr (kTokens > 1) {
      if (m < tokens) {
        multiply<kStrips, kTokens - 1>(codes, q + m * q_stride, q_stride, tokens - m, bytes,
                                       sums + m * Panel<V>::kBlockRows, accumulate);
      }
    }
  }
};

// One panel, `rows` rows from row n on, and one slice of k, `bytes` packed bytes from `begin` on.
template <class V, int kStrips, class Tiles>
inline void panel_slice(const bitlinear_task& task, int64_t m, int64_t tokens, int64_t n,
                        int64_t rows, int64_t begin, int64_t bytes, int64_t ahead, Tiles& tiles,
                        int32_t* sums) {
  constexpr int kLanes = Panel<V>::kLanes;
  if constexpr (kStrips > 1) {
    if (rows <= (kStrips - 1) * kLanes) {
      panel_slice<V, kStrips - 1>(task, m, tokens, n, rows, begin, bytes, ahead, tiles, sums);
      return;
    }
  }
  uint8_t* codes = static_cast<Panel<V>*>(task.scratch)->codes;
  const uint8_t* packed = task.w + n * task.row_bytes + begin;
  for (int s = 0; s < kStrips; ++s) {
    decode_strip<V, kStrips>(packed + s * kLanes * task.row_bytes, task.row_bytes,
                             rows - s * kLanes, bytes, ahead, codes + s * V::kWidth);
  }
  tiles.template multiply<kStrips>(codes, task.q + m * task.q_stride + begin * 4, task.q_stride,
                                   tokens, bytes, sums, begin > 0);
}

// A block of the output: `tokens` tokens from m on, `rows` weight rows from n on.
template <class V, class Tiles>
inline void panel_block(const bitlinear_task& task, int64_t m, int64_t tokens, int64_t n,
                        int64_t rows, Tiles& tiles) {
  using P = Panel<V>;
  int32_t* sums = static_cast<P*>(task.scratch)->sums[0];
  for (int64_t begin = 0; begin < task.row_bytes; begin += P::kBytes) {
    const int64_t bytes = minimum(task.row_bytes - begin, P::kBytes);
    // To the next slice of the same rows, or to the first one of the next block.
    const int64_t ahead =
        begin + bytes < task.row_bytes ? bytes : P::kBlockRows * task.row_bytes - begin;
    for (int64_t first = 0; first < rows; first += P::kRows) {
      panel_slice<V, V::kPanelStrips>(task, m, tokens, n + first, minimum(rows - first, P::kRows),
                                      begin, bytes, ahead, tiles, sums + first);
    }
  }
  // All panels of a token are stored together: the prefetcher follows long runs of addresses
  // better.
  const Epilogue<V, P::kBlockRows> epilogue(task, n, rows);
  epilogue.store(m, tokens, sums, P::kBlockRows);
}

// V provides, in addition to the vocabulary of vocabulary.h (vnni.h and avx512.h are examples):
// kPackedPanels; kPanelDepth, the values of k in a slice; kPanelTokens and kPanelStrips, the tile
// in registers; kDecodingTokens and kFetchingRows, the costs of a row and of a token; zero;
// codes(w, shift), which is (w >> shift) & 3 in every byte; transpose(rows); and for DotTile
// broadcast_quad(p), dot(sum, codes, activations), add, load_ints, store_ints. PackedTile needs
// broadcast_byte, bitwise_and and shift_right as well.
template <class V,
          class Tiles =
              RegisterTiles<V, std::conditional_t<V::kPackedPanels, PackedTile<V>, DotTile<V>>>>
struct PanelGemm {
  // Rows beyond the last whole panel run in a narrower panel, so a strip is the unit.
  static constexpr int64_t kTokenUnit = V::kPanelTokens, kRowUnit = Panel<V>::kLanes;
  static constexpr int64_t kRowCost = V::kDecodingTokens, kTokenCost = V::kFetchingRows;
  static constexpr bitlinear_blocks blocks(int64_t /*M*/, int64_t /*row_bytes*/) {
    return {Panel<V>::kBlockRows, Panel<V>::kRows};
  }
  static int64_t scratch_bytes(int64_t M, int64_t /*row_bytes*/) {
    using P = Panel<V>;
    const int64_t tokens = minimum(M, P::kBlockTokens);
    return static_cast<int64_t>(sizeof(P)) - (P::kBlockTokens - tokens) * P::kBlockRows * 4;
  }
  static void run(const bitlinear_task& task) {
    using P = Panel<V>;
    Tiles tiles;
    for (int64_t m = 0; m < task.M; m += P::kBlockTokens) {
      for (int64_t n = task.n_begin; n < task.n_end; n += P::kBlockRows) {
        panel_block<V>(task, m, minimum(task.M - m, P::kBlockTokens), n,
                       minimum(task.n_end - n, P::kBlockRows), tiles);
      }
    }
  }
};

}  // namespace bitlinear
