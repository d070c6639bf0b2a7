// The check of packed weights: arithmetic on the bytes, such as an average over buffers, makes
// codes that no kernel can read.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>

#include "weight_facts.h"

// Calls a function before each fork(), and one after it in both processes.
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
namespace bitlinear {
inline void around_forks(void (*before)(), void (*after)()) {
  pthread_atfork(before, after, after);
}
}  // namespace bitlinear
#else
namespace bitlinear {
inline void around_forks(void (*)(), void (*)()) {}
}  // namespace bitlinear
#endif

namespace bitlinear {

// Weights whose codes are valid. A call checks those that are not among them.
struct Checked {};
inline WeightFacts<Checked>& checked_weights() {
  static auto* const weights = [] {
    around_forks([] { checked_weights().lock(); }, [] { checked_weights().unlock(); });
    return new WeightFacts<Checked>;  // outlives every thread
  }();
  return *weights;
}

// The position of the first byte of a row that holds a code 3, or a weight other than 0 past K; -1
// if there is none.
inline int64_t find_invalid_byte(const uint8_t* row, int64_t K) {
  const int64_t bytes = (K + 3) / 4;
  int64_t b = 0;
  // Code 3 has both bits of its pair set.
  for (; b + 8 <= bytes; b += 8) {
    uint64_t word;
    memcpy(&word, row + b, sizeof(word));
    if ((word & word >> 1 & 0x5555555555555555u) != 0) break;
  }
  for (; b < bytes; ++b) {
    if ((row[b] & row[b] >> 1 & 0x55) != 0) return b;
  }
  const int unused = (1 << 2 * (4 * bytes - K)) - 1;
  return ((row[bytes - 1] ^ 0x55) & unused) != 0 ? bytes - 1 : -1;
}

// Raises ValueError for the first invalid byte of the weights, with the message of packing.py.
[[noreturn]] inline void report_invalid_byte(uint8_t byte, int64_t n, int64_t b, int64_t K) {
  const bool has_code3 = (byte & byte >> 1 & 0x55) != 0;
  const char* const digits = "0123456789abcdef";
  TORCH_CHECK_VALUE(!has_code3, "bitlinear: w_packed holds the invalid code 3, first in byte ", b,
                    " of row ", n, " (0x", digits[byte >> 4], digits[byte & 15],
                    "): the bytes were changed (averaged, for example) or damaged, or are not in "
                    "packed format version 1");
  TORCH_CHECK_VALUE(false, "bitlinear: w_packed has weights beyond in_features = ", K,
                    ": it was packed for a layer with up to ", 4 * ((K + 3) / 4));
}

}  // namespace bitlinear
