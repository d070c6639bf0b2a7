// The C interface between a CPU kernel variant and whoever drives it (ops.cpp, selftest.h, and the
// test driver). A variant is torch-free and single-threaded: it sees pointers and sizes only.
#pragma once

#include <stdint.h>

#define BITLINEAR_ABI_VERSION 4

// Activations and weights are multiplied in int32. The most significant plane of a packed byte
// counts 64 times too large (see gemv.h), so |acc| <= 127 * 2 * 64 * K / 4, which stays below 2^31
// for K < 528,000.
#define BITLINEAR_MAX_K 500000

enum bitlinear_dtype { BITLINEAR_F32 = 0, BITLINEAR_F16 = 1, BITLINEAR_BF16 = 2 };

// One rectangle y[0:M, n_begin:n_end] of y = epilogue(q @ w^T). Strides count elements of the
// pointed-to type.
struct bitlinear_task {
  const int8_t* q;       // (M, q_stride): activations as quantize_row wrote them
  int64_t q_stride;      // bitlinear_q_stride(kernels, K)
  const float* s_x;      // (M,) scale of each token; NaN makes that row of y NaN
  const int32_t* q_sum;  // (M,) sum of q over k
  int64_t M;
  const uint8_t* w;   // (N, row_bytes): packed weights, format version 1
  int64_t row_bytes;  // ceil(K / 4)
  const float* s_w;
  int64_t s_w_stride;  // 0: one scale per tensor; 1: one per output channel
  const void* bias;    // (N,) or null
  int bias_dtype;
  int64_t n_begin, n_end;
  void* y;  // (M, y_stride)
  int64_t y_stride;
  int y_dtype;
  void* scratch;  // as many bytes as scratch_bytes() says, at a multiple of 64; of this call alone
};

// What a large product costs besides its multiplications; heuristics.h divides the work by it.
struct bitlinear_costs {
  int64_t token_unit, row_unit;  // tokens and rows of a tile: a part costs as much as whole tiles
  int64_t per_row;  // what is done once per weight row (decoding), in multiplications by a token
  // What is done once per token, in multiplications by a weight row: building tables, or fetching
  // the activations that another core has quantised.
  int64_t per_token;
};

struct bitlinear_kernel_table {
  uint32_t abi_version;
  const char* name;
  // Packed bytes per block of the activations' layout: the byte width of the variant's vectors, a
  // multiple of 16.
  int64_t block;
  // Quantises one token x[0:K] of `dtype` to q (bitlinear_q_stride bytes, all of them written), its
  // scale and its sum. Layout of q: blocks of 4 * block bytes, in which byte j * block + b belongs
  // to k = 4 * (block_index * block + b) + j; zero beyond K.
  void (*quantize_row)(const void* x, int dtype, int64_t K, float eps, int8_t* q, float* s_x,
                       int32_t* q_sum);
  // Computes the rectangle of the task.
  void (*linear)(const bitlinear_task* task);
  // What a task of M tokens, or fewer, needs.
  int64_t (*scratch_bytes)(int64_t M, int64_t row_bytes);
  bitlinear_costs costs;

  // For training. Rows are of K values of `dtype`, and lie as torch has them.
  // The sum of |w[0:K]|, added up in an order that depends on K alone.
  double (*sum_magnitudes)(const void* w, int dtype, int64_t K);
  // Packs w[0:K], quantised to {-1, 0, 1} with this scale; zeros where the scale is not finite.
  void (*pack_row)(const void* w, int dtype, int64_t K, float s_w, uint8_t* packed);
  // The inverse: w[0:K] in {-s_w, 0, s_w}.
  void (*expand_row)(const uint8_t* packed, int64_t K, float s_w, float* w);
  // quantize_row, but q[0:K] in the order of x.
  void (*quantize_in_order)(const void* x, int dtype, int64_t K, float eps, int8_t* q, float* s_x);
};

// An odd number of cache lines: rows a power of two apart would compete for the same sets.
static inline int64_t bitlinear_q_stride(const bitlinear_kernel_table* kernels, int64_t K) {
  const int64_t row_bytes = (K + 3) / 4;
  // A block holds whole lines, so the | makes their number odd.
  return (row_bytes + kernels->block - 1) / kernels->block * kernels->block * 4 | 64;
}

#if defined(_WIN32)
#define BITLINEAR_EXPORT extern "C" __declspec(dllexport)
#else
#define BITLINEAR_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Exported by every variant's library. Null if the system refuses what the variant needs.
BITLINEAR_EXPORT const bitlinear_kernel_table* bitlinear_kernels(void);
// 0 if the variant reproduces the numerics of its reference to the bit; else 1 and a message.
BITLINEAR_EXPORT int bitlinear_selftest(char* message, int64_t message_size);
