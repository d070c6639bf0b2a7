// Shared by the x86 vocabularies: F16C conversions, and 256-bit vectors of bytes.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "../portability.h"

namespace bitlinear {
namespace {

struct X86Half {
  static void floats_from_fp16(const uint16_t* half, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
    }
    for (; i < count; ++i) out[i] = BITLINEAR_CVTSH_SS(half[i]);
  }

  static void fp16_from_floats(const float* floats, int64_t count, uint16_t* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight);
    }
    for (; i < count; ++i) out[i] = BITLINEAR_CVTSS_SH(floats[i]);
  }
};

struct X86Ymm : X86Half {
  static constexpr int64_t kWidth = 32;
  using Bytes = __m256i;

  static Bytes load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Bytes load_plane(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  using Ints = Bytes;
  static Ints load_ints(const int32_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
  static void store_ints(int32_t* p, Ints a) { store(reinterpret_cast<uint8_t*>(p), a); }
  static Ints broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
  static Ints choose(const int32_t* p, Ints indices) {
    return _mm256_permutevar8x32_epi32(load_ints(p), indices);
  }
  static Ints low_half(Ints a) { return _mm256_and_si256(a, _mm256_set1_epi32(0xFFFF)); }
  static Ints high_half(Ints a) { return _mm256_srai_epi32(a, 16); }
  static Bytes load_partial(const uint8_t* p, int64_t n) {
    alignas(32) uint8_t bytes[32] = {};
    memcpy(bytes, p, static_cast<size_t>(n));
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  static void store(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static int32_t split_planes(const int8_t* row, int8_t* q) {
    // Columns of bytes become rows within each 128-bit lane; then 64-bit element j has 8 values of
    // plane j.
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i elements = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i parts[4], sum = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      const __m256i part = load_plane(row + 32 * i);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), part);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      parts[i] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(part, bytes), elements);
    }
    const __m256i a = _mm256_unpacklo_epi64(parts[0], parts[1]);
    const __m256i b = _mm256_unpackhi_epi64(parts[0], parts[1]);
    const __m256i c = _mm256_unpacklo_epi64(parts[2], parts[3]);
    const __m256i d = _mm256_unpackhi_epi64(parts[2], parts[3]);
    const auto store_plane = [&](int j, __m256i plane) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 32 * j), plane);
    };
    store_plane(0, _mm256_permute2x128_si256(a, c, 0x20));
    store_plane(1, _mm256_permute2x128_si256(b, d, 0x20));
    store_plane(2, _mm256_permute2x128_si256(a, c, 0x31));
    store_plane(3, _mm256_permute2x128_si256(b, d, 0x31));
    return reduce(sum);
  }
  static int32_t reduce(__m256i sum) {
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }
  static void reduce4(__m256i a, __m256i b, __m256i c, __m256i d, int32_t* out) {
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out),
        _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
  }
  // An 8 x 8 matrix of 32-bit elements.
  static void transpose(Bytes (&rows)[8]) {
    Bytes quads[8];  // quads[4g + c], 128-bit lane l: column 4l + c of rows 4g .. 4g + 3
    for (int g = 0; g < 8; g += 4) {
      const Bytes a = _mm256_unpacklo_epi32(rows[g], rows[g + 1]);
      const Bytes b = _mm256_unpackhi_epi32(rows[g], rows[g + 1]);
      const Bytes c = _mm256_unpacklo_epi32(rows[g + 2], rows[g + 3]);
      const Bytes d = _mm256_unpackhi_epi32(rows[g + 2], rows[g + 3]);
      quads[g] = _mm256_unpacklo_epi64(a, c);
      quads[g + 1] = _mm256_unpackhi_epi64(a, c);
      quads[g + 2] = _mm256_unpacklo_epi64(b, d);
      quads[g + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x20);
      rows[4 + c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x31);
    }
  }
};

}  // namespace
}  // namespace bitlinear
