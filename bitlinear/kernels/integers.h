// Integer arithmetic that the CPU and the CUDA kernels share. nvcc lets device code call these
// functions, because CUDA is compiled with --expt-relaxed-constexpr.
#pragma once

#include <stdint.h>

#include <type_traits>

namespace bitlinear {

// a / b, rounded up. The result has the wider of both types.
template <class A, class B>
constexpr std::common_type_t<A, B> ceil_div(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T{a} + T{b} - 1) / T{b};
}

template <class A, class B>
constexpr std::common_type_t<A, B> minimum(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T{a} < T{b} ? T{a} : T{b};
}

// The first multiple of `unit` that is not below `size`.
constexpr int64_t round_up(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }

}  // namespace bitlinear
