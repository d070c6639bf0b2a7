// Deals the parts of a call to threads that are not equally fast: each has a range of its own, and
// then takes what is left of the others'. The same thread begins with the same parts in every call,
// so it finds small weights in its cache.
#pragma once

#include <stdint.h>

#include <atomic>
#include <optional>
#include <type_traits>

#include "../integers.h"

namespace bitlinear {

class SharedParts {
 public:
  SharedParts(int64_t parts, int64_t threads)
      : parts_(parts), workers_(minimum(parts, threads)), ranges_(minimum(workers_, kMaxRanges)) {
    for (int64_t i = 0; i < ranges_; ++i) next_[i].part.store(begin(i), std::memory_order_relaxed);
  }

  // The number of threads that can have a part.
  int64_t workers() const { return workers_; }

  // Runs parts until none is left. Every thread of a call calls it; together they run each part
  // once. A thread below workers() that gets a part asks body_of(thread) for a function, and calls
  // it with each of its parts.
  template <class BodyOf>
  void run(int64_t thread, const BodyOf& body_of) {
    if (thread >= workers_) return;
    std::optional<std::decay_t<decltype(body_of(thread))>> body;
    for (int64_t i = 0; i < ranges_; ++i) {
      const int64_t range = (thread + i) % ranges_;
      const int64_t end = begin(range + 1);
      for (;;) {
        const int64_t part = next_[range].part.fetch_add(1, std::memory_order_relaxed);
        if (part >= end) break;
        if (!body) body.emplace(body_of(thread));
        (*body)(part);
      }
    }
  }

 private:
  static constexpr int64_t kMaxRanges = 64;
  struct alignas(64) Next {  // a cache line each
    std::atomic<int64_t> part;
  };

  int64_t begin(int64_t range) const { return range * parts_ / ranges_; }

  int64_t parts_, workers_, ranges_;
  Next next_[kMaxRanges];
};

}  // namespace bitlinear
