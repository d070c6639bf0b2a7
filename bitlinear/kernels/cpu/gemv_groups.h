// A few tokens, with a scale for each group of weights along K: exact integers, rounded once.
//
// As gemv.h, with one more product for each block of packed bytes. A 32-bit lane of a vector of
// packed bytes holds 16 weights, which are of one group; its sum is multiplied by the multiplier of
// that group (groups.h). These products fit 32 bits for kGroupFlush blocks: |sum t * q| <= 16 * 127
// = 2032 in a lane, multipliers are below 2^15, and 32 * 2032 * 32767 < 2^31.
//
// Bound: instructions. AVX2 takes 21 for a block of 32 bytes of one row, gemv.h 15; AVX512-VNNI 20
// and 11 for 64 bytes. Splitting the scales of a row, which its tokens share, takes a seventh of
// the time of one token: without it 4096 x 4096 on one core of a Zen 3 would take 1.33 times the
// product with one scale. Times that, groups of 128, 4096 x 4096, M = 1, 2, 4, 8: AVX2 (2 cores of
// a Zen 3) 1.50, 1.29, 1.28, 1.30; AVX512-VNNI (one core of a Xeon of 2023) 1.33, 1.82, 1.76, 1.71;
// AVX-VNNI there 1.64, 1.81, 1.75, 1.75; AVX512-VNNI on one core of a Zen 4, which starts one dot
// product a cycle, 6 instead of 4 for a block, 1.95, 1.70, 1.55, 1.75. Rows of 1024 amortise what
// is done once less: M = 1 takes 2.1 to 2.6 times as long. Groups of other sizes than 32, 64 and
// multiples of a vector take three times as long as those: each lane has a multiplier of its own in
// memory.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../integers.h"
#include "epilogue.h"
#include "gemv.h"
#include "groups.h"

namespace bitlinear {

constexpr int64_t kGroupFlush = 32;

// V provides, in addition to the vocabulary of vocabulary.h:
//   Ints                       kWidth / 4 lanes of 32 bits; load_ints, store_ints
//   GroupSum                   sums of codes times activations times factors; add(w, q, start,
//                              factors) takes a block as PlaneSum does. Lane i has the products of
//                              packed bytes 4i to 4i + 3, plus start, times its factor
//     kFlush                   the maximum of blocks between two calls of flush()
//     lanes()                  the sums of at most kGroupFlush blocks, after a flush()
//   as_start(x), as_factor(m)  the forms of integers of 16 bits among these operands
//   choose(p, indices)         p[index] in each lane, for indices below kWidth / 4
//   broadcast_int(x); low_half(a) and high_half(a), in each lane: a & 0xFFFF, a >> 16
template <class V>
class GroupGemv {
 public:
  static int64_t scratch_bytes(int64_t M, int64_t row_bytes, int64_t /*group_bytes*/) {
    return static_cast<int64_t>(sizeof(Scratch)) +
           minimum(M, kTokens) * lanes_of(row_bytes) * int64_t{sizeof(int32_t)};
  }

  static bitlinear_blocks blocks(int64_t M, int64_t row_bytes) { return gemv_blocks(M, row_bytes); }

  static void run(const bitlinear_task& task) {
    for (int64_t m = 0; m < task.M; m += kTokens) {
      GroupGemv(task, m, minimum(task.M - m, kTokens)).run();
    }
  }

 private:
  static constexpr int64_t kTokens = 16;  // rows of q that share the multipliers of a weight row
  static constexpr int kTile = V::kGemvTokens >= 4 ? 4 : 2;  // of them in registers
  static constexpr int kRows = V::kGemvRows;
  static constexpr int64_t kLanes = V::kWidth / 4;
  static constexpr int64_t kColumns = kGemvColumns;
  static constexpr int64_t kFactorStride = kGroupFlush * kLanes + kLanes;
  // Of kGroupFlush blocks; the first and the last can be cut.
  static constexpr int64_t kMostGroups = kGroupFlush * V::kWidth * 4 / BITLINEAR_GROUP_UNIT + 1;
  static_assert(kTokens % 2 == 0, "both rows of a 16-bit token are together");

