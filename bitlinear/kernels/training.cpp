// The straight-through product of eager training as an autograd function in C++, on every device.
// training.py says what it computes, and has the same function in Python for compilers and
// transforms. In Python, a step of a small layer spends two thirds of its time outside the
// operators: 230 us, where nn.Linear takes 54 and this 125 (CPU, 4 tokens of 16 x 16).
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<ScalarType>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Makes `values`, a new tensor, pass its gradient to argument `index` of forward() if the backward
// pass is itself differentiated: the node has the edges of the arguments. (Tensors that stand for
// the arguments, kept in the context, would free a deep graph by recursion, and overflow the
// stack.)
Tensor pass_gradient(Tensor values, uint32_t index) {
  if (at::GradMode::is_enabled()) {
    if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
      functorch->checkSupportsCppAutogradFunction();
    }
    const auto node = torch::autograd::get_current_node();
    TORCH_CHECK(node,
                "bitlinear: this backward pass runs outside autograd (a call of grad_fn, or "
                "compiled autograd), so it has no derivative: use torch.autograd.grad");
    torch::autograd::impl::set_gradient_edge(values, node->next_edge(index));
  }
  return values;
}

// The product, and the quantised tokens for the backward pass.
std::tuple<Tensor, Tensor, Tensor> multiply(const Tensor& x, const Tensor& w_packed,
                                            const Tensor& w_scale, const OptionalTensor& bias,
                                            double eps, int64_t group_size, int64_t act_bits,
                                            ScalarType dtype) {
  static const auto linear_with_activations =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                              const OptionalTensor&, double, ScalarType, int64_t)>(
          "bitlinear::linear_with_activations");
  static const auto linear =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                  double, int64_t, int64_t, OptionalType)>("bitlinear::linear");
  static const auto quantize_activations =
      find<std::tuple<Tensor, Tensor>(const Tensor&, double, int64_t)>(
          "bitlinear::quantize_activations");
  if (x.is_cuda() && act_bits == 8) {
    return linear_with_activations.call(x, w_packed, w_scale, bias, eps, dtype, group_size);
  }
  Tensor y = linear.call(x, w_packed, w_scale, bias, x.size(-1), eps, group_size, act_bits, dtype);
  auto [q, s_x] = quantize_activations.call(x, eps, act_bits);
  return {y, q, s_x};
}

Tensor sum_tokens(const Tensor& values) {
  // cuBLAS takes 7 us for (8192, 1024) in bf16, where torch's sum takes 16.
  return values.is_cuda() ? at::ones({values.size(0)}, values.options()).matmul(values)
                          : values.sum(0);
}

struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static constexpr bool is_traceable = true;  // backward() reads the context and operators only

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, double eps, int64_t act_bits,
                        int64_t group_size, ScalarType dtype) {
    static const auto quantize_weight =
        find<std::tuple<Tensor, Tensor>(const Tensor&, double, int64_t)>(
            "bitlinear::quantize_weight");
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto [w_packed, w_scale] = quantize_weight.call(weight, eps, group_size);
    const auto [y, q, s_x] = multiply(x, w_packed, w_scale, bias, eps, group_size, act_bits, dtype);
    // 1 or 2 bytes per activation and 2 bits per weight; nn.Linear keeps 4 bytes of each.
    ctx->save_for_backward({q, s_x, w_packed, w_scale});
    ctx->saved_data["x"] = x.scalar_type();
    ctx->saved_data["weight"] = weight.scalar_type();
    ctx->saved_data["group_size"] = group_size;
    if (bias.has_value()) ctx->saved_data["bias"] = bias->scalar_type();
    ctx->set_materialize_grads(false);  // an undefined gradient is not 0
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto expand_weight =
        find<Tensor(const Tensor&, int64_t, const OptionalTensor&, OptionalType, int64_t)>(
            "bitlinear::expand_weight");
    static const auto expand_activations =
        find<Tensor(const Tensor&, const Tensor&, OptionalType)>("bitlinear::expand_activations");
    variable_list result(7);  // one for each argument of forward()
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();  // its hooks run with autocast
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor &q = saved[0], &s_x = saved[1], &w_packed = saved[2], &w_scale = saved[3];
    const int64_t K = q.size(-1);
    // The dtype of the products, as backward_dtype() in autograd.py.
    const ScalarType dtype = grad.is_cuda() ? grad.scalar_type() : ScalarType::Float;
    const Tensor g = grad.reshape({-1, grad.size(-1)}).to(dtype);
    if (ctx->needs_input_grad(0)) {
      const Tensor expanded =
          expand_weight.call(w_packed, K, w_scale, dtype, ctx->saved_data["group_size"].toInt());
      const Tensor grad_x = g.matmul(pass_gradient(expanded, 1));
      result[0] = grad_x.to(ctx->saved_data["x"].toScalarType()).reshape(q.sizes());
    }
    if (ctx->needs_input_grad(1)) {
      const Tensor tokens = pass_gradient(expand_activations.call(q, s_x, dtype), 0);
      result[1] =
          g.t().matmul(tokens.reshape({-1, K})).to(ctx->saved_data["weight"].toScalarType());
    }
    if (const auto bias = ctx->saved_data.find("bias");
        bias != ctx->saved_data.end() && ctx->needs_input_grad(2)) {
      result[2] = sum_tokens(g).to(bias->second.toScalarType());
    }
    return result;
  }
};

Tensor straight_through_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               double eps, int64_t act_bits, int64_t group_size, ScalarType dtype) {
  return StraightThrough::apply(x, weight, bias, eps, act_bits, group_size, dtype);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bitlinear, m) {
  // Without the tag for torch.compile, which traces the function in Python.
  m.def(
      "straight_through_linear(Tensor x, Tensor weight, Tensor? bias, float eps, int act_bits, "
      "int group_size, ScalarType dtype) -> Tensor");
}

// Composite, because code that runs below autograd (custom operators, subclasses) calls it, too.
TORCH_LIBRARY_IMPL(bitlinear, CompositeImplicitAutograd, m) {
  m.impl("straight_through_linear", straight_through_linear);
}
