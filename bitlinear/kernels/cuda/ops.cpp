// The operators on CUDA: arguments, memory and the stream. The arithmetic is behind task.h.
// ../cpu/ops.cpp registers the schemas.
//
// The headers are chosen for compile time.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "../arguments.h"
#include "../checked_weights.h"
#include "../product.h"
#include "../weight_facts.h"
#include "task.h"

namespace {

using at::ScalarType;
using at::Tensor;
using bitlinear::checked_data;
using bitlinear::kernel_dtype;

std::atomic<int> forced_kernel{BITLINEAR_CUDA_AUTO};

bool is_capturing(const c10::cuda::CUDAStream& stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The weights that calls have read, each with the stream of the last one; also scales of groups,
// which the GEMV reads as early. Where a fact holds, a kernel can read the weights while the
// previous work in the stream still runs.
//
// Invariant: the weights were written before an earlier call, which started after all work before
// it had ended; their version has not changed since. A write past torch's version counter (a
// foreign kernel, `.data`) breaks the invariant if a call follows it directly.
bitlinear::WeightFacts<c10::cuda::CUDAStream>& read_weights() {
  static auto* const weights = new bitlinear::WeightFacts<c10::cuda::CUDAStream>;
  return *weights;
}

// A captured graph runs after all calls that have read the weights.
bool is_prefetchable(const Tensor& w, int64_t K, const c10::cuda::CUDAStream& stream) {
  const std::optional<c10::cuda::CUDAStream> reader = read_weights().find(w, K);
  return reader && (*reader == stream || is_capturing(stream));
}

// Not at::empty: its way through the dispatcher costs as much as a launch.
Tensor empty(at::IntArrayRef shape, ScalarType dtype, const Tensor& like) {
  return Tensor(at::detail::empty_cuda(shape, dtype, like.device(), std::nullopt));
}

void* current_stream(const Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

// Raises ValueError if the weights hold an invalid code. Weights in checked_weights() are not read.
// The check waits for the GPU, which a capture forbids, so a capture skips it.
void check_codes(const Tensor& w_packed, const uint8_t* packed, int64_t K,
                 const c10::cuda::CUDAStream& stream) {
  if (bitlinear::checked_weights().find(w_packed, K) || is_capturing(stream)) return;
  const int64_t version = bitlinear::version_of(w_packed);
  const at::DataPtr workspace = c10::cuda::CUDACachingAllocator::get()->allocate(sizeof(int64_t));
  int64_t position = -1;
  uint8_t byte = 0;
  const char* const error =
      bitlinear_cuda_find_invalid_byte(packed, w_packed.size(0), K, &position, &byte,
                                       workspace.get(), static_cast<void*>(stream.stream()));
  TORCH_CHECK(error == nullptr, "bitlinear: the check of w_packed failed on ", w_packed.device(),
              ": ", error);
  const int64_t row_bytes = w_packed.size(1);
  if (position >= 0) {
    bitlinear::report_invalid_byte(byte, position / row_bytes, position % row_bytes, K);
  }
  bitlinear::checked_weights().add(w_packed, K, version, {});
}

void add_weight(bitlinear_cuda_task& task, const bitlinear::Weight& weight) {
  task.weights[task.weight_count++] = {weight.w(),         weight.s_w(),        weight.s_w_stride(),
                                       weight.bias_data(), weight.bias_dtype(), weight.begin,
                                       weight.end};
}

// Queues a task that lacks only its output. `tokens` is its input, or null if x is.
Tensor run(bitlinear_cuda_task& task, const bitlinear_cuda_tokens* tokens, Tensor y,
           const c10::cuda::CUDAStream& stream) {
  task.N = y.size(-1);
  for (int64_t i = task.weight_count; i < BITLINEAR_MAX_WEIGHTS; ++i) {
    task.weights[i].begin = task.weights[i].end = task.N;
  }
  task.y = y.data_ptr();
  task.y_dtype = kernel_dtype(y.scalar_type());
  const int kernel = forced_kernel.load(std::memory_order_relaxed);
  // The workspace belongs to the current stream. Memory that is freed at the end of this call is
  // reused only by work queued after the kernels, also in a captured graph.
  at::DataPtr workspace;
  if (const int64_t bytes = bitlinear_cuda_workspace_bytes(&task, tokens, kernel)) {
    workspace = c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes));
  }
  task.workspace = workspace.get();
  const char* const error =
      bitlinear_cuda_linear(&task, tokens, kernel, static_cast<void*>(stream.stream()));
  TORCH_CHECK(error == nullptr, "bitlinear: a product of (", y.numel() / task.N, ", ", task.K,
              ") by (", task.N, ", ", task.K, ") failed on ", y.device(), ": ", error);
  return y;
}

Tensor compute(const bitlinear::Product& product) {
  const c10::cuda::CUDAGuard guard(product.x.device());
  const int64_t K = product.K, tokens = product.tokens();
  const Tensor y = empty(product.y_shape(), product.y_dtype, product.x);
  if (y.numel() == 0) return y;

  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(product.x.device().index());
  bitlinear_cuda_task task = {};
  task.act_bits = product.act_bits;
  task.x = product.x.const_data_ptr();
  task.x_dtype = kernel_dtype(product.x.scalar_type());
  task.M = tokens * bitlinear_rows_per_token(product.act_bits);
  task.K = K;
  task.groups = bitlinear_cuda_make_groups(K, 4 * product.group_bytes);
  task.eps = product.eps;
  task.prologue = product.prologue();
  task.w_prefetchable = 1;
  // What no call has read yet, and its version.
  c10::SmallVector<std::pair<const Tensor*, int64_t>, 2 * BITLINEAR_MAX_WEIGHTS> unread;
  const auto read = [&](const Tensor& tensor) {
    if (is_prefetchable(tensor, K, stream)) return;
    unread.emplace_back(&tensor, bitlinear::version_of(tensor));
    task.w_prefetchable = 0;
  };
  for (const bitlinear::Weight& weight : product.weights) {
    check_codes(weight.given, weight.w(), K, stream);
    add_weight(task, weight);
    if (weight.packed.is_same(weight.given)) {
      read(weight.given);
    } else {
      task.w_prefetchable = 0;
    }
    if (product.group_bytes > 0) read(weight.scale);
  }
  if (product.residual.defined()) {
    task.residual = product.residual.const_data_ptr();
    task.residual_dtype = kernel_dtype(product.residual.scalar_type());
  }
  run(task, nullptr, y, stream);
  if (is_capturing(stream)) return y;  // captured work does not count: it may never run
  for (const auto& [tensor, version] : unread) read_weights().add(*tensor, K, version, stream);
  return y;
}

void check_launch(const char* error, const char* name, const Tensor& operand) {
  TORCH_CHECK(error == nullptr, "bitlinear: ", name, " of ", operand.sizes(), " failed on ",
              operand.device(), ": ", error);
}

// Scales of a row; 0: one scale per tensor.
int64_t scale_stride(const Tensor& scale) { return scale.dim() == 2 ? scale.size(1) : 0; }

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, double eps, int64_t group_size) {
  bitlinear::check_weight(weight, eps, group_size);
  const c10::cuda::CUDAGuard guard(weight.device());
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor input = bitlinear::kernel_operand(weight, "weight");
  Tensor packed = empty({N, (K + 3) / 4}, ScalarType::Byte, weight);
  Tensor scale = empty(bitlinear::scale_shape(weight, group_size), ScalarType::Float, weight);
  const auto bytes = static_cast<size_t>(bitlinear_cuda_weight_workspace_bytes(N, K));
  const at::DataPtr workspace = c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
  const char* const error = bitlinear_cuda_quantize_weight(
      checked_data(input, "weight"), kernel_dtype(input.scalar_type()), N, K,
      static_cast<float>(eps), packed.data_ptr<uint8_t>(), scale.data_ptr<float>(),
      scale_stride(scale), 4 * bitlinear::group_bytes(group_size), workspace.get(),
      current_stream(weight));
  check_launch(error, "quantize_weight", weight);
  if (!is_capturing(c10::cuda::getCurrentCUDAStream(weight.device().index()))) {
    bitlinear::checked_weights().add(packed, K, bitlinear::version_of(packed), {});
  }
  return {packed, scale};
}