  struct Scratch {
    double sums[kTokens][kColumns];
    float units[kColumns], inverses[kColumns];
    // Of some rows and kGroupFlush blocks: `factors_` for a block. A vector can be read from each.
    int32_t factors[kRows][kFactorStride];
  };

  static int64_t lanes_of(int64_t row_bytes) { return round_up(row_bytes, V::kWidth) / 4; }

  // The factors of a block: as few as do.
  static int64_t factors_of(int64_t group_bytes) {
    if (group_bytes % V::kWidth == 0) return 1;
    return V::kWidth % group_bytes == 0 ? V::kWidth / group_bytes : kLanes;
  }

  GroupGemv(const bitlinear_task& task, int64_t first, int64_t tokens)
      : task_(task),
        first_(first),
        tokens_(tokens),
        lanes_(lanes_of(task.row_bytes)),
        factors_(factors_of(task.group_bytes)),
        of_group_(task.group_bytes * factors_ / V::kWidth),
        scratch_(*static_cast<Scratch*>(task.scratch)),
        starts_(reinterpret_cast<int32_t*>(static_cast<char*>(task.scratch) + sizeof(Scratch))) {
    for (int64_t i = 0; i < kLanes; ++i) {
      factor_of_lane_[i] = static_cast<int32_t>(i * factors_ / kLanes);
    }
  }

  void run() const {
    for (int64_t m = 0; m < tokens_; ++m) subtract_q(m);
    for (int64_t n = task_.n_begin; n < task_.n_end; n += kColumns) {
      const int64_t count = minimum(task_.n_end - n, kColumns);
      find_units(n, count);
      int64_t i = 0;
      for (; i + kRows <= count; i += kRows) multiply_rows<kRows>(n + i, i);
      for (; i < count; ++i) multiply_rows<1>(n + i, i);
      const Epilogue<V, kColumns> epilogue(task_, n, count, scratch_.units);
      epilogue.store(first_, tokens_, scratch_.sums[0], kColumns);
    }
  }

  const int8_t* q(int64_t m) const { return task_.q + (first_ + m) * task_.q_stride; }

  static void load_planes(const int8_t* q, typename V::Bytes (&planes)[4]) {
    for (int j = 0; j < 4; ++j) planes[j] = V::load_plane(q + j * V::kWidth);
  }

  // starts_ = minus the sum of q in each lane: codes are larger than weights by 1.
  void subtract_q(int64_t m) const {
    uint8_t bytes[V::kWidth];
    memset(bytes, 0x55, sizeof(bytes));
    const typename V::Bytes ones = V::load(bytes);
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      typename V::Bytes planes[4];
      load_planes(q(m) + lane * 16, planes);
      typename V::GroupSum sum;
      sum.add(ones, planes, typename V::Ints{}, V::broadcast_int(V::as_factor(-1)));
      sum.flush();
      int32_t* const starts = starts_ + m * lanes_ + lane;
      V::store_ints(starts, sum.lanes());
      for (int i = 0; i < kLanes; ++i) starts[i] = V::as_start(starts[i]);
    }
  }

