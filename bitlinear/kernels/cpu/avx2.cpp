// AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds pairs, saturating at 16 bits. The
// 16-bit sums are flushed to 32 bits before they can reach 2^15.
#include "gemm_lookup.h"
#include "gemm_lookup_groups.h"
#include "vocabulary.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Avx2 : X86Ymm {
  static constexpr int kGemvTokens = 4;
  static constexpr int kGemvRows = 4;
  // Fitted on one core of a Xeon VM; "Refit a constant" in ../README.md has the command.
  static constexpr int64_t kGemmTokens = 12;
  static constexpr int64_t kGemvOverhead = 0;
  static constexpr int kLookupVectors = 1;
  static constexpr int64_t kGroupGemmTokens = 12;

  static __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

  // After one shift by 4 the masks 0x0C and 0x03 serve all planes, so the only factors are 4 and 1.
  struct PlaneSum {
    // A block adds 2 planes of at most 2 codes * 8 * 127 = 2032 to by4: 8 * 2 * 2032 = 32512 <
    // 2^15.
    static constexpr int64_t kFlush = 8;
    __m256i by4 = _mm256_setzero_si256();
    __m256i by1 = _mm256_setzero_si256();
    __m256i sum = _mm256_setzero_si256();
    void add(Bytes w, const Bytes (&q)[4]) {
      const __m256i mask4 = _mm256_set1_epi8(0x0C);
      const __m256i mask1 = _mm256_set1_epi8(0x03);
      const Bytes high = _mm256_srli_epi16(w, 4);
      by4 = _mm256_add_epi16(
          by4, _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(high, mask4), q[0]),
                                _mm256_maddubs_epi16(_mm256_and_si256(w, mask4), q[2])));
      by1 = _mm256_add_epi16(
          by1, _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(high, mask1), q[1]),
                                _mm256_maddubs_epi16(_mm256_and_si256(w, mask1), q[3])));
    }
    void flush() {
      // Every lane of by4 is a multiple of 4: the shift is exact.
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_srai_epi32(widen(by4), 2), widen(by1)));
      by4 = by1 = _mm256_setzero_si256();
    }
    __m256i lanes() const { return sum; }
  };

  static int32_t as_start(int32_t value) { return value & 0xFFFF; }
  static int32_t as_factor(int32_t value) {
    return static_cast<int32_t>((static_cast<uint32_t>(value) & 0xFFFFu) * 0x10001u);
  }

  // The sums of a block are in lanes of 16 bits, two of them for each lane of 32.
  struct GroupSum {
    static constexpr int64_t kFlush = kNeverFlush;
    Ints sum = _mm256_setzero_si256();
    void add(Bytes w, const Bytes (&q)[4], Ints start, Ints factors) {
      const __m256i mask4 = _mm256_set1_epi8(0x0C);
      const __m256i mask1 = _mm256_set1_epi8(0x03);
      const Bytes high = _mm256_srli_epi16(w, 4);
      const __m256i by4 =
          _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(high, mask4), q[0]),
                           _mm256_maddubs_epi16(_mm256_and_si256(w, mask4), q[2]));
      const __m256i by1 =
          _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(high, mask1), q[1]),
                           _mm256_maddubs_epi16(_mm256_and_si256(w, mask1), q[3]));
      // Every lane of by4 is a multiple of 4: the shift is exact.
      const __m256i block =
          _mm256_add_epi16(by1, _mm256_add_epi16(_mm256_srai_epi16(by4, 2), start));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(block, factors));
    }
    void flush() {}
    Ints lanes() const { return sum; }
  };
};

constexpr bitlinear_kernel_table kTable =
    make_table<Avx2, LookupGemm<Avx2>, GroupProduct<Avx2, GroupLookupGemm<Avx2>>>("avx2");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
