// The GEMV's part for scales of groups: how a block splits the scales of its rows, and how a lane
// multiplies the sums of groups. Figures are in gemv_groups.cu.
#pragma once

#include "ampere.cuh"
#include "gemv_tokens.cuh"
#include "groups.cuh"

namespace bitlinear {
namespace cuda {

// What a block has of the scales of groups, in shared memory.
template <int kParts>
class Groups {
 public:
  __device__ Groups(const bitlinear_cuda_task& task, uint8_t* memory, int rows)
      : task_(task), memory_(memory), rows_(rows) {}

  // Of K: those that have sums of their own.
  __device__ int parts() const {
    return ceil_div(static_cast<int>(task_.K), kSliceValues) * kParts;
  }
  __device__ const int8_t* zeros() const { return reinterpret_cast<const int8_t*>(memory_); }
  // (tokens, parts()): the sums of q, negative.
  __device__ int32_t* q_sums() const { return reinterpret_cast<int32_t*>(memory_ + kSliceValues); }
  __device__ float* unit(int row) const {
    return reinterpret_cast<float*>(q_sums() + task_.M * parts()) + row;
  }
  __device__ int32_t* multipliers(int row) const {
    return reinterpret_cast<int32_t*>(unit(rows_)) + row * multiplier_pitch(count());
  }

  // Splits the scales of the rows, of all rows from n on, and writes the zeros.
  __device__ void split_scales(int64_t n) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kSliceValues / 4) reinterpret_cast<int32_t*>(memory_)[thread] = 0;
    split_scales_of_rows<kConsumers>(task_, n, rows_, unit(0), multipliers(0));
  }

 private:
  __device__ int count() const { return task_.groups.count; }

  const bitlinear_cuda_task& task_;
  uint8_t* memory_;
  int rows_;
};

// A lane's part of a product with scales of groups. The eight columns of the fragments, which would
// be tokens, are parts of K: in a column q is zero outside of one part. So products with some
// slices leave sums of eight parts, or of four for two tokens, which are multiplied and added in 64
// bits.
template <int kParts>
class GroupProduct {
 public:
  __device__ GroupProduct(const bitlinear_cuda_task& task, const Groups<kParts>& groups,
                          const int8_t* q, int q_stride, int first_slice, int log_split)
      // Groups have 64 weights or more, so the factor of group_of() has 32 bits.
      : factor_(static_cast<uint32_t>(task.groups.factor)),
        log_split_(log_split),
        first_slice_(first_slice) {
    const int slices = ceil_div(static_cast<int>(task.K), kSliceValues);
    slices_ = (slices - first_slice + (1 << log_split) - 1) >> log_split;
    const int tokens = static_cast<int>(task.M), log_columns = tokens == 1 ? 3 : 2;  // of a token
    const int lane = threadIdx.x % 32, tig = lane % 4;
    const auto token_of = [&](int column) { return column >> log_columns; };
    const auto step_of = [&](int column) { return (column & ((1 << log_columns) - 1)) / kParts; };
    steps_ = (1 << log_columns) / kParts;
    // In a fragment this lane has values of q of a quarter of a slice, for one column.
    const int column = lane / 4;
    const bool is_mine = column % kParts == tig / (4 / kParts);
    load_step_ = is_mine ? step_of(column) : -1;
    q_ = q + token_of(column) * q_stride + first_slice * kSliceValues + 16 * tig;
    zeros_ = groups.zeros();
    // And it has the sums of two columns, which are neighbouring parts of a slice.
    sum_step_ = step_of(2 * tig);
    sum_part_ = 2 * tig % kParts;
    q_sums_ = groups.q_sums() + token_of(2 * tig) * groups.parts();
  }
  // Begins with two rows, of which these are the multipliers.
  __device__ void start(const int32_t* low, const int32_t* high) {
    multipliers_[0] = low;
    multipliers_[1] = high;
    totals_[0] = totals_[1] = 0;
    done_ = 0;
    clear();
  }
  // Adds the products of the next slice, whose packed bytes of both rows are `low` and `high`.
  __device__ void add(const uint4& low, const uint4& high) {
    const int step = done_ & (steps_ - 1);
    const int8_t* const q = step == load_step_ ? q_ + (done_ << log_split_) * kSliceValues : zeros_;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      // Planes have sums of their own. The codes of plane p are 4^p times too large.
      const uint4 b = *reinterpret_cast<const uint4*>(q + kSliceBytes * p);
      const uint32_t mask = 0x03030303u << 2 * p;
      mma_u8s8(sums_[p], low.x & mask, high.x & mask, low.y & mask, high.y & mask, b.x, b.y);
      mma_u8s8(sums_[p], low.z & mask, high.z & mask, low.w & mask, high.w & mask, b.z, b.w);
    }
    ++done_;
    if (step == steps_ - 1 || done_ == slices_) flush(step + 1);
  }
  // Of one of the rows, for token lane % 4 / 2; if there is one token only, for lane % 4 == 0.
  __device__ int64_t total(int row) const {
    const auto add_lane = [](int64_t value, int mask) {
      return value + __shfl_xor_sync(~0u, static_cast<long long>(value), mask);
    };
    const int64_t sum = add_lane(totals_[row], 1);
    const bool is_single = steps_ * kParts == 8;
    const int64_t other = add_lane(sum, 2);
    return (is_single ? other : sum) >> 6;
  }

 private:
  __device__ void clear() {
#pragma unroll
    for (auto& plane : sums_) {
#pragma unroll
      for (int32_t& sum : plane) sum = 0;
    }
  }
  // Multiplies the sums of the last steps, and clears them.
  __device__ void flush(int steps) {
    if (sum_step_ < steps) {
      const int slice = first_slice_ + ((done_ - steps + sum_step_) << log_split_);
      const int part = slice * kParts + sum_part_;
      const int2 minus = *reinterpret_cast<const int2*>(q_sums_ + part);
      constexpr int kBlocks = kSliceValues / BITLINEAR_GROUP_UNIT / kParts;  // of a part
      const uint32_t groups[] = {__umulhi(part * kBlocks, factor_),
                                 __umulhi((part + 1) * kBlocks, factor_)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int32_t sum = sums_[0][i] + (i % 2 == 0 ? minus.x : minus.y);
#pragma unroll
        for (int p = 1; p < 4; ++p) sum = sum * 4 + sums_[p][i];
        totals_[i / 2] += int64_t{sum} * multipliers_[i / 2][groups[i % 2]];
      }
    }
    clear();
  }

  uint32_t factor_;
  int log_split_, first_slice_, steps_, load_step_, sum_step_, sum_part_;
  int slices_, done_;  // of these rows
  const int8_t *q_, *zeros_;
  const int32_t* q_sums_;
  const int32_t* multipliers_[2];
  int32_t sums_[4][4];
  int64_t totals_[2];  // 4^3 times too large
};

}  // namespace cuda
}  // namespace bitlinear
