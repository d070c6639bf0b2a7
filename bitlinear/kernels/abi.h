// The C interface of a CPU kernel variant. ops.cpp, the self-test and the native driver call it. A
// variant includes nothing of torch and starts no thread: it sees pointers and sizes only.
#pragma once

#include <stdint.h>

#include "portability.h"

#define BITLINEAR_ABI_VERSION 10

// Sums are int32. The codes of the most significant plane of a packed byte are 64 times too large
// (see gemv.h), so |acc| <= 127 * 2 * 64 * K / 4, which is below 2^31 for K < 528,000.
#define BITLINEAR_MAX_K 500000

// Activations of 16 bits, in -32385 .. 32385, are two rows of int8, a high and a low one:
// q16 = 254 * high + low, with both in -127 .. 127. They take the same kernels as two tokens.
#define BITLINEAR_HIGH_WEIGHT 254
// round(q16 * this) is a high row: a little less than 1 / 254, so that 32385, at 127.5, gives 127.
// Other values at ties may go either way.
#define BITLINEAR_HIGH_FACTOR (0.99999905f / 254.0f)
static inline int64_t bitlinear_rows_per_token(int64_t act_bits) { return act_bits / 8; }

// Groups of weights that share a scale are multiples of this many.
#define BITLINEAR_GROUP_UNIT 32

enum bitlinear_dtype { BITLINEAR_F32 = 0, BITLINEAR_F16 = 1, BITLINEAR_BF16 = 2 };

enum bitlinear_activation { BITLINEAR_NO_GATE = 0, BITLINEAR_SILU = 1, BITLINEAR_RELU2 = 2 };

// What a fused product does to a token before it quantises it; prologue.py specifies it.
struct bitlinear_prologue {
  int activation;           // of a gate, whose tokens have 2 * K values; or BITLINEAR_NO_GATE
  const void* norm_weight;  // (K,) of an RMSNorm; or null
  int norm_dtype;
  float norm_eps;
};
static inline int bitlinear_is_plain(const struct bitlinear_prologue* prologue) {
  return prologue->activation == BITLINEAR_NO_GATE && prologue->norm_weight == 0;
}

// The most weights that a fused product reads one input for.
#define BITLINEAR_MAX_WEIGHTS 4

// One rectangle y[0:M, n_begin:n_end] of y = epilogue(q @ w^T). Strides count elements, not bytes.
struct bitlinear_task {
  int64_t act_bits;      // 8, or 16: two rows of q per token
  const int8_t* q;       // (M, q_stride): activations as quantize_row wrote them
  int64_t q_stride;      // bitlinear_q_stride(kernels, K)
  const float* s_x;      // scale of each token; NaN makes that row of y NaN
  const int32_t* q_sum;  // (M,) sum of q over k
  int64_t M;             // rows of q: tokens, or twice as many
  const uint8_t* w;      // (N, row_bytes): packed weights, format version 1
  int64_t row_bytes;     // ceil(K / 4)
  const float* s_w;
  int64_t s_w_stride;   // scales of a row: 0: one scale per tensor; 1: one per output channel
  int64_t group_bytes;  // with several scales of a row: packed bytes that share one; else 0
  const void* bias;     // (N,) or null
  int bias_dtype;
  const void* residual;  // (tokens, y_stride), added last; or null
  int residual_dtype;
  int64_t n_begin, n_end;
  void* y;  // (tokens, y_stride)
  int64_t y_stride;
  int y_dtype;
  void* scratch;  // scratch_bytes() bytes at a multiple of 64, which no other call uses
};

// A part that is cut into blocks of about so many rows, multiples of the unit, costs no more.
struct bitlinear_blocks {
  int64_t rows, unit;
};

// The costs of a product apart from its multiplications. heuristics.h divides the work by them.
struct bitlinear_costs {
  int64_t token_unit, row_unit;  // tokens and rows of a tile; a part costs whole tiles
  bitlinear_blocks blocks;
  int64_t per_row;  // work per weight row (decoding), in multiplications by a token
  // Work per token, in multiplications by a weight row: building tables, or fetching activations
  // that another core has quantised.
  int64_t per_token;
};

// Sizes of heads are multiples of the unit. A part of the attention has a limited number of keys.
#define BITLINEAR_HEAD_UNIT 16
#define BITLINEAR_MAX_HEAD 256
#define BITLINEAR_ATTENTION_TOKENS 128

