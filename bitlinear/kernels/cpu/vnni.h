// Sums of codes times activations with vpdpbusd, which multiplies unsigned by signed bytes and adds
// every four products into an int32 lane. There are no 16-bit sums, so nothing has to be flushed.
#pragma once

#include <stdint.h>
#include <string.h>

#include "vocabulary.h"

namespace bitlinear {
namespace {

// Isa provides zero(), dot(sum, codes, plane), bitwise_and(a, b), shift_bytes_right(a, bits),
// broadcast_byte(value), broadcast_int(value), and on int32 lanes shift_right<bits>(a), add(a, b),
// reduce(a), reduce4(...).
template <class Isa>
struct Vnni : Isa {
  static constexpr bool kPackedPanels = false;
  using Bytes = typename Isa::Bytes;

  static Bytes codes(Bytes w, int shift) {
    return Isa::bitwise_and(Isa::shift_bytes_right(w, shift), Isa::broadcast_byte(3));
  }

  // Four consecutive activations, copied to every lane.
  static Bytes broadcast_quad(const int8_t* p) {
    int32_t quad;
    memcpy(&quad, p, sizeof(quad));
    return Isa::broadcast_int(quad);
  }

  using Ints = Bytes;
  static int32_t as_start(int32_t value) { return value; }
  static int32_t as_factor(int32_t value) { return value & 0xFFFF; }

  // Planes whose codes are 4 times too large have a sum of their own, for it to be shifted once.
  struct GroupSum {
    // A block adds 2 planes * 4 products * 2 codes * 4 * 127 = 8128 times a factor below 2^15 to
    // by4: 8 * 8128 * 32767 < 2^31.
    static constexpr int64_t kFlush = 8;
    Ints by4 = Isa::zero(), by1 = Isa::zero();
    void add(Bytes w, const Bytes (&q)[4], Ints start, Ints factors) {
      const Bytes mask4 = Isa::broadcast_byte(0x0C), mask1 = Isa::broadcast_byte(0x03);
      // GCC would load w in three instructions. A Zen 4 loads one vector of 64 bytes a cycle: up to
      // 4 tokens took 6 to 9 % longer.
      BITLINEAR_GCC_ASM((void)w, "" : "+v"(w));
      const Bytes high = Isa::shift_bytes_right(w, 4);
      Ints of_block4 = Isa::dot(Isa::zero(), Isa::bitwise_and(high, mask4), q[0]);
      Ints of_block1 = Isa::dot(start, Isa::bitwise_and(high, mask1), q[1]);
      of_block4 = Isa::dot(of_block4, Isa::bitwise_and(w, mask4), q[2]);
      of_block1 = Isa::dot(of_block1, Isa::bitwise_and(w, mask1), q[3]);
      by4 = Isa::add_products(by4, of_block4, factors);
      by1 = Isa::add_products(by1, of_block1, factors);
    }
    void flush() {
      by1 = Isa::add(by1, Isa::template shift_right<2>(by4));
      by4 = Isa::zero();
    }
    Ints lanes() const { return by1; }
  };

  struct PlaneSum {
    static constexpr int64_t kFlush = kNeverFlush;
    Bytes by64 = Isa::zero(), by16 = Isa::zero(), by4 = Isa::zero(), by1 = Isa::zero();
    void add(Bytes w, const Bytes (&q)[4]) {
      by64 = Isa::dot(by64, Isa::bitwise_and(w, Isa::broadcast_byte(0xC0)), q[0]);
      by16 = Isa::dot(by16, Isa::bitwise_and(w, Isa::broadcast_byte(0x30)), q[1]);
      by4 = Isa::dot(by4, Isa::bitwise_and(w, Isa::broadcast_byte(0x0C)), q[2]);
      by1 = Isa::dot(by1, Isa::bitwise_and(w, Isa::broadcast_byte(0x03)), q[3]);
    }
    void flush() {}
    Bytes lanes() const {
      // Every lane is a multiple of its plane's factor: the shifts are exact.
      const Bytes high =
          Isa::add(Isa::template shift_right<6>(by64), Isa::template shift_right<4>(by16));
      return Isa::add(high, Isa::add(Isa::template shift_right<2>(by4), by1));
    }
  };
};

}  // namespace
}  // namespace bitlinear
