// Lookup GEMM: many tokens against many weight rows, with tables in place of multiplications (the
// method of four Russians), for CPUs without a dot product of bytes, or with a slow one.
//
// Four ternary weights select one of 81 sums +-x0 +-x1 +-x2 +-x3. For a tile of tokens, one per
// 16-bit lane, and a group of four k, these 81 sums are computed once. Then each packed byte of a
// weight row is the index of a table entry, and one vector addition replaces 4 * kTokens
// multiplications. The tables of kQuads quads take 10 to 41 KB of the L1 and L2 caches (fewer
// groups than fit into L1 are slower: the 16-bit sums move more often); the 16-bit sums of all rows
// stream past them.
//
// Bound: the loads, of a vector for each packed byte and of four indices for every fourth one. A
// Zen 4 loads two vectors of 32 bytes or one of 64 a cycle: 0.14 and 0.27 ns a look-up, and reached
// are 0.22 (AVX2) and 0.41. Two cores there, 2560 x 2560, M = 128: 850 Gop/s with AVX2, 980 with
// vectors of 64 bytes. Of 1280 rows and 32 tokens the look-ups take 70 % of the time, the indices
// 15 %, tables, 32-bit sums and output the rest. An earlier form (690 Gop/s with AVX2 on the Zen 4)
// reached 290 on one core of a Xeon at 2.8 GHz, at 4096 x 4096 and M = 256, where vpmaddubsw
// reached 150. NEON's vectors are so short that two of them share an index: for 16 tokens * 4 it
// loads two vectors and adds twice (neon.cpp has the counts).
//
// The working set of a block of R rows and T tiles, in bytes, with entries of E = 2 * kTokens bytes
// (32 with AVX2): 648 E for tables, 256 E for x, and for each row 128 of indices, E of 16-bit sums
// and 2 E T of 32-bit sums. With AVX2, R = 2048 and T = 8 these are 29 KB and 256, 64 and 1024 KB.
// Only the tables are read in any order. The rest is read and written from begin to end, and
// prefetchers fetch it in time from an L3 cache. So the block sizes need not follow from the size
// of the L2 cache.
//
// Measured on a Zen 4, 2026-11, with all operands in pages that compete for a part of the L2 cache:
// random loads are slow beyond that part. 1024 x 1024 to 14336 x 4096, M = 32 to 512, one and two
// threads. With 256 KB instead of 1 MB AVX2 loses 0 to 6 %, mostly 1 to 3, scalar 1 and AVX-512 2;
// with 128 KB AVX2 loses 7 and scalar 8. Even there 2048 rows are the best: 1024 take up to 7 %
// longer and 512 up to 20, as with 1 MB, because a table costs as much as 178 rows. Four tiles take
// 4 % longer for M = 128 (AVX-512: no longer). 4096 rows or 16 tiles gain 1 to 4 %, with 256 KB
// nothing. Not measured: a CPU without an L3 cache, such as small Arm cores.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../integers.h"
#include "epilogue.h"

namespace bitlinear {

template <class V>
struct LookupTables {
  static constexpr int kVectors = V::kLookupVectors;
  static constexpr int kTokens = kVectors * V::kWidth / 2;  // of a tile, in 16-bit lanes
  static constexpr int kQuads = 8;  // groups of four k whose tables exist at a time
  // Groups between additions of the 16-bit sums to the 32-bit sums: |+-x0 +-x1 +-x2 +-x3| <= 4 *
  // 127 = 508, and 64 * 508 = 32512 < 2^15.
  static constexpr int kDepth = 64;
  static constexpr int64_t kRows = 2048;  // more rows amortise the tables
  static constexpr int64_t kTiles = 8;    // more tiles amortise the indices
  static constexpr int kEntries = 81;

  using Words = typename Int16Vector<V::kWidth>::Type;
  struct Entry {
    Words vector[kVectors];
  };

  static constexpr int kColumns = 64;  // rows whose output is written together
  static_assert(kRows % kColumns == 0, "blocks of rows are cut there");

