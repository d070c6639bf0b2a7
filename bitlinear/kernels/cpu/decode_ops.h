// The operators of a decoding step on the CPU: the products of a model's head, and the attention of
// one token. What they compute is in decode.h.
#pragma once

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../abi.h"
#include "../arguments.h"
#include "call.h"
#include "heuristics.h"
#include "parallel.h"

namespace bitlinear {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls rows(begin, count, m) for parts of the rows of a weight of N rows and every token m. A part
// of the weight stays in the L2 cache for all tokens.
template <class Rows>
void for_each_part(int64_t M, int64_t N, int64_t row_bytes, const Rows& rows) {
  constexpr int64_t kBytesPerPart = 128 * 1024;
  const int64_t threads = at::get_num_threads();
  const int64_t parts = pays_for_threads(M * N * row_bytes, threads)
                            ? std::min(N, std::max(threads, N * row_bytes / kBytesPerPart))
                            : 1;
  const auto multiply = [&](int64_t part) {
    const Range n = part_of(N, 1, part, parts);
    for (int64_t m = 0; m < M; ++m) rows(n.begin, n.end - n.begin, m);
  };
  parallel(0, multiply, parts, multiply);
}

inline Tensor int8_product(const Tensor& q, const Tensor& s_x, const Tensor& w,
                           const Tensor& w_scale, ScalarType dtype) {
  check_int8_product(q, s_x, w, w_scale, dtype);
  const bitlinear_kernel_table* const kernels = active_table();
  const int64_t M = s_x.numel(), N = w.size(0), K = w.size(1);
  c10::DimVector shape(q.sizes());
  shape.back() = N;
  Tensor y = Tensor(at::detail::empty_cpu(shape, dtype));
  if (M == 0 || N == 0) return y;
  const Tensor tokens = contiguous(q, "q"), token_scales = contiguous(s_x, "s_x");
  const Tensor weight = contiguous(w, "w"), scales = contiguous(w_scale, "w_scale");
  const int8_t* const rows = weight.const_data_ptr<int8_t>();
  const int16_t* const q_data = tokens.const_data_ptr<int16_t>();
  const float* const s_x_data = token_scales.const_data_ptr<float>();
  const float* const s_w = scales.const_data_ptr<float>();
  char* const out = static_cast<char*>(y.data_ptr());
  const int64_t y_bytes = y.element_size();
  for_each_part(M, N, K, [&](int64_t n, int64_t count, int64_t m) {
    kernels->int8_rows(rows + n * K, count, K, q_data + m * K, s_x_data[m], s_w + n,
                       out + (m * N + n) * y_bytes, kernel_dtype(dtype));
  });
  return y;
}

inline Tensor bf16_product(const Tensor& x, const Tensor& w) {
  check_bf16_product(x, w);
  const bitlinear_kernel_table* const kernels = active_table();
  const int64_t N = w.size(0), K = w.size(1), M = K == 0 ? 0 : x.numel() / K;
  c10::DimVector shape(x.sizes());
  shape.back() = N;
  Tensor y = Tensor(at::detail::empty_cpu(shape, ScalarType::BFloat16));
  if (K == 0) return y.zero_();
  if (M == 0 || N == 0) return y;
  const Tensor tokens = contiguous(x, "x").to(ScalarType::Float), weight = contiguous(w, "w");
  const uint16_t* const rows = static_cast<const uint16_t*>(weight.const_data_ptr());
  const float* const x_data = tokens.const_data_ptr<float>();
  uint16_t* const out = static_cast<uint16_t*>(y.data_ptr());
  for_each_part(M, N, 2 * K, [&](int64_t n, int64_t count, int64_t m) {
    kernels->bf16_rows(rows + n * K, count, K, x_data + m * K, out + m * N + n, BITLINEAR_BF16);
  });
  return y;
}

// Raises NotImplementedError for what the reference can compute, and the kernel cannot.
inline void check_attention_support(const Tensor& query, const Tensor& keys, const Tensor& values,
                                    const OptionalTensor& mask) {
  const int64_t L = keys.size(2), D = keys.size(3);
  TORCH_CHECK_NOT_IMPLEMENTED(
      query.scalar_type() == ScalarType::BFloat16 && D > 0 && D <= BITLINEAR_MAX_HEAD &&
          D % BITLINEAR_HEAD_UNIT == 0 &&
          !(mask.has_value() && mask->scalar_type() != ScalarType::Bool),
      "bitlinear: on a CPU, attend computes bfloat16, with a mask of bool and a size that is a "
      "multiple of 16 of at most ",
      BITLINEAR_MAX_HEAD, ", but query is ", dtype_name(query.scalar_type()), " of shape ",
      query.sizes());
  for (const Tensor* const tensor : {&keys, &values}) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        L == 0 || (tensor->stride(3) == 1 && (L == 1 || tensor->stride(2) == D)),
        "bitlinear: on a CPU, the tokens of a head must lie one behind the "
        "other in keys and values, but strides are ",
        tensor->strides());
  }
}

