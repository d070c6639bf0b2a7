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
// each output and group. wgmma has no time for it, since a register of sums for 128 values of k
// takes as long to scale as to compute. The GEMV has few outputs, and does that (gemv_groups.cu).
#pragma once

#include "common.cuh"

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

}  // namespace cuda
}  // namespace bitlinear
