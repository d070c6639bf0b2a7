// Many tokens against many weight rows, with the dot product of four bytes (VNNI).
//
// A panel of weight rows is decoded once into bytes that all tokens share: vector `step` of a strip
// of kLanes rows holds, in lane r, four codes of row r. The order of k is that of the quantised
// activations, so a step needs the four consecutive bytes q[4 * step ...], broadcast: no shuffle,
// and every lane of an accumulator is an output. A tile of kPanelTokens x kPanelStrips accumulators
// stays in registers while k streams by.
//
// Bound: the peak rate of the dot product (AVX512-VNNI at 2.8 GHz: 720 Gop/s and core); the loop is
// 24 dot products, 11 loads and 4 others, 12 cycles where two dot products start in each. Decoding
// costs about as much as 3 tokens. Reached, on one core of a Xeon that is otherwise idle, at 4096 x
// 4096: M = 16 71 %, M = 32 87 %, M = 256 100 %; what is missing is the decoding.
#pragma once

#include <stdint.h>

#include "epilogue.h"

namespace bitlinear {

template <class V>
struct Panel {
  static constexpr int kLanes = V::kWidth / 4;  // rows of a strip
  static constexpr int64_t kRows = V::kPanelStrips * kLanes;
  static constexpr int64_t kDepth = V::kPanelDepth;  // codes decoded at a time, per row
  // Tokens whose sums are kept between two slices of k.
  static constexpr int64_t kTokens = 256;

  alignas(64) uint8_t codes[kRows * kDepth];
  alignas(64) int32_t sums[kTokens * kRows];
};

// Decodes `bytes` packed bytes of up to kLanes rows into every kStrips-th vector of `codes`; rows
// beyond the last one become zeros.
template <class V, int kStrips>
inline void decode_strip(const uint8_t* w, int64_t row_bytes, int64_t rows, int64_t bytes,
                         uint8_t* codes) {
  constexpr int kLanes = Panel<V>::kLanes;
  for (int64_t begin = 0; begin < bytes; begin += V::kWidth) {
    typename V::Bytes words[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const uint8_t* packed = w + r * row_bytes + begin;
      words[r] = r >= rows                    ? V::zero()
                 : bytes - begin >= V::kWidth ? V::load(packed)
                                              : V::load_partial(packed, bytes - begin);
    }
    V::transpose(words);  // words[i] now holds packed bytes 4i .. 4i + 3 of every row
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < kLanes; ++i) {
        V::store(codes, V::codes(words[i], 6 - 2 * j));
        codes += kStrips * V::kWidth;
      }
    }
  }
}

// sums[m, strip * kLanes + lane] (+)= sum_k c * q over the slice of k that was decoded.
template <class V, int kTokens, int kStrips>
inline void panel_tile(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t bytes,
                       int32_t* sums, bool accumulate) {
  constexpr int kLanes = Panel<V>::kLanes;
  typename V::Bytes tile[kTokens][kStrips] = {};
  // The last block of k may be partial: of each of its planes only the beginning matters. One loop
  // for all five ranges, since a compiler keeps the tile in registers only if it sees it used once.
  const int64_t whole = bytes / V::kWidth * V::kWidth;
  const int64_t tail = (bytes - whole + 3) / 4;
  for (int range = 0; range < 5; ++range) {
    const int64_t first = range == 0 ? 0 : whole + (range - 1) * kLanes;
    const int64_t steps = range == 0 ? whole : tail;
    const uint8_t* code = codes + first * kStrips * V::kWidth;
    const int8_t* quad = q + first * 4;
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
  for (int m = 0; m < kTokens; ++m) {
    for (int s = 0; s < kStrips; ++s) {
      int32_t* out = sums + m * Panel<V>::kRows + s * kLanes;
      V::store_ints(out, accumulate ? V::add(tile[m][s], V::load_ints(out)) : tile[m][s]);
    }
  }
}

template <class V, int kTokens, int kStrips>
inline void panel_tokens(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t tokens,
                         int64_t bytes, int32_t* sums, bool accumulate) {
  int64_t m = 0;
  for (; m + kTokens <= tokens; m += kTokens) {
    panel_tile<V, kTokens, kStrips>(codes, q + m * q_stride, q_stride, bytes,
                                    sums + m * Panel<V>::kRows, accumulate);
  }
  if constexpr (kTokens > 1) {
    if (m < tokens) {
      panel_tokens<V, kTokens / 2, kStrips>(codes, q + m * q_stride, q_stride, tokens - m, bytes,
                                            sums + m * Panel<V>::kRows, accumulate);
    }
  }
}

// How the sums of a panel are computed; the AMX variant has another.
template <class V>
struct DotTiles {
  template <int kStrips>
  void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t tokens,
                int64_t bytes, int32_t* sums, bool accumulate) {
    panel_tokens<V, V::kPanelTokens, kStrips>(codes, q, q_stride, tokens, bytes, sums, accumulate);
  }
};

