// AMX: tiles of 16 x 64 bytes. The product of two tiles takes 16 cycles, which is 8 times the rate
// of AVX512-VNNI. Intel from Sapphire Rapids on.
//
// tdpbsud reads the panels of gemm_panel.h: its first operand is 16 tokens by 64 bytes of quantised
// activations, its second is 16 steps of one strip. Decoding a panel costs as much as 25 tokens, so
// the slice of k is short, and codes and activations stay in the L1 cache.
//
// Bound: 5590 Gop/s on one core of a Sapphire Rapids, measured. Reached there at 4096 x 4096, one
// thread: M = 32 1120, M = 256 1920; 16 threads on 8 cores: 9000. The loop loads 4 tiles for 4
// products. Loads of activations from the L2 cache take longer than the products.
#include "avx512.h"
#include "gemm_groups.h"
#include "gemm_panel.h"

namespace bitlinear {
namespace {

struct AmxInt8 : Vnni<Zmm> {
  // Fitted on a VM with 8 cores of a Sapphire Rapids; "Refit a constant" in ../README.md has the
  // command.
  static constexpr int64_t kGemmTokens = 14;
  static constexpr int64_t kGemvOverhead = 10;
  static constexpr int kPanelTokens = 32;  // 2 x 2 tiles of sums
  static constexpr int kPanelStrips = 2;
  static constexpr int64_t kPanelDepth = 512;
  static constexpr int kDecodingTokens = 25;
  static constexpr int kFetchingRows = 64;
  static constexpr int64_t kGroupGemmTokens = 9;  // as AVX512-VNNI's

  static constexpr int kGroupTokens = 8;
  static constexpr int kGroupStrips = 3;
  static constexpr int64_t kGroupDepth = 512;
};

// Tiles 0 .. 3 hold sums, 4 and 5 activations, 6 and 7 codes. Intrinsics take tile numbers as
// literals.
class AmxTiles {
 public:
  ~AmxTiles() { _tile_release(); }

  template <int kStrips>
  void multiply(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t tokens,
                int64_t bytes, int32_t* sums, bool accumulate) {
    for (int64_t m = 0; m < tokens; m += AmxInt8::kPanelTokens) {
      const int64_t count = minimum(tokens - m, AmxInt8::kPanelTokens);
      configure(static_cast<uint8_t>(count));
      const auto product =
          count > 16 ? multiply_tile<true, kStrips> : multiply_tile<false, kStrips>;
      product(codes, q + m * q_stride, q_stride, bytes, sums + m * Panel<AmxInt8>::kBlockRows,
              accumulate);
    }
  }

 private:
  // Tiles have as many rows as there are tokens, so no load or store goes beyond them.
  void configure(uint8_t tokens) {
    if (tokens == tokens_) return;
    tokens_ = tokens;
    const uint8_t first = tokens < 16 ? tokens : 16;
    const uint8_t second = tokens > 16 ? static_cast<uint8_t>(tokens - 16) : 1;
    const uint8_t rows[8] = {first, first, second, second, first, second, 16, 16};
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = rows[tile];
    }
    // GCC 12 declares that _tile_loadconfig reads eight bytes; the barrier makes it store the
    // others too.
    compiler_barrier(&config);
    _tile_loadconfig(&config);
  }

  template <bool kTwo, int kStrips>
  static void multiply_tile(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t bytes,
                            int32_t* sums, bool accumulate) {
    constexpr int64_t kStep = kStrips * 64;
    constexpr int64_t kSumsStride = Panel<AmxInt8>::kBlockRows * 4;
    int32_t* below = sums + 16 * Panel<AmxInt8>::kBlockRows;
    // GCC does not declare that tile loads read memory.
    compiler_barrier();
    if (accumulate) {
      _tile_loadd(0, sums, kSumsStride);
      if (kStrips > 1) _tile_loadd(1, sums + 16, kSumsStride);
      if (kTwo) _tile_loadd(2, below, kSumsStride);
      if (kTwo && kStrips > 1) _tile_loadd(3, below + 16, kSumsStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    // 16 steps (one plane of a block) at a time. Both operands are padded with zeros to whole
    // blocks.
    const int64_t steps = (bytes + 63) / 64 * 64;
    for (int64_t step = 0; step < steps; step += 16) {
      _tile_loadd(4, q, q_stride);
      _tile_loadd(6, codes, kStep);
      _tile_dpbsud(0, 4, 6);
      if (kStrips > 1) _tile_loadd(7, codes + 64, kStep);
      if (kStrips > 1) _tile_dpbsud(1, 4, 7);
      if (kTwo) _tile_loadd(5, q + 16 * q_stride, q_stride);
      if (kTwo) _tile_dpbsud(2, 5, 6);
      if (kTwo && kStrips > 1) _tile_dpbsud(3, 5, 7);
      q += 64;
      codes += 16 * kStep;
    }
    _tile_stored(0, sums, kSumsStride);
    if (kStrips > 1) _tile_stored(1, sums + 16, kSumsStride);
    if (kTwo) _tile_stored(2, below, kSumsStride);
    if (kTwo && kStrips > 1) _tile_stored(3, below + 16, kSumsStride);
  }

  uint8_t tokens_ = 0;
};

constexpr bitlinear_kernel_table kTable =
    make_table<AmxInt8, PanelGemm<AmxInt8, AmxTiles>, GroupProduct<AmxInt8, GroupGemm<AmxInt8>>>(
        "amx_int8");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) {
  return bitlinear::request_amx_tiles() ? &bitlinear::kTable : nullptr;
}
