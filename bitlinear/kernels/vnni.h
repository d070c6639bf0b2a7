// The sums of codes times activations where one instruction (vpdpbusd) multiplies unsigned by
// signed bytes and adds the products of every four into an int32 lane. No 16-bit sums, nothing to
// flush.
#pragma once

#include <stdint.h>

#include "table.h"

namespace bitlinear {
namespace {

// Isa provides zero(), dot(sum, codes, plane), both(a, b) (bitwise and), bytes_of(value), and on
// int32 lanes shift_right<bits>(a), add(a, b), reduce(a).
template <class Isa>
struct Vnni : Isa {
  using Bytes = typename Isa::Bytes;

  struct CodeSum {
    static constexpr int64_t kFlush = kNeverFlush;
    Bytes sum = Isa::zero();
    void add(Bytes codes, Bytes plane) { sum = Isa::dot(sum, codes, plane); }
    void flush() {}
    int32_t total() const { return Isa::reduce(sum); }
  };

  struct PlaneSum {
    static constexpr int64_t kFlush = kNeverFlush;
    CodeSum by64, by16, by4, by1;
    void add(Bytes w, const Bytes (&q)[4]) {
      by64.add(Isa::both(w, Isa::bytes_of(0xC0)), q[0]);
      by16.add(Isa::both(w, Isa::bytes_of(0x30)), q[1]);
      by4.add(Isa::both(w, Isa::bytes_of(0x0C)), q[2]);
      by1.add(Isa::both(w, Isa::bytes_of(0x03)), q[3]);
    }
    void flush() {}
    int32_t total() const {
      // Every lane is a multiple of its plane's factor: the shifts are exact.
      const Bytes high =
          Isa::add(Isa::template shift_right<6>(by64.sum), Isa::template shift_right<4>(by16.sum));
      const Bytes low = Isa::add(Isa::template shift_right<2>(by4.sum), by1.sum);
      return Isa::reduce(Isa::add(high, low));
    }
  };
};

}  // namespace
}  // namespace bitlinear
