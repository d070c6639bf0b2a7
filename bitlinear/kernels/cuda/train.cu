// The functions for training other than the product: quantise and pack weights, and expand both
// operands for the gradients. (quantize.cu quantises the activations.)
//
// Bound: memory. The weights are read twice, the first time for their mean, and a sixteenth of fp32
// is written; expanded operands are written once. Measured on an H100: 4096 x 4096 in bf16 takes 17
// us for the sum (2.0 TB/s), 12 for packing (partly from L2), and 17 for expanding (2.2 TB/s).
// Expanding 8192 tokens of 4096 takes 44 us (2.3 TB/s).
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

// The sum over a block; valid in its first thread.
__device__ inline double block_sum(double sum) {
  __shared__ double warps[kSumThreads / 32];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return 0;
  for (int w = 1; w < kSumThreads / 32; ++w) sum += warps[w];
  return sum;
}

template <class V>
__global__ void __launch_bounds__(kSumThreads)
    sum_magnitudes(const V* w, int64_t count, bool aligned, double* sums) {
  const int64_t step = int64_t{gridDim.x} * kSumThreads * kGroup;
  double sum = 0;
  for (int64_t i = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) * kGroup; i < count;
       i += step) {
    float values[kGroup];
    load_group(w + i, count - i, aligned).convert(values);
#pragma unroll
    for (const float value : values) sum += static_cast<double>(fabsf(value));
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    find_scale(const double* sums, int blocks, double count, float eps, float* s_w) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kSumThreads) sum += sums[i];
  sum = block_sum(sum);
  const float mean = __double2float_rn(__ddiv_rn(sum, count));
  if (threadIdx.x == 0) *s_w = mean < eps ? eps : mean;  // a NaN stays
}

// The scale of each row, by one block.
template <class V>
__global__ void __launch_bounds__(kSumThreads)
    find_row_scales(const V* w, int K, bool aligned, float eps, float* s_w) {
  const V* const row = w + int64_t{blockIdx.x} * K;
  double sum = 0;
  for (int k = static_cast<int>(threadIdx.x) * kGroup; k < K; k += kSumThreads * kGroup) {
    float values[kGroup];
    load_group(row + k, K - k, aligned).convert(values);
#pragma unroll
    for (const float value : values) sum += static_cast<double>(fabsf(value));
  }
  sum = block_sum(sum);
  const float mean = __double2float_rn(__ddiv_rn(sum, static_cast<double>(K)));
  if (threadIdx.x == 0) s_w[blockIdx.x] = mean < eps ? eps : mean;  // a NaN stays
}

