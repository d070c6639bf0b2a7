// Checks of the operators' arguments, for the CPU and for CUDA, with the messages of arguments.py;
// and access to the memory of tensors. Only the two ops.cpp, which include torch, include this.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>

#include "abi.h"

namespace bitlinear {

// The dtype's number in the kernels' interface, or -1.
inline int kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::ScalarType::Float:
      return BITLINEAR_F32;
    case at::ScalarType::Half:
      return BITLINEAR_F16;
    case at::ScalarType::BFloat16:
      return BITLINEAR_BF16;
    default:
      return -1;
  }
}

// The dtype as Python spells it. torch's own messages have the C++ name.
inline const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::ScalarType::Double:
      return "float64";
    case at::ScalarType::Float:
      return "float32";
    case at::ScalarType::Half:
      return "float16";
    case at::ScalarType::BFloat16:
      return "bfloat16";
    case at::ScalarType::Long:
      return "int64";
    case at::ScalarType::Int:
      return "int32";
    case at::ScalarType::Short:
      return "int16";
    case at::ScalarType::Char:
      return "int8";
    case at::ScalarType::Byte:
      return "uint8";
    case at::ScalarType::Bool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

inline void check_device(const at::Tensor& x, const char* name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(
      other.device() == x.device(), "bitlinear: all tensors must be on one device, but x is on ",
      x.device(), " and ", name, " is on ", other.device(), ": move one of them with .to(device)");
}

inline void check_eps(double eps, int64_t act_bits = 8) {
  const double least = act_bits == 8 ? 2e-36 : 4e-34;
  const int largest = act_bits == 8 ? 127 : 32385;
  TORCH_CHECK_VALUE(eps >= least && eps <= 1e18, "bitlinear: eps must be between ", least,
                    " and 1e+18 (eps / ", largest, ", ", largest,
                    " / eps and eps * eps have to fit float32), but it is ", eps);
}

inline void check_group_size(int64_t group_size) {
  const bool is_group =
      group_size > 0 && group_size <= BITLINEAR_MAX_K && group_size % BITLINEAR_GROUP_UNIT == 0;
  TORCH_CHECK_VALUE(is_group || group_size == 0 || group_size == -1,
                    "bitlinear: group_size must be 0 (one scale per tensor), -1 (one per output "
                    "feature) or a positive multiple of ",
                    BITLINEAR_GROUP_UNIT, " up to ", BITLINEAR_MAX_K, ", but it is ", group_size);
}

// The scales of a row, if it has several.
inline int64_t scales_of_row(int64_t in_features, int64_t group_size) {
  return group_size > 0 ? (in_features + group_size - 1) / group_size : 1;
}

// Whether a tensor has the shape of the scales of so many rows: one for all, or some for each.
inline bool has_scale_shape(const at::Tensor& w_scale, int64_t rows, int64_t in_features,
                            int64_t group_size) {
  return (group_size <= 0 && w_scale.dim() == 1 && w_scale.size(0) == 1) ||
         (w_scale.dim() == 2 && w_scale.size(0) == rows &&
          w_scale.size(1) == scales_of_row(in_features, group_size));
}

inline std::string scale_shapes(int64_t rows, int64_t in_features, int64_t group_size) {
  return (group_size > 0 ? "(" : "(1,) or (") + std::to_string(rows) + ", " +
         std::to_string(scales_of_row(in_features, group_size)) + ")";
}

inline void check_act_bits(int64_t act_bits) {
  TORCH_CHECK_VALUE(act_bits == 8 || act_bits == 16,
                    "bitlinear: act_bits must be 8 or 16, but it is ", act_bits);
}

inline void check_dtype(const at::Tensor& x) {
  TORCH_CHECK_TYPE(
      kernel_dtype(x.scalar_type()) >= 0,
      "bitlinear: x must be float32, float16 or bfloat16, but it is ", dtype_name(x.scalar_type()),
      ": convert it, for example with x.float()",
      x.scalar_type() == at::kDouble ? ", and a model that makes it with model.float()" : "");
}

inline void check_in_features(int64_t in_features) {
  TORCH_CHECK_VALUE(in_features >= 1 && in_features <= BITLINEAR_MAX_K,
                    "bitlinear: in_features must be between 1 and ", BITLINEAR_MAX_K,
                    " (where int32 sums are exact), but it is ", in_features,
                    ": split the layer along in_features");
}

