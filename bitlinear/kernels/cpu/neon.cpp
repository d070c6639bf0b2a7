// NEON of Armv8.0, which has no dot product: smlal multiplies eight signed bytes and adds the
// products to 16-bit sums, which are flushed to 32 bits before they can reach 2^15.
//
// Not timed: no Arm machine was available. Instructions per 64 packed bytes and token, which are
// 256 multiplications (`python -m scripts.dev.instruction_mix`): the GEMV takes 62, of which 32 are
// smlal and 20 masks and shifts; the lookup form takes 24, of which 9.5 are loads, 8 additions and
// 4 extractions of indices. (With a load for each index it took 23, of which 12.5 were loads.)
#include "neon.h"
#include "gemm_lookup.h"
#include "gemm_lookup_groups.h"
#include "vocabulary.h"

namespace bitlinear {
namespace {

struct Neon : NeonBytes {
  static constexpr int kGemvTokens = 2;
  static constexpr int kGemvRows = 4;
  // Fitted to the instructions of whole calls, for rows of 16 to 1024 packed bytes (`python -m
  // scripts.dev.instruction_count`).
  static constexpr int64_t kGemmTokens = 9;
  static constexpr int64_t kGemvOverhead = 0;
  static constexpr int kLookupVectors = 2;
  static constexpr int64_t kGroupGemmTokens = 9;

  struct PlaneSum {
    // A lane takes two products of every plane: a block adds 2 * 8 * 127 = 2032 to by4 and 3 * 2 *
    // 2 * 127 = 1524 to by1, and 16 * 2032 = 32512 < 2^15.
    static constexpr int64_t kFlush = 16;
    int16x8_t by4 = vdupq_n_s16(0);
    int16x8_t by1 = vdupq_n_s16(0);
    int32x4_t sum = vdupq_n_s32(0);
    void add(Bytes w, const Bytes (&q)[4]) {
      const Bytes mask = vdupq_n_u8(0x03);
      by1 = add_products(by1, vshrq_n_u8(w, 6), q[0]);
      by1 = add_products(by1, vandq_u8(vshrq_n_u8(w, 4), mask), q[1]);
      by4 = add_products(by4, vandq_u8(w, vdupq_n_u8(0x0C)), q[2]);
      by1 = add_products(by1, vandq_u8(w, mask), q[3]);
    }
    void flush() {
      // Every lane of by4 is a multiple of 4: the shift is exact.
      sum = vpadalq_s16(vpadalq_s16(sum, vshrq_n_s16(by4, 2)), by1);
      by4 = by1 = vdupq_n_s16(0);
    }
    int32x4_t lanes() const { return sum; }

   private:
    static int16x8_t multiply_add(int16x8_t sums, int8x16_t a, int8x16_t b) {
      return vmlal_high_s8(vmlal_s8(sums, vget_low_s8(a), vget_low_s8(b)), a, b);
    }
    static int16x8_t add_products(int16x8_t sums, Bytes codes, Bytes plane) {
      // With intrinsics both compilers add register moves: 70 instructions for a block of four rows
      // (GCC 12) or 88 (clang 14), where 63 are enough.
      BITLINEAR_ASM(
          sums = multiply_add(sums, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(plane)),
          "smlal %0.8h, %1.8b, %2.8b\n\tsmlal2 %0.8h, %1.16b, %2.16b" : "+w"(sums) : "w"(codes),
          "w"(plane));
      return sums;
    }
  };

  // The lanes of PlaneSum mix bytes of both halves of a vector.
  struct GroupSum {
    static constexpr int64_t kFlush = kNeverFlush;
    Ints sum = vdupq_n_s32(0);
    void add(Bytes w, const Bytes (&q)[4], Ints start, Ints factors) {
      const Bytes mask = vdupq_n_u8(0x03);
      int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);
      const auto add_plane = [&](Bytes codes, Bytes plane) {
        const int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_u8(plane);
        low = vmlal_s8(low, vget_low_s8(a), vget_low_s8(b));
        high = vmlal_high_s8(high, a, b);
      };
      add_plane(vshrq_n_u8(w, 6), q[0]);
      add_plane(vandq_u8(vshrq_n_u8(w, 4), mask), q[1]);
      add_plane(vandq_u8(vshrq_n_u8(w, 2), mask), q[2]);
      add_plane(vandq_u8(w, mask), q[3]);
      const Ints block = vaddq_s32(start, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
      sum = vmlaq_s32(sum, block, factors);
    }
    void flush() {}
    Ints lanes() const { return sum; }
  };
};

constexpr bitlinear_kernel_table kTable =
    make_table<Neon, LookupGemm<Neon>, GroupProduct<Neon, GroupLookupGemm<Neon>>>("neon");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
