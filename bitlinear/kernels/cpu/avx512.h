// Shared by the AVX-512 vocabularies.
#pragma once

#include "vnni.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Zmm : X86Half {
  static constexpr int64_t kWidth = 64;
  static constexpr int kGemvTokens = 4;
  static constexpr int kGemvRows = 4;
  using Bytes = __m512i;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load_plane(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load_partial(const uint8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p);
  }
  static void store(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
  static int32_t split_planes(const int8_t* row, int8_t* q) {
    // Both permutations make columns of a 4 x 4 matrix rows: of bytes within each 128-bit lane, and
    // of 32-bit elements across them. Then lane j has 16 values of plane j.
    const Bytes bytes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const Bytes elements = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    Bytes parts[4], sum = zero();
    for (int i = 0; i < 4; ++i) {
      const Bytes part = load_plane(row + 64 * i);
      sum = dot(sum, broadcast_byte(1), part);
      parts[i] = _mm512_permutexvar_epi32(elements, _mm512_shuffle_epi8(part, bytes));
    }
    const Bytes a = _mm512_shuffle_i32x4(parts[0], parts[1], 0x44);
    const Bytes b = _mm512_shuffle_i32x4(parts[0], parts[1], 0xEE);
    const Bytes c = _mm512_shuffle_i32x4(parts[2], parts[3], 0x44);
    const Bytes d = _mm512_shuffle_i32x4(parts[2], parts[3], 0xEE);
    const auto store_plane = [&](int j, Bytes plane) { _mm512_storeu_si512(q + 64 * j, plane); };
    store_plane(0, _mm512_shuffle_i32x4(a, c, 0x88));
    store_plane(1, _mm512_shuffle_i32x4(a, c, 0xDD));
    store_plane(2, _mm512_shuffle_i32x4(b, d, 0x88));
    store_plane(3, _mm512_shuffle_i32x4(b, d, 0xDD));
    return reduce(sum);
  }
  static Bytes load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(int32_t* p, Bytes a) { _mm512_storeu_si512(p, a); }

  static Bytes choose(const int32_t* p, Bytes indices) {
    return _mm512_permutexvar_epi32(indices, load_ints(p));
  }
  static Bytes low_half(Bytes a) { return bitwise_and(a, broadcast_int(0xFFFF)); }
  static Bytes high_half(Bytes a) { return shift_right<16>(a); }
  static Bytes add_products(Bytes sum, Bytes lanes, Bytes factors) {
    // A lane fits 16 bits, and the upper half of a factor is 0.
    BITLINEAR_GCC_ASM(sum = _mm512_dpwssd_epi32(sum, lanes, factors),
                      "vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(lanes), "vm"(factors));
    return sum;
  }

  static Bytes zero() { return _mm512_setzero_si512(); }
  static Bytes broadcast_byte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static Bytes bitwise_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  // Bits of one byte enter the next one: mask the result.
  static Bytes shift_bytes_right(Bytes a, int bits) { return _mm512_srli_epi16(a, bits); }
  static Bytes broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Bytes dot(Bytes sum, Bytes codes, Bytes plane) {
    // The intrinsic makes GCC move a register for every sum in a nested loop: 40 % slower at M = 4.
    BITLINEAR_GCC_ASM(sum = _mm512_dpbusd_epi32(sum, codes, plane),
                      "vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "vm"(plane));
    return sum;
  }
  template <int kBits>
  static Bytes shift_right(Bytes a) {
    return _mm512_srai_epi32(a, kBits);
  }
  static Bytes add(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
  static int32_t reduce(Bytes a) { return _mm512_reduce_add_epi32(a); }
  static void reduce4(Bytes a, Bytes b, Bytes c, Bytes d, int32_t* out) {
    const Bytes ab = add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Bytes cd = add(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const Bytes four = add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out),
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  // A 16 x 16 matrix of 32-bit elements.
  static void transpose(Bytes (&rows)[16]) {
    Bytes quads[16];  // quads[4g + c], 128-bit lane l: column 4l + c of rows 4g .. 4g + 3
    for (int g = 0; g < 16; g += 4) {
      const Bytes a = _mm512_unpacklo_epi32(rows[g], rows[g + 1]);
      const Bytes b = _mm512_unpackhi_epi32(rows[g], rows[g + 1]);
      const Bytes c = _mm512_unpacklo_epi32(rows[g + 2], rows[g + 3]);
      const Bytes d = _mm512_unpackhi_epi32(rows[g + 2], rows[g + 3]);
      quads[g] = _mm512_unpacklo_epi64(a, c);
      quads[g + 1] = _mm512_unpackhi_epi64(a, c);
      quads[g + 2] = _mm512_unpacklo_epi64(b, d);
      quads[g + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int c = 0; c < 4; ++c) {
      const Bytes a = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x44);
      const Bytes b = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xEE);
      const Bytes d = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x44);
      const Bytes e = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xEE);
      rows[c] = _mm512_shuffle_i32x4(a, d, 0x88);
      rows[4 + c] = _mm512_shuffle_i32x4(a, d, 0xDD);
      rows[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
      rows[12 + c] = _mm512_shuffle_i32x4(b, e, 0xDD);
    }
  }
};

}  // namespace
}  // namespace bitlinear
