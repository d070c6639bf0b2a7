// Scales of groups of weights along K: integers of 15 bits times a power of two, the unit of their
// row. ../../groups.py specifies them; ../cpu/groups.h is the same for the CPU.
//
// The tensor cores multiply by bytes, so mma and wgmma take a weight times its multiplier, t * m,
// as two of them: 256 * high + low, with low in 0 .. 255 and high + 128 in 0 .. 255. Each has sums
// of its own, below 2^31 as long as K is at most kMaxGroupedInputs. A multiplier belongs to at
// least 32 weights, so the four bytes for a code are looked up in a register. It costs twice the
// products of a tensor's scale, but neither other sums for each group nor another order of q.
//
// The alternative keeps the sums of a group apart and multiplies them: a 64-bit multiplication for
// each output and group. The GEMV and the small-batch kernel have few outputs, and do that. What it
// costs with many is in wgmma_groups.cu.
#pragma once

#include "ampere.cuh"
#include "heuristics.h"

namespace bitlinear {
namespace cuda {

struct ScaleUnit {
  float value;    // NaN if a scale of the row is not finite
  float inverse;  // 0 then

  // largest: the bits of the largest magnitude of the row's scales.
  __device__ explicit ScaleUnit(uint32_t largest) {
    const bool is_finite = largest < 0x7F800000u;
    const uint32_t exponent = largest >> 23 > 15 ? (largest >> 23) - 14 : 1;
    value = __uint_as_float(is_finite ? exponent << 23 : 0x7FC00000u);
    inverse = __uint_as_float(is_finite ? (254 - exponent) << 23 : 0u);
  }
  __device__ int32_t multiplier(float scale) const {
    constexpr float kLargest = 32767.0f;
    const float bounded = fmaxf(fminf(__fmul_rn(scale, inverse), kLargest), -kLargest);
    return inverse == 0.0f ? 0 : __float2int_rn(bounded);
  }
};

__device__ inline uint32_t magnitude_bits(float value) {
  return __float_as_uint(value) & 0x7FFFFFFFu;
}

// The group of a block of BITLINEAR_GROUP_UNIT weights of a row.
__device__ inline int group_of(const bitlinear_cuda_groups& groups, int block) {
  const auto group = static_cast<int>(static_cast<uint32_t>(block) * groups.factor >> 32);
  return minimum(group, groups.count - 1);  // blocks beyond K
}

// The multipliers of a row of all weights.
__device__ inline const int16_t* multipliers_of(const bitlinear_cuda_task& task, int64_t n) {
  return task.groups.multipliers + n * task.groups.count;
}

// The bytes of t * m, for the codes 0, 1 and 2 of t, that are multiplied as unsigned ones.
struct GroupTable {
  uint32_t high, low;  // high: plus 128

  __device__ explicit GroupTable(uint32_t multiplier) {  // its lowest 16 bits
    const uint32_t positive = multiplier & 0xFFFFu, negative = 0u - positive;
    // Byte 2 of `positive` is 0.
    low = __byte_perm(positive, negative, 0x2024);
    high = __byte_perm(positive, negative, 0x2125) ^ 0x80808080u;
  }
};

// The codes of four packed bytes in the order in which look_up() takes them: bits 4 i + 16 (p / 2)
// + 2 (p % 2) for plane p of byte i.
__device__ inline uint32_t arrange_codes(uint32_t packed) {
  const uint32_t swapped = (packed ^ packed >> 4) & 0x00F000F0u;  // the middle nibbles
  return __byte_perm(packed ^ swapped ^ swapped << 4, 0, 0x3120);
}
// The bytes of a table for plane p of arranged codes.
__device__ inline uint32_t look_up(uint32_t table, uint32_t arranged, int p) {
  return __byte_perm(table, 0, arranged >> (p / 2 * 16 + p % 2 * 2) & 0x3333u);
}

// Sums of four rows, of a multiplier's bytes put together: sum_k t * m * q. q_sum: of the token.
struct GroupSums {
  int64_t x, y, z, w;
};
__device__ inline int64_t join_bytes(int32_t high, int32_t low, int32_t q_sum) {
  return 256 * (int64_t{high} - 128 * int64_t{q_sum}) + low;
}
__device__ inline GroupSums join_bytes(const int4& high, const int4& low, int32_t q_sum) {
  return {join_bytes(high.x, low.x, q_sum), join_bytes(high.y, low.y, q_sum),
          join_bytes(high.z, low.z, q_sum), join_bytes(high.w, low.w, q_sum)};
}

// Splits the scales of `rows` rows of all weights, from row n on, into shared memory: units, and
// multipliers multiplier_pitch() words apart. The first kThreads threads of a block call this; the
// results are there after their next synchronisation. Short loops: code that runs once is slow, and
// a row for each warp would take a warp's time for each.
template <int kThreads>
__device__ inline void split_scales_of_rows(const bitlinear_cuda_task& task, int64_t n, int rows,
                                            float* units, int32_t* multipliers) {
  const int count = task.groups.count, pitch = multiplier_pitch(count);
  const int thread = static_cast<int>(threadIdx.x);
  // The scales of a weight's rows lie one behind the other.
  const int row_step = kThreads / count, group_step = kThreads % count;
#pragma unroll 1
  for (int i = 0; i < static_cast<int>(task.weight_count); ++i) {
    const bitlinear_cuda_weight& weight = task.weights[i];
    const int64_t begin = n > weight.begin ? n : weight.begin;
    const int present = static_cast<int>(minimum<int64_t>(weight.end, n + rows) - begin);
    int row = thread / count, group = thread % count;
    const float* scales = weight.s_w + (begin - weight.begin) * count + thread;
    int32_t* const out = multipliers + static_cast<int>(begin - n) * pitch;
#pragma unroll 1
    while (row < present) {
      copy_word_async(out + row * pitch + group, scales);
      scales += kThreads;
      row += row_step;
      group += group_step;
      if (group >= count) {
        group -= count;
        ++row;
      }
    }
  }
  commit_copies();
  wait_for_copies<0>();
  sync_leading_threads<kThreads>();
  // Four lanes for each row.
  constexpr int kLanes = 4;
#pragma unroll 1
  for (int row = thread / kLanes; row < round_up(rows, 32 / kLanes); row += kThreads / kLanes) {
    int32_t* const out = multipliers + row * pitch;
    const int present = row < rows ? count : 0;  // every lane takes part in the shuffles
    uint32_t largest = 0;
#pragma unroll 4
    for (int g = thread % kLanes; g < present; g += kLanes) {
      largest = max(largest, static_cast<uint32_t>(out[g]) & 0x7FFFFFFFu);
    }
    for (int mask = 1; mask < kLanes; mask *= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, mask));
    }
    if (row >= rows) break;
    const ScaleUnit unit(largest);
#pragma unroll 4
    for (int g = thread % kLanes; g < count; g += kLanes) {
      out[g] = unit.multiplier(__int_as_float(out[g]));
    }
    if (thread % kLanes == 0) units[row] = unit.value;
  }
}

// Packed codes as two's complement of two bits: t of the weights.
__device__ inline uint32_t signed_codes(uint32_t packed) {
  return (~(packed | packed << 1) & 0xAAAAAAAAu) | (~packed & 0x55555555u);
}
// 64 * t of plane p, as signed bytes.
__device__ inline uint32_t signed_plane(uint32_t codes, int p) {
  return codes << (6 - 2 * p) & 0xC0C0C0C0u;
}
constexpr int kSignedShift = 6;  // of sums of such products

}  // namespace cuda
}  // namespace bitlinear