  // Of rows n .. n + count. Fetches the scales of the next kColumns.
  void find_units(int64_t n, int64_t count) const {
    constexpr int64_t kLine = 64 / sizeof(float);
    const int64_t groups = task_.s_w_stride;
    uint32_t largest[kColumns] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* const scales = task_.s_w + (n + i) * groups;
      for (int64_t g = 0; g < groups; g += kLine) prefetch_l2(scales + kColumns * groups + g);
      largest[i] = largest_bits(scales, groups);
    }
    // All of them, in vector code without a tail.
    for (int64_t i = 0; i < kColumns; ++i) {
      const ScaleUnit unit = unit_of(largest[i]);
      scratch_.units[i] = unit.value;
      scratch_.inverses[i] = unit.inverse;
    }
  }

  // Columns i .. i + kCount of the sums: of rows n .. n + kCount, and all tokens.
  template <int kCount>
  void multiply_rows(int64_t n, int64_t i) const {
    for (int64_t m = 0; m < tokens_; ++m) {
      for (int r = 0; r < kCount; ++r) scratch_.sums[m][i + r] = 0;
    }
    const int64_t whole = task_.row_bytes / V::kWidth;
    const int64_t tail = task_.row_bytes - whole * V::kWidth;
    uint8_t last[kCount * V::kWidth];  // a partial block, padded with zeros
    const int64_t blocks = whole + (tail > 0 ? 1 : 0);
    for (int64_t begin = 0; begin < blocks;) {
      const bool is_tail = begin == whole;
      const int64_t end = is_tail ? blocks : minimum(begin + kGroupFlush, whole);
      const uint8_t* w = task_.w + n * task_.row_bytes + begin * V::kWidth;
      int64_t stride = task_.row_bytes;
      // Without divisions, which take long, if the row is one run.
      const int64_t first_group = begin == 0 ? 0 : begin * factors_ / of_group_;
      const int64_t end_group =
          end == blocks ? task_.s_w_stride : ceil_div(end * factors_, of_group_);
      for (int r = 0; r < kCount; ++r) {
        split_scales(n + r, {scratch_.units[i + r], scratch_.inverses[i + r]}, begin * factors_,
                     end * factors_, first_group, end_group, scratch_.factors[r]);
        if (is_tail) V::store(last + r * V::kWidth, V::load_partial(w + r * stride, tail));
      }
      if (is_tail) {
        w = last;
        stride = V::kWidth;
      }
      if (factors_ == 1) {
        multiply_tokens<kTile, kCount, true>(w, stride, 0, begin, end - begin, i);
      } else {
        multiply_tokens<kTile, kCount, false>(w, stride, 0, begin, end - begin, i);
      }
      begin = end;
    }
  }

  // The factors begin .. end of row n. They belong to groups first_group .. end_group.
  void split_scales(int64_t n, ScaleUnit unit, int64_t begin, int64_t end, int64_t first_group,
                    int64_t end_group, int32_t* factors) const {
    const float* const scales = task_.s_w + n * task_.s_w_stride;
    int32_t of_groups[kMostGroups];
    int32_t* const out = of_group_ == 1 ? factors : of_groups;
    for (int64_t g = first_group; g < end_group; ++g) {
      out[g - first_group] = V::as_factor(unit.multiplier(scales[g]));
    }
    if (of_group_ == 1) return;
    int64_t i = begin;
    for (int64_t g = first_group; g < end_group; ++g) {
      const typename V::Ints factor = V::broadcast_int(of_groups[g - first_group]);
      const int64_t group_end = minimum((g + 1) * of_group_, end);
      // Vectors, whose last lanes the next group overwrites.
      for (; i < group_end; i += kLanes) V::store_ints(factors + i - begin, factor);
      i = group_end;
    }
  }

  // kCount tokens at a time, then the tail.
  template <int kCount, int kOfRows, bool kOneFactor>
  void multiply_tokens(const uint8_t* w, int64_t stride, int64_t m, int64_t begin, int64_t count,
                       int64_t i) const {
    for (; m + kCount <= tokens_; m += kCount) {
      multiply_tile<kCount, kOfRows, kOneFactor>(w, stride, m, begin, count, i);
    }
    if constexpr (kCount > 1) {
      if (m < tokens_) {
        multiply_tokens<kCount / 2, kOfRows, kOneFactor>(w, stride, m, begin, count, i);
      }
    }
  }

  // At most kGroupFlush blocks, of as many rows at a time as registers hold. Not inlined: with more
  // code around it GCC spills the sums.
  template <int kCount, int kOfRows, bool kOneFactor>
  BITLINEAR_NOINLINE void multiply_tile(const uint8_t* first_w, int64_t stride, int64_t m,
                                        int64_t begin, int64_t count, int64_t i) const {
    constexpr int kTileRows = kOfRows > kCount ? kOfRows / kCount : 1;
    const typename V::Ints factor_of_lane = V::load_ints(factor_of_lane_);
    const int8_t* const first_q = this->q(m) + begin * 4 * V::kWidth;
    const int32_t* const first_start = starts_ + m * lanes_ + begin * kLanes;
    const int64_t q_stride = task_.q_stride, lanes = lanes_, step = kOneFactor ? 1 : factors_;
    for (int row = 0; row < kOfRows; row += kTileRows) {
      typename V::GroupSum sums[kCount][kTileRows];
      const uint8_t* w = first_w + row * stride;
      const int8_t* q = first_q;
      const int32_t* starts = first_start;
      const int32_t* factor = scratch_.factors[row];
      for (int64_t block = 0; block < count;) {
        const int64_t run = block + minimum(count - block, V::GroupSum::kFlush);
        for (; block < run; ++block) {
          // Short vectors: one prefetch per cache line.
          if (V::kWidth * block % 64 == 0) {
            for (int r = 0; r < kTileRows; ++r) prefetch_l2(w + r * stride + kGemvPrefetch);
          }
          typename V::Bytes packed[kTileRows];
          typename V::Ints factors[kTileRows];
          for (int r = 0; r < kTileRows; ++r) {
            packed[r] = V::load(w + r * stride);
            factors[r] = kOneFactor ? V::broadcast_int(factor[r * kFactorStride])
                                    : V::choose(factor + r * kFactorStride, factor_of_lane);
          }
          for (int t = 0; t < kCount; ++t) {
            typename V::Bytes planes[4];
            load_planes(q + t * q_stride, planes);
            const typename V::Ints start = V::load_ints(starts + t * lanes);
            for (int r = 0; r < kTileRows; ++r) {
              sums[t][r].add(packed[r], planes, start, factors[r]);
            }
          }
          w += V::kWidth;
          q += 4 * V::kWidth;
          starts += kLanes;
          factor += step;
        }
        for (int t = 0; t < kCount; ++t) {
          for (int r = 0; r < kTileRows; ++r) sums[t][r].flush();
        }
      }
      double totals[kCount * kTileRows];
      add_lanes<kCount * kTileRows>(sums[0], totals);
      for (int t = 0; t < kCount; ++t) {
        double* const out = scratch_.sums[m + t] + i + row;
        for (int r = 0; r < kTileRows; ++r) out[r] += totals[t * kTileRows + r];
      }
    }
  }

  // The exact total of each sum: halves of lanes have totals of 32 bits.
  template <int kCount>
  static void add_lanes(const typename V::GroupSum* sums, double* totals) {
    int32_t low[kCount], high[kCount];
    const auto low_half = [=](int i) { return V::low_half(sums[i].lanes()); };
    const auto high_half = [=](int i) { return V::high_half(sums[i].lanes()); };
    int i = 0;
    for (; i + 4 <= kCount; i += 4) {
      V::reduce4(low_half(i), low_half(i + 1), low_half(i + 2), low_half(i + 3), low + i);
      V::reduce4(high_half(i), high_half(i + 1), high_half(i + 2), high_half(i + 3), high + i);
    }
    for (; i < kCount; ++i) {
      low[i] = V::reduce(low_half(i));
      high[i] = V::reduce(high_half(i));
    }
    for (i = 0; i < kCount; ++i) totals[i] = 65536.0 * high[i] + low[i];
  }

  const bitlinear_task& task_;
  const int64_t first_, tokens_, lanes_;
  const int64_t factors_, of_group_;  // multipliers of a block and of a group
  Scratch& scratch_;
  int32_t* const starts_;
  int32_t factor_of_lane_[kLanes];
};

// The faster form for so many rows of q.
template <class V, class Gemm>
struct GroupProduct {
  // Of both forms: a part of the call can have fewer rows of q.
  static int64_t scratch_bytes(int64_t M, int64_t row_bytes, int64_t group_bytes) {
    const int64_t few = minimum(M, V::kGroupGemmTokens - 1);
    const int64_t gemv = GroupGemv<V>::scratch_bytes(few, row_bytes, group_bytes);
    const int64_t gemm = M > few ? Gemm::scratch_bytes(M, row_bytes, group_bytes) : 0;
    return gemm > gemv ? gemm : gemv;
  }
  static bitlinear_blocks blocks(int64_t M, int64_t row_bytes) {
    return M < V::kGroupGemmTokens ? GroupGemv<V>::blocks(M, row_bytes)
                                   : Gemm::blocks(M, row_bytes);
  }
  static void run(const bitlinear_task& task) {
    task.M < V::kGroupGemmTokens ? GroupGemv<V>::run(task) : Gemm::run(task);
  }
};

}  // namespace bitlinear
