// Many tokens against many weight rows with scales of groups, for instruction sets with a dot
// product of four bytes. As gemm_panel.h; but the sums of a part of k, which lies in one group and
// in one block, leave the tile multiplied.
//
// A sum of a part fits 16 bits: |sum t * q| <= 256 * 127. A multiplier is split into a low part of
// 8 bits and a high part of 7, whose products with it fit 23 bits, and 32-bit lanes take
// kPartsOfRun of them.
//
// Bound: of 24 accumulators and groups of 128, 768 dot products, then 48 more of two 16-bit values,
// 72 loads and 48 stores. Measured on one core of a Xeon of 2023, times the product with one scale,
// 4096 x 4096 with groups of 128: AVX512-VNNI 1.52 for 16 tokens and 1.37 for 128, AVX-VNNI 1.29
// and 1.25. On a Zen 4, where a store takes two cycles, 1.55 for 16 and 1.45 for 24.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../integers.h"
#include "epilogue.h"
#include "gemm_panel.h"
#include "gemv_groups.h"
#include "groups.h"

namespace bitlinear {

// V provides what DotTile and GroupGemv need, broadcast_int, kGroupTokens and kGroupStrips, the
// tile in registers, and kGroupDepth, the values of k that are decoded at a time.
template <class V>
class GroupGemm {
 public:
  static int64_t scratch_bytes(int64_t M, int64_t row_bytes, int64_t group_bytes) {
    return static_cast<int64_t>(sizeof(Panel)) +
           minimum(M, kTokens) * count_parts(row_bytes, group_bytes) * int64_t{sizeof(int32_t)};
  }

  static bitlinear_blocks blocks(int64_t /*M*/, int64_t /*row_bytes*/) {
    return {kBlockRows, kRows};
  }

  static void run(const bitlinear_task& task) {
    for (int64_t m = 0; m < task.M; m += kTokens) {
      GroupGemm(task, m, minimum(task.M - m, kTokens)).run();
    }
  }

 private:
  static constexpr int64_t kTokens = 128, kLanes = V::kWidth / 4;
  static constexpr int64_t kRows = V::kGroupStrips * kLanes;
  // Outputs are written in runs of so many columns: prefetchers follow them.
  static constexpr int64_t kBlockRows = 4 * kRows;
  static constexpr int64_t kBytes = V::kGroupDepth / 4;  // packed bytes of a row decoded at a time
  static constexpr int64_t kMostParts = kBytes / (BITLINEAR_GROUP_UNIT / 4);
  static constexpr int64_t kPartsOfRun = 128;
  static_assert(kTokens % 2 == 0, "both rows of a 16-bit token are together");
  static_assert(kMostParts <= kPartsOfRun, "the parts of a slice are in one run");

  struct Panel {
    alignas(64) uint8_t codes[kRows * V::kGroupDepth];
    alignas(64) int32_t low[kMostParts][kRows];  // parts of multipliers
    alignas(64) int32_t high[kMostParts][kRows];
    alignas(64) int32_t low_sums[kTokens][kRows];
    alignas(64) int32_t high_sums[kTokens][kRows];
    alignas(64) double totals[kTokens][kBlockRows];
    float units[kBlockRows];
  };

  // A range of packed bytes that lies in one group and in one block.
  struct Part {
    int64_t begin, end;
  };

  static Part part_at(int64_t begin, int64_t row_bytes, int64_t group_bytes) {
    const int64_t group_end = (begin / group_bytes + 1) * group_bytes;
    const int64_t block_end = (begin / V::kWidth + 1) * V::kWidth;
    return {begin, minimum(minimum(group_end, block_end), round_up(row_bytes, 8))};
  }
  static int64_t count_parts(int64_t row_bytes, int64_t group_bytes) {
    return ceil_div(row_bytes, group_bytes) + ceil_div(row_bytes, V::kWidth);
  }

  GroupGemm(const bitlinear_task& task, int64_t first, int64_t tokens)
      : task_(task),
        first_(first),
        tokens_(tokens),
        parts_(count_parts(task.row_bytes, task.group_bytes)),
        panel_(*static_cast<Panel*>(task.scratch)),
        starts_(reinterpret_cast<int32_t*>(static_cast<char*>(task.scratch) + sizeof(Panel))) {}

