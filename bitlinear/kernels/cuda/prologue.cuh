// What a fused product does to a token before it quantises it: a gate, then an RMSNorm. prologue.py
// is the specification; every float operation here is one of its operations.
//
// A thread has groups of 16 values, and group 32 j + l of a token belongs to lane l of a warp. So a
// warp adds the squares of 512 values in pairs; the sums of the warps are added in pairs likewise,
// after they have met in shared memory.
#pragma once

#include "quantize.cuh"

namespace bitlinear {
namespace cuda {

constexpr int kWarpValues = 32 * kGroup;

__device__ inline float exp_of(float z) {
  z = z < -86.0f ? -86.0f : z;  // a NaN stays
  z = z > 88.0f ? 88.0f : z;
  const float shifted = __fadd_rn(__fmul_rn(z, 1.44269504f), kRoundMagic);
  const float n = __fsub_rn(shifted, kRoundMagic);
  float r = __fsub_rn(z, __fmul_rn(n, 0.693359375f));
  r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

__device__ inline float gate(int activation, float a, float b) {
  float value;
  if (activation == BITLINEAR_SILU) {
    value = __fdiv_rn(a, __fadd_rn(exp_of(-a), 1.0f));
  } else {
    const float positive = a < 0.0f ? 0.0f : a;
    value = __fmul_rn(positive, positive);
  }
  return __fmul_rn(value, b);
}

// kGroup values in fp32. Its functions are those of Group, which the quantiser calls.
struct FloatGroup {
  float values[kGroup];

  __device__ void convert(float (&out)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out[i] = values[i];
  }
  __device__ uint32_t magnitude_bits() const {
    uint32_t largest[4] = {};  // four chains have less latency than one
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      largest[i % 4] = max(largest[i % 4], __float_as_uint(values[i]) & 0x7FFFFFFFu);
    }
    return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
  }
};

// kGroup values as they are in memory, of a dtype that is known at run time; kWide: also fp32.
template <bool kWide = true>
struct RawGroup {
  uint4 vectors[kWide ? 4 : 2];

  // Values at a multiple of 16 bytes.
  __device__ void load(const void* values, int dtype) {
    const uint4* const source = static_cast<const uint4*>(values);
    vectors[0] = source[0];
    vectors[1] = source[1];
    if constexpr (kWide) {
      if (dtype == BITLINEAR_F32) {
        vectors[2] = source[2];
        vectors[3] = source[3];
      }
    }
  }
  // From any address: the first `count` values, then zeros.
  __device__ void load(const void* array, int dtype, int64_t i, int64_t count) {
    uint32_t words[kGroup] = {};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const uint32_t bits = j < count ? load_bits(array, dtype, i + j) : 0;
      if (dtype == BITLINEAR_F32) {
        words[j] = bits;
      } else {
        words[j / 2] |= bits << 16 * (j % 2);
      }
    }
#pragma unroll
    for (int v = 0; v < kGroup / 4; ++v) {
      vectors[v] = make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]);
    }
  }
  __device__ void convert(float (&values)[kGroup], int dtype) const {
    uint32_t words[kGroup];
#pragma unroll
    for (int v = 0; v < (kWide ? 4 : 2); ++v) {
      words[4 * v] = vectors[v].x;
      words[4 * v + 1] = vectors[v].y;
      words[4 * v + 2] = vectors[v].z;
      words[4 * v + 3] = vectors[v].w;
    }
    if (kWide && dtype == BITLINEAR_F32) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = __uint_as_float(words[i]);
    } else if (dtype == BITLINEAR_BF16) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        values[i] = __half2float(__ushort_as_half(
            static_cast<unsigned short>(i % 2 ? words[i / 2] >> 16 : words[i / 2])));
      }
    }
  }
};

// Loads values k .. k + 16 of an array, of which `count` are left.
__device__ inline void load_raw(RawGroup<>& group, const void* array, int dtype, int64_t k,
                                int64_t count, bool aligned) {
  if (aligned && count >= kGroup) {
    group.load(static_cast<const char*>(array) + k * (dtype == BITLINEAR_F32 ? 4 : 2), dtype);
  } else {
    group.load(array, dtype, k, count);
  }
}

// What a gate makes of values a and b; without one, a.
template <bool kWide>
__device__ inline FloatGroup apply_gate(int activation, const RawGroup<kWide>& raw_a,
                                        const RawGroup<kWide>& raw_b, int dtype) {
  FloatGroup a, b;
  raw_a.convert(a.values, dtype);
  if (activation != BITLINEAR_NO_GATE) {
    raw_b.convert(b.values, dtype);
    // One branch for all values: straight code is fetched faster.
    if (activation == BITLINEAR_SILU) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) a.values[i] = gate(BITLINEAR_SILU, a.values[i], b.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        a.values[i] = gate(BITLINEAR_RELU2, a.values[i], b.values[i]);
    }
  }
  return a;
}

// Overwrites the first kPairs values with the sums of neighbours.
template <int kPairs>
__device__ inline void add_neighbours(float (&values)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) values[i] = __fadd_rn(values[2 * i], values[2 * i + 1]);
}

// The sum over the lanes of a warp, in pairs; in every lane.
__device__ inline float add_lanes(float sum) {
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1 << step));
  }
  return sum;
}

// The sum of squares of the 512 values that the groups of a warp hold, in pairs; in every lane.
__device__ inline float warp_sum_of_squares(const FloatGroup& group) {
  float values[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] = __fmul_rn(group.values[i], group.values[i]);
  static_assert(kGroup == 16, "four levels of pairs");
  add_neighbours<8>(values);
  add_neighbours<4>(values);
  add_neighbours<2>(values);
  return add_lanes(__fadd_rn(values[0], values[1]));
}

// The sum of sums[0:count], count <= kMaxCount, in pairs; in every lane of a warp.
template <int kMaxCount>
__device__ inline float add_warp_sums(const float* sums, int count) {
  static_assert(kMaxCount <= 1024, "two levels of 32 lanes");
  const int lane = threadIdx.x % 32;
  if (kMaxCount <= 32) return add_lanes(lane < count ? sums[lane] : 0.0f);
  float mine = 0.0f;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const float sum = add_lanes(first + lane < count ? sums[first + lane] : 0.0f);
    if (first == 32 * lane) mine = sum;
  }
  return add_lanes(mine);
}

// 1 / sqrt(sum / K + eps), from the sums of the warps of a token of at most kMaxK values.
template <int64_t kMaxK>
__device__ inline float norm_factor(const bitlinear_prologue& prologue, const float* sums,
                                    int64_t K) {
  const int count = static_cast<int>(ceil_div<int64_t>(K, kWarpValues));
  const float sum = add_warp_sums<ceil_div<int64_t>(kMaxK, kWarpValues)>(sums, count);
  const float mean = __fdiv_rn(sum, static_cast<float>(K));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, prologue.norm_eps)));
}

// Multiplies a group with the factor, then with the weight of the norm.
__device__ inline void normalize(FloatGroup& group, const RawGroup<>& raw_weights, int dtype,
                                 float factor) {
  float weights[kGroup];
  raw_weights.convert(weights, dtype);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    group.values[i] = __fmul_rn(__fmul_rn(group.values[i], factor), weights[i]);
  }
}

}  // namespace cuda
}  // namespace bitlinear
