// The peak rates of a machine: int8 multiply-adds with one instruction set, and reading memory.
// peaks.py compiles this with the flags of a kernel variant and calls it from as many threads as
// the kernel has.
//
// The compiler must neither hoist work out of a loop nor delete it: `opaque` hides a value from the
// optimiser, `keep` uses one. Neither is an instruction.
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define VECTOR_REGISTER "v"
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VECTOR_REGISTER "w"
#else
#error "peaks.cpp knows the vector registers of x86-64 and of AArch64 only"
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace {

template <class Vector>
inline void opaque(Vector& value) {
  asm volatile("" : "+" VECTOR_REGISTER(value));
}

template <class Vector>
inline void keep(const Vector& value) {
  asm volatile("" : : VECTOR_REGISTER(value));
}

// The fastest instruction of this set that multiplies bytes and adds the products to a sum. kSums
// independent sums: more than latency times throughput, and few enough for the registers.
#if defined(__AVX512VNNI__)
struct Dot {
  using Vector = __m512i;
  static constexpr int kSums = 20;
  static constexpr int kMultiplyAdds = 64;
  static Vector add(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
};
#elif defined(__AVXVNNI__)
struct Dot {
  using Vector = __m256i;
  static constexpr int kSums = 12;
  static constexpr int kMultiplyAdds = 32;
  static Vector add(Vector sum, Vector a, Vector b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
};
#elif defined(__AVX2__)
struct Dot {
  using Vector = __m256i;
  static constexpr int kSums = 12;
  static constexpr int kMultiplyAdds = 32;
  static Vector add(Vector sum, Vector a, Vector b) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
  }
};
#elif defined(__SSE2__)
struct Dot {
  using Vector = __m128i;
  static constexpr int kSums = 12;
  static constexpr int kMultiplyAdds = 8;  // of 16-bit numbers: SSE2 multiplies no bytes
  static Vector add(Vector sum, Vector a, Vector b) {
    return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
  }
};
#elif defined(__ARM_FEATURE_MATMUL_INT8)
struct Dot {
  using Vector = int32x4_t;
  static constexpr int kSums = 24;
  static constexpr int kMultiplyAdds = 32;
  static Vector add(Vector sum, Vector a, Vector b) {
    return vmmlaq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Dot {
  using Vector = int32x4_t;
  static constexpr int kSums = 24;
  static constexpr int kMultiplyAdds = 16;
  static Vector add(Vector sum, Vector a, Vector b) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
};
#elif defined(__ARM_NEON)
struct Dot {
  using Vector = int16x8_t;
  static constexpr int kSums = 24;
  static constexpr int kMultiplyAdds = 8;
  static Vector add(Vector sum, Vector a, Vector b) {
    return vmlal_high_s8(sum, vreinterpretq_s8_s16(a), vreinterpretq_s8_s16(b));
  }
};
#else
// No dot product of bytes: only the bandwidth bounds the times.
struct Dot {
  using Vector = uint64_t __attribute__((vector_size(16)));
  static constexpr int kSums = 1;
  static constexpr int kMultiplyAdds = 0;
  static Vector add(Vector sum, Vector, Vector) { return sum; }
};
#endif

using Words = uint64_t __attribute__((vector_size(VECTOR_BYTES)));
constexpr int kStreams = 8;

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

#if defined(__AMX_INT8__)
// Tile numbers are part of the instruction. The process must have permission to use tiles: loading
// the kernel variant has asked for it.
EXPORTED int64_t multiply_adds(int64_t steps) {
  struct alignas(64) {
    uint8_t palette = 1, reserved[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  // As in amx_int8.cpp: GCC 12 declares that it reads eight bytes.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_release();
  return steps * 4 * (16 * 16 * 64);
}
#else
// Returns the number of multiply-adds; 0 if the instruction set has none for bytes.
EXPORTED int64_t multiply_adds(int64_t steps) {
  Dot::Vector a = {}, b = {};
  Dot::Vector sums[Dot::kSums] = {};
  opaque(a);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < Dot::kSums; ++i) {
      opaque(b);  // otherwise one product would serve every sum
      sums[i] = Dot::add(sums[i], a, b);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < Dot::kSums; ++i) keep(sums[i]);
  return steps * Dot::kSums * Dot::kMultiplyAdds;
}
#endif

// Reads `bytes` (rounded down to a multiple of 512) at `data`, 64-byte aligned, `passes` times.
// Returns the number of bytes read.
EXPORTED int64_t read_bytes(const void* data, int64_t bytes, int64_t passes) {
  const Words* const words = static_cast<const Words*>(data);
  const int64_t count = bytes / 512 * (512 / VECTOR_BYTES);
  Words sums[kStreams] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    asm volatile("" : : : "memory");  // every pass reads again
    for (int64_t first = 0; first < count; first += kStreams) {
#pragma GCC unroll 8
      for (int i = 0; i < kStreams; ++i) sums[i] += words[first + i];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kStreams; ++i) keep(sums[i]);
  return passes * count * VECTOR_BYTES;
}
