// Products with a scale for each group of weights along K: exact integers, rounded once.
//
// A 32-bit lane of a vector of packed bytes holds 16 weights, which are of one group. So each block
// ends with one product of its lanes and of the multipliers of these groups, and the sums of lanes
// stay in 32 bits for kGroupFlush blocks: |sum t * q| <= 16 * 127 = 2032 in a lane, multipliers are
// below 2^15, and 32 * 2032 * 32767 < 2^31.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../integers.h"
#include "epilogue.h"
#include "gemv.h"
#include "groups.h"

namespace bitlinear {

constexpr int64_t kGroupFlush = 32;

// V provides, in addition to the vocabulary of vocabulary.h: Ints, kWidth / 4 lanes of 32 bits;
// load_ints, store_ints; BlockSum, a PlaneSum whose lane i has the products of packed bytes 4i to
// 4i + 3; add_groups(sum, codes, q, factors), which is sum + (codes - q) * factors, if codes - q
// fits 16 bits; as_factor(m), the form of an integer m of 16 bits among the factors; and
// choose(p, indices), p[index] in each lane, for indices below kWidth / 4.
template <class V>
class GroupGemv {
 public:
  static int64_t scratch_bytes(int64_t M, int64_t row_bytes, int64_t /*group_bytes*/) {
    return static_cast<int64_t>(sizeof(Sums)) +
           (minimum(M, kTokens) * lanes_of(row_bytes) + kRows * stride_of(row_bytes)) *
               int64_t{sizeof(int32_t)};
  }

  static bitlinear_blocks blocks(int64_t M, int64_t row_bytes) { return gemv_blocks(M, row_bytes); }

  static void run(const bitlinear_task& task) {
    for (int64_t m = 0; m < task.M; m += kTokens) {
      GroupGemv(task, m, minimum(task.M - m, kTokens)).run();
    }
  }

 private:
  static constexpr int64_t kTokens = 16;  // rows of q that share the multipliers of a weight row
  static constexpr int64_t kRows = V::kGemvRows, kLanes = V::kWidth / 4;
  static constexpr int64_t kColumns = kGemvColumns;
  static_assert(kTokens % 2 == 0, "both rows of a 16-bit token are together");
  using Sums = int64_t[kTokens][kColumns];

  static int64_t lanes_of(int64_t row_bytes) { return round_up(row_bytes, V::kWidth) / 4; }

  // Of the multipliers: a vector can be read from each.
  static int64_t stride_of(int64_t row_bytes) { return lanes_of(row_bytes) + kLanes; }

  // Lanes that share a multiplier in memory.
  static int64_t width_of(int64_t group_bytes) {
    const int64_t width = group_bytes / 4;
    return width % kLanes == 0 || kLanes % width == 0 ? width : 1;
  }

  GroupGemv(const bitlinear_task& task, int64_t first, int64_t tokens)
      : task_(task),
        first_(first),
        tokens_(tokens),
        lanes_(lanes_of(task.row_bytes)),
        stride_(stride_of(task.row_bytes)),
        width_(width_of(task.group_bytes)),
        sums_(*static_cast<Sums*>(task.scratch)),
        q_lanes_(reinterpret_cast<int32_t*>(static_cast<char*>(task.scratch) + sizeof(Sums))),
        multipliers_(q_lanes_ + tokens * lanes_) {
    for (int64_t i = 0; i < kLanes; ++i) group_of_lane_[i] = static_cast<int32_t>(i / width_);
  }

  void run() const {
    for (int64_t m = 0; m < tokens_; ++m) add_up_lanes(m);
    for (int64_t n = task_.n_begin; n < task_.n_end; n += kColumns) {
      const int64_t count = minimum(task_.n_end - n, kColumns);
      int64_t i = 0;
      for (; i + kRows <= count; i += kRows) multiply_rows<kRows>(n + i, i);
      for (; i < count; ++i) multiply_rows<1>(n + i, i);
      const Epilogue<V, kColumns> epilogue(task_, n, count);
      epilogue.store(first_, tokens_, sums_[0], kColumns);
    }
  }

