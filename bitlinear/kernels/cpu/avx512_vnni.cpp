// AVX512-VNNI: Intel from Cascade Lake / Ice Lake on, AMD from Zen 4 on.
#include "avx512.h"
#include "gemm_panel.h"

namespace bitlinear {
namespace {

struct Avx512Vnni : Vnni<Zmm> {
  // Fitted on one core of a Xeon VM; "Refit a constant" in ../README.md has the command.
  static constexpr int64_t kGemmTokens = 22;
  static constexpr int64_t kGemvOverhead = 10;
  static constexpr int kPanelTokens = 8;
  static constexpr int kPanelStrips = 3;
  static constexpr int64_t kPanelDepth = 512;
  static constexpr int kDecodingTokens = 3;
  static constexpr int kFetchingRows = 32;
};

constexpr bitlinear_kernel_table kTable =
    make_table<Avx512Vnni, PanelGemm<Avx512Vnni>>("avx512_vnni");

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) { return &bitlinear::kTable; }