Tensor expand_weight(const Tensor& w_packed, int64_t in_features,
                     const std::optional<Tensor>& w_scale, std::optional<ScalarType> dtype,
                     int64_t group_size) {
  const ScalarType w_dtype = dtype.value_or(ScalarType::Float);
  bitlinear::check_packed(w_packed, in_features, w_scale, w_dtype, group_size);
  const c10::cuda::CUDAGuard guard(w_packed.device());
  const Tensor input = bitlinear::contiguous(w_packed, "w_packed");
  Tensor weight = empty({w_packed.size(0), in_features}, w_dtype, w_packed);
  const Tensor scale = w_scale.has_value() ? bitlinear::contiguous(*w_scale, "w_scale") : Tensor();
  const char* const error = bitlinear_cuda_expand_weight(
      reinterpret_cast<const uint8_t*>(checked_data(input, "w_packed")), w_packed.size(0),
      in_features, scale.defined() ? scale.const_data_ptr<float>() : nullptr,
      scale.defined() ? scale_stride(scale) : 0, 4 * bitlinear::group_bytes(group_size),
      weight.data_ptr(), kernel_dtype(w_dtype), current_stream(w_packed));
  check_launch(error, "expand_weight", w_packed);
  return weight;
}

struct Quantized {
  Tensor q, s_x, q_sum;
};

