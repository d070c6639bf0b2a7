// The row quantiser: one block per token; absmax, scale, rounding, plane order and sum.
//
// x is read twice, the second time from the caches, and 1 byte per value written: bound by memory.
#include "launch.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class X, Layout kLayout>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(const X* x, int64_t K, float eps, bool aligned, Activations out) {
  __shared__ uint32_t warp_max[kWarps];
  __shared__ int32_t warp_sum[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t m = blockIdx.x;
  const X* row = x + m * K;
  const int64_t first = threadIdx.x * kGroup;
  constexpr int64_t kStep = kThreads * kGroup;
  const auto load = [&](int64_t k, Group<X>& group) {
    if (aligned && k + kGroup <= K) {
      group.load(row + k);
    } else {
      group.load(row + k, K - k);
    }
  };
  allow_successor();
  wait_for_predecessor();

  uint32_t absmax = 0;
  for (int64_t k = first; k < K; k += kStep) {
    Group<X> group;
    load(k, group);
    absmax = max(absmax, group.magnitude_bits());
  }
  absmax = warp_reduce_max(absmax);
  if (lane == 0) warp_max[warp] = absmax;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) absmax = max(absmax, warp_max[w]);
  const TokenScale scale(absmax, eps);

  int32_t sum = 0;
  for (int64_t k = first; k < out.q_stride; k += kStep) {
    Group<X> group;
    load(k, group);
    float values[kGroup];
    group.convert(values);
    uint32_t planes[4];
    sum += quantize_group(values, scale.inv, planes);
    const int64_t slice = k / kSliceValues;
    const int word = static_cast<int>(k / kGroup % 16);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int64_t place = kLayout == Layout::kRows
                                ? m * out.q_stride + slice * kSliceValues + 64 * p + 4 * word
                                : tiled_place(out, m, slice, p, word);
      *reinterpret_cast<uint32_t*>(out.q + place) = planes[p];
    }
  }
  sum = warp_reduce_add(sum);
  if (lane == 0) warp_sum[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_sum[w];
    out.s_x[m] = scale.s_x;
    out.q_sum[m] = sum;
  }
}

template <class X>
cudaError_t launch(const bitlinear_cuda_task& task, const Activations& out, Layout layout,
                   cudaStream_t stream) {
  const X* x = static_cast<const X*>(task.x);
  const bool aligned = rows_aligned(x, task.K * static_cast<int64_t>(sizeof(X)));
  const auto kernel =
      layout == Layout::kRows ? quantize_rows<X, Layout::kRows> : quantize_rows<X, Layout::kTiles>;
  const Launch how = {dim3(static_cast<unsigned>(task.M)), kThreads};
  return launch_kernel(kernel, how, task, stream, x, task.K, task.eps, aligned, out);
}

}  // namespace

cudaError_t quantize(const bitlinear_cuda_task& task, const Activations& out, Layout layout,
                     cudaStream_t stream) {
  if (task.x_dtype == BITLINEAR_F32) return launch<float>(task, out, layout, stream);
  if (task.x_dtype == BITLINEAR_F16) return launch<__half>(task, out, layout, stream);
  return launch<__nv_bfloat16>(task, out, layout, stream);
}

}  // namespace cuda
}  // namespace bitlinear
