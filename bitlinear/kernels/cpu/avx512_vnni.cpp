// AVX512-VNNI: Intel from Cascade Lake / Ice Lake on, AMD from Zen 4 on.
//
// Server Xeons and server Zen 5 start two dot products of 64 bytes a cycle, and panels reach that
// rate. Zen 4 starts one, which bounds panels by 460 Gop/s on a core of a VM: at 4096 x 4096 they
// reach 384 for M = 8, 417 for 16 and 430 for 24. Tables, which multiply nothing, reach 460 for
// M = 32 and 440 to 520 beyond; with scales of groups of 128 350 and 400, panels 306 and 345. Other
// CPUs were not measured, and have panels.
#include "avx512.h"
#include "gemm_groups.h"
#include "gemm_lookup.h"
#include "gemm_lookup_groups.h"
#include "gemm_panel.h"
#include "part.h"

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
  static constexpr int64_t kGroupGemmTokens = 9;  // on a Xeon
  static constexpr int kGroupTokens = 8;
  static constexpr int kGroupStrips = 3;
  static constexpr int64_t kGroupDepth = 512;
};

// A store takes two cycles, and masks run beside the dot products, so panels stay packed: decoding
// costs as much as 1.5 tokens instead of 3. M = 8 to 16 take 12 to 17 % less time.
struct Zen4 : Avx512Vnni {
  static constexpr int64_t kGemmTokens = 7;
  static constexpr int64_t kGemvOverhead = 6;
  static constexpr bool kPackedPanels = true;
  static constexpr int64_t kPanelDepth = 1024;
  static constexpr int kDecodingTokens = 2;
  static constexpr int kLookupVectors = 1;
};

// Whole tiles of tokens by tables, if they are faster, and the other tokens by panels.
template <class Tables, class Panels>
struct TablesAndPanels {
  static constexpr int64_t kTokens = Tables::L::kTokens;
  // Fewer rows do not amortise the tables, shorter rows not the 32-bit sums.
  static constexpr int64_t kFewestRows = 640, kFewestBytes = 256;

  // Of M tokens, those that tables take.
  static int64_t tokens_of_tables(int64_t M, int64_t row_bytes) {
    return row_bytes < kFewestBytes ? 0 : M / kTokens * kTokens;
  }
  static bitlinear_blocks blocks(int64_t M, int64_t row_bytes) {
    return tokens_of_tables(M, row_bytes) > 0 ? Tables::blocks(M, row_bytes)
                                              : Panels::blocks(M, row_bytes);
  }
  // group_bytes: for scales of groups.
  template <class... Groups>
  static int64_t scratch_bytes(int64_t M, int64_t row_bytes, Groups... group_bytes) {
    const int64_t panels = Panels::scratch_bytes(M, row_bytes, group_bytes...);
    if (tokens_of_tables(M, row_bytes) == 0) return panels;
    const int64_t tables = Tables::scratch_bytes(M, row_bytes, group_bytes...);
    return tables > panels ? tables : panels;
  }
  static void run(const bitlinear_task& task) {
    const bool pays = task.n_end - task.n_begin >= kFewestRows;
    const int64_t tokens = pays ? tokens_of_tables(task.M, task.row_bytes) : 0;
    if (tokens > 0) Tables::run(tokens_of(task, 0, tokens));
    if (tokens < task.M) Panels::run(tokens_of(task, tokens, task.M));
  }
};

struct Zen4Gemm : TablesAndPanels<LookupGemm<Zen4>, PanelGemm<Zen4>> {
  using Panels = PanelGemm<Zen4>;
  static constexpr int64_t kTokenUnit = Panels::kTokenUnit, kRowUnit = Panels::kRowUnit;
  static constexpr int64_t kRowCost = Panels::kRowCost, kTokenCost = Panels::kTokenCost;
};

using Groups = GroupProduct<Avx512Vnni, GroupGemm<Avx512Vnni>>;
using Zen4Groups = TablesAndPanels<GroupLookupGemm<Zen4>, Groups>;

constexpr bitlinear_kernel_table kPanels =
    make_table<Avx512Vnni, PanelGemm<Avx512Vnni>, Groups>("avx512_vnni");
constexpr bitlinear_kernel_table kTablesAndPanels =
    make_table<Zen4, Zen4Gemm, Zen4Groups>("avx512_vnni");

// A test defines this, to run both forms on any CPU with AVX-512.
#ifndef BITLINEAR_IS_ZEN4
// Of AMD's family 19h, Zen 4 alone has AVX-512.
#define BITLINEAR_IS_ZEN4 (cpu_family() == 0x19)
#endif

}  // namespace
}  // namespace bitlinear

const bitlinear_kernel_table* bitlinear_kernels(void) {
  using namespace bitlinear;
  return BITLINEAR_IS_ZEN4 ? &kTablesAndPanels : &kPanels;
}
