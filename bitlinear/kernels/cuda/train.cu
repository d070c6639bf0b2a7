// The functions for training other than the product: quantise and pack weights, and expand both
// operands for the gradients. (quantize.cu quantises the activations.)
//
// Bound: memory. The weights are read twice, the first time for their mean, and a sixteenth of fp32
// is written; expanded operands are written once. Measured on an H100: 4096 x 4096 in bf16 takes 17
// us for the sum (2.0 TB/s), 12 for packing (partly from L2), and 17 for expanding (2.2 TB/s).
// Expanding 8192 tokens of 4096 takes 44 us (2.3 TB/s).
#include "groups.cuh"
#include "launch.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kSumThreads = 256;
// Threads along a row, and rows of a block.
constexpr int kRowThreads = 64, kBlockRows = 4;

// Blocks that sum magnitudes. Their number is the same on every GPU, so that sums have the same
// order.
constexpr int64_t sum_blocks(int64_t count) {
  const int64_t blocks = ceil_div<int64_t>(count, int64_t{kSumThreads} * kGroup);
  return blocks < 1 ? 1 : minimum<int64_t>(blocks, 1024);
}

// Lets the next kernel of this file be launched while this one runs, and waits for the previous
// one. In turn, no kernel here touches memory before it.
__device__ inline void start() {
  allow_successor();
  wait_for_predecessor();
}

// The sum over a block of kSumThreads, in all threads.
__device__ inline double block_sum(double sum, int thread) {
  __shared__ double warps[kSumThreads / 32];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (thread % 32 == 0) warps[thread / 32] = sum;
  __syncthreads();
  sum = warps[0];
  for (int w = 1; w < kSumThreads / 32; ++w) sum += warps[w];
  return sum;
}

__device__ inline double sum_of_magnitudes(const float (&values)[kGroup]) {
  double sum = 0;
#pragma unroll
  for (const float value : values) sum += static_cast<double>(fabsf(value));
  return sum;
}

__device__ inline float scale_of(double sum, double count, float eps) {
  const float mean = __double2float_rn(__ddiv_rn(sum, count));
  return mean < eps ? eps : mean;  // a NaN stays
}

