// Checks what a decoding step needs beside products of ternary weights.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

#include "../abi.h"
#include "../float_environment.h"
#include "operands.h"

namespace bitlinear {
namespace selftest {

// Checks the functions for the head of a model: up to c.N rows of int8 and of bf16. Returns "" or
// the first difference.
inline std::string check_head(const bitlinear_kernel_table& kernels, const Case& c, uint64_t seed) {
  const int64_t N = seed % 16 == 0 && c.K < 100 ? c.N : 1 + c.N % 5;
  Random random{seed * 2654435761u + 2};
  const bool is_largest = c.data == Data::kLargestSums;
  const float special = c.data == Data::kNonFinite ? NAN : 0.0f;
  const auto integer = [&](int32_t largest) {
    if (is_largest) return largest;
    const int32_t value = static_cast<int32_t>(random.next() % (2 * largest + 1)) - largest;
    return c.data == Data::kZero ? 0 : value;
  };
  std::vector<int8_t> w(static_cast<size_t>(N * c.K));
  std::vector<int16_t> q(static_cast<size_t>(c.K));
  std::vector<float> s_w(static_cast<size_t>(N)), x(static_cast<size_t>(c.K));
  Buffer halves(BITLINEAR_BF16, N * c.K);
  const float size = c.data == Data::kSubnormal ? 0x1p-64f : 1.0f;  // of products, its square
  for (int64_t i = 0; i < N * c.K; ++i) {
    w[i] = static_cast<int8_t>(integer(127));
    halves.set(i, random.uniform() * size);
  }
  for (int64_t k = 0; k < c.K; ++k) {
    q[k] = static_cast<int16_t>(integer(32385));
    x[k] = random.uniform() * size;
  }
  x[random.next() % c.K] += special;
  for (float& scale : s_w) scale = 0.01f + fabsf(random.uniform());
  const float s_x = 0.003f + special;

  Buffer y(c.dtype, N), z(c.dtype, N), want(c.dtype, 1);
  {
    const SubnormalScope scope(c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve);
    kernels.int8_rows(w.data(), N, c.K, q.data(), s_x, s_w.data(), y.data(), c.dtype);
    kernels.bf16_rows(reinterpret_cast<const uint16_t*>(halves.data()), N, c.K, x.data(), z.data(),
                      c.dtype);
  }
  const std::vector<float> half_floats = floats_of(halves);
  for (int64_t n = 0; n < N; ++n) {
    int64_t sum = 0;
    float sums[64] = {};
    for (int64_t k = 0; k < c.K; ++k) {
      sum += int64_t{w[n * c.K + k]} * q[k];
      // Volatile: contraction would merge the two roundings.
      const volatile float product = half_floats[n * c.K + k] * x[k];
      sums[k % 64] = sums[k % 64] + product;
    }
    for (int half = 32; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    const volatile float scale = s_x * s_w[n];
    const struct {
      const char* name;
      float value, got;
    } results[] = {{"int8_rows", static_cast<float>(sum) * scale, y.get(n)},
                   {"bf16_rows", sums[0], z.get(n)}};
    for (const auto& result : results) {
      want.set(0, result.value);
      const float expected = want.get(0);
      if (isnan(expected) ? isnan(result.got) : memcmp(&result.got, &expected, 4) == 0) continue;
      return std::string(result.name) + "[" + std::to_string(n) +
             "] = " + std::to_string(result.got) + ", expected " + std::to_string(expected) +
             " at " + describe(c);
    }
  }
  return "";
}

// Checks the functions for attention, with up to 150 keys in parts and a few queries. Returns "" or
// the first difference.
inline std::string check_attention(const bitlinear_kernel_table& kernels, const Case& c,
                                   uint64_t seed) {
  Random random{seed * 2654435761u + 3};
  const int64_t sizes[] = {16, 64, 128, 144, BITLINEAR_MAX_HEAD};
  const int64_t K = c.K < 150 ? c.K : 150, D = sizes[seed / 4 % 5];
  const int64_t rows = 1 + static_cast<int64_t>(seed / 4 % 6);
  Buffer x(BITLINEAR_BF16, rows * D), q(BITLINEAR_BF16, rows * D);
  Buffer keys(BITLINEAR_BF16, K * D), values(BITLINEAR_BF16, K * D), y(BITLINEAR_BF16, D);
  Buffer cos(BITLINEAR_BF16, D), sin(BITLINEAR_BF16, D), rounded(BITLINEAR_BF16, 1);
  std::vector<uint8_t> mask(static_cast<size_t>(K), 1);
  for (Buffer* const buffer : {&x, &keys, &values, &cos, &sin}) {
    const int64_t count = static_cast<int64_t>(buffer->size() / 2);
    for (int64_t i = 0; i < count; ++i) buffer->set(i, random.uniform() * 2.0f);
  }
  if (c.data == Data::kNonFinite) x.set(random.next() % D, NAN);  // in query 0
  if (c.data == Data::kLargestSums) {
    for (int64_t i = 0; i < K * D; ++i) keys.set(i, keys.get(i) * 64.0f);
  }
  for (uint8_t& shown : mask) shown = c.data == Data::kZero ? 0 : random.next() % 3 != 0;
  const bool is_masked = seed / 8 % 2 == 0 || c.data == Data::kZero;

  const Subnormals mode = c.flushes_subnormals ? Subnormals::kFlush : Subnormals::kPreserve;
  const auto bits = [](Buffer& buffer) { return reinterpret_cast<uint16_t*>(buffer.data()); };
  const auto round = [&](float value) {
    rounded.set(0, value);
    return rounded.get(0);
  };
  const auto is_near = [](double got, double want, double limit) {
    return isnan(want) ? isnan(got) : fabs(got - want) <= limit;
  };
  {
    const SubnormalScope scope(mode);
    kernels.rotate_heads(bits(x), rows, D, bits(cos), bits(sin), bits(q));
  }
  for (int64_t i = 0; i < rows * D; ++i) {
    const int64_t d = i % D;
    const float other = d < D / 2 ? -x.get(i + D / 2) : x.get(i - D / 2);
    const float want = round(round(x.get(i) * cos.get(d)) + round(other * sin.get(d)));
    if (!is_near(q.get(i), want, 0.0)) return "rotate_heads " + std::to_string(i) + describe(c);
  }

  const int64_t step = BITLINEAR_ATTENTION_TOKENS, parts = (K + step - 1) / step;
  std::vector<bitlinear_attention> tasks(static_cast<size_t>(parts));
  std::vector<float> results(static_cast<size_t>(parts * rows * (D + 2)));
  const float scale = 0.2f;
  for (int64_t p = 0; p < parts; ++p) {
    float* const totals = results.data() + p * rows * (D + 2);
    const int64_t first = p * step, count = K - first < step ? K - first : step;
    tasks[p] = {bits(q),
                rows,
                D,
                bits(keys) + first * D,
                bits(values) + first * D,
                count,
                is_masked ? mask.data() + first : nullptr,
                scale,
                totals + rows * D,
                totals + rows * D + rows,
                totals};
    const SubnormalScope scope(mode);
    kernels.attend(&tasks[p]);
  }
  const std::vector<float> key_floats = floats_of(keys), value_floats = floats_of(values);
  const std::vector<float> queries = floats_of(q);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const query = queries.data() + r * D;
    {
      const SubnormalScope scope(mode);
      kernels.join_parts(tasks.data(), parts, r, bits(y));
    }
    std::vector<double> scores(static_cast<size_t>(K)), want(static_cast<size_t>(D));
    double largest = -HUGE_VAL, sum = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t d = 0; d < D; ++d) scores[k] += double{query[d]} * key_floats[k * D + d];
      scores[k] = is_masked && mask[k] == 0 ? -HUGE_VAL : scores[k] * scale;
      largest = scores[k] > largest ? scores[k] : largest;
    }
    for (int64_t k = 0; k < K; ++k) {
      if (is_masked && mask[k] == 0) continue;
      const double weight = exp(scores[k] - largest);
      sum += weight;
      for (int64_t d = 0; d < D; ++d) want[d] += weight * value_floats[k * D + d];
    }
    for (int64_t d = 0; d < D; ++d) {
      const double exact = sum == 0.0 ? 0.0 : want[d] / sum;
      // bf16 keeps 8 bits. The error of a score is a relative one of its weight.
      const double limit = fabs(exact) / 256 + (c.data == Data::kLargestSums ? 4e-3 : 2e-5);
      if (is_near(y.get(d), exact, limit)) continue;
      return "attention[" + std::to_string(r) + ", " + std::to_string(d) +
             "] = " + std::to_string(y.get(d)) + ", expected " + std::to_string(exact) + " at " +
             describe(c);
    }
  }
  return "";
}

}  // namespace selftest
}  // namespace bitlinear