template <class V>
__global__ void __launch_bounds__(kRowThreads* kBlockRows)
    pack_rows(const V* w, int64_t N, int K, bool aligned, const float* s_w, int64_t s_w_stride,
              uint8_t* packed) {
  const int64_t n = int64_t{blockIdx.x} * kBlockRows + threadIdx.y;
  if (n >= N) return;
  const int row_bytes = (K + 3) / 4;
  // w / s_w rounds to 1 if it exceeds 1/2 (1/2 itself rounds to even, 0). A quotient of floats
  // exceeds 1/2 exactly if w exceeds s_w / 2, and that product is exact.
  const float half = __fmul_rn(0.5f, s_w[n * s_w_stride]);
  for (int k = static_cast<int>(threadIdx.x) * kGroup; k < K; k += kRowThreads * kGroup) {
    float values[kGroup];
    load_group(w + n * K + k, K - k, aligned).convert(values);
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
    expand_weights(const uint8_t* __restrict__ packed, int64_t N, int K, const float* s_w,
                   int64_t s_w_stride, T* __restrict__ w) {
  const int64_t n = int64_t{blockIdx.x} * kBlockRows + threadIdx.y;
  if (n >= N) return;
  constexpr int kValues = kStoredValues<T>, kStep = kRowThreads * kValues;
  const int row_bytes = (K + 3) / 4;
  const float scale = s_w == nullptr ? 1.0f : s_w[n * s_w_stride];
#pragma unroll 4
  for (int k = static_cast<int>(threadIdx.x) * kValues; k < K; k += kStep) {
    const uint8_t* const bytes = packed + n * row_bytes + k / 4;
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
  if (m >= M) return;
  constexpr int kValues = kStoredValues<T>, kStep = kRowThreads * kValues;
  const float scale = s_x[m];
  const bool aligned = reinterpret_cast<uintptr_t>(q) % 16 == 0 && K % kValues == 0;
#pragma unroll 4
  for (int k = static_cast<int>(threadIdx.x) * kValues; k < K; k += kStep) {
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

LaunchConfig row_blocks(int64_t N) {
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(N, kBlockRows))),
          dim3(kRowThreads, kBlockRows)};
}

template <class V>
cudaError_t find_scales(const Call& call, const V* w, int64_t N, int64_t K, float eps, float* s_w,
                        int64_t s_w_stride, double* sums) {
  if (s_w_stride == 1) {
    if (N == 0) return cudaSuccess;
    const bool aligned = rows_aligned(w, K * static_cast<int64_t>(sizeof(V)));
    const LaunchConfig by_rows = {dim3(static_cast<unsigned>(N)), kSumThreads};
    return launch_kernel<find_row_scales<V>>(by_rows, call, w, static_cast<int>(K), aligned, eps,
                                             s_w);
  }
  const int blocks = static_cast<int>(sum_blocks(N * K));
  const LaunchConfig by_blocks = {dim3(static_cast<unsigned>(blocks)), kSumThreads};
  const cudaError_t error =
      launch_kernel<sum_magnitudes<V>>(by_blocks, call, w, N * K, rows_aligned(w, 16), sums);
  if (error != cudaSuccess) return error;
  const double count = static_cast<double>(N * K);
  return launch_kernel<find_scale>({dim3(1), kSumThreads}, call, sums, blocks, count, eps, s_w);
}

template <class V>
cudaError_t quantize_weight(const Call& call, const V* w, int64_t N, int64_t K, float eps,
                            uint8_t* packed, float* s_w, int64_t s_w_stride, double* sums) {
  const cudaError_t error = find_scales(call, w, N, K, eps, s_w, s_w_stride, sums);
  if (error != cudaSuccess || N == 0) return error;
  const bool aligned = rows_aligned(w, K * static_cast<int64_t>(sizeof(V)));
  return launch_kernel<pack_rows<V>>(row_blocks(N), call, w, N, static_cast<int>(K), aligned, s_w,
                                     s_w_stride, packed);
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
  return report(launch({{}, device, static_cast<cudaStream_t>(stream)}));
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
                                                            void* workspace, void* stream) {
  using namespace bitlinear::cuda;
  return run_on_current_device(N, K, stream, [&](const Call& call) {
    return dispatch_dtype(dtype, [&](auto zero) {
      return quantize_weight(call, static_cast<const decltype(zero)*>(w), N, K, eps, packed, s_w,
                             s_w_stride, static_cast<double*>(workspace));
    });
  });
}

BITLINEAR_EXPORT const char* bitlinear_cuda_expand_weight(const uint8_t* packed, int64_t N,
                                                          int64_t K, const float* s_w,
                                                          int64_t s_w_stride, void* w, int dtype,
                                                          void* stream) {
  using namespace bitlinear::cuda;
  if (N == 0) return nullptr;
  return run_on_current_device(N, K, stream, [&](const Call& call) {
    return dispatch_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      return launch_kernel<expand_weights<T>>(row_blocks(N), call, packed, N, static_cast<int>(K),
                                              s_w, s_w_stride, static_cast<T*>(w));
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
                                                                 float* s_x, void* stream) {
  using namespace bitlinear::cuda;
  if (M == 0 || K == 0) return nullptr;
  return run_on_current_device(M, K, stream, [&](Call call) {
    call.task.x = x;
    call.task.x_dtype = dtype;
    call.task.act_bits = act_bits;
    call.task.M = M * bitlinear_rows_per_token(act_bits);
    call.task.K = K;
    call.task.eps = eps;
    return quantize(call, {static_cast<int8_t*>(q), K, 0, s_x, nullptr}, Layout::kInOrder);
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
            row_blocks(M), call, integers, s_x, M, static_cast<int>(K), static_cast<T*>(x));
      };
      return act_bits == 8 ? expand(static_cast<const int8_t*>(q))
                           : expand(static_cast<const int16_t*>(q));
    });
  });
}