// Checks everything but the weights; `width` is the last dimension of x.
inline void check_product(const at::Tensor& x, int64_t in_features, int64_t width, double eps,
                          int64_t group_size, int64_t act_bits, at::ScalarType out_dtype) {
  check_group_size(group_size);
  check_act_bits(act_bits);
  check_in_features(in_features);
  check_eps(eps, act_bits);
  check_dtype(x);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == width,
                    "bitlinear: the last dimension of x must be ",
                    width == in_features ? "in_features = " : "2 * in_features = ", width,
                    ", but x has shape ", x.sizes());
  TORCH_CHECK_TYPE(kernel_dtype(out_dtype) >= 0,
                   "bitlinear: out_dtype must be float32, float16 or bfloat16, but it is ",
                   dtype_name(out_dtype), ": leave it out to get the dtype of x");
}

// Checks a floating-point vector of `size` values.
inline void check_vector(const at::Tensor& x, const char* name, const at::Tensor& vector,
                         int64_t size, const char* of) {
  TORCH_CHECK_TYPE(at::isFloatingType(vector.scalar_type()), "bitlinear: ", name,
                   " must be floating point, but it is ", dtype_name(vector.scalar_type()),
                   ": convert it with ", name, ".float()");
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == size, "bitlinear: ", name,
                    " must have shape (", size, ",), one value for each of the ", of,
                    ", but it has shape ", vector.sizes());
  check_device(x, name, vector);
}

// Checks one weight, with its scale and its bias.
inline void check_operand(const at::Tensor& x, const at::Tensor& w_packed,
                          const at::Tensor& w_scale, const std::optional<at::Tensor>& bias,
                          int64_t in_features, int64_t group_size) {
  TORCH_CHECK_TYPE(w_packed.scalar_type() == at::ScalarType::Byte,
                   "bitlinear: w_packed must be uint8, but it is ",
                   dtype_name(w_packed.scalar_type()),
                   ": pack ternary weights with bitlinear.packing.pack_ternary");
  TORCH_CHECK_TYPE(w_scale.scalar_type() == at::ScalarType::Float,
                   "bitlinear: w_scale must be float32, but it is ",
                   dtype_name(w_scale.scalar_type()), ": convert it with w_scale.float()");
  const int64_t columns = (in_features + 3) / 4;
  TORCH_CHECK_VALUE(w_packed.dim() == 2 && w_packed.size(1) == columns,
                    "bitlinear: w_packed must have shape (N, ", columns,
                    ") for in_features = ", in_features,
                    ", four weights to a byte, but it has shape ", w_packed.sizes());
  const int64_t out_features = w_packed.size(0);
  TORCH_CHECK_VALUE(has_scale_shape(w_scale, out_features, in_features, group_size),
                    "bitlinear: w_scale must have shape ",
                    scale_shapes(out_features, in_features, group_size),
                    " for group_size = ", group_size, ", but it has shape ", w_scale.sizes(),
                    ": pass the group_size of the layer that it comes from");
  check_device(x, "w_packed", w_packed);
  check_device(x, "w_scale", w_scale);
  if (bias.has_value()) check_vector(x, "bias", *bias, out_features, "rows of w_packed");
}

// The same conditions and messages as check_linear in arguments.py.
inline void check_arguments(const at::Tensor& x, const at::Tensor& w_packed,
                            const at::Tensor& w_scale, const std::optional<at::Tensor>& bias,
                            int64_t in_features, double eps, int64_t group_size, int64_t act_bits,
                            at::ScalarType out_dtype) {
  check_product(x, in_features, in_features, eps, group_size, act_bits, out_dtype);
  check_operand(x, w_packed, w_scale, bias, in_features, group_size);
}

// The activation's number in the kernels' interface.
inline int activation_of(const std::optional<std::string_view>& name) {
  if (!name.has_value()) return BITLINEAR_NO_GATE;
  TORCH_CHECK_VALUE(*name == "silu" || *name == "relu2",
                    "bitlinear: activation must be None or one of silu, relu2, but it is ", *name);
  return *name == "silu" ? BITLINEAR_SILU : BITLINEAR_RELU2;
}

