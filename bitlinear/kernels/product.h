// The operands of linear and fused_linear, checked and in memory that kernels read, for the CPU and
// for CUDA. Only the two ops.cpp, which include torch, include this.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "arguments.h"
#include "float_environment.h"

namespace bitlinear {

// The floating-point vector in contiguous memory, in a dtype that the kernels read; an undefined
// tensor without one.
inline at::Tensor contiguous_floats(const std::optional<at::Tensor>& vector, const char* name) {
  return vector.has_value() ? kernel_operand(*vector, name) : at::Tensor();
}

inline float to_fp32(double value) { return static_cast<float>(value); }

// A weight of a product. Its outputs are columns begin .. end of y.
struct Weight {
  at::Tensor given;          // w_packed as the caller has it
  at::Tensor packed, scale;  // contiguous
  at::Tensor bias;           // contiguous; undefined without one
  int64_t begin, end;

  Weight(const at::Tensor& w_packed, const at::Tensor& w_scale,
         const std::optional<at::Tensor>& bias_or_none, int64_t first)
      : given(w_packed),
        packed(contiguous(w_packed, "w_packed")),
        scale(contiguous(w_scale, "w_scale")),
        bias(contiguous_floats(bias_or_none, "bias")),
        begin(first),
        end(first + w_packed.size(0)) {}

  const uint8_t* w() const { return static_cast<const uint8_t*>(packed.const_data_ptr()); }
  const float* s_w() const { return static_cast<const float*>(scale.const_data_ptr()); }
  int64_t s_w_stride() const { return scale.dim() == 2 ? scale.size(1) : 0; }
  const void* bias_data() const { return bias.defined() ? bias.const_data_ptr() : nullptr; }
  int bias_dtype() const {
    return bias.defined() ? kernel_dtype(bias.scalar_type()) : BITLINEAR_F32;
  }
};

// y = prologue(x) @ [w_0, w_1, ...]^T + residual. All weights read the input, quantised once; y has
// their outputs side by side.
struct Product {
  at::Tensor x;  // contiguous
  int64_t K;
  float eps;
  int64_t act_bits;
  int64_t group_bytes;  // packed bytes of a row that share a scale; 0: all of them
  at::ScalarType y_dtype;
  c10::SmallVector<Weight, BITLINEAR_MAX_WEIGHTS> weights = {};
  int activation = BITLINEAR_NO_GATE;
  at::Tensor norm_weight = {};  // contiguous; undefined: no norm
  float norm_eps = 0.0f;
  at::Tensor residual = {};  // contiguous; undefined: none

  int64_t out_features() const { return weights.back().end; }
  int64_t tokens() const { return x.numel() / x.sizes().back(); }
  c10::DimVector y_shape() const {
    c10::DimVector shape(x.sizes());
    shape.back() = out_features();
    return shape;
  }
  // It points to norm_weight.
  bitlinear_prologue prologue() const {
    if (!norm_weight.defined()) return {activation, nullptr, BITLINEAR_F32, norm_eps};
    return {activation, norm_weight.const_data_ptr(), kernel_dtype(norm_weight.scalar_type()),
            norm_eps};
  }
};

inline int64_t group_bytes(int64_t group_size) { return group_size > 0 ? group_size / 4 : 0; }

// The operators. kCompute: computes a product on a device.
template <at::Tensor (*kCompute)(const Product&)>
at::Tensor linear(const at::Tensor& x, const at::Tensor& w_packed, const at::Tensor& w_scale,
                  const std::optional<at::Tensor>& bias, int64_t in_features, double eps,
                  int64_t group_size, int64_t act_bits, std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType y_dtype = out_dtype.value_or(x.scalar_type());
  check_arguments(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, y_dtype);
  Product product = {contiguous(x, "x"),      in_features, static_cast<float>(eps), act_bits,
                     group_bytes(group_size), y_dtype};
  product.weights.emplace_back(w_packed, w_scale, bias, 0);
  return kCompute(product);
}

template <at::Tensor (*kCompute)(const Product&)>
at::Tensor fused_linear(const at::Tensor& x, at::TensorList w_packed, at::TensorList w_scale,
                        const c10::List<std::optional<at::Tensor>>& bias, int64_t in_features,
                        double eps, int64_t group_size, int64_t act_bits,
                        std::optional<std::string_view> activation,
                        const std::optional<at::Tensor>& norm_weight, double norm_eps,
                        const std::optional<at::Tensor>& residual,
                        std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType y_dtype = out_dtype.value_or(x.scalar_type());
  const c10::SmallVector<std::optional<at::Tensor>, BITLINEAR_MAX_WEIGHTS> biases(bias.begin(),
                                                                                  bias.end());
  check_fused_arguments(x, w_packed, w_scale, biases, in_features, eps, group_size, act_bits,
                        activation, norm_weight, norm_eps, residual, y_dtype);
  Product product = {contiguous(x, "x"),      in_features, static_cast<float>(eps), act_bits,
                     group_bytes(group_size), y_dtype};
  int64_t begin = 0;
  for (size_t i = 0; i < w_packed.size(); ++i) {
    product.weights.emplace_back(w_packed[i], w_scale[i], biases[i], begin);
    begin = product.weights.back().end;
  }
  product.activation = activation_of(activation);
  product.norm_weight = contiguous_floats(norm_weight, "norm_weight");
  product.norm_eps = PreservingSubnormals<to_fp32>::run(norm_eps);
  if (residual.has_value()) product.residual = contiguous(*residual, "residual");
  return kCompute(product);
}

}  // namespace bitlinear
