// Compares a CUDA kernel with the reference in ../selftest. selftest.cu runs some hundred cases
// after every build, the native driver in tests/ runs thousands. Every array is a device allocation
// of exactly the promised size, so compute-sanitizer sees each byte that is read or written beyond
// it. Guard bytes around y and behind the workspace are checked in every run.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "../selftest/check.h"
#include "heuristics.h"
#include "task.h"

namespace bitlinear {
namespace cuda {

// The CUDA runtime failed: there is no result, rather than a wrong one.
struct CudaFailure {
  cudaError_t error;
  const char* call;
};
#define BITLINEAR_CUDA_CALL(call)                                                   \
  do {                                                                              \
    const cudaError_t error_ = (call);                                              \
    if (error_ != cudaSuccess) throw ::bitlinear::cuda::CudaFailure{error_, #call}; \
  } while (false)

class Stream {
 public:
  // Does not synchronise with the default stream, in which other threads can have queued work.
  Stream() { BITLINEAR_CUDA_CALL(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  void upload(void* to, const void* from, size_t bytes) const {
    BITLINEAR_CUDA_CALL(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
  }
  void download(void* to, const void* from, size_t bytes) const {
    BITLINEAR_CUDA_CALL(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    BITLINEAR_CUDA_CALL(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
};

// A device array. It starts `offset` bytes after its allocation, and both end together.
class DeviceArray {
 public:
  DeviceArray(const Stream& stream, const void* data, size_t bytes, size_t offset = 0)
      : offset_(offset) {
    BITLINEAR_CUDA_CALL(cudaMalloc(&memory_, offset + bytes));
    try {
      if (bytes > 0) stream.upload(this->data(), data, bytes);
    } catch (...) {
      cudaFree(memory_);
      throw;
    }
  }
  ~DeviceArray() { cudaFree(memory_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  template <class T = uint8_t>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(memory_) + offset_);
  }

 private:
  void* memory_ = nullptr;
  size_t offset_;
};

// The alignment of the operands: as torch allocates them, or only as their types require.
enum class Placement { kAligned, kUnaligned };

constexpr size_t kGuardBytes = 256;  // a multiple of the alignment of y and of the workspace
constexpr uint8_t kGuard = 0xA5;

inline bool is_intact(const uint8_t* guard) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] != kGuard) return false;
  }
  return true;
}

inline bool row_aligned(Placement placement, int64_t row_bytes) {
  return placement == Placement::kAligned && row_bytes % 16 == 0;
}

inline Shape shape_of(const selftest::Case& c, Placement placement) {
  const int64_t element = c.dtype == BITLINEAR_F32 ? 4 : 2;
  return {c.M * bitlinear_rows_per_token(c.act_bits),
          c.N,
          c.K,
          row_aligned(placement, c.K * element),
          row_aligned(placement, (c.K + 3) / 4),
          c.weights,
          c.activation != BITLINEAR_NO_GATE || c.norm,
          bitlinear_rows_per_token(c.act_bits),
          false,
          false,
          c.group_size};
}

// Whether the kernels read x, or tokens that are already quantised.
enum class Input { kValues, kTokens };

// Whether the kernel supports a case. AUTO supports every case that exists.
inline bool supports_case(int kernel, const Device& device, const selftest::Case& c,
                          Placement placement, Input input) {
  Shape shape = shape_of(c, placement);
  if (input == Input::kTokens) {
    if (c.act_bits != 8 || c.weights != 1 || shape.has_prologue) return false;
    shape.is_quantized = true;
    shape.q_aligned = c.K % 16 == 0 && c.group_size == 0;
  }
  return kernel == BITLINEAR_CUDA_AUTO || supports(kernel, device, shape);
}

// The weights of a case: consecutive rows of w, each in device arrays of its own.
class Weights {
 public:
  Weights(const Stream& stream, const selftest::Operands& operands, bool unaligned) {
    const selftest::Case& c = operands.shape;
    const int64_t element = c.dtype == BITLINEAR_F32 ? 4 : 2;
    // Rows of `bytes` bytes, whose values have `value` bytes.
    const auto copy = [&](const void* data, int64_t first, int64_t end, int64_t bytes,
                          int64_t value) {
      arrays_.push_back(std::make_unique<DeviceArray>(
          stream, static_cast<const uint8_t*>(data) + first * bytes,
          static_cast<size_t>((end - first) * bytes),
          unaligned ? static_cast<size_t>(bytes % 16 == 0 ? value : bytes) : 0));
      return arrays_.back()->data();
    };
    for (bitlinear_cuda_weight& weight : weights_) weight.begin = weight.end = c.N;
    for (int64_t i = 0; i < c.weights; ++i) {
      bitlinear_cuda_weight& weight = weights_[i];
      weight.begin = c.N * i / c.weights;
      weight.end = c.N * (i + 1) / c.weights;
      weight.w = copy(operands.w.data(), weight.begin, weight.end, operands.row_bytes, 1);
      weight.s_w_stride = operands.s_w_stride();
      const bool by_row = weight.s_w_stride > 0;
      weight.s_w = reinterpret_cast<const float*>(
          copy(operands.s_w.data(), by_row ? weight.begin : 0, by_row ? weight.end : 1,
               operands.groups() * int64_t{sizeof(float)}, sizeof(float)));
      if (c.bias) {
        weight.bias = copy(operands.bias.data(), weight.begin, weight.end, element, element);
      }
      weight.bias_dtype = c.dtype;
    }
    count_ = c.weights;
  }

  void describe(bitlinear_cuda_task& task) const {
    memcpy(task.weights, weights_, sizeof(weights_));
    task.weight_count = count_;
  }

 private:
  std::vector<std::unique_ptr<DeviceArray>> arrays_;
  bitlinear_cuda_weight weights_[BITLINEAR_MAX_WEIGHTS] = {};
  int64_t count_;
};

// Returns "" or the first difference; throws CudaFailure. `run` queues the task on the stream with
// this kernel and returns null or an error message. `name` stands for the kernel in messages.
template <class Run>
std::string check_case(const std::string& name, int kernel, const Run& run,
                       const selftest::Example& example, Placement placement, Input input,
                       const Stream& stream) {
  const selftest::Operands& operands = example.operands;
  const selftest::Case& c = operands.shape;
  const size_t element = c.dtype == BITLINEAR_F32 ? 4 : 2;
  const bool unaligned = placement == Placement::kUnaligned;
  const DeviceArray x(stream, operands.x.data(), operands.x.size(), unaligned ? element : 0);
  const DeviceArray norm_weight(stream, operands.norm_weight.data(), operands.norm_weight.size(),
                                unaligned ? element : 0);
  const DeviceArray residual(stream, operands.residual.data(), operands.residual.size(),
                             unaligned ? element : 0);
  const Weights weights(stream, operands, unaligned);

  const size_t y_bytes = static_cast<size_t>(c.M * c.N) * element;
  std::vector<uint8_t> y_memory(y_bytes + 2 * kGuardBytes, kGuard);
  const DeviceArray y(stream, y_memory.data(), y_memory.size());

  bitlinear_cuda_task task = {};
  task.act_bits = c.act_bits;
  task.x = x.data();
  task.x_dtype = task.residual_dtype = task.y_dtype = c.dtype;
  task.M = c.M * bitlinear_rows_per_token(c.act_bits);
  task.N = c.N;
  task.K = c.K;
  task.groups = bitlinear_cuda_make_groups(c.K, c.group_size);
  task.eps = operands.eps;
  task.prologue = operands.prologue();
  if (c.norm) task.prologue.norm_weight = norm_weight.data();
  weights.describe(task);
  task.residual = c.residual ? residual.data() : nullptr;
  task.y = y.data() + kGuardBytes;
  // The weights are copied before y in the stream, so they can be prefetched.
  task.w_prefetchable = example.seed % 3 != 0;
  const std::vector<uint8_t> unset(static_cast<size_t>(c.M * c.K));
  const std::vector<float> unset_numbers(static_cast<size_t>(c.M));
  const DeviceArray q(stream, unset.data(), unset.size());
  const DeviceArray s_x(stream, unset_numbers.data(), unset_numbers.size() * sizeof(float));
  const DeviceArray q_sum(stream, unset_numbers.data(), unset_numbers.size() * sizeof(int32_t));
  const bitlinear_cuda_tokens quantized = {q.data<int8_t>(), s_x.data<float>(),
                                           q_sum.data<int32_t>()};
  const bitlinear_cuda_tokens* const tokens = input == Input::kTokens ? &quantized : nullptr;
  if (tokens != nullptr) {
    const char* const refusal =
        bitlinear_cuda_quantize_activations(task.x, task.x_dtype, c.M, c.K, task.eps, 8, q.data(),
                                            s_x.data<float>(), q_sum.data<int32_t>(), stream.get());
    if (refusal != nullptr) return refusal;
    task.x = nullptr;
  }
  const size_t workspace_bytes =
      static_cast<size_t>(bitlinear_cuda_workspace_bytes(&task, tokens, kernel));
  // The old contents of the workspace must not matter.
  std::vector<uint8_t> guard(workspace_bytes + kGuardBytes, kGuard);
  const DeviceArray workspace(stream, guard.data(), guard.size());
  task.workspace = workspace.data();

  const std::string where =
      " by " + name + (tokens != nullptr ? ", of tokens" : "") + (unaligned ? ", unaligned" : "");
  const char* refusal = run(task, tokens, stream.get());
  if (refusal != nullptr) return std::string(refusal) + " at " + describe(c) + where;
  stream.download(y_memory.data(), y.data(), y_memory.size());
  stream.download(guard.data(), workspace.data() + workspace_bytes, kGuardBytes);

  if (!is_intact(y_memory.data()) || !is_intact(y_memory.data() + kGuardBytes + y_bytes)) {
    return "written beyond y at " + describe(c) + where;
  }
  if (!is_intact(guard.data())) return "written beyond the workspace at " + describe(c) + where;
  selftest::Buffer got(c.dtype, c.M * c.N);
  memcpy(got.data(), y_memory.data() + kGuardBytes, y_bytes);
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    const std::string difference =
        selftest::compare_output(c, i / c.N, i % c.N, got.get(i), example.y.get(i));
    if (!difference.empty()) return difference + where;
  }
  return "";
}

inline std::string check_case(int kernel, const selftest::Example& example, Placement placement,
                              Input input, const Stream& stream) {
  const auto run = [kernel](const bitlinear_cuda_task& task, const bitlinear_cuda_tokens* tokens,
                            cudaStream_t on) {
    return bitlinear_cuda_linear(&task, tokens, kernel, on);
  };
  const std::string name = "kernel " + std::to_string(kernel);
  return check_case(name, kernel, run, example, placement, input, stream);
}

// Whether value i is this fp32 value, rounded to the dtype.
inline bool same_value(const selftest::Buffer& values, int64_t i, float wanted) {
  selftest::Buffer rounded(values.dtype(), 1);
  rounded.set(0, wanted);
  const float value = values.get(i);
  return value == rounded.get(0) || (isnan(value) && isnan(wanted));
}

// Returns "" or the first difference of scales that were found for weights. With groups they are
// rounded to multiples of a power of two, of which 2^14 make the largest of a row.
inline std::string compare_scales(const selftest::Operands& operands, const std::vector<float>& s_w,
                                  int64_t stride) {
  const selftest::Case& c = operands.shape;
  std::vector<double> magnitudes(s_w.size()), counts(s_w.size());
  const int64_t size = c.group_size > 0 ? c.group_size : c.K;
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t k = 0; k < c.K; ++k) {
      const auto i = static_cast<size_t>(m * stride + k / size);
      magnitudes[i] += fabs(static_cast<double>(operands.x.get(m * c.K + k)));
      counts[i] += 1.0;
    }
  }
  for (size_t i = 0; i < s_w.size(); ++i) {
    const double sum = magnitudes[i];
    const float wanted = fmaxf(static_cast<float>(sum / counts[i]), operands.eps);
    const size_t row = i / static_cast<size_t>(operands.groups()) * operands.groups();
    float tolerance = 1.2e-7f * wanted;
    bool row_is_finite = true;
    for (int64_t g = 0; c.group_size > 0 && g < operands.groups(); ++g) {
      const double other = magnitudes[row + g];
      row_is_finite = row_is_finite && isfinite(other);
      const double mean = fmax(other / counts[row + g], operands.eps);
      constexpr float kSmallestStep = 0x1p-127f;  // half of the smallest unit
      tolerance = fmaxf(tolerance, fmaxf(static_cast<float>(mean) * 0x1p-15f, kSmallestStep));
    }
    const bool same = c.group_size > 0 && !row_is_finite ? isnan(s_w[i])
                      : isnan(sum)                       ? isnan(s_w[i])
                      : isinf(sum)                       ? isinf(s_w[i])
                                                         : fabsf(s_w[i] - wanted) <= tolerance;
    if (!same) return "s_w[" + std::to_string(i) + "] is " + std::to_string(s_w[i]);
  }
  return "";
}

// Checks the functions for training on x, as weights and then as activations. Returns "" or the
// first difference.
inline std::string check_training(const selftest::Case& c, uint64_t seed, Placement placement,
                                  const Stream& stream) {
  const selftest::Operands operands(c, seed);
  const size_t element = c.dtype == BITLINEAR_F32 ? 4 : 2;
  const size_t count = static_cast<size_t>(c.M * c.K);
  const bool unaligned = placement == Placement::kUnaligned;
  const std::string where = " at " + describe(c) + (unaligned ? ", unaligned" : "");
  const DeviceArray x(stream, operands.x.data(), operands.x.size(), unaligned ? element : 0);

  std::vector<uint8_t> packed(static_cast<size_t>(c.M * operands.row_bytes));
  selftest::Buffer w(c.dtype, c.M * c.K);
  const std::vector<uint8_t> sums(
      static_cast<size_t>(bitlinear_cuda_weight_workspace_bytes(c.M, c.K)));
  const int64_t stride = operands.s_w_stride();
  std::vector<float> s_w(static_cast<size_t>(stride > 0 ? c.M * stride : 1));
  const DeviceArray device_sums(stream, sums.data(), sums.size());
  const DeviceArray device_packed(stream, packed.data(), packed.size());
  const DeviceArray device_scale(stream, s_w.data(), s_w.size() * sizeof(float));
  const DeviceArray device_w(stream, w.data(), w.size());
  const char* refusal = bitlinear_cuda_quantize_weight(
      x.data(), c.dtype, c.M, c.K, operands.eps, device_packed.data(), device_scale.data<float>(),
      stride, c.group_size, device_sums.data(), stream.get());
  if (refusal != nullptr) return refusal + where;
  const bool scaled = seed % 2 == 0;
  refusal = bitlinear_cuda_expand_weight(device_packed.data(), c.M, c.K,
                                         scaled ? device_scale.data<float>() : nullptr, stride,
                                         c.group_size, device_w.data(), c.dtype, stream.get());
  if (refusal != nullptr) return refusal + where;
  stream.download(packed.data(), device_packed.data(), packed.size());
  stream.download(s_w.data(), device_scale.data(), s_w.size() * sizeof(float));
  stream.download(w.data(), device_w.data(), w.size());

  const std::string difference = compare_scales(operands, s_w, stride);
  if (!difference.empty()) return difference + where;
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t k = 0; k < 4 * operands.row_bytes; ++k) {
      const int64_t group = c.group_size > 0 ? k / c.group_size : 0;
      const float scale =
          s_w[static_cast<size_t>(m * stride + minimum(group, operands.groups() - 1))];
      const int code = packed[m * operands.row_bytes + k / 4] >> (6 - 2 * (k % 4)) & 3;
      const volatile float quotient = k < c.K ? operands.x.get(m * c.K + k) / scale : 0.0f;
      const float rounded = nearbyintf(quotient);
      const float wanted = isnan(rounded) ? 0 : rounded > 1 ? 1 : rounded < -1 ? -1 : rounded;
      if (code - 1 != wanted) {
        return "weight " + std::to_string(k) + " of row " + std::to_string(m) + " is packed as " +
               std::to_string(code) + where;
      }
      if (k < c.K && !same_value(w, m * c.K + k, wanted * (scaled ? scale : 1.0f))) {
        return "weight " + std::to_string(k) + " of row " + std::to_string(m) + " is expanded to " +
               std::to_string(w.get(m * c.K + k)) + where;
      }
    }
  }