// The same conditions and messages as check_fused_linear in arguments.py.
inline void check_fused_arguments(const at::Tensor& x, at::TensorList w_packed,
                                  at::TensorList w_scale,
                                  at::ArrayRef<std::optional<at::Tensor>> bias, int64_t in_features,
                                  double eps, int64_t group_size, int64_t act_bits,
                                  const std::optional<std::string_view>& activation,
                                  const std::optional<at::Tensor>& norm_weight, double norm_eps,
                                  const std::optional<at::Tensor>& residual,
                                  at::ScalarType out_dtype) {
  const int64_t width =
      activation_of(activation) == BITLINEAR_NO_GATE ? in_features : 2 * in_features;
  check_product(x, in_features, width, eps, group_size, act_bits, out_dtype);
  const size_t count = w_packed.size();
  TORCH_CHECK_VALUE(count >= 1 && count <= BITLINEAR_MAX_WEIGHTS && w_scale.size() == count &&
                        bias.size() == count,
                    "bitlinear: w_packed, w_scale and bias must be lists of one length, from 1 to ",
                    BITLINEAR_MAX_WEIGHTS, ", but they have ", count, ", ", w_scale.size(), " and ",
                    bias.size(), " elements");
  int64_t out_features = 0;
  for (size_t i = 0; i < count; ++i) {
    check_operand(x, w_packed[i], w_scale[i], bias[i], in_features, group_size);
    out_features += w_packed[i].size(0);
  }
  if (norm_weight.has_value()) {
    check_vector(x, "norm_weight", *norm_weight, in_features, "in_features");
    TORCH_CHECK_VALUE(norm_eps >= 0 && norm_eps <= 1e18,
                      "bitlinear: norm_eps must be between 0 and 1e+18, but it is ", norm_eps);
  }
  if (residual.has_value()) {
    TORCH_CHECK_TYPE(kernel_dtype(residual->scalar_type()) >= 0,
                     "bitlinear: residual must be float32, float16 or bfloat16, but it is ",
                     dtype_name(residual->scalar_type()),
                     ": convert it, for example with residual.float()");
    c10::DimVector shape(x.sizes());
    shape.back() = out_features;
    TORCH_CHECK_VALUE(residual->sizes() == shape,
                      "bitlinear: residual must have the shape of the output, ",
                      at::IntArrayRef(shape), ", but it has shape ", residual->sizes());
    check_device(x, "residual", *residual);
  }
}

inline void check_weight(const at::Tensor& weight, double eps, int64_t group_size) {
  check_eps(eps);
  check_group_size(group_size);
  TORCH_CHECK_VALUE(weight.dim() == 2 && at::isFloatingType(weight.scalar_type()),
                    "bitlinear: weight must be floating point, of shape (N, K), but it is ",
                    dtype_name(weight.scalar_type()), " of shape ", weight.sizes());
}

inline void check_output_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(kernel_dtype(dtype) >= 0,
                   "bitlinear: dtype must be float32, float16 or bfloat16, but it is ",
                   dtype_name(dtype));
}

inline void check_packed(const at::Tensor& w_packed, int64_t in_features,
                         const std::optional<at::Tensor>& w_scale, at::ScalarType dtype,
                         int64_t group_size) {
  check_group_size(group_size);
  const int64_t columns = (in_features + 3) / 4;
  TORCH_CHECK_VALUE(w_packed.scalar_type() == at::ScalarType::Byte && w_packed.dim() == 2 &&
                        w_packed.size(1) == columns,
                    "bitlinear: w_packed must be uint8, of shape (N, ", columns,
                    ") for in_features = ", in_features, ", but it is ",
                    dtype_name(w_packed.scalar_type()), " of shape ", w_packed.sizes());
  if (w_scale.has_value()) {
    TORCH_CHECK_VALUE(w_scale->scalar_type() == at::ScalarType::Float &&
                          has_scale_shape(*w_scale, w_packed.size(0), in_features, group_size) &&
                          w_scale->device() == w_packed.device(),
                      "bitlinear: w_scale must be float32, of shape ",
                      scale_shapes(w_packed.size(0), in_features, group_size), ", on ",
                      w_packed.device(), ", but it is ", dtype_name(w_scale->scalar_type()),
                      " of shape ", w_scale->sizes(), " on ", w_scale->device());
  }
  check_output_dtype(dtype);
}

inline void check_quantized(const at::Tensor& q, const at::Tensor& s_x, at::ScalarType dtype) {
  const bool matches = q.dim() > 0 && s_x.dim() == q.dim() && s_x.size(-1) == 1 &&
                       s_x.sizes().slice(0, q.dim() - 1) == q.sizes().slice(0, q.dim() - 1) &&
                       s_x.device() == q.device();
  TORCH_CHECK_VALUE(
      matches &&
          (q.scalar_type() == at::ScalarType::Char || q.scalar_type() == at::ScalarType::Short) &&
          s_x.scalar_type() == at::ScalarType::Float,
      "bitlinear: q must be int8 or int16, of shape (..., K), and s_x float32, of shape (..., 1) "
      "on the same device, but they are ",
      dtype_name(q.scalar_type()), " of shape ", q.sizes(), " on ", q.device(), " and ",
      dtype_name(s_x.scalar_type()), " of shape ", s_x.sizes(), " on ", s_x.device());
  check_output_dtype(dtype);
}

