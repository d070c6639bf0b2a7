// Host side: how kernels are launched, and the launchers of each kernel file.
#pragma once

#include <utility>

#include "common.cuh"
#include "heuristics.h"

namespace bitlinear {
namespace cuda {

// The current device, and the code in this library that it runs.
cudaError_t current_device(Device* device);

struct Launch {
  dim3 grid;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;  // neighbouring blocks that share their memory
};

// Launches a kernel which, where w_settled and the device allow it, starts before its predecessor
// in the stream has ended: before wait_for_predecessor() it may touch nothing but w.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& how,
                          const bitlinear_cuda_task& task, cudaStream_t stream,
                          Arguments&&... arguments) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  // Older devices know neither attribute.
  if (task.w_settled && device.capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Whether every row starts at a multiple of 16 bytes.
inline bool rows_aligned(const void* rows, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && row_bytes % 16 == 0;
}

// The parts of the workspace of a call.
Activations activations_of(const bitlinear_cuda_task& task);

cudaError_t quantize(const bitlinear_cuda_task& task, const Activations& out, Layout layout,
                     cudaStream_t stream);

// The products. `q` is what quantize() has written: in kTiles for wgmma, else in kRows.
cudaError_t dp4a(const bitlinear_cuda_task& task, const Activations& q, cudaStream_t stream);
cudaError_t gemv(const bitlinear_cuda_task& task, const Activations& q, const GemvPlan& plan,
                 cudaStream_t stream);
cudaError_t mma(const bitlinear_cuda_task& task, const Activations& q, cudaStream_t stream);
cudaError_t wgmma(const bitlinear_cuda_task& task, const Activations& q, const WgmmaPlan& plan,
                  cudaStream_t stream);

}  // namespace cuda
}  // namespace bitlinear
