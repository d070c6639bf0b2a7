// Parts of the activation quantiser that quantize.cu, gemv.cu and small_layer.cu share.
#pragma once

#include <string.h>

#include "common.cuh"

namespace bitlinear {
namespace cuda {

// Values of x that a thread quantises at a time. They become one 32-bit word in each of four
// planes.
constexpr int kGroup = 16;

// kGroup values of x, as they are in memory.
template <class X>
struct Group {
  uint4 vectors[kGroup * sizeof(X) / sizeof(uint4)];

  // x: at a multiple of 16 bytes.
  __device__ void load(const X* x) {
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof(X)); ++v) {
      vectors[v] = reinterpret_cast<const uint4*>(x)[v];
    }
  }
  // From any address: the first `count` values, then zeros.
  __device__ void load(const X* x, int64_t count) {
    X* const values = reinterpret_cast<X*>(vectors);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = i < count ? x[i] : X{};
  }
  __device__ void convert(float (&values)[kGroup]) const {
    const X* const x = reinterpret_cast<const X*>(vectors);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = to_float(x[i]);
  }
  // The largest magnitude, as the bits of a float: as unsigned integers these order finite <
  // infinity < NaN, and so do those of the 16-bit formats.
  __device__ uint32_t magnitude_bits() const {
    uint32_t largest = 0;
#pragma unroll
    for (const uint4& v : vectors) {
      for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        if constexpr (sizeof(X) == 4) {
          largest = max(largest, word & 0x7FFFFFFFu);
        } else {
          largest = __vmaxu2(largest, word & 0x7FFF7FFFu);
        }
      }
    }
    if constexpr (sizeof(X) == 4) {
      return largest;
    } else {
      const uint16_t bits = static_cast<uint16_t>(max(largest & 0xFFFFu, largest >> 16));
      X value;
      memcpy(&value, &bits, sizeof(value));
      return __float_as_uint(to_float(value));
    }
  }
};

template <class X>
__device__ inline Group<X> load_group(const X* x, int64_t count, bool aligned) {
  Group<X> group;
  if (aligned && count >= kGroup) {
    group.load(x);
  } else {
    group.load(x, count);
  }
  return group;
}

// The scale of a token, which becomes kRows rows of q, from its largest magnitude.
template <int kRows>
struct TokenScale {
  float inv, s_x;

  __device__ TokenScale(uint32_t absmax_bits, float eps) {
    constexpr float kMax = kRows == 1 ? 127.0f : 32385.0f;
    // A NaN or an infinity makes the whole row NaN.
    const float absmax = absmax_bits >= 0x7F800000u ? __uint_as_float(0x7FC00000u)
                                                    : fmaxf(__uint_as_float(absmax_bits), eps);
    inv = __fdiv_rn(kMax, absmax);
    s_x = __fdiv_rn(absmax, kMax);
  }
};

// Adding 1.5 * 2^23 to a small float rounds it to the nearest integer, ties to even, and leaves
// that integer in the low bits: a third of the cost of the conversion instruction.
constexpr float kRoundMagic = 12582912.0f;

__device__ inline float round_magically(float x) { return __fadd_rn(x, kRoundMagic); }

// planes[p] receives the lowest bytes of the values with k = 3 - p (mod 4), which belong to the
// weights at bits 2p of a packed byte. Returns the sum of all, as int8.
__device__ inline int32_t store_planes(const uint32_t (&q)[kGroup], uint32_t (&planes)[4]) {
  int32_t sum = 0;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint32_t low = __byte_perm(q[3 - p], q[7 - p], 0x0040);
    const uint32_t high = __byte_perm(q[11 - p], q[15 - p], 0x0040);
    planes[p] = __byte_perm(low, high, 0x5410);
    sum = __dp4a(static_cast<int32_t>(planes[p]), 0x01010101, sum);
  }
  return sum;
}

// Quantises a group to each row of q that its token has, and adds to their sums. |x * inv| rounds
// to the largest value at most; where s_x is NaN, q is arbitrary.
__device__ inline void quantize_group(const float (&values)[kGroup], float inv,
                                      uint32_t (&planes)[1][4], int32_t (&sums)[1]) {
  uint32_t q[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    q[i] = __float_as_uint(round_magically(__fmul_rn(values[i], inv)));
  }
  sums[0] += store_planes(q, planes[0]);
}
__device__ inline void quantize_group(const float (&values)[kGroup], float inv,
                                      uint32_t (&planes)[2][4], int32_t (&sums)[2]) {
  uint32_t high[kGroup], low[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float scaled = __fmul_rn(values[i], inv);
    // Of the unrounded value: where it rounds to another high row than q16 would, q16 is 127 from
    // both.
    high[i] = __float_as_uint(round_magically(__fmul_rn(scaled, BITLINEAR_HIGH_FACTOR)));
    // In the lowest byte, q16 - 254 * high is q16 + 2 * high.
    low[i] = __float_as_uint(round_magically(scaled)) + 2 * high[i];
  }
  sums[0] += store_planes(high, planes[0]);
  sums[1] += store_planes(low, planes[1]);
}

}  // namespace cuda
}  // namespace bitlinear
