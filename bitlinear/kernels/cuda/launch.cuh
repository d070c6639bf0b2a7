// Host side: launches kernels, and declares the entry point of each kernel file.
#pragma once

#include <atomic>
#include <utility>

#include "common.cuh"
#include "heuristics.h"

namespace bitlinear {
namespace cuda {

// Properties of this many devices are cached.
constexpr int kCachedDevices = 128;

// The current device, and the code in this library that it runs.
cudaError_t current_device(Device* device);

// The arguments of a call of the C interface. The device is the current one.
struct Call {
  bitlinear_cuda_task task;
  const Device& device;
  cudaStream_t stream;
};

struct LaunchConfig {
  dim3 grid;
  dim3 threads;
  int shared_bytes = 0;
  int cluster = 1;  // blocks of a cluster, which read each other's shared memory
  // More shared memory and less L1 for its multiprocessors, so that other blocks find some, too.
  bool prefers_shared = false;
};

// Raises the kernel's limit of dynamic shared memory, and sets what it prefers, if the launch needs
// any.
template <auto kKernel>
cudaError_t allow_shared_bytes(const LaunchConfig& config, const Device& device) {
  if (config.shared_bytes == 0) return cudaSuccess;
  // The limit belongs to the kernel, not to this call. It never shrinks, because other threads
  // launch the kernel too.
  static std::atomic<int> allowed[kCachedDevices];
  const int index = device.index;
  if (index < kCachedDevices && allowed[index].load() >= config.shared_bytes) return cudaSuccess;
  cudaFuncAttributes declared;
  cudaError_t error = cudaFuncGetAttributes(&declared, kKernel);
  if (error != cudaSuccess) return error;
  const int available = device.shared_bytes - static_cast<int>(declared.sharedSizeBytes);
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, available);
  if (error == cudaSuccess && config.prefers_shared) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && index < kCachedDevices) allowed[index].store(available);
  return error;
}

// The configuration for CUDA. It refers to `attributes`, which must outlive it.
inline cudaLaunchConfig_t cuda_config(const LaunchConfig& config, cudaStream_t stream,
                                      cudaLaunchAttribute* attributes, unsigned count) {
  cudaLaunchConfig_t cuda = {};
  cuda.gridDim = config.grid;
  cuda.blockDim = config.threads;
  cuda.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  cuda.stream = stream;
  cuda.attrs = attributes;
  cuda.numAttrs = count;
  return cuda;
}

inline cudaLaunchAttribute cluster_attribute(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return attribute;
}

// Whether the device has room for a cluster of this launch at all. An error counts as no.
template <auto kKernel>
bool has_room_for_cluster(const LaunchConfig& config, const Device& device) {
  cudaLaunchAttribute attribute = cluster_attribute(config.cluster);
  const cudaLaunchConfig_t cuda = cuda_config(config, nullptr, &attribute, 1);
  int clusters = 0;
  cudaError_t error = allow_shared_bytes<kKernel>(config, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kKernel, &cuda);
  if (error != cudaSuccess) cudaGetLastError();  // clears the error: no caller reports it
  return error == cudaSuccess && clusters > 0;
}

