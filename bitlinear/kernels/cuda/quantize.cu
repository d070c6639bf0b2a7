// Placeholder until there are kernels: one that copies, and the self-test of it.
#include <cuda_runtime_api.h>
#include <stdio.h>

#include "kernels.h"

namespace {

__global__ void copy(const float* x, float* y, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) y[i] = x[i];
}

}  // namespace

int bitlinear_cuda_copy(const float* x, float* y, int64_t size, void* stream) {
  const unsigned blocks = static_cast<unsigned>((size + 255) / 256);
  copy<<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(x, y, size);
  return cudaGetLastError();
}

int bitlinear_cuda_selftest(int device, char* message, int64_t message_size) {
  float* memory = nullptr;
  float y = 0;
  const float x = 1;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMalloc(&memory, 2 * sizeof(float));
  if (error == cudaSuccess) {
    error = cudaMemcpy(memory, &x, sizeof(float), cudaMemcpyHostToDevice);
  }
  if (error == cudaSuccess) {
    error = static_cast<cudaError_t>(bitlinear_cuda_copy(memory, memory + 1, 1, nullptr));
  }
  if (error == cudaSuccess) {
    error = cudaMemcpy(&y, memory + 1, sizeof(float), cudaMemcpyDeviceToHost);
  }
  cudaFree(memory);
  if (error != cudaSuccess) {
    snprintf(message, static_cast<size_t>(message_size), "%s", cudaGetErrorString(error));
    return 2;
  }
  if (y != x) {
    snprintf(message, static_cast<size_t>(message_size), "%g is not %g", y, x);
    return 1;
  }
  return 0;
}
