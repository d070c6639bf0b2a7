// The row quantiser: one block per token; absmax, scale, rounding, plane order and sum.
//
// x is read once, as long as a thread can keep its part (up to 16384 values), and 1 byte per value
// written: bound by memory.
#include "launch.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kMaxThreads = 1024;

template <class X, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_rows(const X* x, int64_t K, float eps, bool aligned, Activations out) {
  __shared__ uint32_t warp_max[32];
  __shared__ int32_t warp_sum[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t m = blockIdx.x;
  const X* row = x + m * K;
  const int64_t first = threadIdx.x * kGroup;
  const int64_t step = int64_t{blockDim.x} * kGroup;
  const auto load = [&](int64_t k, Group<X>& group) {
    if (aligned && k + kGroup <= K) {
      group.load(row + k);
    } else {
      group.load(row + k, K - k);
    }
  };
  allow_successor();
  wait_for_predecessor();

  Group<X> held;
  load(first, held);
  uint32_t absmax = held.magnitude_bits();
  for (int64_t k = first + step; k < K; k += step) {
    Group<X> group;
    load(k, group);
    absmax = max(absmax, group.magnitude_bits());
  }
  absmax = warp_reduce_max(absmax);
  if (lane == 0) warp_max[warp] = absmax;
  __syncthreads();
  absmax = warp_reduce_max(lane < warps ? warp_max[lane] : 0);
  const TokenScale scale(absmax, eps);

  int32_t sum = 0;
  for (int64_t k = first; k < out.q_stride; k += step) {
    Group<X> group = held;
    if (k != first) load(k, group);
    float values[kGroup];
    group.convert(values);
    uint32_t planes[4];
    sum += quantize_group(values, scale.inv, planes);
    const int64_t slice = k / kSliceValues;
    const int word = static_cast<int>(k / kGroup % 16);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      *reinterpret_cast<uint32_t*>(out.q + place_of<kLayout>(out, m, slice, p, word)) = planes[p];
    }
  }
  sum = warp_reduce_add(sum);
  if (lane == 0) warp_sum[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += warp_sum[w];
    out.s_x[m] = scale.s_x;
    out.q_sum[m] = sum;
  }
}

template <class X, Layout kLayout>
cudaError_t launch(const Call& call, const Activations& out) {
  const bitlinear_cuda_task& task = call.task;
  const X* x = static_cast<const X*>(task.x);
  const bool aligned = rows_aligned(x, task.K * static_cast<int64_t>(sizeof(X)));
  // A thread keeps its first values between the passes; with more threads, it has no others.
  const int threads = task.K <= 4096 ? 256 : task.K <= 8192 ? 512 : kMaxThreads;
  const Launch how = {dim3(static_cast<unsigned>(task.M)), threads};
  return launch_kernel<quantize_rows<X, kLayout>>(how, call, x, task.K, task.eps, aligned, out);
}

template <class X>
cudaError_t launch(const Call& call, const Activations& out, Layout layout) {
  if (layout == Layout::kRows) return launch<X, Layout::kRows>(call, out);
  if (layout == Layout::kFragments) return launch<X, Layout::kFragments>(call, out);
  return launch<X, Layout::kTiles>(call, out);
}

}  // namespace

cudaError_t quantize(const Call& call, const Activations& out, Layout layout) {
  if (call.task.x_dtype == BITLINEAR_F32) return launch<float>(call, out, layout);
  if (call.task.x_dtype == BITLINEAR_F16) return launch<__half>(call, out, layout);
  return launch<__nv_bfloat16>(call, out, layout);
}

}  // namespace cuda
}  // namespace bitlinear
