// The lookup GEMM with scales of groups.
//
// As gemm_lookup.h. The tables that exist at a time are of 32 weights, and groups are multiples of
// 32, so a group begins and ends with a pass over the rows. Products of a depth fit 32 bits, |sum t
// * q| * 32767 <= 256 * 127 * 32767 < 2^31, and are added to sums in fp64, which are exact: below
// 2^53.
//
// The 16-bit sums of a depth's groups wait in memory, and one pass multiplies and adds them: with a
// product at the end of each group, 32-bit sums would move that often (1.9 instead of 1.2 times the
// product with one scale). Bound: as in gemm_lookup.h, and for each row, tile and depth two
// multiplications for each group and four conversions, 15 % of the instructions with groups of 128.
// Two cores of a Zen 3, AVX2, 1024 x 1024 to 14336 x 4096, M = 64 and 256, times the product with
// one scale: 1.16 to 1.22, with groups of 64 1.28 to 1.34. One core of a Zen 4, vectors of 64
// bytes, 4096 x 4096: M = 32 1.28, 64 to 256 1.24, of which that pass takes 0.15; a pass for each
// second depth is not faster there.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../integers.h"
#include "epilogue.h"
#include "gemm_lookup.h"
#include "groups.h"

namespace bitlinear {

template <class V>
struct GroupLookup : LookupTables<V> {
  using Tables = LookupTables<V>;
  static constexpr int kSlices = Tables::kDepth / Tables::kQuads;  // of a depth, 32 weights each
  static_assert(Tables::kQuads * 4 == BITLINEAR_GROUP_UNIT, "a slice lies in one group");

  float units[Tables::kRows];
  float inverses[Tables::kRows];
  // Of the groups of a depth, whole or in part.
  alignas(64) int32_t multipliers[kSlices][Tables::kRows];
  alignas(64) typename Tables::Entry parts[kSlices][Tables::kRows];         // 16-bit sums
  alignas(64) double sums[Tables::kTiles][Tables::kRows][Tables::kTokens];  // the last member
};

template <class V>
class GroupLookupGemm {
 public:
  using L = GroupLookup<V>;

  static int64_t scratch_bytes(int64_t M, int64_t /*row_bytes*/, int64_t /*group_bytes*/) {
    const int64_t unused = L::kTiles - minimum(ceil_div(M, L::kTokens), L::kTiles);
    return static_cast<int64_t>(sizeof(L)) - unused * static_cast<int64_t>(sizeof(L::sums[0]));
  }
  static bitlinear_blocks blocks(int64_t M, int64_t row_bytes) {
    return LookupGemm<V>::blocks(M, row_bytes);
  }

  static void run(const bitlinear_task& task) {
    lookup_blocks<V>(task, [&](int64_t m, int64_t tokens, int64_t n, int64_t rows) {
      GroupLookupGemm(task, m, tokens, n, rows).run();
    });
  }

 private:
  GroupLookupGemm(const bitlinear_task& task, int64_t first, int64_t tokens, int64_t n,
                  int64_t rows)
      : task_(task),
        first_(first),
        tokens_(tokens),
        n_(n),
        rows_(rows),
        scratch_(*static_cast<L*>(task.scratch)) {}

  void run() const {
    const int64_t tiles = ceil_div(tokens_, L::kTokens);
    for (int64_t r = 0; r < rows_; ++r) {
      const ScaleUnit unit = unit_of(scales(r), task_.s_w_stride);
      scratch_.units[r] = unit.value;
      scratch_.inverses[r] = unit.inverse;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      memset(scratch_.sums[tile], 0, static_cast<size_t>(rows_) * sizeof(scratch_.sums[0][0]));
    }
    for (int64_t byte = 0; byte < task_.row_bytes; byte += L::kDepth) {
      const int64_t bytes = minimum(L::kDepth, task_.row_bytes - byte);
      for (int64_t r = 0; r < rows_; ++r) {
        lookup_index<V>(task_.w + (n_ + r) * task_.row_bytes + byte, bytes, r, scratch_);
        split_scales(r, byte, bytes);
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m = tile * L::kTokens;
        lookup_gather<V>(task_.q + (first_ + m) * task_.q_stride, task_.q_stride,
                         minimum(L::kTokens, tokens_ - m), byte, bytes, scratch_);
        multiply_tile(byte, bytes, scratch_.sums[tile]);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * L::kTokens;
      store(first_ + m, minimum(L::kTokens, tokens_ - m), scratch_.sums[tile]);
    }
  }

  const float* scales(int64_t r) const { return task_.s_w + (n_ + r) * task_.s_w_stride; }

  void split_scales(int64_t r, int64_t byte, int64_t bytes) const {
    const ScaleUnit unit = {scratch_.units[r], scratch_.inverses[r]};
    const float* const of_row = scales(r);
    int64_t i = 0;
    for (int64_t g = byte / task_.group_bytes; g * task_.group_bytes < byte + bytes; ++g, ++i) {
      scratch_.multipliers[i][r] = unit.multiplier(of_row[g]);
    }
  }

  // One tile of tokens against a depth, `bytes` packed bytes of every row.
  void multiply_tile(int64_t byte, int64_t bytes, double (*sums)[L::kTokens]) const {
    const int64_t slices = ceil_div(bytes, L::kQuads);
    int parts = 0;  // groups of this depth
    for (int64_t slice = 0; slice < slices; ++slice) {
      for (int g = 0; g < L::kQuads; ++g) {
        lookup_table<V>(scratch_.x[slice * L::kQuads + g], scratch_.tables[g]);
      }
      const auto index = scratch_.index[slice];
      const bool first = slice == 0 || (byte + slice * L::kQuads) % task_.group_bytes == 0;
      if (first) {
        lookup_keep<V, true>(index, rows_, scratch_, scratch_.parts[parts++]);
      } else {
        lookup_keep<V, false>(index, rows_, scratch_, scratch_.parts[parts - 1]);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      int32_t products[L::kTokens] = {};
      for (int p = 0; p < parts; ++p) {
        const typename L::Entry part = scratch_.parts[p][r];
        int16_t lanes[L::kTokens];
        memcpy(lanes, &part, sizeof(lanes));
        const int32_t multiplier = scratch_.multipliers[p][r];
        for (int t = 0; t < L::kTokens; ++t) products[t] += lanes[t] * multiplier;
      }
      for (int t = 0; t < L::kTokens; ++t) sums[r][t] += products[t];
    }
  }

  void store(int64_t m, int64_t tokens, const double (*sums)[L::kTokens]) const {
    constexpr int kColumns = L::kColumns;
    double columns[L::kTokens][kColumns];
    for (int64_t r = 0; r < rows_; r += kColumns) {
      const int64_t count = minimum(rows_ - r, kColumns);
      const Epilogue<V, kColumns> epilogue(task_, n_ + r, count, scratch_.units + r);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t t = 0; t < L::kTokens; ++t) columns[t][i] = sums[r + i][t];
      }
      epilogue.store(m, tokens, columns[0], kColumns);
    }
  }

  const bitlinear_task& task_;
  const int64_t first_, tokens_, n_, rows_;
  L& scratch_;
};

}  // namespace bitlinear