template <class V>
__global__ void __launch_bounds__(kSumThreads)
    sum_magnitudes(const V* w, int64_t count, bool aligned, double* sums) {
  const int64_t step = int64_t{gridDim.x} * kSumThreads * kGroup;
  start();
  double sum = 0;
  for (int64_t i = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) * kGroup; i < count;
       i += step) {
    float values[kGroup];
    load_group(w + i, count - i, aligned).convert(values);
    sum += sum_of_magnitudes(values);
  }
  sum = block_sum(sum, static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The scale of each row, by one block.
template <class V>
__global__ void __launch_bounds__(kSumThreads)
    find_row_scales(const V* w, int K, bool aligned, float eps, float* s_w) {
  const V* const row = w + int64_t{blockIdx.x} * K;
  start();
  double sum = 0;
  for (int k = static_cast<int>(threadIdx.x) * kGroup; k < K; k += kSumThreads * kGroup) {
    float values[kGroup];
    load_group(row + k, K - k, aligned).convert(values);
    sum += sum_of_magnitudes(values);
  }
  sum = block_sum(sum, static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) s_w[blockIdx.x] = scale_of(sum, K, eps);
}

// The scales of the groups of each row, by one block: a warp for each group. They are rounded to
// what products compute with.
template <class V>
__global__ void __launch_bounds__(kSumThreads)
    find_group_scales(const V* w, int K, int group_size, int count, float eps, float* s_w) {
  __shared__ uint32_t warp_largest[kSumThreads / 32];
  const V* const row = w + int64_t{blockIdx.x} * K;
  float* const scales = s_w + int64_t{blockIdx.x} * count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  start();
  uint32_t largest = 0;
  for (int group = warp; group < count; group += kSumThreads / 32) {
    const int begin = group * group_size, end = minimum(begin + group_size, K);
    double sum = 0;
    for (int k = begin + lane; k < end; k += 32) {
      sum += static_cast<double>(fabsf(to_float(row[k])));
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float scale = scale_of(sum, end - begin, eps);
    if (lane == 0) scales[group] = scale;
    largest = max(largest, magnitude_bits(scale));
  }
  if (lane == 0) warp_largest[warp] = largest;
  __syncthreads();
  for (const uint32_t other : warp_largest) largest = max(largest, other);
  const ScaleUnit unit(largest);
  for (int group = static_cast<int>(threadIdx.x); group < count; group += kSumThreads) {
    scales[group] = __fmul_rn(static_cast<float>(unit.multiplier(scales[group])), unit.value);
  }
}

// The scales of a weight: one for each row, s_w[n * stride], or one for each group of a row.
struct RowScales {
  float* s_w;
  int64_t stride;
  int group_size;  // 0: no groups

  __device__ float at(int64_t n, int k) const {
    return s_w[n * stride + (group_size > 0 ? k / group_size : 0)];
  }
};

// The magnitudes that give the scale of a tensor: their sums by the blocks of sum_magnitudes().
struct Magnitudes {
  const double* sums;  // null: the rows have scales, which are known
  int blocks;
  double count;
  float eps;
};

// Each block finds the scale of the tensor for itself, and the first one stores it.
template <class V>
__global__ void __launch_bounds__(kRowThreads* kBlockRows)
    pack_rows(const V* w, int64_t N, int K, bool aligned, Magnitudes magnitudes, RowScales scales,
              uint8_t* packed) {
  static_assert(kRowThreads * kBlockRows == kSumThreads, "block_sum() adds for such blocks");
  const int64_t n = int64_t{blockIdx.x} * kBlockRows + threadIdx.y;
  start();
  float scale = 0.0f;
  if (magnitudes.sums != nullptr) {
    const int thread = static_cast<int>(threadIdx.y * kRowThreads + threadIdx.x);
    double sum = 0;
    for (int i = thread; i < magnitudes.blocks; i += kSumThreads) sum += magnitudes.sums[i];
    scale = scale_of(block_sum(sum, thread), magnitudes.count, magnitudes.eps);
    if (blockIdx.x == 0 && thread == 0) *scales.s_w = scale;
  }
  if (n >= N) return;
  const int row_bytes = (K + 3) / 4;
  // w / s_w rounds to 1 if it exceeds 1/2 (1/2 itself rounds to even, 0). A quotient of floats
  // exceeds 1/2 exactly if w exceeds s_w / 2, and that product is exact.
  for (int k = static_cast<int>(threadIdx.x) * kGroup; k < K; k += kRowThreads * kGroup) {
    float values[kGroup];
    load_group(w + n * K + k, K - k, aligned).convert(values);
    const float half = __fmul_rn(0.5f, magnitudes.sums != nullptr ? scale : scales.at(n, k));
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t code = 1 + (values[i] > half) - (values[i] < -half);
      word |= code << (8 * (i / 4) + 6 - 2 * (i % 4));
    }
    uint8_t* const bytes = packed + n * row_bytes + k / 4;
    if (row_bytes % 4 == 0) {
      *reinterpret_cast<uint32_t*>(bytes) = word;
    } else {
      store_partial(bytes, word, row_bytes - k / 4);
    }
  }
}

// The values of T that a thread expands at a time: one store, next to those of the other threads.
template <class T>
constexpr int kStoredValues = 16 / static_cast<int>(sizeof(T));

// Stores the first `count` values.
template <class T>
__device__ inline void store_values(T* out, const float (&values)[kStoredValues<T>], int count,
                                    bool aligned) {
  alignas(16) T rounded[kStoredValues<T>];
#pragma unroll
  for (int i = 0; i < kStoredValues<T>; ++i) rounded[i] = from_float<T>(values[i]);
  if (aligned && count >= kStoredValues<T>) {
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(rounded);
  } else {
#pragma unroll
    for (int i = 0; i < kStoredValues<T>; ++i) {
      if (i < count) out[i] = rounded[i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads* kBlockRows)
    expand_weights(const uint8_t* __restrict__ packed, int64_t N, int K, RowScales scales,
                   T* __restrict__ w) {
  const int64_t n = int64_t{blockIdx.x} * kBlockRows + threadIdx.y;
  start();
  if (n >= N) return;
  constexpr int kValues = kStoredValues<T>, kStep = kRowThreads * kValues;
  const int row_bytes = (K + 3) / 4;
  const float row_scale = scales.s_w == nullptr ? 1.0f : scales.at(n, 0);
  const int first = static_cast<int>(blockIdx.y * kStep + threadIdx.x * kValues);
#pragma unroll 2
  for (int k = first; k < K; k += static_cast<int>(gridDim.y) * kStep) {
    const uint8_t* const bytes = packed + n * row_bytes + k / 4;
    const float scale = scales.group_size > 0 ? scales.at(n, k) : row_scale;
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int byte = k / 4 + i / 4 < row_bytes ? bytes[i / 4] : 0;
      values[i] = __fmul_rn(scale, static_cast<float>((byte >> (6 - 2 * (i % 4)) & 3) - 1));
    }
    store_values(w + n * K + k, values, K - k, K * sizeof(T) % 16 == 0);
  }
}

template <class Integer, class T>
__global__ void __launch_bounds__(kRowThreads* kBlockRows)
    expand_activations(const Integer* __restrict__ q, const float* s_x, int64_t M, int K,
                       T* __restrict__ x) {
  const int64_t m = int64_t{blockIdx.x} * kBlockRows + threadIdx.y;
  start();
  if (m >= M) return;
  constexpr int kValues = kStoredValues<T>, kStep = kRowThreads * kValues;
  const float scale = s_x[m];
  const bool aligned = reinterpret_cast<uintptr_t>(q) % 16 == 0 && K % kValues == 0;
  const int first = static_cast<int>(blockIdx.y * kStep + threadIdx.x * kValues);
#pragma unroll 2
  for (int k = first; k < K; k += static_cast<int>(gridDim.y) * kStep) {
    struct alignas(kValues * sizeof(Integer)) Codes {
      Integer values[kValues];
    } codes;
    if (aligned) {
      codes = *reinterpret_cast<const Codes*>(q + m * K + k);
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        codes.values[i] = k + i < K ? q[m * K + k + i] : Integer{0};
      }
    }
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = __fmul_rn(static_cast<float>(codes.values[i]), scale);
    }
    store_values(x + m * K + k, values, K - k, K * sizeof(T) % 16 == 0);
  }
}

// Writes the position of the first byte that holds a code 3, or a weight other than 0 past K, to
// `first`, which the caller has set to ~0.
__global__ void __launch_bounds__(kRowThreads* kBlockRows)
    find_invalid_byte(const uint8_t* packed, int64_t N, int K, unsigned long long* first) {
  const int64_t n = int64_t{blockIdx.x} * kBlockRows + threadIdx.y;
  start();
  if (n >= N) return;
  const int row_bytes = (K + 3) / 4;
  const int unused = (1 << 2 * (4 * row_bytes - K)) - 1;
  for (int b = static_cast<int>(threadIdx.x); b < row_bytes; b += kRowThreads) {
    const int byte = packed[n * row_bytes + b];
    const bool has_code3 = (byte & byte >> 1 & 0x55) != 0;
    if (has_code3 || (b == row_bytes - 1 && ((byte ^ 0x55) & unused) != 0)) {
      atomicMin(first, static_cast<unsigned long long>(n * row_bytes + b));
      return;
    }
  }
}

// Blocks of kBlockRows rows, which are cut into parts if a thread would take more than two steps of
// `step` values.
LaunchConfig row_blocks(int64_t N, int64_t K, int step) {
  const int64_t parts = minimum<int64_t>(ceil_div<int64_t>(K, 2 * int64_t{step}), 65535);
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(N, kBlockRows)),
               static_cast<unsigned>(parts < 1 ? 1 : parts)),
          dim3(kRowThreads, kBlockRows)};
}
LaunchConfig row_blocks(int64_t N) { return row_blocks(N, 1, 1); }