  void run() const {
    for (int64_t m = 0; m < tokens_; ++m) subtract_q(m);
    for (int64_t n = task_.n_begin; n < task_.n_end; n += kBlockRows) {
      const int64_t rows = minimum(task_.n_end - n, kBlockRows);
      memset(panel_.totals, 0, sizeof(panel_.totals[0]) * static_cast<size_t>(tokens_));
      for (int64_t r = 0; r < rows; r += kRows) multiply_panel(n + r, minimum(rows - r, kRows), r);
      const Epilogue<V, kBlockRows> epilogue(task_, n, rows, panel_.units);
      epilogue.store(first_, tokens_, panel_.totals[0], kBlockRows);
    }
  }

  Part part(int64_t begin) const { return part_at(begin, task_.row_bytes, task_.group_bytes); }
  const int8_t* q(int64_t m) const { return task_.q + (first_ + m) * task_.q_stride; }

  // starts_[m * parts_ + i] = minus the sum of q in part i: codes are larger than weights by 1.
  void subtract_q(int64_t m) const {
    const typename V::Bytes ones = V::broadcast_byte(0x55);  // codes of 1
    int64_t i = 0;
    Part p = part(0);
    for (int64_t block = 0; block < task_.row_bytes; block += V::kWidth) {
      typename V::Bytes planes[4];
      for (int j = 0; j < 4; ++j) planes[j] = V::load_plane(q(m) + block * 4 + j * V::kWidth);
      typename V::GroupSum sum;
      sum.add(ones, planes, typename V::Ints{}, V::broadcast_int(V::as_factor(-1)));
      sum.flush();
      int32_t lanes[kLanes];
      V::store_ints(lanes, sum.lanes());
      for (; p.begin < task_.row_bytes && p.begin < block + V::kWidth; p = part(p.end), ++i) {
        int32_t total = 0;
        for (int64_t b = p.begin; b < p.end; b += 4) total += lanes[(b - block) / 4];
        starts_[m * parts_ + i] = total;
      }
    }
  }

  // Rows n .. n + rows, which are columns `column` and so on of the totals.
  void multiply_panel(int64_t n, int64_t rows, int64_t column) const {
    ScaleUnit units[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      units[r] = unit_of(scales(n + r), task_.s_w_stride);
      panel_.units[column + r] = units[r].value;
    }
    int64_t index = 0, in_run = 0;  // parts
    for (int64_t begin = 0; begin < task_.row_bytes; begin += kBytes) {
      const int64_t bytes = minimum(task_.row_bytes - begin, kBytes);
      decode(n, rows, begin, bytes);
      const int64_t count = split_multipliers(n, rows, begin, begin + bytes, units);
      if (in_run + count > kPartsOfRun) {
        flush(column);
        in_run = 0;
      }
      multiply_slice<V::kGroupTokens>(0, begin, begin + bytes, index, in_run == 0);
      index += count;
      in_run += count;
    }
    flush(column);
  }

  const float* scales(int64_t n) const { return task_.s_w + n * task_.s_w_stride; }

  void decode(int64_t n, int64_t rows, int64_t begin, int64_t bytes) const {
    const uint8_t* const packed = task_.w + n * task_.row_bytes + begin;
    for (int64_t s = 0; s < V::kGroupStrips; ++s) {
      decode_strip<V, V::kGroupStrips, false>(packed + s * kLanes * task_.row_bytes,
                                              task_.row_bytes, rows - s * kLanes, bytes, bytes,
                                              panel_.codes + s * V::kWidth);
    }
  }