// A part of the attention of one token, in bf16: queries that share keys, and some of the keys.
struct bitlinear_attention {
  const uint16_t* q;  // (rows, head_size)
  int64_t rows;
  int64_t head_size;
  const uint16_t* keys;    // (count, head_size)
  const uint16_t* values;  // (count, head_size)
  int64_t count;
  const uint8_t* mask;  // (count,), 0 at keys that do not count; or null
  float scale;
  // Results, for each query: the largest score, the sum of exp(score - largest), and the values
  // (head_size) times these weights.
  float *largest, *sums, *totals;
};

struct bitlinear_kernel_table {
  uint32_t abi_version;
  const char* name;
  // Packed bytes per block of the activations' layout: the byte width of the variant's vectors, a
  // multiple of 16.
  int64_t block;
  // Quantises one token x[0:K] of `dtype` to one or two rows of q, its scale, and the sum of each
  // row. Writes bitlinear_q_stride bytes to each row. Layout of q: blocks of 4 * block bytes; byte
  // j * block + b of a block belongs to k = 4 * (block_index * block + b) + j; zero beyond K.
  // `floats` is scratch memory of K floats; null if the prologue is plain.
  void (*quantize_row)(const bitlinear_prologue* prologue, const void* x, int dtype, int64_t K,
                       float eps, int64_t act_bits, float* floats, int8_t* q, int64_t q_stride,
                       float* s_x, int32_t* q_sum);
  // Computes the rectangle of the task.
  void (*linear)(const bitlinear_task* task);
  // The bytes of scratch memory for a task of at most M rows of q.
  int64_t (*scratch_bytes)(int64_t M, int64_t row_bytes, int64_t group_bytes);
  // The costs of a product of M rows of q.
  bitlinear_costs (*costs)(int64_t M, int64_t row_bytes, int64_t group_bytes);

  // The functions below are for training. Rows have K values of `dtype`, in the order of torch.
  //
  // Returns the sum of |w[0:K]|, added in an order that depends on K alone.
  double (*sum_magnitudes)(const void* w, int dtype, int64_t K);
  // Quantises w[0:K] to {-1, 0, 1} with this scale and packs it; packs zeros if the scale is not
  // finite.
  void (*pack_row)(const void* w, int dtype, int64_t K, float s_w, uint8_t* packed);
  // The inverse of pack_row: w[0:K] in {-s_w, 0, s_w}, rounded to `dtype`.
  void (*expand_row)(const uint8_t* packed, int64_t K, float s_w, void* w, int dtype);
  // As quantize_row, but q[0:K] has the order of x, and holds int8 or int16.
  void (*quantize_in_order)(const void* x, int dtype, int64_t K, float eps, int64_t act_bits,
                            void* q, float* s_x);

  // The functions below are for the head of a model: y[n], for `rows` rows of K weights, and one
  // token in the order of torch.
  //
  // Weights of int8 with a scale each row, and an activation of 16 bits: the exact sum of
  // w[n, k] * q[k], in fp32, times (s_x * s_w[n]).
  void (*int8_rows)(const int8_t* w, int64_t rows, int64_t K, const int16_t* q, float s_x,
                    const float* s_w, void* y, int y_dtype);
  // Weights of bf16: the sum of w[n, k] * x[k] in fp32. Each operation is rounded on its own, in an
  // order that depends on K alone (head.h).
  void (*bf16_rows)(const uint16_t* w, int64_t rows, int64_t K, const float* x, void* y,
                    int y_dtype);

  // The functions below are for the attention of one token in bf16.
  //
  // y = x * cos + rotate_half(x) * sin for heads of D values; cos and sin have D.
  void (*rotate_heads)(const uint16_t* x, int64_t heads, int64_t D, const uint16_t* cos,
                       const uint16_t* sin, uint16_t* y);
  void (*attend)(const bitlinear_attention* part);
  // y[0:head_size] of one query, from all parts of its keys.
  void (*join_parts)(const bitlinear_attention* parts, int64_t count, int64_t row, uint16_t* y);
};

// An odd number of cache lines. Rows a power of two apart would compete for the same cache sets.
static inline int64_t bitlinear_q_stride(const bitlinear_kernel_table* kernels, int64_t K) {
  const int64_t row_bytes = (K + 3) / 4;
  // A block holds whole lines, so setting bit 6 makes their number odd.
  return (row_bytes + kernels->block - 1) / kernels->block * kernels->block * 4 | 64;
}

// Exported by every variant's library. Null if the operating system refuses a resource that the
// variant needs (AMX tiles).
BITLINEAR_EXPORT const bitlinear_kernel_table* bitlinear_kernels(void);
// Returns 0 if the variant gives the bits of the reference in selftest/; else 1 and a message.
BITLINEAR_EXPORT int bitlinear_selftest(char* message, int64_t message_size);