template <class V>
cudaError_t quantize_weight(const Call& call, const V* w, int64_t N, int64_t K, float eps,
                            uint8_t* packed, const RowScales& scales, double* sums) {
  float* const s_w = scales.s_w;
  Magnitudes magnitudes = {};
  const bool aligned = rows_aligned(w, K * static_cast<int64_t>(sizeof(V)));
  cudaError_t error = cudaSuccess;
  if (scales.stride > 0) {
    if (N == 0) return cudaSuccess;
    const LaunchConfig by_rows = {dim3(static_cast<unsigned>(N)), kSumThreads};
    const auto width = static_cast<int>(K);
    error = scales.group_size > 0
                ? launch_kernel<find_group_scales<V>>(by_rows, call, w, width, scales.group_size,
                                                      static_cast<int>(scales.stride), eps, s_w)
                : launch_kernel<find_row_scales<V>>(by_rows, call, w, width, aligned, eps, s_w);
  } else {
    magnitudes = {sums, static_cast<int>(sum_blocks(N * K)), static_cast<double>(N * K), eps};
    const LaunchConfig by_blocks = {dim3(static_cast<unsigned>(magnitudes.blocks)), kSumThreads};
    error = launch_kernel<sum_magnitudes<V>>(by_blocks, call, w, N * K, rows_aligned(w, 16), sums);
  }
  if (error != cudaSuccess) return error;
  // Without rows, one block stores the scale.
  return launch_kernel<pack_rows<V>>(row_blocks(N == 0 ? 1 : N), call, w, N, static_cast<int>(K),
                                     aligned, magnitudes, scales, packed);
}