// Also their sums, if they are wanted.
Quantized quantize(const Tensor& x, double eps, int64_t act_bits, bool sums) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t K = x.size(-1), M = K == 0 ? 0 : x.numel() / K;
  const Tensor input = bitlinear::contiguous(x, "x");
  c10::DimVector shape(x.sizes());
  Tensor q = empty(shape, bitlinear::integer_type(act_bits), x);
  shape.back() = 1;
  Tensor scale = empty(shape, ScalarType::Float, x);
  Tensor sum = sums ? empty(shape, ScalarType::Int, x) : Tensor();
  const char* const error = bitlinear_cuda_quantize_activations(
      checked_data(input, "x"), kernel_dtype(x.scalar_type()), M, K, static_cast<float>(eps),
      act_bits, q.data_ptr(), scale.data_ptr<float>(), sums ? sum.data_ptr<int32_t>() : nullptr,
      current_stream(x));
  check_launch(error, "quantize_activations", x);
  return {q, scale, sum};
}

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x, double eps, int64_t act_bits) {
  bitlinear::check_tokens(x, eps, act_bits);
  const Quantized tokens = quantize(x, eps, act_bits, false);
  return {tokens.q, tokens.s_x};
}

Tensor quantized_linear(const Tensor& q, const Tensor& s_x, const Tensor& q_sum,
                        const Tensor& w_packed, const Tensor& w_scale,
                        const std::optional<Tensor>& bias, ScalarType dtype, int64_t group_size) {
  bitlinear::check_quantized_linear(q, s_x, q_sum, w_packed, w_scale, bias, dtype, group_size);
  const c10::cuda::CUDAGuard guard(q.device());
  const int64_t K = q.size(-1);
  c10::DimVector shape(q.sizes());
  shape.back() = w_packed.size(0);
  const Tensor y = empty(shape, dtype, q);
  if (y.numel() == 0) return y;
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(q.device().index());
  const bitlinear::Weight weight(w_packed, w_scale, bias, 0);
  check_codes(weight.given, weight.w(), K, stream);
  const Tensor values = bitlinear::contiguous(q, "q"), scales = bitlinear::contiguous(s_x, "s_x"),
               sums = bitlinear::contiguous(q_sum, "q_sum");
  const bitlinear_cuda_tokens tokens = {values.const_data_ptr<int8_t>(),
                                        scales.const_data_ptr<float>(),
                                        sums.const_data_ptr<int32_t>()};
  bitlinear_cuda_task task = {};
  task.act_bits = 8;
  task.M = scales.numel();
  task.K = K;
  task.groups = bitlinear_cuda_make_groups(K, 4 * bitlinear::group_bytes(group_size));
  add_weight(task, weight);
  return run(task, &tokens, y, stream);
}

std::tuple<Tensor, Tensor, Tensor> linear_with_activations(const Tensor& x, const Tensor& w_packed,
                                                           const Tensor& w_scale,
                                                           const std::optional<Tensor>& bias,
                                                           double eps, ScalarType dtype,
                                                           int64_t group_size) {
  bitlinear::check_tokens(x, eps, 8);
  const Quantized tokens = quantize(x, eps, 8, true);
  const Tensor y = quantized_linear(tokens.q, tokens.s_x, tokens.q_sum, w_packed, w_scale, bias,
                                    dtype, group_size);
  return {y, tokens.q, tokens.s_x};
}

Tensor expand_activations(const Tensor& q, const Tensor& s_x, std::optional<ScalarType> dtype) {
  const ScalarType x_dtype = dtype.value_or(ScalarType::Float);
  bitlinear::check_quantized(q, s_x, x_dtype);
  const c10::cuda::CUDAGuard guard(q.device());
  const int64_t K = q.size(-1), M = K == 0 ? 0 : q.numel() / K;
  const Tensor tokens = bitlinear::contiguous(q, "q"), scales = bitlinear::contiguous(s_x, "s_x");
  Tensor x = empty(q.sizes(), x_dtype, q);
  const char* const error = bitlinear_cuda_expand_activations(
      checked_data(tokens, "q"), 8 * q.element_size(), scales.const_data_ptr<float>(), M, K,
      x.data_ptr(), kernel_dtype(x_dtype), current_stream(q));
  check_launch(error, "expand_activations", q);
  return x;
}