inline Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values,
                     const OptionalTensor& mask, double scale, const OptionalTensor& position,
                     const OptionalTensor& new_key, const OptionalTensor& new_value,
                     const OptionalTensor& cos, const OptionalTensor& sin) {
  check_attend(query, keys, values, mask, position, new_key, new_value, cos, sin);
  check_attention_support(query, keys, values, mask);
  const int64_t B = keys.size(0), G = keys.size(1), L = keys.size(2), D = keys.size(3);
  const int64_t H = query.size(1), R = H / G;
  const bool is_new = new_key.has_value();
  const int64_t at = position.has_value()
                         ? *reinterpret_cast<const int64_t*>(checked_data(*position, "position"))
                         : L - 1;
  TORCH_CHECK_VALUE(!is_new || (at >= 0 && at < L), "bitlinear: position must be between 0 and ",
                    L - 1, ", but it is ", at);
  const bitlinear_kernel_table* const kernels = active_table();
  Tensor y = Tensor(at::detail::empty_cpu({B, 1, H, D}, ScalarType::BFloat16));
  if (L == 0) return y.zero_();

  const auto data = [](const Tensor& tensor, const char* name) {
    return reinterpret_cast<const uint16_t*>(checked_data(tensor, name));
  };
  const auto operand = [&](const Tensor& tensor, const char* name) {
    const Tensor checked = contiguous(tensor, name);
    return is_new ? unshared(checked, keys, values) : checked;
  };
  const Tensor q = operand(query, "query");
  const uint16_t* const q_data = data(q, "query");
  Tensor k, v, cosines, sines, visible;
  const uint16_t *k_data = nullptr, *v_data = nullptr, *cos_data = nullptr, *sin_data = nullptr;
  if (is_new) {
    k = operand(*new_key, "new_key"), v = operand(*new_value, "new_value");
    cosines = operand(*cos, "cos"), sines = operand(*sin, "sin");
    k_data = data(k, "new_key"), v_data = data(v, "new_value");
    cos_data = data(cosines, "cos"), sin_data = data(sines, "sin");
  }
  if (mask.has_value()) visible = contiguous(*mask, "mask");
  const uint8_t* const mask_data =
      visible.defined() ? static_cast<const uint8_t*>(visible.const_data_ptr()) : nullptr;
  uint16_t* const all_keys = const_cast<uint16_t*>(data(keys, "keys"));
  uint16_t* const all_values = const_cast<uint16_t*>(data(values, "values"));
  if (is_new) prepare_write(keys, values);  // nothing is refused after it
  uint16_t* const out = static_cast<uint16_t*>(y.data_ptr());

  // Each part has its results and its queries, rotated.
  constexpr int64_t kTokens = BITLINEAR_ATTENTION_TOKENS;
  const int64_t chunks = ceil_div(L, kTokens), parts = B * G * chunks;
  const int64_t floats = R * (D + 2), part_bytes = floats * int64_t{sizeof(float)} + R * D * 2;
  Scratch scratch(parts * (part_bytes + int64_t{sizeof(bitlinear_attention)}));
  auto* const tasks = reinterpret_cast<bitlinear_attention*>(scratch.data());
  char* const memory = reinterpret_cast<char*>(tasks + parts);
  const auto compute_part = [&](int64_t part) {
    const int64_t chunk = part % chunks, head = part / chunks, b = head / G, g = head % G;
    const int64_t first = chunk * kTokens;
    uint16_t* const key = all_keys + b * keys.stride(0) + g * keys.stride(1);
    uint16_t* const value = all_values + b * values.stride(0) + g * values.stride(1);
    float* const results = reinterpret_cast<float*>(memory + part * part_bytes);
    bitlinear_attention& task = tasks[part];
    task.q = q_data + head * R * D;
    if (is_new) {
      uint16_t* const rotated = reinterpret_cast<uint16_t*>(results + floats);
      const int64_t angle = cosines.size(0) == 1 ? 0 : b * D;
      kernels->rotate_heads(task.q, R, D, cos_data + angle, sin_data + angle, rotated);
      task.q = rotated;
      if (at / kTokens == chunk) {
        kernels->rotate_heads(k_data + head * D, 1, D, cos_data + angle, sin_data + angle,
                              key + at * D);
        memcpy(value + at * D, v_data + head * D, static_cast<size_t>(D) * 2);
      }
    }
    task.rows = R;
    task.head_size = D;
    task.keys = key + first * D;
    task.values = value + first * D;
    task.count = std::min(kTokens, L - first);
    task.mask =
        mask_data == nullptr ? nullptr : mask_data + first + (visible.size(0) == 1 ? 0 : b * L);
    task.scale = static_cast<float>(scale);
    task.totals = results;
    task.largest = results + R * D;
    task.sums = task.largest + R;
    kernels->attend(&task);
  };
  const auto join = [&](int64_t row) {
    kernels->join_parts(tasks + row / R * chunks, chunks, row % R, out + row * D);
  };
  if (pays_for_threads(B * G * L * D * 4, at::get_num_threads())) {
    parallel(parts, compute_part, B * H, join);
  } else {
    run_parts(parts, compute_part);
    run_parts(B * H, join);
  }
  return y;
}

}  // namespace bitlinear