// The same conditions and messages as _check in quantized_linear.py.
inline void check_quantized_linear(const at::Tensor& q, const at::Tensor& s_x,
                                   const at::Tensor& q_sum, const at::Tensor& w_packed,
                                   const at::Tensor& w_scale, const std::optional<at::Tensor>& bias,
                                   at::ScalarType dtype, int64_t group_size) {
  check_quantized(q, s_x, dtype);
  TORCH_CHECK_TYPE(q.scalar_type() == at::ScalarType::Char, "bitlinear: q must be int8, but it is ",
                   dtype_name(q.scalar_type()), ": quantise with act_bits = 8");
  TORCH_CHECK_VALUE(q_sum.scalar_type() == at::ScalarType::Int && q_sum.sizes() == s_x.sizes(),
                    "bitlinear: q_sum must be int32, of shape ", s_x.sizes(), ", but it is ",
                    dtype_name(q_sum.scalar_type()), " of shape ", q_sum.sizes());
  check_device(q, "q_sum", q_sum);
  check_in_features(q.size(-1));
  check_group_size(group_size);
  check_operand(q, w_packed, w_scale, bias, q.size(-1), group_size);
}

// The same conditions and messages as reference_int8_product in head_products.py.
inline void check_int8_product(const at::Tensor& q, const at::Tensor& s_x, const at::Tensor& w,
                               const at::Tensor& w_scale, at::ScalarType dtype) {
  check_quantized(q, s_x, dtype);
  TORCH_CHECK_TYPE(q.scalar_type() == at::ScalarType::Short,
                   "bitlinear: q must be int16, but it is ", dtype_name(q.scalar_type()),
                   ": quantise with act_bits = 16");
  TORCH_CHECK_VALUE(w.scalar_type() == at::ScalarType::Char && w.dim() == 2 &&
                        w.size(1) == q.size(-1) && w.device() == q.device(),
                    "bitlinear: w must be int8, of shape (N, ", q.size(-1), "), on ", q.device(),
                    ", but it is ", dtype_name(w.scalar_type()), " of shape ", w.sizes(), " on ",
                    w.device());
  TORCH_CHECK_VALUE(w_scale.scalar_type() == at::ScalarType::Float && w_scale.dim() == 2 &&
                        w_scale.size(0) == w.size(0) && w_scale.size(1) == 1 &&
                        w_scale.device() == q.device(),
                    "bitlinear: w_scale must be float32, of shape (", w.size(0), ", 1), on ",
                    q.device(), ", but it is ", dtype_name(w_scale.scalar_type()), " of shape ",
                    w_scale.sizes(), " on ", w_scale.device());
}

// The same conditions and messages as reference_bf16_product in head_products.py.
inline void check_bf16_product(const at::Tensor& x, const at::Tensor& w) {
  TORCH_CHECK_VALUE(
      x.scalar_type() == at::ScalarType::BFloat16 && w.scalar_type() == at::ScalarType::BFloat16 &&
          w.dim() == 2 && x.dim() > 0 && x.size(-1) == w.size(1) && x.device() == w.device(),
      "bitlinear: x must be bfloat16, of shape (..., K), and w bfloat16, of shape (N, K) on the "
      "same device, but they are ",
      dtype_name(x.scalar_type()), " of shape ", x.sizes(), " on ", x.device(), " and ",
      dtype_name(w.scalar_type()), " of shape ", w.sizes(), " on ", w.device());
}

inline void check_like(const at::Tensor& query, const char* name, const at::Tensor& tensor,
                       at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == dtype && tensor.sizes() == shape && tensor.device() == query.device(),
      "bitlinear: ", name, " must be ", dtype_name(dtype), ", of shape ", shape, ", on ",
      query.device(), ", but it is ", dtype_name(tensor.scalar_type()), " of shape ",
      tensor.sizes(), " on ", tensor.device());
}