// Copies the strides of the first two dimensions. The last dimension must be contiguous, and rows
// must start at multiples of 16 bytes.
void take_strides(const Tensor& tensor, const char* name, int64_t (&strides)[2]) {
  bool aligned = tensor.stride(-1) == 1 && tensor.size(-1) % 8 == 0 &&
                 reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) aligned = aligned && tensor.stride(i) % 8 == 0;
  TORCH_CHECK_VALUE(aligned, "bitlinear: the rows of ", name,
                    " must start at multiples of 16 bytes");
  for (int i = 0; i < 2; ++i) strides[i] = tensor.stride(i);
}

using OptionalTensor = std::optional<Tensor>;

Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values,
              const OptionalTensor& mask, double scale, const OptionalTensor& position,
              const OptionalTensor& new_key, const OptionalTensor& new_value,
              const OptionalTensor& cos, const OptionalTensor& sin) {
  bitlinear::check_attend(query, keys, values, mask, position, new_key, new_value, cos, sin);
  const c10::cuda::CUDAGuard guard(query.device());
  bitlinear_cuda_attention task = {};
  task.dtype = kernel_dtype(query.scalar_type());
  task.batch = query.size(0);
  task.heads = query.size(1);
  task.head_dim = query.size(3);
  task.key_heads = keys.size(1);
  task.length = keys.size(2);
  TORCH_CHECK_NOT_IMPLEMENTED(
      task.dtype != BITLINEAR_F32 && (task.head_dim == 64 || task.head_dim == 128) &&
          task.heads <= 8 * task.key_heads && mask.has_value() &&
          new_key.has_value() == position.has_value() && (task.length <= 1 || mask->stride(3) == 1),
      "bitlinear: on a GPU, attend computes 16 bits, sizes of 64 and 128, up to 8 heads for each "
      "key "
      "head, with a mask, and a new key with its position, but query is ",
      bitlinear::dtype_name(query.scalar_type()), " of shape ", query.sizes(),
      " and keys have shape ", keys.sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(
      keys.stride(2) == task.head_dim && values.stride(2) == task.head_dim,
      "bitlinear: on a GPU, the tokens of a head must lie one behind the other in keys and values, "
      "but strides are ",
      keys.strides(), " and ", values.strides());
  task.key = keys.data_ptr();
  task.value = values.data_ptr();
  take_strides(keys, "keys", task.key_strides);
  take_strides(values, "values", task.value_strides);
  task.mask = mask->const_data_ptr();
  task.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
  task.mask_stride = mask->size(0) == 1 ? 0 : mask->stride(0);
  task.scale = static_cast<float>(scale);
  Tensor q = query, k, v, cosines, sines;
  if (position.has_value()) {
    const auto operand = [&](const Tensor& tensor) {
      return bitlinear::unshared(tensor, keys, values);
    };
    q = operand(query), k = operand(*new_key), v = operand(*new_value);
    cosines = operand(bitlinear::contiguous(*cos, "cos"));
    sines = operand(bitlinear::contiguous(*sin, "sin"));
    task.position = position->const_data_ptr<int64_t>();
    task.new_key = k.const_data_ptr();
    task.new_value = v.const_data_ptr();
    take_strides(k, "new_key", task.new_key_strides);
    take_strides(v, "new_value", task.new_value_strides);
    task.cosine = cosines.const_data_ptr();
    task.sine = sines.const_data_ptr();
    task.angle_stride = cosines.size(0) == 1 ? 0 : task.head_dim;
  }
  task.query = q.const_data_ptr();
  take_strides(q, "query", task.query_strides);
  if (position.has_value()) bitlinear::prepare_write(keys, values);  // nothing is refused after it
  Tensor output = empty({task.batch, 1, task.heads, task.head_dim}, query.scalar_type(), query);
  task.output = output.data_ptr();
  const char* const error = bitlinear_cuda_attend(&task, current_stream(query));
  check_launch(error, "attend", query);
  return output;
}

}  // namespace

// For tests and benchmarks: the operator runs only this kernel of enum bitlinear_cuda_kernel, in
// every thread; 0 lets heuristics.h choose again. Returns the kernel that was forced before.
BITLINEAR_EXPORT int bitlinear_cuda_force(int kernel) { return forced_kernel.exchange(kernel); }

TORCH_LIBRARY_IMPL(bitlinear, CUDA, m) {
  m.impl("attend", attend);
  m.impl("linear", bitlinear::linear<compute>);
  m.impl("fused_linear", bitlinear::fused_linear<compute>);
  m.impl("quantize_weight", quantize_weight);
  m.impl("expand_weight", expand_weight);
  m.impl("quantize_activations", quantize_activations);
  m.impl("expand_activations", expand_activations);
  m.impl("quantized_linear", quantized_linear);
  m.impl("linear_with_activations", linear_with_activations);
}
