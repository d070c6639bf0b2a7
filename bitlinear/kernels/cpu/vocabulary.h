// Turns the vector vocabulary V of an instruction set into the table that a variant exports.
//
// V provides (avx2.cpp is a short example, ../README.md has another one):
//   kWidth                     bytes in a vector
//   Bytes                      a vector of kWidth bytes
//   load(p)                    kWidth packed bytes
//   load_partial(p, n)         n < kWidth packed bytes, then zeros; reads no byte beyond them
//   store(p, bytes)
//   load_plane(p)              kWidth activations (int8) at any address
//   split_planes(row, q)       4 * kWidth activations, in order, to four planes, one after the
//                              other; returns their sum. split_planes_plainly suits any ISA
//   PlaneSum                   sum of codes times activations; add(w, q) takes packed bytes and the
//                              four activation vectors of their block
//     kFlush                   the maximum of blocks between two calls of flush()
//     lanes()                  32-bit lanes; their total is the exact sum, after a flush()
//   reduce(lanes)              their total
//   reduce4(a, b, c, d, out)   the totals of four vectors of lanes, to out[0] .. out[3]
//   kGemvTokens                tokens that share the loads of packed bytes
//   kGemvRows                  PlaneSums in registers: weight rows times tokens
//   floats_from_fp16, fp16_from_floats   conversions; portable_half.h has some for any ISA
//   kGemmTokens, kGemvOverhead the number of tokens from which Gemm is faster: see heuristics.h
//
// Gemm is PanelGemm or LookupGemm (gemm_panel.h, gemm_lookup.h). Its file lists what it needs in
// addition. Its constants kTokenUnit, kRowUnit, kRowCost and kTokenCost and its blocks() are fields
// of bitlinear_costs.
#pragma once

#include <stdint.h>

#include "../abi.h"
#include "../float_environment.h"
#include "decode.h"
#include "gemv.h"
#include "gemv_groups.h"
#include "heuristics.h"
#include "quantize.h"
#include "train.h"

namespace bitlinear {

template <class V>
bool use_gemm(int64_t M, int64_t row_bytes) {
  return prefer_gemm(M, ceil_div(row_bytes, V::kWidth), V::kGemmTokens, V::kGemvOverhead);
}

template <class V, class Gemm, class Groups>
void linear(const bitlinear_task* task) {
  if (task->group_bytes > 0) {
    Groups::run(*task);
  } else if (use_gemm<V>(task->M, task->row_bytes)) {
    Gemm::run(*task);
  } else {
    gemv<V>(*task);
  }
}

template <class V, class Gemm, class Groups>
int64_t scratch_bytes(int64_t M, int64_t row_bytes, int64_t group_bytes) {
  if (group_bytes > 0) return Groups::scratch_bytes(M, row_bytes, group_bytes);
  return use_gemm<V>(M, row_bytes) ? Gemm::scratch_bytes(M, row_bytes) : 0;
}

template <class V, class Gemm, class Groups>
bitlinear_costs costs(int64_t M, int64_t row_bytes, int64_t group_bytes) {
  const bitlinear_blocks blocks = group_bytes > 0             ? Groups::blocks(M, row_bytes)
                                  : use_gemm<V>(M, row_bytes) ? Gemm::blocks(M, row_bytes)
                                                              : gemv_blocks(M, row_bytes);
  return {Gemm::kTokenUnit, Gemm::kRowUnit, blocks, Gemm::kRowCost, Gemm::kTokenCost};
}

template <class V, class Gemm, class Groups = GroupGemv<V>>
constexpr bitlinear_kernel_table make_table(const char* name) {
  static_assert(Gemm::kTokenUnit % 2 == 0, "a part holds both rows of a 16-bit token");
  return {BITLINEAR_ABI_VERSION,
          name,
          V::kWidth,
          PreservingSubnormals<quantize_row<V>>::run,
          PreservingSubnormals<linear<V, Gemm, Groups>>::run,
          scratch_bytes<V, Gemm, Groups>,
          costs<V, Gemm, Groups>,
          PreservingSubnormals<sum_magnitudes<V>>::run,
          PreservingSubnormals<pack_row<V>>::run,
          PreservingSubnormals<expand_row<V>>::run,
          PreservingSubnormals<quantize_in_order<V>>::run,
          PreservingSubnormals<int8_rows>::run,
          PreservingSubnormals<bf16_rows>::run,
          PreservingSubnormals<rotate_heads>::run,
          PreservingSubnormals<attend>::run,
          PreservingSubnormals<join_parts>::run};
}

}  // namespace bitlinear