// The same conditions and messages as reference_attend in attend.py.
inline void check_attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                         const std::optional<at::Tensor>& mask,
                         const std::optional<at::Tensor>& position,
                         const std::optional<at::Tensor>& new_key,
                         const std::optional<at::Tensor>& new_value,
                         const std::optional<at::Tensor>& cos,
                         const std::optional<at::Tensor>& sin) {
  const at::ScalarType dtype = query.scalar_type();
  TORCH_CHECK_VALUE(kernel_dtype(dtype) >= 0 && query.dim() == 4 && query.size(2) == 1,
                    "bitlinear: query must be float32, float16 or bfloat16, of shape (batch, "
                    "heads, 1, size), but it is ",
                    dtype_name(dtype), " of shape ", query.sizes());
  const int64_t batch = query.size(0), heads = query.size(1), size = query.size(3);
  TORCH_CHECK_VALUE(keys.dim() == 4 && keys.size(1) > 0 && heads % keys.size(1) == 0,
                    "bitlinear: keys must have shape (", batch, ", key heads, length, ", size,
                    "), ", heads, " heads a multiple of the key heads, but they have shape ",
                    keys.sizes());
  const int64_t groups = keys.size(1), length = keys.size(2);
  check_like(query, "keys", keys, dtype, {batch, groups, length, size});
  check_like(query, "values", values, dtype, {batch, groups, length, size});
  const auto batch_of = [=](const at::Tensor& tensor) {
    return tensor.dim() > 0 && tensor.size(0) == 1 ? int64_t{1} : batch;
  };
  if (mask.has_value()) {
    const bool is_bool = mask->scalar_type() == at::ScalarType::Bool;
    check_like(query, "mask", *mask, is_bool ? at::ScalarType::Bool : dtype,
               {batch_of(*mask), 1, 1, length});
  }
  if (position.has_value()) check_like(query, "position", *position, at::ScalarType::Long, {1});
  const int given = new_key.has_value() + new_value.has_value() + cos.has_value() + sin.has_value();
  TORCH_CHECK_VALUE((given == 4 && length > 0) || (given == 0 && !position.has_value()),
                    "bitlinear: new_key, new_value, cos and sin come together, and a position with "
                    "them, for at least one key, but ",
                    given, " of them are given for ", length, " keys");
  if (given == 0) return;
  check_like(query, "new_key", *new_key, dtype, {batch, groups, 1, size});
  check_like(query, "new_value", *new_value, dtype, {batch, groups, 1, size});
  check_like(query, "cos", *cos, dtype, {batch_of(*cos), 1, size});
  check_like(query, "sin", *sin, dtype, {batch_of(*cos), 1, size});
}

inline void check_tokens(const at::Tensor& x, double eps, int64_t act_bits) {
  check_act_bits(act_bits);
  check_eps(eps, act_bits);
  check_dtype(x);
  TORCH_CHECK_VALUE(x.dim() > 0, "bitlinear: x must have shape (..., K), but it has no dimension");
}

// The type of quantised activations.
inline at::ScalarType integer_type(int64_t act_bits) {
  return act_bits == 8 ? at::ScalarType::Char : at::ScalarType::Short;
}

// The shape of the scale of a weight.
inline c10::SmallVector<int64_t, 2> scale_shape(const at::Tensor& weight, int64_t group_size) {
  if (group_size == 0) return {1};
  return {weight.size(0), scales_of_row(weight.size(1), group_size)};
}

// The memory of a tensor. Raises ValueError if a framework that shards parameters has freed it.
inline const char* checked_data(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.unsafeGetTensorImpl()->storage_initialized(), "bitlinear: ", name,
                    " has ", tensor.numel(),
                    " elements, but its storage was freed: restore it before the forward pass");
  return static_cast<const char*>(tensor.const_data_ptr());
}

// The tensor in contiguous memory. Raises as checked_data() does: here, because a copy would read
// freed memory, and no thread of a parallel region may raise.
inline at::Tensor contiguous(const at::Tensor& tensor, const char* name) {
  checked_data(tensor, name);
  return tensor.contiguous();
}

// The same, in a dtype that the kernels read.
inline at::Tensor kernel_operand(const at::Tensor& tensor, const char* name) {
  const at::Tensor operand = contiguous(tensor, name);
  return kernel_dtype(operand.scalar_type()) < 0 ? operand.to(at::ScalarType::Float) : operand;
}

// Before keys and values are changed in place: raises RuntimeError if one value would be written
// twice, and tells autograd, as operators of torch do.
inline void prepare_write(const at::Tensor& keys, const at::Tensor& values) {
  at::assert_no_partial_overlap(keys, values);
  for (const at::Tensor* const written : {&keys, &values}) {
    at::assert_no_internal_overlap(*written);
    if (!written->is_inference()) written->unsafeGetTensorImpl()->bump_version();
  }
}

// The tensor, or a copy if it shares memory with keys or values, which change before it is read.
inline at::Tensor unshared(const at::Tensor& tensor, const at::Tensor& keys,
                           const at::Tensor& values) {
  return tensor.is_alias_of(keys) || tensor.is_alias_of(values) ? tensor.clone() : tensor;
}

}  // namespace bitlinear
