// One token against many weight rows, read as they are packed.
//
// In a vector of packed bytes w, the masks 0xC0, 0x30, 0x0C, 0x03 leave the codes of k = 0, 1, 2, 3
// (mod 4), 64, 16, 4 and 1 times too large. The quantiser has laid the activations out in the same
// four planes, so each plane is one dot product with an accumulator of its own, and the factors are
// shifted away once at the end: no shift and no shuffle of weights.
//
// Bound: per vector of packed bytes 1 load, 4 ands, 4 dot products (AVX512-VNNI: 64 bytes in about
// 4 cycles, some 57 GB/s and core), beyond the cache the memory bandwidth. kRows rows share the
// loads of the activations.
#pragma once

#include <stdint.h>

#include "epilogue.h"

namespace bitlinear {

// The four activation vectors of a block.
template <class V>
inline void load_planes(const int8_t* q, typename V::Bytes (&planes)[4]) {
  for (int j = 0; j < 4; ++j) planes[j] = V::load_plane(q + j * V::kWidth);
}

// codes[r] = sum_k c[r, k] * q[k] for kRows consecutive weight rows.
template <class V, int kRows>
inline void gemv_rows(const uint8_t* w, int64_t row_bytes, const int8_t* q, int32_t* codes) {
  typename V::PlaneSum sums[kRows] = {};
  typename V::Bytes planes[4];
  const int64_t whole = row_bytes / V::kWidth;
  int64_t block = 0;
  while (block < whole) {
    const int64_t stop = whole - block > V::PlaneSum::kFlush ? block + V::PlaneSum::kFlush : whole;
    for (; block < stop; ++block) {
      load_planes<V>(q + block * 4 * V::kWidth, planes);
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* bytes = w + r * row_bytes + block * V::kWidth;
        // Several strided row streams defeat the hardware prefetcher: fetch the next row group.
        __builtin_prefetch(bytes + kRows * row_bytes);
        sums[r].add(V::load(bytes), planes);
      }
    }
    for (int r = 0; r < kRows; ++r) sums[r].flush();
  }
  const int64_t tail = row_bytes - whole * V::kWidth;
  if (tail > 0) {
    load_planes<V>(q + whole * 4 * V::kWidth, planes);
    for (int r = 0; r < kRows; ++r) {
      sums[r].add(V::load_partial(w + r * row_bytes + whole * V::kWidth, tail), planes);
      sums[r].flush();
    }
  }
  for (int r = 0; r < kRows; ++r) codes[r] = sums[r].total();
}

template <class V>
void gemv(const bitlinear_task& task, int64_t m) {
  const int8_t* q = task.q + m * task.q_stride;
  for (int64_t n = task.n_begin; n < task.n_end; n += kEpilogueColumns) {
    const int64_t count = task.n_end - n < kEpilogueColumns ? task.n_end - n : kEpilogueColumns;
    const uint8_t* w = task.w + n * task.row_bytes;
    int32_t codes[kEpilogueColumns];
    int64_t i = 0;
    for (; i + V::kGemvRows <= count; i += V::kGemvRows) {
      gemv_rows<V, V::kGemvRows>(w + i * task.row_bytes, task.row_bytes, q, codes + i);
    }
    for (; i < count; ++i) gemv_rows<V, 1>(w + i * task.row_bytes, task.row_bytes, q, codes + i);
    epilogue<V>(task, m, n, count, codes);
  }
}

}  // namespace bitlinear
