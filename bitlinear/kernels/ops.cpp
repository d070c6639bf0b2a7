// torch.ops.bitlinear.linear on the CPU: arguments, memory and threads. The arithmetic is in the
// kernel variant that bitlinear_use_kernels() received.
//
// The headers are chosen for compile time: this file is most of a cold import.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "abi.h"
#include "arguments.h"
#include "heuristics.h"
#include "parallel.h"

namespace {

using at::ScalarType;
using at::Tensor;
using bitlinear::check_arguments;
using bitlinear::data_of;
using bitlinear::kernel_dtype;

std::atomic<const bitlinear_kernel_table*> active_kernels{nullptr};

constexpr int64_t kAlignment = 64;  // of torch's memory, of cache lines and of vectors

// The scratch memory of one call: on the stack where it is small, as it is for one token.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > int64_t{sizeof(stack_)}) heap_ = at::detail::empty_cpu({bytes}, ScalarType::Byte);
  }
  char* data() { return heap_.defined() ? static_cast<char*>(heap_.data_ptr()) : stack_; }

 private:
  alignas(kAlignment) char stack_[16 * 1024];
  at::TensorBase heap_;
};

Tensor linear(const Tensor& x, const Tensor& w_packed, const Tensor& w_scale,
              const std::optional<Tensor>& bias, int64_t in_features, double eps,
              int64_t group_size, int64_t act_bits, std::optional<ScalarType> out_dtype) {
  const ScalarType y_dtype = out_dtype.value_or(x.scalar_type());
  check_arguments(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, y_dtype);
  const bitlinear_kernel_table* kernels = active_kernels.load(std::memory_order_acquire);
  TORCH_CHECK(kernels != nullptr, "bitlinear: no CPU kernel is active; see bitlinear.doctor");

  const int64_t K = in_features;
  const int64_t N = w_packed.size(0);
  const int64_t M = x.numel() / K;
  c10::DimVector shape(x.sizes());
  shape.back() = N;
  // Not at::empty, whose way through the dispatcher costs as much as a small product.
  Tensor y = Tensor(at::detail::empty_cpu(shape, y_dtype));
  if (M == 0 || N == 0) return y;

  const Tensor input = x.contiguous();
  const Tensor weight = w_packed.contiguous();
  const Tensor scale = w_scale.contiguous();
  const Tensor addend = bitlinear::kernel_bias(bias);

  const int64_t threads = at::get_num_threads();
  const int64_t row_bytes = weight.size(1);
  const bitlinear::Grid grid = bitlinear::choose_grid(M, N, row_bytes, threads, kernels->costs);
  const int64_t parts = grid.tokens * grid.rows;

  // One block of scratch: what each part needs, then the quantised activations, scales and sums.
  const int64_t part_tokens = bitlinear::largest_part(M, kernels->costs.token_unit, grid.tokens);
  const int64_t part_bytes =
      bitlinear::ceil_div(kernels->scratch_bytes(part_tokens, row_bytes), kAlignment) * kAlignment;
  const int64_t q_stride = bitlinear_q_stride(kernels, K);
  const int64_t token_bytes = q_stride + int64_t{sizeof(float)} + int64_t{sizeof(int32_t)};
  Scratch scratch(parts * part_bytes + M * token_bytes);
  char* const part_scratch = scratch.data();
  int8_t* q = reinterpret_cast<int8_t*>(part_scratch + parts * part_bytes);
  float* s_x = reinterpret_cast<float*>(q + M * q_stride);
  int32_t* q_sum = reinterpret_cast<int32_t*>(s_x + M);

  const int x_dtype = kernel_dtype(x.scalar_type());
  const char* tokens = data_of(input, "x");
  const int64_t x_bytes = K * input.element_size();
  bitlinear_task task = {};
  task.q = q;
  task.q_stride = q_stride;
  task.s_x = s_x;
  task.q_sum = q_sum;
  task.M = M;
  task.w = reinterpret_cast<const uint8_t*>(data_of(weight, "w_packed"));
  task.row_bytes = row_bytes;
  task.s_w = reinterpret_cast<const float*>(data_of(scale, "w_scale"));
  task.s_w_stride = scale.dim() == 2 ? 1 : 0;
  task.bias = addend.defined() ? data_of(addend, "bias") : nullptr;
  task.bias_dtype = addend.defined() ? kernel_dtype(addend.scalar_type()) : BITLINEAR_F32;
  task.y = y.data_ptr();
  task.y_stride = N;
  task.y_dtype = kernel_dtype(y_dtype);
  const int64_t quantize_parts = bitlinear::choose_quantize_parts(M, K, threads, parts);
  const auto quantize = [&](int64_t part) {
    const bitlinear::Range rows = bitlinear::part_of(M, 1, part, quantize_parts);
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      kernels->quantize_row(tokens + m * x_bytes, x_dtype, K, static_cast<float>(eps),
                            q + m * q_stride, s_x + m, q_sum + m);
    }
  };
  const auto multiply = [&](int64_t part) {
    const bitlinear::Range m =
        bitlinear::part_of(M, kernels->costs.token_unit, part / grid.rows, grid.tokens);
    const bitlinear::Range n =
        bitlinear::part_of(N, kernels->costs.row_unit, part % grid.rows, grid.rows);
    bitlinear_task mine = task;
    mine.q += m.begin * q_stride;
    mine.s_x += m.begin;
    mine.q_sum += m.begin;
    mine.M = m.end - m.begin;
    mine.n_begin = n.begin;
    mine.n_end = n.end;
    mine.scratch = part_scratch + part * part_bytes;
    mine.y = static_cast<char*>(task.y) + m.begin * N * y.element_size();
    kernels->linear(&mine);
  };
  bitlinear::parallel(quantize_parts, quantize, parts, multiply);
  return y;
}

}  // namespace

// Makes a variant's kernels the ones that the operator runs. 0, or 1 if its interface is another.
BITLINEAR_EXPORT int bitlinear_use_kernels(const bitlinear_kernel_table* kernels) {
  if (kernels == nullptr || kernels->abi_version != BITLINEAR_ABI_VERSION) return 1;
  active_kernels.store(kernels, std::memory_order_release);
  return 0;
}

// How many threads take part in one parallel region: 1 where the work would silently be serial.
BITLINEAR_EXPORT int bitlinear_parallel_threads(void) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  const auto note = [&](int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  };
  bitlinear::parallel(0, note, at::get_num_threads(), note);
  return static_cast<int>(threads.size());
}

TORCH_LIBRARY(bitlinear, m) {
  // The same string as SCHEMA in ops.py, which says what the arguments mean.
  m.def(
      "linear(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias, int in_features, "
      "float eps=1e-6, int group_size=0, int act_bits=8, ScalarType? out_dtype=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(bitlinear, CPU, m) { m.impl("linear", linear); }

// The operator has no derivative: a backward pass raises instead of losing the gradient.
TORCH_LIBRARY_IMPL(bitlinear, Autograd, m) {
  m.impl("linear", torch::autograd::autogradNotImplementedFallback());
}
