// AVX-VNNI: the dot product of AVX512-VNNI on 256-bit vectors, VEX-encoded. Intel from Alder Lake
// on (also where AVX-512 is fused off), AMD from Zen 5 on.
#include "table.h"
#include "x86.h"

namespace bitlinear {
namespace {

struct AvxVnni : X86Ymm {
  static constexpr int kGemvRows = 2;
  static constexpr int kTokens = 4;
  static constexpr int kTileRows = 2;

  struct CodeSum {
    static constexpr int64_t kFlush = kNeverFlush;
    __m256i sum = _mm256_setzero_si256();
    void add(Bytes codes, Bytes plane) { sum = _mm256_dpbusd_avx_epi32(sum, codes, plane); }
    void flush() {}
    int32_t total() const { return reduce(sum); }
  };

  struct PlaneSum {
    static constexpr int64_t kFlush = kNeverFlush;
    CodeSum sums[4];
    void add(Bytes w, const Planes& q) {
      for (int j = 0; j < 4; ++j) {
        sums[j].add(_mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>(0xC0 >> (2 * j)))),
                    q.plane[j]);
      }
    }
    void flush() {}
    int32_t total() const {
      // Every lane is a multiple of its plane's factor: the shifts are exact.
      const __m256i high =
          _mm256_add_epi32(_mm256_srai_epi32(sums[0].sum, 6), _mm256_srai_epi32(sums[1].sum, 4));
      const __m256i low = _mm256_add_epi32(_mm256_srai_epi32(sums[2].sum, 2), sums[3].sum);
      return reduce(_mm256_add_epi32(high, low));
    }
  };
};

constexpr bitlinear_kernel_table kTable = make_table<AvxVnni>("avx_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
