// Plain C++ over arrays of 16 bytes, for every machine; what the compiler makes of the loops with
// the baseline instruction set is what it is.
#include "gemm_lookup.h"
#include "vocabulary.h"

namespace bitlinear {
namespace {

struct Scalar {
  static constexpr int64_t kWidth = 16;
  static constexpr int kGemvTokens = 1;  // no registers to keep more in
  static constexpr int kGemvRows = 1;
  static constexpr int64_t kGemmTokens = 3;
  static constexpr int64_t kGemvOverhead = 0;
  static constexpr int kLookupVectors = 1;

  struct Bytes {
    uint8_t byte[kWidth];
  };

  static Bytes load(const uint8_t* p) { return load_partial(p, kWidth); }
  static Bytes load_partial(const uint8_t* p, int64_t n) {
    Bytes w = {};
    memcpy(w.byte, p, static_cast<size_t>(n));
    return w;
  }
  static void store(uint8_t* p, Bytes a) { memcpy(p, a.byte, sizeof(a.byte)); }
  static Bytes load_plane(const int8_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
  struct PlaneSum {
    // 16-bit lanes are what a baseline instruction set multiplies well. A block adds 4 planes of at
    // most 2 * 127 = 254 to a lane: 32 * 4 * 254 = 32512 < 2^15.
    static constexpr int64_t kFlush = 32;
    int16_t sums16[kWidth] = {};
    int32_t sum = 0;
    void add(Bytes w, const Bytes (&q)[4]) {
      for (int i = 0; i < kWidth; ++i) {
        int value = sums16[i];
        for (int j = 0; j < 4; ++j) {
          value += (w.byte[i] >> (6 - 2 * j) & 3) * static_cast<int8_t>(q[j].byte[i]);
        }
        sums16[i] = static_cast<int16_t>(value);
      }
    }
    void flush() {
      for (int i = 0; i < kWidth; ++i) {
        sum += sums16[i];
        sums16[i] = 0;
      }
    }
    int32_t lanes() const { return sum; }
  };

  static int32_t reduce(int32_t sum) { return sum; }
  static void reduce4(int32_t a, int32_t b, int32_t c, int32_t d, int32_t* out) {
    const int32_t sums[4] = {a, b, c, d};
    memcpy(out, sums, sizeof(sums));
  }

  static void floats_from_fp16(const uint16_t* half, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_from_fp16(half[i]);
  }
  static void fp16_from_floats(const float* floats, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = fp16_from_float(floats[i]);
  }

  static float float_from_fp16(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // Read as fp32 the exponent is 112 too small; the product is exact, subnormals included.
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
  }

  static uint16_t fp16_from_float(float x) {
    const uint32_t bits = float_bits(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 rounds up to infinity
    if (magnitude < 0x38800000u) {
      // Subnormal: an addition with 0.5 as the larger operand rounds at 2^-24, ties to even.
      return sign | static_cast<uint16_t>(float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u);
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xFFFu + odd) >> 13);
  }
};

constexpr bitlinear_kernel_table kTable = make_table<Scalar, LookupGemm<Scalar>>("scalar");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
