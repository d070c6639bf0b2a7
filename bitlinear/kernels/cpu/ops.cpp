// The operators torch.ops.bitlinear.* on the CPU: arguments, memory and threads. The arithmetic is
// in the kernel variant that bitlinear_use_kernels() activates.
//
// The headers are chosen for compile time: this file takes most of a cold import.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <tuple>
#include <vector>

#include "../abi.h"
#include "../arguments.h"
#include "../checked_weights.h"
#include "../product.h"
#include "call.h"
#include "decode_ops.h"
#include "groups.h"
#include "heuristics.h"
#include "parallel.h"
#include "part.h"

namespace {

using at::ScalarType;
using at::Tensor;
using bitlinear::active_table;
using bitlinear::checked_data;
using bitlinear::for_each_row;
using bitlinear::kernel_dtype;

// Raises ValueError if the weights hold an invalid code. Weights in checked_weights() are not read.
void check_codes(const Tensor& w_packed, const uint8_t* rows, int64_t K) {
  if (bitlinear::checked_weights().find(w_packed, K)) return;
  const int64_t version = bitlinear::version_of(w_packed);
  const int64_t N = w_packed.size(0), row_bytes = w_packed.size(1);
  std::atomic<int64_t> first_row{N};
  for_each_row(N, K, [&](int64_t n) {
    if (bitlinear::find_invalid_byte(rows + n * row_bytes, K) < 0) return;
    int64_t first = first_row.load(std::memory_order_relaxed);
    while (n < first && !first_row.compare_exchange_weak(first, n)) {
    }
  });
  if (const int64_t n = first_row.load(); n < N) {
    const uint8_t* const row = rows + n * row_bytes;
    const int64_t b = bitlinear::find_invalid_byte(row, K);
    bitlinear::report_invalid_byte(row[b], n, b, K);
  }
  bitlinear::checked_weights().add(w_packed, K, version, {});
}

// Where M rows of quantised activations lie, one array after the other.
struct Activations {
  int8_t* q;       // (M, q_stride)
  float* s_x;      // (M,) or, with two rows for each token, half as many
  int32_t* q_sum;  // (M,)

