// Splits the scales of groups into multipliers and units, for the kernels that do not do so
// themselves. Bound: latency; it reads and writes a tenth of the bytes of the weights, or less. So
// it reads the scales while the quantiser runs; the second time they are in the L1 cache.
#include "groups.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// A warp splits a row.
__global__ void __launch_bounds__(kThreads)
    split_scales_kernel(const __grid_constant__ bitlinear_cuda_task task, int16_t* multipliers,
                        float* units) {
  const int64_t n = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, count = task.groups.count;
  allow_successor();
  if (n >= task.N) return;
  const bitlinear_cuda_weight& weight = weight_at(task, n);
  const float* const scales = weight.s_w + (n - weight.begin) * weight.s_w_stride;
  uint32_t largest = 0;
#pragma unroll 4
  for (int g = lane; g < count; g += 32) largest = max(largest, magnitude_bits(scales[g]));
  const ScaleUnit unit(warp_reduce_max(largest));
  wait_for_predecessor();
#pragma unroll 4
  for (int g = lane; g < count; g += 32) {
    multipliers[n * count + g] = static_cast<int16_t>(unit.multiplier(scales[g]));
  }
  if (lane == 0) units[n] = unit.value;
}

}  // namespace

cudaError_t split_scales(Call* call) {
  bitlinear_cuda_task& task = call->task;
  if (task.groups.size == 0) return cudaSuccess;
  const GroupScales scales = group_scales_of(task);
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(ceil_div<int64_t>(task.N, kThreads / 32))), kThreads};
  const cudaError_t error =
      launch_kernel<split_scales_kernel>(config, *call, task, scales.multipliers, scales.units);
  task.groups.multipliers = scales.multipliers;
  for (bitlinear_cuda_weight& weight : task.weights) {
    weight.s_w = scales.units + weight.begin;
    weight.s_w_stride = 1;
  }
  return error;
}

}  // namespace cuda
}  // namespace bitlinear
