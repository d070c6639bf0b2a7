// Compares a kernel variant with a reference: the numerics of README.md, in the plainest code.
//
// check_case runs one shape with one kind of data and returns the first difference. selftest.cpp
// runs over 100 cases after every build; the native driver in tests/ runs thousands, under
// sanitizers and emulators. Every buffer is a heap block of exactly the promised size, so a
// sanitizer sees each byte that is read or written beyond it. The operands and the expected results
// also serve the CUDA kernels (cuda/selftest.cuh).
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "../abi.h"
#include "../float_environment.h"
#include "../portability.h"
#include "decode.h"
#include "expected.h"
#include "operands.h"

namespace bitlinear {
namespace selftest {

// Checks the functions for training on row m of x, as weights and then as activations. Returns ""
// or the first difference.
inline std::string check_training(const bitlinear_kernel_table& kernels, const Operands& operands,
                                  int64_t m, const Expected& expected) {
  const Case& c = operands.shape;
  const std::string where = " of row " + std::to_string(m) + " at " + describe(c);
  Buffer row(c.dtype, c.K);
  memcpy(row.data(), operands.x.data() + m * static_cast<int64_t>(row.size()), row.size());
  std::vector<float> values(static_cast<size_t>(c.K));
  double sum = 0.0;
  for (int64_t k = 0; k < c.K; ++k) {
    values[k] = row.get(k);
    sum += fabs(static_cast<double>(values[k]));
  }
  const Subnormals mode = c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve;
  const double got_sum = [&] {
    const SubnormalScope scope(mode);
    return kernels.sum_magnitudes(row.data(), c.dtype, c.K);
  }();
  const bool sum_is_right = isfinite(sum) ? fabs(got_sum - sum) <= 1e-12 * sum
                            : isnan(sum)  ? isnan(got_sum)
                                          : isinf(got_sum);
  if (!sum_is_right) return "sum_magnitudes is " + std::to_string(got_sum) + where;

  // Any scale would do here; a layer's is max(mean, eps).
  const float s_w = static_cast<float>(sum / static_cast<double>(c.K)) + operands.eps;
  std::vector<uint8_t> packed(static_cast<size_t>(operands.row_bytes), 99);
  Buffer w(c.dtype, c.K), w_scale(c.dtype, 1);
  const float scale = c.data == Data::kSubnormal ? 0x1p-140f : 0.3f;
  w_scale.set(0, scale);
  std::vector<int8_t> q(static_cast<size_t>(c.K * bitlinear_rows_per_token(c.act_bits)), 99);
  float s_x = 0.0f;
  {
    const SubnormalScope scope(mode);
    kernels.pack_row(row.data(), c.dtype, c.K, s_w, packed.data());
    kernels.expand_row(packed.data(), c.K, scale, w.data(), c.dtype);
    kernels.quantize_in_order(row.data(), c.dtype, c.K, operands.eps, c.act_bits, q.data(), &s_x);
  }
  for (int64_t k = 0; k < 4 * operands.row_bytes; ++k) {
    const int code = packed[k / 4] >> (6 - 2 * (k % 4)) & 3;
    const volatile float quotient = k < c.K ? values[k] / s_w : 0.0f;
    const float rounded = nearbyintf(quotient);
    const float wanted = isnan(rounded) ? 0 : rounded > 1 ? 1 : rounded < -1 ? -1 : rounded;
    if (code - 1 != wanted || (k < c.K && w.get(k) != w_scale.get(0) * wanted)) {
      return "weight " + std::to_string(k) + " is packed as " + std::to_string(code) + where;
    }
  }

  for (int64_t k = 0; k < c.K; ++k) {
    int16_t value = q[k];
    if (c.act_bits == 16) memcpy(&value, q.data() + 2 * k, sizeof(value));
    if (value != expected.q(k)) return "q in order, " + std::to_string(k) + where;
  }
  if (!expected.is_scale(s_x)) return "s_x in order is " + std::to_string(s_x) + where;
  return "";
}

// Returns "" or the first difference.
inline std::string check_case(const bitlinear_kernel_table& kernels, const Case& c, uint64_t seed) {
  Operands operands(c, seed);

  const int64_t q_stride = bitlinear_q_stride(&kernels, c.K);
  const int64_t token_rows = bitlinear_rows_per_token(c.act_bits);
  std::vector<int8_t> q(static_cast<size_t>(c.M * token_rows * q_stride), 99);
  std::vector<float> s_x(static_cast<size_t>(c.M));
  std::vector<int32_t> q_sum(static_cast<size_t>(c.M * token_rows));
  const int64_t element = c.dtype == BITLINEAR_F32 ? 4 : 2;
  const bitlinear_prologue prologue = operands.prologue();
  std::vector<float> floats(bitlinear_is_plain(&prologue) ? 0 : static_cast<size_t>(c.K));
  const Subnormals mode = c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve;
  for (int64_t m = 0; m < c.M; ++m) {
    const SubnormalScope scope(mode);
    kernels.quantize_row(&prologue, operands.x.data() + m * operands.x_width() * element, c.dtype,
                         c.K, operands.eps, c.act_bits, floats.data(),
                         q.data() + m * token_rows * q_stride, q_stride, &s_x[m],
                         &q_sum[m * token_rows]);
  }
  Buffer y(c.dtype, c.M * c.N);
  const float is_intact = 12345.0f;
  for (int64_t i = 0; i < c.M * c.N; ++i) y.set(i, is_intact);
  bitlinear_task task = {};
  task.act_bits = c.act_bits;
  task.q = q.data();
  task.q_stride = q_stride;
  task.s_x = s_x.data();
  task.q_sum = q_sum.data();
  task.M = c.M * token_rows;
  task.w = operands.w.data();
  task.row_bytes = operands.row_bytes;
  task.s_w = operands.s_w.data();
  task.s_w_stride = operands.s_w_stride();
  task.group_bytes = c.group_size / 4;
  task.bias = c.bias ? operands.bias.data() : nullptr;
  task.bias_dtype = c.dtype;
  task.residual = c.residual ? operands.residual.data() : nullptr;
  task.residual_dtype = c.dtype;
  task.n_begin = c.n_begin;
  task.n_end = c.N;
  task.y = y.data();
  task.y_stride = c.N;
  task.y_dtype = c.dtype;
  // Exactly the promised length and alignment.
  const int64_t scratch_bytes = kernels.scratch_bytes(task.M, operands.row_bytes, task.group_bytes);
  void* scratch = allocate_aligned(64, static_cast<size_t>(scratch_bytes));
  if (scratch == nullptr) return "no memory";
  memset(scratch, 99, static_cast<size_t>(scratch_bytes));
  task.scratch = scratch;
  {
    const SubnormalScope scope(mode);
    kernels.linear(&task);
  }
  free_aligned(scratch);

  Buffer never_written(c.dtype, 1);
  never_written.set(0, is_intact);
  for (int64_t m = 0; m < c.M; ++m) {
    const Expected expected(operands, m);
    for (int64_t k = 0; k < c.K; ++k) {
      const int64_t block = k / 4 / kernels.block;
      const int64_t position =
          block * 4 * kernels.block + k % 4 * kernels.block + k / 4 % kernels.block;
      int32_t value = 0;
      for (int64_t r = 0; r < token_rows; ++r) {
        const int32_t part = q[(m * token_rows + r) * q_stride + position];
        if (part == -128) return "a q is -128 at " + describe(c);
        value = BITLINEAR_HIGH_WEIGHT * value + part;
      }
      if (value != expected.q(k)) {
        return "q[" + std::to_string(m) + ", " + std::to_string(k) +
               "] = " + std::to_string(value) + ", expected " + std::to_string(expected.q(k)) +
               " at " + describe(c);
      }
    }
    for (int64_t n = 0; n < c.N; ++n) {
      const float want = n < c.n_begin ? never_written.get(0) : expected.y(m, n);
      const std::string difference = compare_output(c, m, n, y.get(m * c.N + n), want);
      if (!difference.empty()) return difference;
    }
    if (m >= 2 || !bitlinear_is_plain(&prologue)) continue;  // of those, one row is not finite
    const std::string difference = check_training(kernels, operands, m, expected);
    if (!difference.empty()) return difference;
  }
  if (seed % 4 != 0) return "";  // the references below take long
  const std::string difference = check_head(kernels, c, seed);
  return difference.empty() ? check_attention(kernels, c, seed) : difference;
}

}  // namespace selftest
}  // namespace bitlinear
