// Shared by the operators on the CPU: the active kernel variant, scratch memory, and rows that are
// divided among threads.
#pragma once

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <atomic>

#include "../abi.h"
#include "heuristics.h"
#include "parallel.h"

namespace bitlinear {

inline std::atomic<const bitlinear_kernel_table*> active_kernels{nullptr};

inline const bitlinear_kernel_table* active_table() {
  const bitlinear_kernel_table* table = active_kernels.load(std::memory_order_acquire);
  TORCH_CHECK(table != nullptr,
              "bitlinear: no CPU kernel is active: run python -m bitlinear.doctor");
  return table;
}

constexpr int64_t kAlignment = 64;  // of torch's allocations, of cache lines and of vectors

// The distance between the memory of one thread and the next, `bytes` each, if there are several.
// Prefetchers run ahead of a thread that reads and writes with a stride, and fetch lines that the
// next thread writes, again and again. On a Zen 4, gaps of 16 KB end that in part, of 64 KB wholly;
// without one a product of 768 x 384 and 128 tokens took 176 instead of 116 us while its two cores
// were far from each other.
inline int64_t spaced(int64_t bytes, int64_t threads) {
  constexpr int64_t kGap = 64 * 1024;
  return bytes == 0 ? 0 : round_up(bytes, kAlignment) + (threads > 1 ? kGap : 0);
}

// The scratch memory of one call: on the stack if it is small, as for one token.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > int64_t{sizeof(stack_)})
      heap_ = at::detail::empty_cpu({bytes}, at::ScalarType::Byte);
  }
  char* data() { return heap_.defined() ? static_cast<char*>(heap_.data_ptr()) : stack_; }

 private:
  alignas(kAlignment) char stack_[16 * 1024];
  at::TensorBase heap_;
};

// Calls `row` for each row, on all threads if there is enough work.
template <class Row>
void for_each_row(int64_t rows, int64_t columns, const Row& row) {
  constexpr int64_t kParallelValues = 32 * 1024;
  const int64_t parts =
      std::min(rows, rows * columns < kParallelValues ? 1 : int64_t{4} * at::get_num_threads());
  parallel(0, row, parts, [&](int64_t part) {
    const Range range = part_of(rows, 1, part, parts);
    for (int64_t i = range.begin; i < range.end; ++i) row(i);
  });
}

}  // namespace bitlinear
