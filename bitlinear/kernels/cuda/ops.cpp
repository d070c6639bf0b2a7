// Placeholder for torch.ops.bitlinear.linear on CUDA: it refuses, so that nobody takes it for more.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "kernels.h"

namespace {

using at::Tensor;

Tensor linear(const Tensor& x, const Tensor& w_packed, const Tensor& w_scale,
              const std::optional<Tensor>& bias, int64_t in_features, double eps,
              int64_t group_size, int64_t act_bits, std::optional<at::ScalarType> out_dtype) {
  const int error = bitlinear_cuda_copy(nullptr, nullptr, 0, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK_NOT_IMPLEMENTED(false, "bitlinear: there is no CUDA kernel yet (", error, ")");
}

}  // namespace

TORCH_LIBRARY_IMPL(bitlinear, CUDA, m) { m.impl("linear", linear); }
