// The C interface: inspects the device, lays out the workspace, chooses the kernel, reports errors.
#include "launch.cuh"

#include <mutex>

namespace bitlinear {
namespace cuda {
namespace {

constexpr int64_t kWorkspaceAlignment = 256;

// The attributes of this kernel tell for which architecture of this library the driver has loaded
// code. Its shared memory is above 0 if that is sm_90a.
__global__ void probe(int* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ int mark;
  mark = *out;
  __syncthreads();
  *out = mark;
#endif
}

cudaError_t inspect_device(int index, Device* device) {
  const auto query = [&](cudaDeviceAttr attribute, int* value) {
    return cudaDeviceGetAttribute(value, attribute, index);
  };
  int major = 0, minor = 0;
  cudaFuncAttributes code = {};
  device->index = index;
  cudaError_t error = query(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = query(cudaDevAttrComputeCapabilityMinor, &minor);
  if (error == cudaSuccess) error = query(cudaDevAttrMultiProcessorCount, &device->multiprocessors);
  if (error == cudaSuccess) {
    error = query(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, probe);
  const int capability = 10 * major + minor;
  // Code for an older device that the driver has translated has no newer instructions.
  device->capability = code.ptxVersion < capability ? code.ptxVersion : capability;
  device->has_wgmma = code.sharedSizeBytes > 0;
  return error;
}

// The layout of the workspace. The size of each part is a multiple of the alignment.
struct Workspace {
  int64_t tokens, q_stride, s_x_offset, q_sum_offset, multipliers_offset, units_offset, bytes;
  bool has_groups;

  explicit Workspace(const bitlinear_cuda_task& task) {
    tokens = padded_tokens(task.M);
    q_stride = round_up(task.K, kSliceValues);
    bytes = 0;
    add(tokens * q_stride);
    s_x_offset = add(tokens * int64_t{sizeof(float)});
    q_sum_offset = add(tokens * int64_t{sizeof(int32_t)});
    has_groups = task.groups.size > 0;
    const int64_t rows = has_groups ? task.N : 0;
    multipliers_offset = add(rows * task.groups.count * int64_t{sizeof(int16_t)});
    units_offset = add(rows * int64_t{sizeof(float)});
  }
  // The offset of a new part.
  int64_t add(int64_t part_bytes) {
    const int64_t offset = bytes;
    bytes += round_up(part_bytes, kWorkspaceAlignment);
    return offset;
  }

  Activations activations(void* memory) const {
    char* const base = static_cast<char*>(memory);
    return {reinterpret_cast<int8_t*>(base),
            q_stride,
            tokens / 8,
            reinterpret_cast<float*>(base + s_x_offset),
            reinterpret_cast<int32_t*>(base + q_sum_offset),
            has_groups};
  }
};

// Whether the copy engine can read the tokens as they are: each at a multiple of 16 bytes.
bool reads_in_order(const bitlinear_cuda_task& task, const bitlinear_cuda_tokens* tokens) {
  return tokens != nullptr && task.groups.size == 0 && rows_aligned(tokens->q, task.K);
}

Shape shape_of(const bitlinear_cuda_task& task, const bitlinear_cuda_tokens* tokens) {
  return {task.M,
          task.N,
          task.K,
          tokens_aligned(task),
          weights_aligned(task),
          task.weight_count,
          !bitlinear_is_plain(&task.prologue),
          bitlinear_rows_per_token(task.act_bits),
          tokens != nullptr,
          reads_in_order(task, tokens),
          task.groups.size,
          wgmma_many_serves(task),
          wgmma_short_serves(task) && tokens == nullptr};
}

// The requested kernel, or the best one; BITLINEAR_CUDA_AUTO if no kernel can run.
int kernel_for(const bitlinear_cuda_task& task, const bitlinear_cuda_tokens* tokens, int kernel,
               const Device& device) {
  const Shape shape = shape_of(task, tokens);
  if (kernel == BITLINEAR_CUDA_AUTO) return choose_kernel(device, shape);
  return supports(kernel, device, shape) ? kernel : BITLINEAR_CUDA_AUTO;
}

cudaError_t run_wgmma(const Call& call, const Shape& shape, const Activations& q) {
  const auto runs_clusters = [&](const WgmmaPlan& plan) { return wgmma_runs_clusters(call, plan); };
  return wgmma(call, q, plan_wgmma(call.device, shape, runs_clusters));
}

// The product of tokens that stay in order, by weights that are reordered.
cudaError_t run_in_order(Call call, const bitlinear_cuda_tokens& tokens) {
  bitlinear_cuda_task& task = call.task;
  const Activations q = {
      const_cast<int8_t*>(tokens.q),      task.K, 0, const_cast<float*>(tokens.s_x),
      const_cast<int32_t*>(tokens.q_sum), false};
  auto* const reordered = static_cast<uint8_t*>(task.workspace);
  task.w_prefetchable = 1;  // this kernel waits before it reads weights
  const cudaError_t error = reorder(call, reordered);
  if (error != cudaSuccess) return error;
  task.w_prefetchable = 0;
  task.weights[0].w = reordered;
  task.K = round_up(task.K, kSliceValues);
  return run_wgmma(call, shape_of(task, &tokens), q);
}

cudaError_t run(int kernel, Call call, const bitlinear_cuda_tokens* tokens) {
  if (kernel == BITLINEAR_CUDA_WGMMA && reads_in_order(call.task, tokens)) {
    return run_in_order(call, *tokens);
  }
  const Shape shape = shape_of(call.task, tokens);
  if (kernel == BITLINEAR_CUDA_GEMV) return gemv(call, plan_gemv(call.device, shape));
  if (kernel == BITLINEAR_CUDA_SMALL_LAYER) {
    return small_layer(call, plan_small_layer(call.device, shape));
  }
  const Activations q = activations_of(call.task);
  const Layout layout = layout_for(kernel);
  cudaError_t error =
      tokens == nullptr ? quantize(call, q, layout) : arrange(call, *tokens, q, layout);
  call.task.w_prefetchable = 1;  // the weights were written before the quantiser started
  if (error == cudaSuccess && reads_split_scales(kernel)) error = split_scales(&call);
  if (error != cudaSuccess) return error;
  switch (kernel) {
    case BITLINEAR_CUDA_SMALL_BATCH:
      return small_batch(call, q, plan_small_batch(call.device, shape));
    case BITLINEAR_CUDA_WGMMA:
      return run_wgmma(call, shape, q);
    case BITLINEAR_CUDA_MMA:
      return mma(call, q);
    default:
      return dp4a(call, q);
  }
}

}  // namespace

Layout layout_for(int kernel) {
  if (kernel == BITLINEAR_CUDA_SMALL_BATCH) return Layout::kFragments;
  return kernel == BITLINEAR_CUDA_WGMMA ? Layout::kTiles : Layout::kRows;
}

Activations activations_of(const bitlinear_cuda_task& task) {
  return Workspace(task).activations(task.workspace);
}

GroupScales group_scales_of(const bitlinear_cuda_task& task) {
  const Workspace workspace(task);
  char* const base = static_cast<char*>(task.workspace);
  return {reinterpret_cast<int16_t*>(base + workspace.multipliers_offset),
          reinterpret_cast<float*>(base + workspace.units_offset)};
}

cudaError_t current_device(Device* device) {
  // Each device is inspected once. Failures are not cached: they can be temporary.
  static std::mutex mutex;
  static Device cache[kCachedDevices];
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index >= kCachedDevices) return inspect_device(index, device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (cache[index].capability == 0) {
    Device found;
    error = inspect_device(index, &found);
    if (error != cudaSuccess) return error;
    cache[index] = found;
  }
  *device = cache[index];
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace bitlinear

BITLINEAR_EXPORT int64_t bitlinear_cuda_workspace_bytes(const bitlinear_cuda_task* task,
                                                        const bitlinear_cuda_tokens* tokens,
                                                        int kernel) {
  using namespace bitlinear::cuda;
  Device device;
  // bitlinear_cuda_linear() meets the same error and reports it.
  if (current_device(&device) != cudaSuccess) return 0;
  const int chosen = kernel_for(*task, tokens, kernel, device);
  if (fuses_quantizer(chosen)) return 0;
  if (chosen == BITLINEAR_CUDA_WGMMA && reads_in_order(*task, tokens)) {
    return reordered_bytes(task->N, task->K);
  }
  return Workspace(*task).bytes;
}

BITLINEAR_EXPORT const char* bitlinear_cuda_linear(const bitlinear_cuda_task* task,
                                                   const bitlinear_cuda_tokens* tokens, int kernel,
                                                   void* stream) {
  using namespace bitlinear::cuda;
  if (task->M == 0 || task->N == 0) return nullptr;
  if (task->M > INT32_MAX || task->N > INT32_MAX) return "M and N must be less than 2^31";
  if (task->K < 1 || task->K > BITLINEAR_MAX_K) return "K must be between 1 and 500000";
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return report(error);
  const int chosen = kernel_for(*task, tokens, kernel, device);
  if (chosen == BITLINEAR_CUDA_AUTO) {
    return kernel == BITLINEAR_CUDA_AUTO
               ? "no kernel was compiled for this GPU"
               : "the kernel asked for does not serve this shape, alignment or GPU";
  }
  return report(run(chosen, {*task, device, static_cast<cudaStream_t>(stream)}, tokens));
}