  const size_t q_element = static_cast<size_t>(c.act_bits / 8);
  std::vector<uint8_t> q(count * q_element);
  const auto q_value = [&](int64_t i) {
    if (c.act_bits == 8) return static_cast<int32_t>(static_cast<int8_t>(q[i]));
    int16_t value;
    memcpy(&value, q.data() + 2 * i, sizeof(value));
    return static_cast<int32_t>(value);
  };
  std::vector<float> s_x(static_cast<size_t>(c.M));
  const DeviceArray device_q(stream, q.data(), q.size());
  const DeviceArray device_scales(stream, s_x.data(), s_x.size() * sizeof(float));
  refusal = bitlinear_cuda_quantize_activations(x.data(), c.dtype, c.M, c.K, operands.eps,
                                                c.act_bits, device_q.data(),
                                                device_scales.data<float>(), nullptr, stream.get());
  if (refusal != nullptr) return refusal + where;
  stream.download(q.data(), device_q.data(), q.size());
  stream.download(s_x.data(), device_scales.data(), s_x.size() * sizeof(float));
  selftest::Buffer tokens(c.dtype, c.M * c.K);
  const DeviceArray device_tokens(stream, tokens.data(), tokens.size());
  refusal =
      bitlinear_cuda_expand_activations(device_q.data(), c.act_bits, device_scales.data<float>(),
                                        c.M, c.K, device_tokens.data(), c.dtype, stream.get());
  if (refusal != nullptr) return refusal + where;
  stream.download(tokens.data(), device_tokens.data(), tokens.size());
  for (int64_t m = 0; m < c.M; ++m) {
    const selftest::Expected expected(operands, m);
    for (int64_t k = 0; k < c.K; ++k) {
      const int64_t i = m * c.K + k;
      if (q_value(i) != expected.q(k)) return "q in order, " + std::to_string(k) + where;
      if (!same_value(tokens, i, static_cast<float>(q_value(i)) * s_x[m])) {
        return "token " + std::to_string(m) + " is expanded to " + std::to_string(tokens.get(i)) +
               where;
      }
    }
    if (!expected.is_scale(s_x[m])) return "s_x in order is " + std::to_string(s_x[m]) + where;
  }
  return "";
}

}  // namespace cuda
}  // namespace bitlinear