  const int8_t* q(int64_t m) const { return task_.q + (first_ + m) * task_.q_stride; }

  static void load_planes(const int8_t* q, typename V::Bytes (&planes)[4]) {
    for (int j = 0; j < 4; ++j) planes[j] = V::load_plane(q + j * V::kWidth);
  }

  // The sum of q in each lane: the product with weights of code 1.
  void add_up_lanes(int64_t m) const {
    uint8_t bytes[V::kWidth];
    memset(bytes, 0x55, sizeof(bytes));
    const typename V::Bytes ones = V::load(bytes);
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      typename V::Bytes planes[4];
      load_planes(q(m) + lane * 16, planes);
      typename V::BlockSum sum;
      sum.add(ones, planes);
      sum.flush();
      V::store_ints(q_lanes_ + m * lanes_ + lane, sum.lanes());
    }
  }

  // Of row n: one for each group, if vectors begin and end with a group or lie in one; else one for
  // each lane.
  void split_scales(int64_t n, int32_t* multipliers) const {
    const int64_t groups = task_.s_w_stride;
    const float* const scales = task_.s_w + n * groups;
    const ScaleUnit unit = unit_of(scales, groups);
    for (int64_t g = 0; g < groups; ++g) multipliers[g] = V::as_factor(unit.multiplier(scales[g]));
    if (width_ > 1) return;
    const int64_t width = task_.group_bytes / 4;
    for (int64_t lane = lanes_ - 1; lane >= 0; --lane) {
      const int64_t g = lane / width;
      multipliers[lane] = g < groups ? multipliers[g] : 0;
    }
  }

  // The sums of all tokens and rows n .. n + kCount, columns i .. i + kCount of sums_.
  template <int kCount>
  void multiply_rows(int64_t n, int64_t i) const {
    for (int r = 0; r < kCount; ++r) split_scales(n + r, multipliers_ + r * stride_);
    const uint8_t* const w = task_.w + n * task_.row_bytes;
    for (int64_t m = 0; m < tokens_; ++m) {
      int64_t totals[kCount] = {};
      for (int64_t lane = 0; lane < lanes_; lane += kGroupFlush * kLanes) {
        multiply_run<kCount>(w, m, lane, minimum(lane + kGroupFlush * kLanes, lanes_), totals);
      }
      for (int r = 0; r < kCount; ++r) sums_[m][i + r] = totals[r];
    }
  }

  template <int kCount>
  void multiply_run(const uint8_t* w, int64_t m, int64_t begin, int64_t end,
                    int64_t (&totals)[kCount]) const {
    const int64_t width = width_;
    typename V::Ints sums[kCount] = {};
    const typename V::Ints group_of_lane = V::load_ints(group_of_lane_);
    for (int64_t lane = begin; lane < end; lane += kLanes) {
      typename V::Bytes planes[4];
      load_planes(q(m) + lane * 16, planes);
      const typename V::Ints q_lanes = V::load_ints(q_lanes_ + m * lanes_ + lane);
      const int64_t rest = task_.row_bytes - lane * 4, group = lane / width;
      for (int r = 0; r < kCount; ++r) {
        const uint8_t* const packed = w + r * task_.row_bytes + lane * 4;
        prefetch_l2(packed + kGemvPrefetch);
        typename V::BlockSum sum;
        sum.add(rest >= V::kWidth ? V::load(packed) : V::load_partial(packed, rest), planes);
        sum.flush();
        sums[r] = V::add_groups(sums[r], sum.lanes(), q_lanes,
                                V::choose(multipliers_ + r * stride_ + group, group_of_lane));
      }
    }
    for (int r = 0; r < kCount; ++r) {
      int32_t lanes[kLanes];
      V::store_ints(lanes, sums[r]);
      for (const int32_t lane : lanes) totals[r] += lane;
    }
  }

  const bitlinear_task& task_;
  const int64_t first_, tokens_, lanes_, stride_, width_;
  Sums& sums_;
  int32_t *const q_lanes_, *const multipliers_;
  int32_t group_of_lane_[kLanes];
};

}  // namespace bitlinear
