// AVX512-VNNI: Intel from Cascade Lake / Ice Lake on, AMD from Zen 4 on.
#include <immintrin.h>

#include "table.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct Avx512Vnni : X86Half {
  static constexpr int64_t kWidth = 64;
  static constexpr int kGemvRows = 4;
  static constexpr int kTokens = 8;
  static constexpr int kTileRows = 2;
  using Bytes = __m512i;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load_plane(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes load_partial(const uint8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p);
  }
  static Bytes codes(Bytes w, int shift) {
    return _mm512_and_si512(_mm512_srli_epi16(w, shift), _mm512_set1_epi8(3));
  }

  struct Planes {
    Bytes plane[4];
    explicit Planes(const int8_t* p) {
      for (int j = 0; j < 4; ++j) plane[j] = load_plane(p + j * kWidth);
    }
  };

  struct CodeSum {
    static constexpr int64_t kFlush = kNeverFlush;
    __m512i sum = _mm512_setzero_si512();
    void add(Bytes codes, Bytes plane) { sum = _mm512_dpbusd_epi32(sum, codes, plane); }
    void flush() {}
    int32_t total() const { return _mm512_reduce_add_epi32(sum); }
  };

  struct PlaneSum {
    static constexpr int64_t kFlush = kNeverFlush;
    CodeSum sums[4];
    void add(Bytes w, const Planes& q) {
      for (int j = 0; j < 4; ++j) {
        sums[j].add(_mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(0xC0 >> (2 * j)))),
                    q.plane[j]);
      }
    }
    void flush() {}
    int32_t total() const {
      // Every lane is a multiple of its plane's factor: the shifts are exact.
      const __m512i high =
          _mm512_add_epi32(_mm512_srai_epi32(sums[0].sum, 6), _mm512_srai_epi32(sums[1].sum, 4));
      const __m512i low = _mm512_add_epi32(_mm512_srai_epi32(sums[2].sum, 2), sums[3].sum);
      return _mm512_reduce_add_epi32(_mm512_add_epi32(high, low));
    }
  };
};

constexpr bitlinear_kernel_table kTable = make_table<Avx512Vnni>("avx512_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
