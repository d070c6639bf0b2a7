// The mode in which a thread preserves subnormal numbers or flushes them to zero.
// torch.set_flush_denormal(True) makes the calling thread flush them; threads that it starts
// inherit the mode.
#pragma once

#include "portability.h"

namespace bitlinear {

enum class Subnormals { kPreserve, kFlush };

// Sets the mode of this thread until the end of the scope. A compiler can move float operations
// across both ends of the scope, so the code in it has to be a call that is not inlined.
class SubnormalScope {
 public:
  explicit SubnormalScope(Subnormals mode) : previous_(read_float_control()) {
    write_float_control(mode == Subnormals::kPreserve ? previous_ & ~kFlushBits
                                                      : previous_ | kFlushBits);
  }
  ~SubnormalScope() { write_float_control(previous_); }
  SubnormalScope(const SubnormalScope&) = delete;
  SubnormalScope& operator=(const SubnormalScope&) = delete;

 private:
  const decltype(read_float_control()) previous_;
};

// Wraps a kernel function, so that it preserves subnormal numbers on every thread.
template <auto kFunction>
struct PreservingSubnormals;

template <class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct PreservingSubnormals<kFunction> {
  static Result run(Arguments... arguments) {
    if ((read_float_control() & kFlushBits) == 0) return call(arguments...);
    const SubnormalScope scope(Subnormals::kPreserve);
    return call(arguments...);
  }

 private:
  BITLINEAR_NOINLINE static Result call(Arguments... arguments) { return kFunction(arguments...); }
};

}  // namespace bitlinear