  alignas(64) Entry tables[kQuads][kEntries];
  static_assert(sizeof(tables) <= 1 << 16, "an index has 16 bits");
  alignas(64) int16_t x[kDepth][4][kTokens];
  // Byte offsets of entries in `tables`. A few rows more than kRows, because slices a power of two
  // apart would compete for the same cache sets.
  alignas(64) uint16_t index[kDepth / kQuads][kRows + 4][kQuads];
};

template <class V>
struct Lookup : LookupTables<V> {
  using Tables = LookupTables<V>;
  alignas(64) typename Tables::Entry sums16[Tables::kRows];
  // The last member, so that scratch_bytes() can leave out unused tiles.
  alignas(64) int32_t sums[Tables::kTiles][Tables::kRows][Tables::kTokens];
};

// x[g][j][t] = q[t, k] for k = 4 * (first_byte + g) + j. Groups beyond the bytes get zeros, as far
// as q is padded with them, and tokens beyond the last one repeat it.
template <class V>
inline void lookup_gather(const int8_t* q, int64_t q_stride, int64_t tokens, int64_t first_byte,
                          int64_t bytes, LookupTables<V>& scratch) {
  constexpr int kLanes = V::kWidth / 4;
  static_assert(LookupTables<V>::kTokens % kLanes == 0, "a tile holds whole vectors of tokens");
  for (int64_t begin = 0; begin < bytes; begin += V::kWidth) {
    for (int j = 0; j < 4; ++j) {
      const int8_t* const plane = q + (first_byte + begin) * 4 + j * V::kWidth;
      for (int t = 0; t < LookupTables<V>::kTokens; t += kLanes) {
        typename V::Bytes rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = V::load_plane(plane + minimum(t + i, tokens - 1) * q_stride);
        }
        V::transpose(rows);  // rows[c] now holds bytes 4c .. 4c + 3 of every token
        for (int c = 0; c < kLanes; ++c) {
          uint32_t quads[kLanes];
          memcpy(quads, &rows[c], sizeof(quads));
          for (int g = 0; g < 4; ++g) {
            int16_t* const x = scratch.x[begin + 4 * c + g][j] + t;
            for (int i = 0; i < kLanes; ++i) {
              const int32_t high = static_cast<int32_t>(quads[i] << (24 - 8 * g));
              x[i] = static_cast<int16_t>(high >> 24);
            }
          }
        }
      }
    }
  }
}

// table[27 * c0 + 9 * c1 + 3 * c2 + c3] = sum_j (c_j - 1) * x[j].
template <class V>
inline void lookup_table(const int16_t (&x)[4][LookupTables<V>::kTokens],
                         typename LookupTables<V>::Entry (&table)[LookupTables<V>::kEntries]) {
  typename LookupTables<V>::Entry value[4];
  memcpy(value, x, sizeof(value));
  for (int v = 0; v < LookupTables<V>::kVectors; ++v) {
    auto* entry = table;
    auto sum0 = -value[0].vector[v];
    for (int c0 = 0; c0 < 3; ++c0, sum0 += value[0].vector[v]) {
      auto sum1 = sum0 - value[1].vector[v];
      for (int c1 = 0; c1 < 3; ++c1, sum1 += value[1].vector[v]) {
        auto sum2 = sum1 - value[2].vector[v];
        for (int c2 = 0; c2 < 3; ++c2, sum2 += value[2].vector[v]) {
          (entry++)->vector[v] = sum2 - value[3].vector[v];
          (entry++)->vector[v] = sum2;
          (entry++)->vector[v] = sum2 + value[3].vector[v];
        }
      }
    }
  }
}

// The table offsets of up to kDepth packed bytes of one row.
template <class V>
inline void lookup_index(const uint8_t* packed, int64_t bytes, int64_t row,
                         LookupTables<V>& scratch) {
  constexpr int kDepth = LookupTables<V>::kDepth;
  constexpr int kQuads = LookupTables<V>::kQuads;
  uint8_t padded[kDepth];
  if (bytes < kDepth) {
    memset(padded, 0x55, sizeof(padded));  // weight 0
    memcpy(padded, packed, static_cast<size_t>(bytes));
    packed = padded;
  }
  // The next slice of k of the same row.
  prefetch(packed + kDepth);
  // From digits of base 4 to base 3: 4a + b becomes 3a + b in each nibble, then 16A + B 9A + B.
  uint8_t entry[kDepth];
  for (int g = 0; g < kDepth; ++g) {
    const uint8_t pairs = static_cast<uint8_t>(packed[g] - (packed[g] >> 2 & 0x33));
    entry[g] = static_cast<uint8_t>(pairs - 7 * (pairs >> 4));
  }
  uint16_t offset[kDepth];
  for (int g = 0; g < kDepth; ++g) {
    const size_t table = g % kQuads * sizeof(scratch.tables[0]);
    offset[g] = static_cast<uint16_t>(table + entry[g] * sizeof(scratch.tables[0][0]));
  }
  for (int slice = 0; slice < kDepth / kQuads; ++slice) {
    memcpy(scratch.index[slice][row], offset + slice * kQuads, sizeof(scratch.index[slice][row]));
  }
}

