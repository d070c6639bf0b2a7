// Runs the parts of a call on torch's own threads.
//
// at::parallel_for is a template around `#pragma omp parallel`: clang would compile it into calls
// of a second runtime, which ignores torch.set_num_threads and competes with torch's for the cores.
// Calling GNU's entry points, which libgomp, Intel's and LLVM's runtimes export, binds to the
// runtime that torch has loaded, with any compiler. Without such a runtime the work is serial, and
// the doctor reports it.
//
// at::parallel_for remains for a torch with a thread pool of its own, and for Windows, where no
// runtime exports GNU's entry points. There it needs the compiler's OpenMP flag (../flags.py), and
// its threads are not those of torch.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#include "shared_parts.h"

// A test defines these, to run on Linux what Windows and macOS run.
#if !AT_PARALLEL_OPENMP || defined(_WIN32)
#define BITLINEAR_USE_PARALLEL_FOR
#elif defined(__APPLE__)
#define BITLINEAR_FIND_GOMP
#endif

#if defined(BITLINEAR_FIND_GOMP)
#include <dlfcn.h>
#elif !defined(BITLINEAR_USE_PARALLEL_FOR)
// Weak: null in a process without such a runtime.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data,
                                                    unsigned num_threads, unsigned flags);
extern "C" __attribute__((weak)) void GOMP_barrier();
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();
#endif

namespace bitlinear {

template <class Body>
void run_parts(int64_t parts, const Body& body, int64_t first = 0, int64_t step = 1) {
  for (int64_t part = first; part < parts; part += step) body(part);
}

#if defined(BITLINEAR_USE_PARALLEL_FOR)

template <class First, class Second>
void run_on_threads(int64_t first_parts, const First& first, int64_t second_parts,
                    const Second& second) {
  at::parallel_for(0, first_parts, 1,
                   [&](int64_t begin, int64_t end) { run_parts(end, first, begin); });
  // Numbers of workers, because the compiler's runtime and torch's may count other threads.
  SharedParts shared(second_parts, at::get_num_threads());
  at::parallel_for(0, shared.workers(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) shared.run(thread, second);
  });
}

#else

struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  void (*barrier)();
  int (*thread_num)();
  int (*num_threads)();

  bool is_complete() const { return parallel && barrier && thread_num && num_threads; }
};

#if defined(BITLINEAR_FIND_GOMP)
// A library of macOS finds a symbol only in libraries that it names by their paths, and torch alone
// knows the path of its runtime. So the entry points are looked up in what torch depends on.
inline OpenMp find_openmp() {
  Dl_info torch = {};
  if (dladdr(reinterpret_cast<void*>(&at::get_num_threads), &torch) == 0) return {};
  void* const library = dlopen(torch.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return {};
  return {reinterpret_cast<decltype(OpenMp::parallel)>(dlsym(library, "GOMP_parallel")),
          reinterpret_cast<decltype(OpenMp::barrier)>(dlsym(library, "GOMP_barrier")),
          reinterpret_cast<decltype(OpenMp::thread_num)>(dlsym(library, "omp_get_thread_num")),
          reinterpret_cast<decltype(OpenMp::num_threads)>(dlsym(library, "omp_get_num_threads"))};
}
#else
inline OpenMp find_openmp() {
  return {GOMP_parallel, GOMP_barrier, omp_get_thread_num, omp_get_num_threads};
}
#endif

inline const OpenMp& openmp() {
  static const OpenMp found = find_openmp();
  return found;
}

template <class First, class Second>
void run_on_threads(int64_t first_parts, const First& first, int64_t second_parts,
                    const Second& second) {
  const OpenMp& runtime = openmp();
  if (!runtime.is_complete()) {
    run_parts(first_parts, first);
    run_parts(second_parts, second(0));
    return;
  }
  struct Region {
    const OpenMp& runtime;
    int64_t first_parts;
    const First& first;
    SharedParts second_parts;
    const Second& second;
  } region{runtime, first_parts, first, {second_parts, at::get_num_threads()}, second};
  runtime.parallel(
      [](void* data) {
        Region& shared = *static_cast<Region*>(data);
        // There can be more or fewer threads than parts.
        const int64_t thread = shared.runtime.thread_num();
        const int64_t threads = shared.runtime.num_threads();
        if (shared.first_parts > 0) {
          run_parts(shared.first_parts, shared.first, thread, threads);
          shared.runtime.barrier();
        }
        shared.second_parts.run(thread, shared.second);
      },
      // 0: as many threads as torch.set_num_threads set. libgomp ends its threads and starts new
      // ones if the number changes between calls.
      &region, 0, 0);
}

#endif

// Runs first(part) for every part in [0, first_parts) on torch's intra-op threads, the same number
// of parts on each; when all are done, runs the parts in [0, second_parts), each on whichever
// thread is free: a thread that gets one asks second(thread) for a function, and calls it with its
// parts. `thread` is below second_parts and below at::get_num_threads(). Serial inside another
// parallel region, as at::parallel_for is. No function may throw.
template <class First, class Second>
void parallel_by_thread(int64_t first_parts, const First& first, int64_t second_parts,
                        const Second& second) {
  // A single part runs here: waking threads for it would cost more.
  if (first_parts == 1) {
    first(0);
    first_parts = 0;
  }
  if ((first_parts == 0 && second_parts <= 1) || at::get_num_threads() <= 1 ||
      at::in_parallel_region()) {
    run_parts(first_parts, first);
    run_parts(second_parts, second(0));
    return;
  }
  run_on_threads(first_parts, first, second_parts, second);
}

// The same, if the parts need to know no thread.
template <class First, class Second>
void parallel(int64_t first_parts, const First& first, int64_t second_parts, const Second& second) {
  parallel_by_thread(first_parts, first, second_parts,
                     [&](int64_t) -> const Second& { return second; });
}

}  // namespace bitlinear
