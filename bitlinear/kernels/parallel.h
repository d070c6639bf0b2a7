// Who runs the parts of a call: torch's own threads.
#pragma once

#include <ATen/Parallel.h>

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

}  // namespace bitlinear