// All tokens against rows n .. n + count, at most kStrips strips.
template <class V, int kStrips, class Tiles>
inline void panel_rows(const bitlinear_task& task, int64_t n, int64_t count, Tiles& tiles) {
  constexpr int64_t kBytes = Panel<V>::kDepth / 4;
  Panel<V>& panel = *static_cast<Panel<V>*>(task.scratch);
  const Epilogue<V, kStrips * Panel<V>::kLanes> epilogue(task, n, count);
  for (int64_t m = 0; m < task.M; m += Panel<V>::kTokens) {
    const int64_t tokens = task.M - m < Panel<V>::kTokens ? task.M - m : Panel<V>::kTokens;
    for (int64_t b = 0; b < task.row_bytes; b += kBytes) {
      const int64_t bytes = task.row_bytes - b < kBytes ? task.row_bytes - b : kBytes;
      for (int s = 0; s < kStrips; ++s) {
        const int64_t first = s * Panel<V>::kLanes;
        decode_strip<V, kStrips>(task.w + (n + first) * task.row_bytes + b, task.row_bytes,
                                 count - first, bytes, panel.codes + s * V::kWidth);
      }
      tiles.template multiply<kStrips>(panel.codes, task.q + m * task.q_stride + b * 4,
                                       task.q_stride, tokens, bytes, panel.sums, b > 0);
    }
    for (int64_t t = 0; t < tokens; ++t) epilogue.store(m + t, panel.sums + t * Panel<V>::kRows);
  }
}

// Panels of kStrips strips, then whatever is left in narrower ones.
template <class V, int kStrips, class Tiles>
inline void panel_width(const bitlinear_task& task, int64_t n, Tiles& tiles) {
  constexpr int64_t kRows = kStrips * Panel<V>::kLanes;
  while (task.n_end - n > kRows - Panel<V>::kLanes) {
    const int64_t count = task.n_end - n < kRows ? task.n_end - n : kRows;
    panel_rows<V, kStrips>(task, n, count, tiles);
    n += count;
  }
  if constexpr (kStrips > 1) {
    if (n < task.n_end) panel_width<V, kStrips - 1>(task, n, tiles);
  }
}

// What V provides besides (vnni.h, avx512.h): kPanelDepth; kPanelTokens and kPanelStrips, the tile
// in registers; zero, codes(w, shift), which is (w >> shift) & 3 in every byte, broadcast_quad(p),
// dot(sum, codes, activations), add, transpose(rows), store, load_ints, store_ints.
template <class V, class Tiles = DotTiles<V>>
struct PanelGemm {
  static constexpr bitlinear_costs kCosts = {V::kPanelTokens, Panel<V>::kRows, V::kDecodingTokens,
                                             0};
  static int64_t scratch_bytes(int64_t) { return sizeof(Panel<V>); }
  static void run(const bitlinear_task& task) {
    Tiles tiles;
    panel_width<V, V::kPanelStrips>(task, task.n_begin, tiles);
  }
};

}  // namespace bitlinear
