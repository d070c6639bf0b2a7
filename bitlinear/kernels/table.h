// Turns an instruction set's vector vocabulary V into the table that a variant exports.
//
// What V provides (see avx2.cpp for an example):
//   kWidth                     bytes in a vector
//   Bytes                      a vector of kWidth bytes
//   load(p), load_partial(p, n)     packed bytes; the latter reads n < kWidth of them, rest zero
//   load_plane(p)              activations (int8), aligned or not
//   PlaneSum                   sum of codes times activations; add(w, q) takes packed bytes and the
//                              four activation vectors of their block
//     kFlush                   blocks that may be added before flush() must be called
//     total()                  the exact sum over all lanes, after a flush()
//   kGemvRows                  weight rows that share the loads of activations
//   floats_from_fp16, fp16_from_floats
//   kTokens                    tokens in a tile of the GEMM; 1: none, several tokens are as many
//                              GEMVs, and what follows is not needed
//   kTileRows                  weight rows in a tile
//   codes(w, shift)            (w >> shift) & 3 in every byte
//   CodeSum                    as PlaneSum, but add(codes, plane) takes decoded codes
#pragma once

#include <limits.h>

#include "abi.h"
#include "gemm.h"
#include "gemv.h"
#include "quantize.h"

namespace bitlinear {

constexpr int64_t kNeverFlush = INT64_MAX;

template <class V>
void linear(const bitlinear_task* task) {
  if constexpr (V::kTokens > 1) {
    if (task->M > 1) return gemm<V>(*task);
  }
  for (int64_t m = 0; m < task->M; ++m) gemv<V>(*task, m);
}

template <class V>
constexpr bitlinear_kernel_table make_table(const char* name) {
  return {BITLINEAR_ABI_VERSION, name, V::kWidth, quantize_row<V>, linear<V>};
}

}  // namespace bitlinear