  Activations(char* memory, int64_t M, int64_t q_stride)
      : q(reinterpret_cast<int8_t*>(memory)),
        s_x(reinterpret_cast<float*>(memory + M * q_stride)),
        q_sum(reinterpret_cast<int32_t*>(s_x + M)) {}
  static int64_t bytes(int64_t M, int64_t q_stride) {
    return M * (q_stride + int64_t{sizeof(float)} + int64_t{sizeof(int32_t)});
  }
};

Tensor compute(const bitlinear::Product& product) {
  const bitlinear_kernel_table* const kernels = active_table();
  const int64_t K = product.K, N = product.out_features(), tokens = product.tokens();
  const int64_t token_rows = bitlinear_rows_per_token(product.act_bits);
  const int64_t M = tokens * token_rows;
  // Not at::empty: its way through the dispatcher costs as much as a small product.
  Tensor y = Tensor(at::detail::empty_cpu(product.y_shape(), product.y_dtype));
  if (M == 0 || N == 0) return y;
  for (const bitlinear::Weight& weight : product.weights) check_codes(weight.given, weight.w(), K);
  const bitlinear_prologue prologue = product.prologue();

  const int64_t threads = at::get_num_threads();
  const int64_t row_bytes = bitlinear::ceil_div(K, 4);
  const bitlinear_costs costs = kernels->costs(M, row_bytes, product.group_bytes);
  const bitlinear::Pieces pieces = bitlinear::choose_pieces(M, N, row_bytes, threads, costs);
  const int64_t workers = std::min(threads, pieces.count());
  const bool is_plain = bitlinear_is_plain(&prologue) != 0;
  int64_t quantize_parts = bitlinear::choose_quantize_parts(tokens, K, threads, pieces.count());
  const bool each =
      bitlinear::each_quantizes(pieces, quantize_parts, tokens, K, N, threads, is_plain);
  if (each) quantize_parts = 0;

  // One allocation: scratch memory of each thread; for each one that quantises, the floats of a
  // prologue; quantised activations, scales and sums, of all threads or of each.
  const int64_t largest = bitlinear::largest_part(M, costs.token_unit, pieces.grid.tokens);
  const int64_t scratch_step =
      bitlinear::spaced(kernels->scratch_bytes(largest, row_bytes, product.group_bytes), workers);
  const int64_t quantizers = each ? workers : quantize_parts;
  const int64_t float_step =
      bitlinear::spaced(is_plain ? 0 : K * int64_t{sizeof(float)}, quantizers);
  const int64_t q_stride = bitlinear_q_stride(kernels, K);
  // One token lies on the stack, without gaps: it is written once.
  const int64_t q_step =
      bitlinear::spaced(Activations::bytes(M, q_stride), each && tokens > 1 ? workers : 1);
  bitlinear::Scratch scratch(workers * scratch_step + quantizers * float_step +
                             (each ? workers : 1) * q_step);
  char* const scratch_data = scratch.data();
  char* const floats = scratch_data + workers * scratch_step;
  char* const activations = floats + quantizers * float_step;

  const int x_dtype = kernel_dtype(product.x.scalar_type());
  const char* const x_data = static_cast<const char*>(product.x.const_data_ptr());
  const int64_t x_bytes = product.x.sizes().back() * product.x.element_size();
  bitlinear_task task = {};
  task.act_bits = product.act_bits;
  task.q_stride = q_stride;
  task.M = M;
  task.row_bytes = row_bytes;
  task.group_bytes = product.group_bytes;
  task.y = y.data_ptr();
  task.y_stride = N;
  task.y_dtype = kernel_dtype(product.y_dtype);
  int64_t residual_bytes = 0;  // of a value
  if (product.residual.defined()) {
    task.residual = product.residual.const_data_ptr();
    task.residual_dtype = kernel_dtype(product.residual.scalar_type());
    residual_bytes = product.residual.element_size();
  }
  // Each thread copies the description of the call once: it lies in few lines.
  const auto quantize_tokens = [=, eps = product.eps, act_bits = product.act_bits](
                                   bitlinear::Range range, int64_t quantizer, char* memory) {
    const Activations out(memory, M, q_stride);
    float* const values =
        float_step == 0 ? nullptr : reinterpret_cast<float*>(floats + quantizer * float_step);
    for (int64_t i = range.begin; i < range.end; ++i) {
      kernels->quantize_row(&prologue, x_data + i * x_bytes, x_dtype, K, eps, act_bits, values,
                            out.q + i * token_rows * q_stride, q_stride, out.s_x + i,
                            out.q_sum + i * token_rows);
    }
  };
  const auto quantize = [&](int64_t part) {
    quantize_tokens(bitlinear::part_of(tokens, 1, part, quantize_parts), part, activations);
  };
  const int64_t y_bytes = y.element_size();
  const auto multiply_on = [=, &weights = product.weights](int64_t thread) {
    char* const memory = activations + (each ? thread * q_step : 0);
    if (each) quantize_tokens({0, tokens}, thread, memory);
    const Activations quantized(memory, M, q_stride);
    bitlinear_task mine = task;
    mine.q = quantized.q;
    mine.s_x = quantized.s_x;
    mine.q_sum = quantized.q_sum;
    mine.scratch = scratch_data + thread * scratch_step;
    return [=, &weights](int64_t index) {
      const auto [m, n] = bitlinear::piece_of(M, N, costs, pieces, index);
      const bitlinear_task of_tokens = bitlinear::tokens_of(mine, m.begin, m.end);
      bitlinear_task piece = of_tokens;
      for (const bitlinear::Weight& weight : weights) {
        piece.n_begin = std::max(n.begin, weight.begin) - weight.begin;
        piece.n_end = std::min(n.end, weight.end) - weight.begin;
        if (piece.n_begin >= piece.n_end) continue;
        piece.w = weight.w();
        piece.s_w = weight.s_w();
        piece.s_w_stride = weight.s_w_stride();
        piece.bias = weight.bias_data();
        piece.bias_dtype = weight.bias_dtype();
        piece.y = static_cast<char*>(of_tokens.y) + weight.begin * y_bytes;
        if (mine.residual != nullptr) {
          piece.residual =
              static_cast<const char*>(of_tokens.residual) + weight.begin * residual_bytes;
        }
        kernels->linear(&piece);
      }
    };
  };
  bitlinear::parallel_by_thread(quantize_parts, quantize, pieces.count(), multiply_on);
  return y;
}

// The weights of a row, cut where their scales change.
struct Parts {
  int64_t K, size, count;

  Parts(int64_t in_features, int64_t group_size)
      : K(in_features),
        size(group_size > 0 ? group_size : in_features),
        count(bitlinear::scales_of_row(in_features, group_size)) {}

