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
// Sums of warps of a token that norm_factor() adds.
constexpr int kMaxWarpSums = 1024;
static_assert(kMaxWarpSums * kWarpValues >= BITLINEAR_MAX_K, "a long token has more sums");

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

// Values k .. k + 16 of a token, behind the gate; zeros beyond K. `aligned`: rows of K values start
// at multiples of 16 bytes.
template <class X>
__device__ inline Group<float> load_gated(const bitlinear_prologue& prologue, const X* x, int64_t K,
                                          int64_t k, bool aligned) {
  Group<float> result;
  float* const values = reinterpret_cast<float*>(result.vectors);
  float a[kGroup];
  load_group(x + k, K - k, aligned).convert(a);
  if (prologue.activation == BITLINEAR_NO_GATE) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = a[i];
  } else {
    float b[kGroup];
    load_group(x + K + k, K - k, aligned).convert(b);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = gate(prologue.activation, a[i], b[i]);
  }
  return result;
}

// The sum of squares of the 512 values that the groups of a warp hold, in pairs; in every lane.
__device__ inline float warp_sum_of_squares(const Group<float>& group) {
  float values[kGroup];
  group.convert(values);
#pragma unroll
  for (float& value : values) value = __fmul_rn(value, value);
#pragma unroll
  for (int size = kGroup / 2; size > 0; size /= 2) {
#pragma unroll
    for (int i = 0; i < size; ++i) values[i] = __fadd_rn(values[2 * i], values[2 * i + 1]);
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    values[0] = __fadd_rn(values[0], __shfl_xor_sync(~0u, values[0], mask));
  }
  return values[0];
}

// The sum of sums[0:count], count <= 1024, in pairs; in every lane of a warp.
__device__ inline float add_warp_sums(const float* sums, int count) {
  const int lane = threadIdx.x % 32;
  const auto add_lanes = [](float sum) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, mask));
    }
    return sum;
  };
  if (count <= 32) return add_lanes(lane < count ? sums[lane] : 0.0f);
  float mine = 0.0f;
  for (int first = 0; first < count; first += 32) {
    const float sum = add_lanes(first + lane < count ? sums[first + lane] : 0.0f);
    if (first == 32 * lane) mine = sum;
  }
  return add_lanes(mine);
}

// 1 / sqrt(sum / K + eps), from the sums of the warps of a token.
__device__ inline float norm_factor(const bitlinear_prologue& prologue, const float* sums,
                                    int64_t K) {
  const int count = static_cast<int>(ceil_div<int64_t>(K, kWarpValues));
  const float mean = __fdiv_rn(add_warp_sums(sums, count), static_cast<float>(K));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, prologue.norm_eps)));
}

// Multiplies values k .. k + 16 of a token with the factor and with the weight of the norm.
template <class W>
__device__ inline void normalize_group(Group<float>& group, const W* weight, int64_t K, int64_t k,
                                       bool aligned, float factor) {
  float* const values = reinterpret_cast<float*>(group.vectors);
  float weights[kGroup];
  load_group(weight + k, K - k, aligned).convert(weights);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    values[i] = __fmul_rn(__fmul_rn(values[i], factor), weights[i]);
  }
}
__device__ inline void normalize(Group<float>& group, const bitlinear_prologue& prologue, int64_t K,
                                 int64_t k, bool aligned, float factor) {
  with_dtype(prologue.norm_dtype, [&](auto zero) {
    const auto* const weight = static_cast<const decltype(zero)*>(prologue.norm_weight);
    normalize_group(group, weight, K, k, aligned, factor);
  });
}

}  // namespace cuda
}  // namespace bitlinear
