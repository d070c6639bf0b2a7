// Turns an instruction set's vector vocabulary V into the table that a variant exports.
//
// What V provides (see avx512_vnni.cpp for the shortest example):
//   kWidth                     bytes in a vector
//   Bytes                      a vector of kWidth bytes
//   load(p), load_partial(p, n)     packed bytes; the latter reads n < kWidth of them, rest zero
//   load_plane(p)              activations (int8), aligned or not
//   codes(w, shift)            (w >> shift) & 3 in every byte
//   Planes(p)                  the four activation vectors of a block
//   PlaneSum                   sum of codes times activations; add(w, planes) takes packed bytes
//   CodeSum                    the same; add(codes, plane) takes decoded codes
//     kFlush                   blocks that may be added before flush() must be called
//     total()                  the exact sum over all lanes, after a flush()
//   floats_from_fp16, fp16_from_floats
//   kGemvRows, kTokens, kTileRows   tile sizes
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
  if (task->M == 1) {
    gemv<V>(*task, 0);
  } else {
    gemm<V>(*task);
  }
}

template <class V>
constexpr bitlinear_kernel_table make_table(const char* name) {
  return {BITLINEAR_ABI_VERSION, name, V::kWidth, quantize_row<V>, linear<V>};
}

}  // namespace bitlinear