// K is less than 2^30, so a larger group has a whole row too.
RowScales row_scales(const float* s_w, int64_t stride, int64_t group_size) {
  const int64_t size = s_w == nullptr ? 0 : minimum<int64_t>(group_size, 1 << 30);
  return {const_cast<float*>(s_w), stride, static_cast<int>(size)};
}

// Returns the error message of `launch`, called for the current device, or null.
template <class F>
const char* run_on_current_device(int64_t rows, int64_t K, void* stream, F&& launch) {
  if (rows > INT32_MAX || K > INT32_MAX / 2) {
    return "there must be fewer than 2^31 rows, and K must be less than 2^30";
  }
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return report(error);
  Call call = {{}, device, static_cast<cudaStream_t>(stream)};
  call.task.w_prefetchable = 1;  // all kernels wait for their predecessor themselves
  return report(launch(call));
}

}  // namespace
}  // namespace cuda
}  // namespace bitlinear

BITLINEAR_EXPORT int64_t bitlinear_cuda_weight_workspace_bytes(int64_t N, int64_t K) {
  return bitlinear::cuda::sum_blocks(N * K) * static_cast<int64_t>(sizeof(double));
}

BITLINEAR_EXPORT const char* bitlinear_cuda_quantize_weight(const void* w, int dtype, int64_t N,
                                                            int64_t K, float eps, uint8_t* packed,
                                                            float* s_w, int64_t s_w_stride,
                                                            int64_t group_size, void* workspace,
                                                            void* stream) {
  using namespace bitlinear::cuda;
  return run_on_current_device(N, K, stream, [&](const Call& call) {
    return dispatch_dtype(dtype, [&](auto zero) {
      return quantize_weight(call, static_cast<const decltype(zero)*>(w), N, K, eps, packed,
                             row_scales(s_w, s_w_stride, group_size),
                             static_cast<double*>(workspace));
    });
  });
}