  // Of the parts in a slice of k; returns their number.
  int64_t split_multipliers(int64_t n, int64_t rows, int64_t begin, int64_t end,
                            const ScaleUnit* units) const {
    const int64_t first = begin / task_.group_bytes, last = ceil_div(end, task_.group_bytes);
    const int64_t groups = minimum(last, task_.s_w_stride) - first;
    int32_t multipliers[kRows][kMostParts];
    for (int64_t r = 0; r < rows; ++r) {
      const float* const scales = this->scales(n + r) + first;
      const ScaleUnit unit = units[r];
      for (int64_t g = 0; g < groups; ++g) multipliers[r][g] = unit.multiplier(scales[g]);
    }
    int64_t i = 0;
    for (Part p = part(begin); p.begin < end; p = part(p.end), ++i) {
      const int64_t group = p.begin / task_.group_bytes - first;
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t multiplier = multipliers[r][group];
        panel_.low[i][r] = V::as_factor(multiplier & 0xFF);
        panel_.high[i][r] = V::as_factor(multiplier >> 8);
      }
    }
    return i;
  }

  // Tiles of kCount tokens, then a smaller one for the tokens that are left.
  template <int kCount>
  void multiply_slice(int64_t m, int64_t begin, int64_t end, int64_t index, bool first) const {
    for (; m + kCount <= tokens_; m += kCount) {
      int64_t i = 0;
      for (Part p = part(begin); p.begin < end; p = part(p.end), ++i) {
        multiply_part<kCount>(m, p, begin, i, index + i, first && i == 0);
      }
    }
    if constexpr (kCount > 1) {
      if (m < tokens_) multiply_slice<kCount - 1>(m, begin, end, index, first);
    }
  }

  // Not inlined: with more code around it GCC spills sums of the tile.
  template <int kCount>
  BITLINEAR_NOINLINE void multiply_part(int64_t m, Part p, int64_t slice, int64_t i, int64_t index,
                                        bool first) const {
    constexpr int kStrips = V::kGroupStrips;
    typename V::Ints tile[kCount][kStrips] = {};
    const int64_t block = p.begin / V::kWidth * V::kWidth;
    const int64_t first_step = block + (p.begin - block) / 4, pairs = (p.end - p.begin) / 8;
    const int64_t q_stride = task_.q_stride;
    for (int plane = 0; plane < 4; ++plane) {
      const int64_t step = first_step + plane * kLanes;
      const uint8_t* code = panel_.codes + (step - slice) * kStrips * V::kWidth;
      const int8_t* quad = q(m) + step * 4;
      // Two steps at a time, for the reason given at PackedTile.
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int two = 0; two < 2; ++two) {
          typename V::Bytes strip[kStrips];
          for (int s = 0; s < kStrips; ++s) strip[s] = V::load(code + s * V::kWidth);
          for (int t = 0; t < kCount; ++t) {
            const typename V::Bytes activations = V::broadcast_quad(quad + t * q_stride);
            for (int s = 0; s < kStrips; ++s) {
              tile[t][s] = V::dot(tile[t][s], strip[s], activations);
            }
          }
          code += kStrips * V::kWidth;
          quad += 4;
        }
      }
    }
    // Compilers read a member again behind each store.
    Panel& panel = panel_;
    const int32_t* const starts = starts_ + m * parts_ + index;
    const int64_t parts = parts_;
    BITLINEAR_UNROLL_8
    for (int t = 0; t < kCount; ++t) {
      const typename V::Ints start = V::broadcast_int(starts[t * parts]);
      for (int s = 0; s < kStrips; ++s) {
        int32_t* const low = panel.low_sums[m + t] + s * kLanes;
        int32_t* const high = panel.high_sums[m + t] + s * kLanes;
        const typename V::Ints none = {};
        const typename V::Ints sum = V::add(tile[t][s], start);
        V::store_ints(low, V::add_products(first ? none : V::load_ints(low), sum,
                                           V::load_ints(panel.low[i] + s * kLanes)));
        V::store_ints(high, V::add_products(first ? none : V::load_ints(high), sum,
                                            V::load_ints(panel.high[i] + s * kLanes)));
      }
    }
  }

  void flush(int64_t column) const {
    for (int64_t m = 0; m < tokens_; ++m) {
      for (int64_t r = 0; r < kRows; ++r) {
        panel_.totals[m][column + r] += 256.0 * panel_.high_sums[m][r] + panel_.low_sums[m][r];
      }
    }
  }

  const bitlinear_task& task_;
  const int64_t first_, tokens_, parts_;
  Panel& panel_;
  int32_t* const starts_;
};

}  // namespace bitlinear
