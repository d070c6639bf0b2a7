// Shared by all kernels: layouts of the activations, conversions, the float operations of the
// numerics, dependent launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "heuristics.h"
#include "task.h"

namespace bitlinear {
namespace cuda {

// The layout of q in memory. In the first three, a slice of a token (256 values) is 4 planes of 64
// bytes.
//
// kRows: (M, q_stride). Word w of plane p has the four values that are multiplied with word w of
// the packed slice.
//
// kFragments: (token_groups, q_stride / 256, 4, 8, 64). As kRows, but a plane of 8 tokens is
// contiguous: the fragments that a warp loads for mma.m16n8k32. With scales of groups 512 bytes
// have a quarter of the slice instead of a plane, so that a product has 32 of 64 consecutive values
// of k.
//
// kTiles: (q_stride / 128, token_groups, 8, 128). Half a slice of 8 tokens is an atom of wgmma's
// 128-byte swizzle. The atoms of consecutive tokens are contiguous, so that one bulk copy fetches a
// tile. The words of a plane, seen as a 4 x 4 matrix, are transposed.
//
// kInOrder: (M, K), in the order of x; int16 if activations have 16 bits. There are no groups.
enum class Layout { kRows, kFragments, kTiles, kInOrder };

// Quantised activations: output of the quantiser, input of the products. M counts rows of q. A
// token with 16 bits has two, one after the other: the high and the low one.
struct Activations {
  int8_t* q;
  int64_t q_stride;      // a multiple of 256; kInOrder: K
  int64_t token_groups;  // M / 8, rounded up to whole tiles; kInOrder: 0
  float* s_x;            // (M,), the token's scale for each of its rows; kInOrder: (tokens,)
  int32_t* q_sum;        // (M,); kInOrder: can be null
  bool has_groups;       // of scales
};

// The offset of word `word` (0..15) of plane `plane` of a token's slice.
template <Layout kLayout>
__device__ inline int64_t word_offset(const Activations& activations, int64_t m, int64_t slice,
                                      int plane, int word) {
  const int row = static_cast<int>(m % 8);
  if constexpr (kLayout == Layout::kRows) {
    return m * activations.q_stride + slice * kSliceValues + 64 * plane + 4 * word;
  } else if constexpr (kLayout == Layout::kFragments) {
    const int part = activations.has_groups ? 512 * (word / 4) + 16 * (word % 4) + 4 * plane
                                            : 512 * plane + 4 * word;
    return (m - row) * activations.q_stride + slice * 2048 + row * 64 + part;
  } else {
    const int64_t half = 2 * slice + plane / 2;
    const int chunk = (4 * (plane % 2) + word % 4) ^ row;
    return (half * activations.token_groups + m / 8) * 1024 + row * 128 + chunk * 16 + word / 4 * 4;
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Loading bits and converting them are two functions, so that no thread waits for a load before it
// needs the value.
__device__ inline uint32_t load_bits(const void* p, int dtype, int64_t i) {
  // Predicates, because branches would wait for the loads.
  const bool is_wide = dtype == BITLINEAR_F32;
  uint32_t bits;
  asm volatile(
      "{\n"
      ".reg .pred wide;\n"
      "setp.ne.s32 wide, %2, 0;\n"
      "@wide ld.global.u32 %0, [%1];\n"
      "@!wide ld.global.u16 %0, [%1];\n"
      "}\n"
      : "=r"(bits)
      : "l"(__cvta_generic_to_global(static_cast<const char*>(p) + i * (is_wide ? 4 : 2))),
        "r"(static_cast<int>(is_wide)));
  return bits;
}
__device__ inline float float_from_bits(uint32_t bits, int dtype) {
  if (dtype == BITLINEAR_F32) return __uint_as_float(bits);
  if (dtype == BITLINEAR_BF16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline float load_as_float(const void* p, int dtype, int64_t i) {
  return float_from_bits(load_bits(p, dtype, i), dtype);
}

template <class Y>
__device__ inline Y from_float(float value) {
  if constexpr (sizeof(Y) == 4) {
    return value;
  } else if constexpr (std::is_same<Y, __half>::value) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <class X>
constexpr int dtype_of() {
  return sizeof(X) == 4                   ? BITLINEAR_F32
         : std::is_same<X, __half>::value ? BITLINEAR_F16
                                          : BITLINEAR_BF16;
}

// Calls `f` with a zero of the C++ type of the dtype.
template <class F>
__device__ inline void with_dtype(int dtype, F&& f) {
  if (dtype == BITLINEAR_F32) {
    f(float{});
  } else if (dtype == BITLINEAR_F16) {
    f(__half{});
  } else {
    f(__nv_bfloat16{});
  }
}

// Rounds four neighbouring values of y into one vector.
__device__ inline float4 round_to_vector(float, const float (&v)[4]) {
  return make_float4(v[0], v[1], v[2], v[3]);
}
template <class Half>
__device__ inline uint2 round_to_vector(Half, const float (&v)[4]) {
  const Half halves[4] = {from_float<Half>(v[0]), from_float<Half>(v[1]), from_float<Half>(v[2]),
                          from_float<Half>(v[3])};
  uint2 bits;
  memcpy(&bits, halves, sizeof(bits));
  return bits;
}

// Stores the first `count` of four values.
template <class Y, class Four>
__device__ inline void store_partial(Y* y, const Four& four, int count) {
  const Y* const each = reinterpret_cast<const Y*>(&four);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < count) y[j] = each[j];
  }
}

// y = float(acc) * (s_x * s_w) + bias, each operation rounded on its own. `codes` is sum_k c * q
// for each row of q that the token has.
__device__ inline float dequantize(const int32_t (&codes)[1], const int32_t* q_sum, float s_x,
                                   float s_w) {
  return __fmul_rn(__int2float_rn(codes[0] - q_sum[0]), __fmul_rn(s_x, s_w));
}
__device__ inline float dequantize(const int32_t (&codes)[2], const int32_t* q_sum, float s_x,
                                   float s_w) {
  const int64_t high = codes[0] - q_sum[0], low = codes[1] - q_sum[1];
  return __fmul_rn(__ll2float_rn(BITLINEAR_HIGH_WEIGHT * high + low), __fmul_rn(s_x, s_w));
}
// The same with scales of groups: `sums` are sum_k m * t * q, and s_w is the unit of the row.
__device__ inline float dequantize(const int64_t (&sums)[1], const int32_t*, float s_x, float s_w) {
  return __fmul_rn(__ll2float_rn(sums[0]), __fmul_rn(s_x, s_w));
}
__device__ inline float dequantize(const int64_t (&sums)[2], const int32_t*, float s_x, float s_w) {
  return __fmul_rn(__ll2float_rn(BITLINEAR_HIGH_WEIGHT * sums[0] + sums[1]), __fmul_rn(s_x, s_w));
}

// The weight that holds row n of all. The index reaches into constant memory: to select every
// field would take registers. kIsPlain: the task has only one.
template <bool kIsPlain = false>
__device__ inline const bitlinear_cuda_weight& weight_at(const bitlinear_cuda_task& task,
                                                         int64_t n) {
  int index = 0;
#pragma unroll
  for (int i = 1; !kIsPlain && i < BITLINEAR_MAX_WEIGHTS; ++i) {
    index += static_cast<int>(n) >= static_cast<int>(task.weights[i].begin);
  }
  return task.weights[index];
}
// The packed bytes of row n of all.
template <bool kIsPlain = false>
__device__ inline const uint8_t* weight_row(const bitlinear_cuda_task& task, int64_t n,
                                            int64_t row_bytes) {
  const bitlinear_cuda_weight& weight = weight_at<kIsPlain>(task, n);
  return weight.w + (n - weight.begin) * row_bytes;
}

// The number of tiles of kRows rows. A tile has rows of one weight.
template <int kRows>
__host__ __device__ inline int row_tiles(const bitlinear_cuda_task& task) {
  int tiles = 0;
  for (int i = 0; i < BITLINEAR_MAX_WEIGHTS; ++i) {
    tiles += ceil_div(static_cast<int>(task.weights[i].end - task.weights[i].begin), kRows);
  }
  return tiles;
}
// The first row of a tile.
template <int kRows>
__device__ inline int64_t row_of_tile(const bitlinear_cuda_task& task, int tile) {
  int64_t first = 0;
#pragma unroll
  for (int i = 0; i < BITLINEAR_MAX_WEIGHTS; ++i) {
    const int64_t begin = task.weights[i].begin;
    if (tile >= 0) first = begin + int64_t{tile} * kRows;
    tile -= ceil_div(static_cast<int>(task.weights[i].end - begin), kRows);
  }
  return first;
}

// Scale and bias of a row of a weight. The bias is in its dtype, so that no thread waits for the
// load before it needs the value; -0, which changes no value, where there is none.
struct RowScale {
  float s_w;
  uint32_t bias_bits;

  RowScale() = default;
  __device__ RowScale(const bitlinear_cuda_weight& weight, int64_t row) {
    s_w = weight.s_w[row * weight.s_w_stride];
    // Without a bias, any address will do: a branch would wait for the loads.
    const bool has_bias = weight.bias != nullptr;
    bias_bits = load_bits(has_bias ? weight.bias : weight.s_w,
                          has_bias ? weight.bias_dtype : BITLINEAR_F32, has_bias ? row : 0);
  }
  __device__ float bias(const bitlinear_cuda_weight& weight) const {
    return weight.bias == nullptr ? -0.0f : float_from_bits(bias_bits, weight.bias_dtype);
  }
};

__device__ inline int token_rows_of(const bitlinear_cuda_task& task) {
  return task.act_bits == 8 ? 1 : 2;
}

// Calls `f` with the number of rows of q that a token has, as a constant. kIsPlain: it is one.
template <bool kIsPlain = false, class F>
__device__ inline void with_token_rows(const bitlinear_cuda_task& task, F&& f) {
  if constexpr (kIsPlain) {
    f(std::integral_constant<int, 1>{});
  } else if (task.act_bits == 8) {
    f(std::integral_constant<int, 1>{});
  } else {
    f(std::integral_constant<int, 2>{});
  }
}

// Programmatic dependent launch (sm_90): a kernel can start while its predecessor in the stream
// still runs. Only after wait_for_predecessor() may it read what the predecessor wrote, or
// overwrite what the predecessor reads.
//
// A kernel calls allow_successor() before it waits itself, so the successor can overlap the kernel
// before this one too. That is safe for any successor, also for one of another library. PTX
// promises a successor nothing about the memory of earlier kernels before its own
// griddepcontrol.wait. That wait returns when all prerequisite grids in flight have completed,
// including the one before this kernel: every kernel here waits, so it completes after its
// predecessor.
//
// Invariant: before the wait our kernels read no memory but w and, where a block splits them,
// scales of groups, and these only if w_prefetchable is set. Then they were written before the
// previous kernel in this stream started (see ops.cpp).
//
// Tried, and slower: allow_successor() after the wait costs 15 % on an H100, 3.4 us instead of 2.95
// for one token of 4096 x 4096.
__device__ inline void allow_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Computes a value here rather than where it is used, which can be after a wait.
template <class T>
__device__ inline void compute_now(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

// Prefetches the line at an address into L2. It is safe before the wait: it returns no value,
// and L2 sees what the predecessor writes later.
constexpr int kLineBytes = 128;
__device__ inline void prefetch_line(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)) : "memory");
}
// Prefetches weights into L2 (sm_90).
__device__ inline void prefetch_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(bytes)
               : "memory");
#endif
}

__device__ inline uint32_t warp_reduce_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, value);
#else
  for (int step = 16; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(~0u, value, step));
  }
  return value;
#endif
}
__device__ inline int32_t warp_reduce_add(int32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(~0u, value);
#else
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
#endif
}

__device__ inline int64_t warp_reduce_add(int64_t value) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(~0u, static_cast<long long>(value), step);
  }
  return value;
}

// Weights are read once per call. In L1 they would only displace the activations.
__device__ inline uint4 load_weights(const uint8_t* p) {
#if __CUDA_ARCH__ >= 700
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
#else
  return *reinterpret_cast<const uint4*>(p);
#endif
}

// 16 packed bytes at `offset` of a row; zeros beyond its end. kAligned: rows start at multiples of
// 16.
template <bool kAligned>
__device__ inline uint4 load_chunk(const uint8_t* row, int64_t offset, int64_t row_bytes) {
  if constexpr (kAligned) {
    return offset < row_bytes ? load_weights(row + offset) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (offset + i < row_bytes) words[i / 4] |= uint32_t{row[offset + i]} << 8 * (i % 4);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace cuda
}  // namespace bitlinear