// Adds kQuads quads to the 16-bit sums of all rows, or starts them, and passes them to
// finish(row, sum).
template <class V, bool kFirst, class Finish>
inline void lookup_add(const uint16_t (*index)[LookupTables<V>::kQuads], int64_t rows,
                       const LookupTables<V>& scratch,
                       const typename LookupTables<V>::Entry* sums16, const Finish& finish) {
  using L = LookupTables<V>;
  using Words = typename L::Words;
  const char* tables[L::kVectors];
  for (int v = 0; v < L::kVectors; ++v) {
    tables[v] = reinterpret_cast<const char*>(&scratch.tables[0][0].vector[v]);
    // So that the compiler derives no base from another one: base plus index is an address, but a
    // further constant costs AArch64 an addition per vector.
    hide_origin(tables[v]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    typename L::Entry sum = kFirst ? typename L::Entry{} : sums16[r];
    // One load has four indices.
    for (int g = 0; g < L::kQuads; g += 4) {
      uint64_t indices;
      memcpy(&indices, index[r] + g, sizeof(indices));
      hide_origin(indices);  // GCC would load each of them
      for (int i = 0; i < 4; ++i, indices >>= 16) {
        for (int v = 0; v < L::kVectors; ++v) {
          sum.vector[v] +=
              *reinterpret_cast<const Words*>(tables[v] + static_cast<uint16_t>(indices));
        }
      }
    }
    finish(r, sum);
  }
}

// The same, and keeps the 16-bit sums.
template <class V, bool kFirst>
inline void lookup_keep(const uint16_t (*index)[LookupTables<V>::kQuads], int64_t rows,
                        const LookupTables<V>& scratch, typename LookupTables<V>::Entry* sums16) {
  lookup_add<V, kFirst>(index, rows, scratch, sums16,
                        [=](int64_t r, const auto& sum) { sums16[r] = sum; });
}

// The same, and adds the 16-bit sums to the 32-bit sums.
template <class V, bool kFirst>
inline void lookup_widen(const uint16_t (*index)[LookupTables<V>::kQuads], int64_t rows,
                         const LookupTables<V>& scratch,
                         const typename LookupTables<V>::Entry* sums16,
                         int32_t (*sums)[LookupTables<V>::kTokens]) {
  lookup_add<V, kFirst>(index, rows, scratch, sums16, [=](int64_t r, const auto& sum) {
    int16_t lanes[LookupTables<V>::kTokens];
    memcpy(lanes, &sum, sizeof(lanes));
    for (int t = 0; t < LookupTables<V>::kTokens; ++t) sums[r][t] += lanes[t];
  });
}

// One tile of tokens against one slice of k, `bytes` packed bytes of every row.
template <class V>
inline void lookup_tile(int64_t rows, int64_t bytes, Lookup<V>& scratch,
                        int32_t (*sums)[Lookup<V>::kTokens]) {
  constexpr int kQuads = Lookup<V>::kQuads;
  const int64_t slices = ceil_div(bytes, kQuads);
  for (int64_t slice = 0; slice < slices; ++slice) {
    for (int g = 0; g < kQuads; ++g)
      lookup_table<V>(scratch.x[slice * kQuads + g], scratch.tables[g]);
    const auto index = scratch.index[slice];
    if (slice < slices - 1) {
      slice == 0 ? lookup_keep<V, true>(index, rows, scratch, scratch.sums16)
                 : lookup_keep<V, false>(index, rows, scratch, scratch.sums16);
    } else {
      slice == 0 ? lookup_widen<V, true>(index, rows, scratch, scratch.sums16, sums)
                 : lookup_widen<V, false>(index, rows, scratch, scratch.sums16, sums);
    }
  }
}

// Writes the output of one tile from its sums.
template <class V>
inline void lookup_store(const bitlinear_task& task, int64_t m, int64_t tokens, int64_t n,
                         int64_t rows, const int32_t (*sums)[Lookup<V>::kTokens]) {
  constexpr int kColumns = Lookup<V>::kColumns;
  constexpr int kLanes = V::kWidth / 4;
  static_assert(kLanes % 2 == 0, "both rows of a 16-bit token are stored together");
  for (int64_t r = 0; r < rows; r += kColumns) {
    const int64_t count = minimum(rows - r, kColumns);
    const Epilogue<V, kColumns> epilogue(task, n + r, count);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      alignas(64) int32_t codes[kLanes][kColumns];
      for (int64_t i = 0; i < count; i += kLanes) {
        typename V::Bytes lanes[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) {
          memcpy(&lanes[j], sums[r + minimum(i + j, count - 1)] + t, sizeof(lanes[j]));
        }
        V::transpose(lanes);
        for (int j = 0; j < kLanes; ++j) memcpy(codes[j] + i, &lanes[j], sizeof(lanes[j]));
      }
      epilogue.store(m + t, minimum(tokens - t, kLanes), codes[0], kColumns);
    }
  }
}

