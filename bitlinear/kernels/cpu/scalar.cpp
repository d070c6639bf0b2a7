// Plain C++ over arrays of 16 bytes, for every machine. The compiler vectorises the loops with the
// baseline instruction set.
#include "gemm_lookup.h"
#include "gemm_lookup_groups.h"
#include "portable_half.h"
#include "vocabulary.h"

namespace bitlinear {
namespace {

struct Scalar : PortableHalf {
  static constexpr int64_t kWidth = 16;
  static constexpr int kGemvTokens = 1;  // more would not fit the registers
  static constexpr int kGemvRows = 1;
  // Fitted on one core of a Xeon VM; "Refit a constant" in ../README.md has the command.
  static constexpr int64_t kGemmTokens = 3;
  static constexpr int64_t kGemvOverhead = 0;
  static constexpr int kLookupVectors = 1;
  static constexpr int64_t kGroupGemmTokens = 3;

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
  static int32_t split_planes(const int8_t* row, int8_t* q) {
    return split_planes_plainly<kWidth>(row, q);
  }
  static void transpose(Bytes (&rows)[4]) { transpose_4x4(rows); }
  struct PlaneSum {
    // Baseline instruction sets multiply 16-bit lanes well. A block adds 4 planes of at most 2 *
    // 127 = 254 to a lane: 32 * 4 * 254 = 32512 < 2^15.
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

  struct Ints {
    int32_t lane[kWidth / 4];
  };
  static int32_t as_start(int32_t value) { return value; }
  static int32_t as_factor(int32_t value) { return value; }
  static Ints broadcast_int(int32_t value) {
    Ints a;
    for (int32_t& lane : a.lane) lane = value;
    return a;
  }
  static Ints load_ints(const int32_t* p) {
    Ints a;
    memcpy(a.lane, p, sizeof(a.lane));
    return a;
  }
  static void store_ints(int32_t* p, Ints a) { memcpy(p, a.lane, sizeof(a.lane)); }
  static Ints choose(const int32_t* p, Ints indices) {
    for (int32_t& lane : indices.lane) lane = p[lane];
    return indices;
  }
  static Ints low_half(Ints a) {
    for (int32_t& lane : a.lane) lane &= 0xFFFF;
    return a;
  }
  static Ints high_half(Ints a) {
    for (int32_t& lane : a.lane) lane >>= 16;
    return a;
  }
  static int32_t reduce(Ints a) {
    int32_t sum = 0;
    for (const int32_t lane : a.lane) sum += lane;
    return sum;
  }
  static void reduce4(Ints a, Ints b, Ints c, Ints d, int32_t* out) {
    const Ints sums[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = reduce(sums[i]);
  }
  struct GroupSum {
    static constexpr int64_t kFlush = kNeverFlush;
    Ints sum = {};
    void add(Bytes w, const Bytes (&q)[4], Ints start, Ints factors) {
      for (int i = 0; i < kWidth; ++i) {
        for (int j = 0; j < 4; ++j) {
          start.lane[i / 4] += (w.byte[i] >> (6 - 2 * j) & 3) * static_cast<int8_t>(q[j].byte[i]);
        }
      }
      for (int i = 0; i < kWidth / 4; ++i) sum.lane[i] += start.lane[i] * factors.lane[i];
    }
    void flush() {}
    Ints lanes() const { return sum; }
  };

  static int32_t reduce(int32_t sum) { return sum; }
  static void reduce4(int32_t a, int32_t b, int32_t c, int32_t d, int32_t* out) {
    const int32_t sums[4] = {a, b, c, d};
    memcpy(out, sums, sizeof(sums));
  }
};

constexpr bitlinear_kernel_table kTable =
    make_table<Scalar, LookupGemm<Scalar>, GroupProduct<Scalar, GroupLookupGemm<Scalar>>>("scalar");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