  // Calls part(index, first weight, number of weights) for each.
  template <class Part>
  void for_each(const Part& part) const {
    for (int64_t g = 0; g < count; ++g) part(g, g * size, std::min(size, K - g * size));
  }
};

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, double eps, int64_t group_size) {
  bitlinear::check_weight(weight, eps, group_size);
  const bitlinear_kernel_table* const kernels = active_table();
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor input = bitlinear::kernel_operand(weight, "weight");
  const int dtype = kernel_dtype(input.scalar_type());
  const char* const rows = static_cast<const char*>(input.const_data_ptr());
  const int64_t bytes = K * input.element_size();
  const int64_t row_bytes = bitlinear::ceil_div(K, 4);
  Tensor packed = Tensor(at::detail::empty_cpu({N, row_bytes}, ScalarType::Byte));
  Tensor scale =
      Tensor(at::detail::empty_cpu(bitlinear::scale_shape(weight, group_size), ScalarType::Float));
  float* const s_w = scale.data_ptr<float>();
  const float floor = static_cast<float>(eps);
  const auto scale_of = [floor](double sum, int64_t count) {
    const float mean = static_cast<float>(sum / static_cast<double>(count));
    return mean < floor ? floor : mean;  // a NaN stays
  };

  const Parts parts(K, group_size);
  if (group_size == 0) {
    // Each row is summed in a fixed order, then the rows one after the other: the bits do not
    // depend on the number of threads.
    std::vector<double> sums(static_cast<size_t>(N));
    for_each_row(N, K, [&](int64_t n) {
      sums[static_cast<size_t>(n)] = kernels->sum_magnitudes(rows + n * bytes, dtype, K);
    });
    double sum = 0.0;
    for (const double row : sums) sum += row;
    *s_w = scale_of(sum, N * K);
  } else {
    for_each_row(N, K, [&](int64_t n) {
      float* const scales = s_w + n * parts.count;
      parts.for_each([&](int64_t g, int64_t k, int64_t count) {
        const char* const part = rows + n * bytes + k * input.element_size();
        scales[g] = scale_of(kernels->sum_magnitudes(part, dtype, count), count);
      });
      if (group_size > 0) bitlinear::round_scales(scales, parts.count);
    });
  }
  const int64_t stride = group_size == 0 ? 0 : parts.count;
  uint8_t* const out = packed.data_ptr<uint8_t>();
  for_each_row(N, K, [&](int64_t n) {
    parts.for_each([&](int64_t g, int64_t k, int64_t count) {
      kernels->pack_row(rows + n * bytes + k * input.element_size(), dtype, count,
                        s_w[n * stride + g], out + n * row_bytes + k / 4);
    });
  });
  bitlinear::checked_weights().add(packed, K, bitlinear::version_of(packed), {});
  return {packed, scale};
}

Tensor expand_weight(const Tensor& w_packed, int64_t in_features,
                     const std::optional<Tensor>& w_scale, std::optional<ScalarType> dtype,
                     int64_t group_size) {
  bitlinear::check_packed(w_packed, in_features, w_scale, dtype.value_or(ScalarType::Float),
                          group_size);
  const bitlinear_kernel_table* const kernels = active_table();
  const int64_t N = w_packed.size(0);
  checked_data(w_packed, "w_packed");
  // Columns of a weight need no copy.
  const Tensor input = w_packed.stride(1) == 1 ? w_packed : w_packed.contiguous();
  const int64_t row_bytes = input.stride(0);
  const ScalarType w_dtype = dtype.value_or(ScalarType::Float);
  Tensor weight = Tensor(at::detail::empty_cpu({N, in_features}, w_dtype));
  const uint8_t* const rows = input.const_data_ptr<uint8_t>();
  const float one = 1.0f;
  const Tensor scale = w_scale.has_value() ? bitlinear::contiguous(*w_scale, "w_scale") : Tensor();
  const float* const s_w = scale.defined() ? scale.const_data_ptr<float>() : &one;
  const int64_t stride = scale.defined() && scale.dim() == 2 ? scale.size(1) : 0;
  char* const out = static_cast<char*>(weight.data_ptr());
  const int64_t bytes = in_features * weight.element_size();
  const Parts parts(in_features, scale.defined() ? group_size : 0);
  for_each_row(N, in_features, [&](int64_t n) {
    parts.for_each([&](int64_t g, int64_t k, int64_t count) {
      kernels->expand_row(rows + n * row_bytes + k / 4, count, s_w[n * stride + g],
                          out + n * bytes + k * weight.element_size(), kernel_dtype(w_dtype));
    });
  });
  return weight;
}

