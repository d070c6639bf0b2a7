// What a decoding step needs beside ternary products; decode.cpp is compiled for each variant. It
// is a source of its own: beside them in one, GCC inlines less into the ternary products.
#pragma once

#include "../abi.h"

namespace bitlinear {

// See abi.h.
void int8_rows(const int8_t* w, int64_t rows, int64_t K, const int16_t* q, float s_x,
               const float* s_w, void* y, int y_dtype);
void bf16_rows(const uint16_t* w, int64_t rows, int64_t K, const float* x, void* y, int y_dtype);
void rotate_heads(const uint16_t* x, int64_t heads, int64_t D, const uint16_t* cos,
                  const uint16_t* sin, uint16_t* y);
void attend(const bitlinear_attention* part);
void join_parts(const bitlinear_attention* parts, int64_t count, int64_t row, uint16_t* y);

}  // namespace bitlinear
