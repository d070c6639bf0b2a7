// Runs the parts of a call on torch's own threads.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

// The entry points of GNU's OpenMP runtime, which libgomp, Intel's and LLVM's runtimes export on
// Linux. at::parallel_for is a template around `#pragma omp parallel`: clang would compile it into
// calls of a second runtime, which ignores torch.set_num_threads and competes with torch's for the
// cores. Calling the entry point binds to the runtime that torch has loaded, with any compiler. The
// symbols are weak: without such a runtime the work is serial, and the doctor reports it.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data,
                                                    unsigned num_threads, unsigned flags);
extern "C" __attribute__((weak)) void GOMP_barrier();
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();

namespace bitlinear {

template <class Body>
void run_parts(int64_t parts, const Body& body, int64_t first = 0, int64_t step = 1) {
  for (int64_t part = first; part < parts; part += step) body(part);
}

// Runs first(part) for every part in [0, first_parts) on torch's intra-op threads; when all are
// done, runs second(part) for every part in [0, second_parts). Serial inside another parallel
// region, as at::parallel_for is. Neither function may throw.
template <class First, class Second>
void parallel(int64_t first_parts, const First& first, int64_t second_parts, const Second& second) {
  // A single part runs here: waking threads for it would cost more.
  if (first_parts == 1) {
    first(0);
    first_parts = 0;
  }
  if ((first_parts == 0 && second_parts <= 1) || at::get_num_threads() <= 1 ||
      at::in_parallel_region() || GOMP_parallel == nullptr || GOMP_barrier == nullptr) {
    run_parts(first_parts, first);
    run_parts(second_parts, second);
    return;
  }
  struct Region {
    int64_t first_parts;
    const First& first;
    int64_t second_parts;
    const Second& second;
  } region{first_parts, first, second_parts, second};
  GOMP_parallel(
      [](void* data) {
        const Region& shared = *static_cast<Region*>(data);
        // There can be more or fewer threads than parts.
        const int64_t thread = omp_get_thread_num();
        const int64_t threads = omp_get_num_threads();
        if (shared.first_parts > 0) {
          run_parts(shared.first_parts, shared.first, thread, threads);
          GOMP_barrier();
        }
        run_parts(shared.second_parts, shared.second, thread, threads);
      },
      // 0: as many threads as torch.set_num_threads set. libgomp ends its threads and starts new
      // ones if the number changes between calls.
      &region, 0, 0);
}

}  // namespace bitlinear