std::tuple<Tensor, Tensor> quantize_activations(const Tensor& x, double eps, int64_t act_bits) {
  bitlinear::check_tokens(x, eps, act_bits);
  const bitlinear_kernel_table* const kernels = active_table();
  const int64_t K = x.size(-1), M = K == 0 ? 0 : x.numel() / K;
  const Tensor input = bitlinear::contiguous(x, "x");
  const int dtype = kernel_dtype(input.scalar_type());
  const char* const tokens = static_cast<const char*>(input.const_data_ptr());
  const int64_t bytes = K * input.element_size();
  c10::DimVector shape(x.sizes());
  Tensor q = Tensor(at::detail::empty_cpu(shape, bitlinear::integer_type(act_bits)));
  shape.back() = 1;
  Tensor scale = Tensor(at::detail::empty_cpu(shape, ScalarType::Float));
  char* const out = static_cast<char*>(q.data_ptr());
  const int64_t q_bytes = K * q.element_size();
  float* const s_x = scale.data_ptr<float>();
  for_each_row(M, K, [&](int64_t m) {
    kernels->quantize_in_order(tokens + m * bytes, dtype, K, static_cast<float>(eps), act_bits,
                               out + m * q_bytes, s_x + m);
  });
  return {q, scale};
}

}  // namespace

// Activates a variant. Returns 0, or 1 if the variant has another version of the interface.
BITLINEAR_EXPORT int bitlinear_use_kernels(const bitlinear_kernel_table* kernels) {
  if (kernels == nullptr || kernels->abi_version != BITLINEAR_ABI_VERSION) return 1;
  bitlinear::active_kernels.store(kernels, std::memory_order_release);
  return 0;
}

// The number of threads of a parallel region. 1 shows that the work is silently serial.
BITLINEAR_EXPORT int bitlinear_parallel_threads(void) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  const auto record = [&](int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  };
  bitlinear::parallel(at::get_num_threads(), record, 0, record);
  return static_cast<int>(threads.size());
}

TORCH_LIBRARY(bitlinear, m) {
  // The same strings as SCHEMAS in ops.py, which documents the arguments.
  m.def(
      "linear(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias, int in_features, "
      "float eps=1e-6, int group_size=0, int act_bits=8, ScalarType? out_dtype=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "fused_linear(Tensor x, Tensor[] w_packed, Tensor[] w_scale, Tensor?[] bias, "
      "int in_features, float eps=1e-6, int group_size=0, int act_bits=8, str? activation=None, "
      "Tensor? norm_weight=None, float norm_eps=0.0, Tensor? residual=None, "
      "ScalarType? out_dtype=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("quantize_weight(Tensor weight, float eps=1e-6, int group_size=0) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "expand_weight(Tensor w_packed, int in_features, Tensor? w_scale=None, "
      "ScalarType? dtype=None, int group_size=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("quantize_activations(Tensor x, float eps=1e-6, int act_bits=8) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("expand_activations(Tensor q, Tensor s_x, ScalarType? dtype=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "quantized_linear(Tensor q, Tensor s_x, Tensor q_sum, Tensor w_packed, Tensor w_scale, "
      "Tensor? bias, ScalarType dtype, int group_size=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_with_activations(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias, float eps, "
      "ScalarType dtype, int group_size=0) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("int8_product(Tensor q, Tensor s_x, Tensor w, Tensor w_scale, ScalarType dtype) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("bf16_product(Tensor x, Tensor w) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "attend(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor? mask, float scale, "
      "Tensor? position=None, Tensor? new_key=None, Tensor? new_value=None, Tensor? cos=None, "
      "Tensor? sin=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(bitlinear, CPU, m) {
  m.impl("linear", bitlinear::linear<compute>);
  m.impl("fused_linear", bitlinear::fused_linear<compute>);
  m.impl("quantize_weight", quantize_weight);
  m.impl("expand_weight", expand_weight);
  m.impl("quantize_activations", quantize_activations);
  m.impl("int8_product", bitlinear::int8_product);
  m.impl("bf16_product", bitlinear::bf16_product);
  m.impl("attend", bitlinear::attend);
}

// The operators have no backward pass: torch's fallback raises, so that no gradient is silently
// lost. (bitlinear.linear.BitLinear has one; it is built above the operators.)
TORCH_LIBRARY_IMPL(bitlinear, Autograd, m) {
  for (const char* name : {"linear", "fused_linear", "quantize_weight", "expand_weight",
                           "quantize_activations", "expand_activations", "quantized_linear",
                           "linear_with_activations", "int8_product", "bf16_product", "attend"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}