// At most kTiles tiles of tokens against at most kRows rows.
template <class V>
inline void lookup_block(const bitlinear_task& task, int64_t begin, int64_t tokens, int64_t n,
                         int64_t rows) {
  using L = Lookup<V>;
  L& scratch = *static_cast<L*>(task.scratch);
  const int64_t tiles = ceil_div(tokens, L::kTokens);
  // The tables hold sums of weights, the epilogue expects sums of codes, which are larger by q_sum.
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = tile * L::kTokens;
    int32_t q_sums[L::kTokens] = {};
    const int64_t count = minimum(L::kTokens, tokens - m);
    memcpy(q_sums, task.q_sum + begin + m, static_cast<size_t>(count) * sizeof(q_sums[0]));
    for (int64_t r = 0; r < rows; ++r) memcpy(scratch.sums[tile][r], q_sums, sizeof(q_sums));
  }
  for (int64_t byte = 0; byte < task.row_bytes; byte += L::kDepth) {
    const int64_t bytes = minimum(L::kDepth, task.row_bytes - byte);
    for (int64_t r = 0; r < rows; ++r) {
      lookup_index<V>(task.w + (n + r) * task.row_bytes + byte, bytes, r, scratch);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * L::kTokens;
      lookup_gather<V>(task.q + (begin + m) * task.q_stride, task.q_stride,
                       minimum(L::kTokens, tokens - m), byte, bytes, scratch);
      lookup_tile<V>(rows, bytes, scratch, scratch.sums[tile]);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = tile * L::kTokens;
    lookup_store<V>(task, begin + m, minimum(L::kTokens, tokens - m), n, rows, scratch.sums[tile]);
  }
}

// Calls multiply(m, tokens, n, rows) for blocks that fit the scratch memory.
template <class V, class Multiply>
void lookup_blocks(const bitlinear_task& task, const Multiply& multiply) {
  using L = LookupTables<V>;
  // Blocks of nearly equal size: a block of a few rows would not amortise its tables.
  const int64_t all_rows = task.n_end - task.n_begin;
  const int64_t count = (all_rows - 1) / L::kRows + 1;  // 1 also for no rows
  const int64_t block_rows = round_up(ceil_div(all_rows, count), L::kColumns);
  for (int64_t n = task.n_begin; n < task.n_end; n += block_rows) {
    for (int64_t m = 0; m < task.M; m += L::kTiles * L::kTokens) {
      multiply(m, minimum(task.M - m, L::kTiles * L::kTokens), n,
               minimum(task.n_end - n, block_rows));
    }
  }
}

// V provides, in addition to the vocabulary of vocabulary.h: transpose(rows), of a square matrix of
// 32-bit elements; kLookupVectors, the vectors of a table entry. More vectors mean more tokens per
// tile, larger tables, and fewer indices per token.
template <class V>
struct LookupGemm {
  using L = Lookup<V>;

  // Building a table costs the additions of 81 rows; gathering its x costs some 50 more. An index
  // costs as much as half a tile. Fitted to an earlier form; on a Zen 4 a table costs 142 (64
  // bytes) to 178 (AVX2) rows, its x 20, an index a fifth to a half of a tile.
  static constexpr int64_t kTokenUnit = L::kTokens, kRowUnit = L::kColumns;
  static constexpr int64_t kRowCost = L::kTokens / 2, kTokenCost = L::kEntries + 50;
  static constexpr bitlinear_blocks blocks(int64_t /*M*/, int64_t /*row_bytes*/) {
    return {L::kRows, L::kColumns};
  }

  // The size of Lookup without the tiles that the task does not need.
  static int64_t scratch_bytes(int64_t M, int64_t /*row_bytes*/) {
    const int64_t unused = L::kTiles - minimum(ceil_div(M, L::kTokens), L::kTiles);
    return static_cast<int64_t>(sizeof(L)) - unused * static_cast<int64_t>(sizeof(L::sums[0]));
  }

  static void run(const bitlinear_task& task) {
    lookup_blocks<V>(task, [&](int64_t m, int64_t tokens, int64_t n, int64_t rows) {
      lookup_block<V>(task, m, tokens, n, rows);
    });
  }
};

}  // namespace bitlinear