BITLINEAR_EXPORT const char* bitlinear_cuda_expand_weight(const uint8_t* packed, int64_t N,
                                                          int64_t K, const float* s_w,
                                                          int64_t s_w_stride, int64_t group_size,
                                                          void* w, int dtype, void* stream) {
  using namespace bitlinear::cuda;
  if (N == 0) return nullptr;
  return run_on_current_device(N, K, stream, [&](const Call& call) {
    return dispatch_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      return launch_kernel<expand_weights<T>>(
          row_blocks(N, K, kRowThreads * kStoredValues<T>), call, packed, N, static_cast<int>(K),
          row_scales(s_w, s_w_stride, group_size), static_cast<T*>(w));
    });
  });
}

BITLINEAR_EXPORT const char* bitlinear_cuda_find_invalid_byte(const uint8_t* packed, int64_t N,
                                                              int64_t K, int64_t* position,
                                                              uint8_t* byte, void* workspace,
                                                              void* stream) {
  using namespace bitlinear::cuda;
  return run_on_current_device(N, K, stream, [&](const Call& call) {
    auto* const first = static_cast<unsigned long long*>(workspace);
    cudaError_t error = cudaMemsetAsync(first, 0xFF, sizeof(*first), call.stream);
    if (error != cudaSuccess) return error;
    error = launch_kernel<find_invalid_byte>(row_blocks(N), call, packed, N, static_cast<int>(K),
                                             first);
    if (error != cudaSuccess) return error;
    error =
        cudaMemcpyAsync(position, first, sizeof(*position), cudaMemcpyDeviceToHost, call.stream);
    if (error != cudaSuccess) return error;
    error = cudaStreamSynchronize(call.stream);
    if (error != cudaSuccess || *position < 0) return error;
    error = cudaMemcpyAsync(byte, packed + *position, 1, cudaMemcpyDeviceToHost, call.stream);
    return error != cudaSuccess ? error : cudaStreamSynchronize(call.stream);
  });
}

BITLINEAR_EXPORT const char* bitlinear_cuda_quantize_activations(const void* x, int dtype,
                                                                 int64_t M, int64_t K, float eps,
                                                                 int64_t act_bits, void* q,
                                                                 float* s_x, int32_t* q_sum,
                                                                 void* stream) {
  using namespace bitlinear::cuda;
  if (M == 0 || K == 0) return nullptr;
  return run_on_current_device(M, K, stream, [&](Call call) {
    call.task.x = x;
    call.task.x_dtype = dtype;
    call.task.act_bits = act_bits;
    call.task.M = M * bitlinear_rows_per_token(act_bits);
    call.task.K = K;
    call.task.eps = eps;
    return quantize(call, {static_cast<int8_t*>(q), K, 0, s_x, q_sum, false}, Layout::kInOrder);
  });
}

BITLINEAR_EXPORT const char* bitlinear_cuda_expand_activations(const void* q, int64_t act_bits,
                                                               const float* s_x, int64_t M,
                                                               int64_t K, void* x, int dtype,
                                                               void* stream) {
  using namespace bitlinear::cuda;
  if (M == 0 || K == 0) return nullptr;
  return run_on_current_device(M, K, stream, [&](const Call& call) {
    return dispatch_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto expand = [&](const auto* integers) {
        using Integer = std::remove_const_t<std::remove_pointer_t<decltype(integers)>>;
        return launch_kernel<expand_activations<Integer, T>>(
            row_blocks(M, K, kRowThreads * kStoredValues<T>), call, integers, s_x, M,
            static_cast<int>(K), static_cast<T*>(x));
      };
      return act_bits == 8 ? expand(static_cast<const int8_t*>(q))
                           : expand(static_cast<const int16_t*>(q));
    });
  });
}