// Launches a kernel. If w_prefetchable is set and the device supports it, the kernel starts before
// its predecessor in the stream has ended: before wait_for_predecessor() it may read no memory but
// that which w_prefetchable is about.
template <auto kKernel, class... Arguments>
cudaError_t launch_kernel(const LaunchConfig& config, const Call& call, Arguments&&... arguments) {
  const cudaError_t error = allow_shared_bytes<kKernel>(config, call.device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  // Older devices know neither attribute.
  if (call.task.w_prefetchable && call.device.capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) attributes[count++] = cluster_attribute(config.cluster);
  const cudaLaunchConfig_t cuda = cuda_config(config, call.stream, attributes, count);
  return cudaLaunchKernelEx(&cuda, kKernel, std::forward<Arguments>(arguments)...);
}

// Calls `f` with a zero of the C++ type of the dtype.
template <class F>
cudaError_t dispatch_dtype(int dtype, F&& f) {
  if (dtype == BITLINEAR_F32) return f(float{});
  if (dtype == BITLINEAR_F16) return f(__half{});
  return f(__nv_bfloat16{});
}

// The message of an error, or null. Clears the error, so that the next call does not report it.
inline const char* report(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Whether every row starts at a multiple of 16 bytes.
inline bool rows_aligned(const void* rows, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && row_bytes % 16 == 0;
}

// Whether the rows of all weights start at multiples of 16 bytes.
inline bool weights_aligned(const bitlinear_cuda_task& task) {
  bool aligned = true;
  for (int64_t i = 0; i < task.weight_count; ++i) {
    aligned = aligned && rows_aligned(task.weights[i].w, ceil_div<int64_t>(task.K, 4));
  }
  return aligned;
}

// Whether the rows of x, and both halves of them with a gate, and the weight of a norm start at
// multiples of 16 bytes.
inline bool tokens_aligned(const bitlinear_cuda_task& task) {
  return rows_aligned(task.x, task.K * (task.x_dtype == BITLINEAR_F32 ? 4 : 2)) &&
         rows_aligned(task.prologue.norm_weight, 0);
}

// Whether a product is of one weight and of tokens of 8 bits, without a residual. Most are, and
// some kernels have code for them alone (kIsPlain): it is shorter, and code that runs once is slow.
inline bool is_plain_product(const bitlinear_cuda_task& task) {
  return task.weight_count == 1 && task.act_bits == 8 && task.residual == nullptr;
}

// The parts of the workspace of a call.
Activations activations_of(const bitlinear_cuda_task& task);
struct GroupScales {
  int16_t* multipliers;  // (N, groups), of all weights
  float* units;          // (N,)
};
GroupScales group_scales_of(const bitlinear_cuda_task& task);

cudaError_t quantize(const Call& call, const Activations& out, Layout layout);
// The same of tokens that are already quantised. The layout is not kInOrder.
cudaError_t arrange(const Call& call, const bitlinear_cuda_tokens& tokens, const Activations& out,
                    Layout layout);
// Writes the weights of the task, (N, reordered K), as wgmma() reads them beside activations in
// kInOrder.
cudaError_t reorder(const Call& call, uint8_t* reordered);
int64_t reordered_bytes(int64_t N, int64_t K);

// Splits scales of groups into multipliers and units, in the workspace behind the activations, and
// makes the task read these; without groups, does nothing. reads_split_scales() says which kernels
// need it.
cudaError_t split_scales(Call* call);

// The layout in which a kernel reads the output of quantize().
Layout layout_for(int kernel);
// The products. gemv() and small_layer() read x, the others the output of quantize(). Without
// groups, wgmma() also reads kInOrder if K is a multiple of 16, beside the output of reorder().
cudaError_t dp4a(const Call& call, const Activations& q);
cudaError_t gemv(const Call& call, const GemvPlan& plan);
cudaError_t gemv_groups(const Call& call, const GemvPlan& plan);
cudaError_t mma(const Call& call, const Activations& q);
cudaError_t mma_groups(const Call& call, const Activations& q);
cudaError_t small_batch(const Call& call, const Activations& q, const SmallBatchPlan& plan);
cudaError_t small_layer(const Call& call, const SmallLayerPlan& plan);
cudaError_t wgmma(const Call& call, const Activations& q, const WgmmaPlan& plan);
cudaError_t wgmma_general(const Call& call, const Activations& q, const WgmmaPlan& plan);
cudaError_t wgmma_short(const Call& call, const Activations& q, const WgmmaPlan& plan);
cudaError_t wgmma_many(const Call& call, const Activations& q, const WgmmaPlan& plan);
// Whether these two kernels serve such products; is_many_tile() and is_short say which plans.
bool wgmma_short_serves(const bitlinear_cuda_task& task);
bool wgmma_many_serves(const bitlinear_cuda_task& task);
cudaError_t wgmma_groups(const Call& call, const Activations& q, const WgmmaPlan& plan);
// Whether the device runs the clusters of this plan.
bool wgmma_runs_clusters(const Call& call, const WgmmaPlan& plan);
bool wgmma_groups_run_clusters(const Device& device, const WgmmaPlan& plan);

}  // namespace cuda
}  // namespace bitlinear
