// Threads: how the work of one call is divided, and who runs the parts.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

// The entry point of GNU's OpenMP runtime, which libgomp, Intel's and LLVM's runtimes export on
// Linux. at::parallel_for is a template around `#pragma omp parallel`: clang would compile it into
// calls of a second runtime, which ignores torch.set_num_threads and competes with torch's for the
// cores. Calling the entry point binds to the runtime that torch has loaded, with any compiler.
// Weak: without one the work is serial, and the doctor says so.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data,
                                                    unsigned num_threads, unsigned flags);
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();

namespace bitlinear {

// Runs body(part) for every part in [0, parts) on torch's intra-op threads; serially inside another
// parallel region, as at::parallel_for does. `body` must not throw.
template <class Body>
void parallel(int64_t parts, const Body& body) {
  if (parts <= 1 || at::get_num_threads() <= 1 || at::in_parallel_region() ||
      GOMP_parallel == nullptr) {
    for (int64_t part = 0; part < parts; ++part) body(part);
    return;
  }
  struct Region {
    const Body& body;
    int64_t parts;
  } region{body, parts};
  GOMP_parallel(
      [](void* data) {
        const Region& shared = *static_cast<Region*>(data);
        // The team may be larger or smaller than the number of parts.
        for (int64_t part = omp_get_thread_num(); part < shared.parts;
             part += omp_get_num_threads()) {
          shared.body(part);
        }
      },
      // 0: as many as torch.set_num_threads said. A team size that changes from call to call makes
      // libgomp dismiss its threads and start new ones.
      &region, 0, 0);
}

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` nearly equal parts of [0, size), cut at multiples of `unit`.
inline Range part_of(int64_t size, int64_t unit, int64_t index, int64_t parts) {
  const int64_t units = (size + unit - 1) / unit;
  return {std::min(size, index * units / parts * unit),
          std::min(size, (index + 1) * units / parts * unit)};
}

// The output (M, N) is cut into tokens x rows rectangles, one per thread.
struct Grid {
  int64_t tokens, rows;
};

// Boundaries fall between tiles and between the cache lines of the output.
constexpr int64_t kTokenUnit = 8;
constexpr int64_t kRowUnit = 32;
// Below this many packed bytes times tokens a fork costs more than it saves.
constexpr int64_t kSerialBytes = 128 * 1024;

// Rows first: every thread then reads its own share of the weights, once. Tokens are divided where
// there are too few rows.
inline Grid choose_grid(int64_t M, int64_t N, int64_t row_bytes, int64_t threads) {
  if (threads <= 1 || M * N * row_bytes < kSerialBytes) return {1, 1};
  const int64_t rows = std::min(threads, (N + kRowUnit - 1) / kRowUnit);
  const int64_t tokens = std::min(threads / rows, (M + kTokenUnit - 1) / kTokenUnit);
  return {tokens, rows};
}

inline int64_t choose_quantize_parts(int64_t M, int64_t K, int64_t threads) {
  return M * K < kSerialBytes ? 1 : std::min(M, threads);
}

}  // namespace bitlinear
