// The C interface of the CUDA kernels. ops.cpp, the self-test and the test driver call it.
#pragma once

#include <stdint.h>

#include "../abi.h"

// A weight of a product: rows `begin` to `end` of all. Every array is contiguous.
struct bitlinear_cuda_weight {
  const uint8_t* w;    // (end - begin, ceil(K/4)): packed weights, format version 1
  const float* s_w;    // (1,), (end - begin,) or (end - begin, groups)
  int64_t s_w_stride;  // scales of a row; 0: one scale per tensor
  const void* bias;    // (end - begin,) or null
  int bias_dtype;
  int64_t begin, end;
};

// The groups of weights along K that have scales of their own, by bitlinear_cuda_make_groups().
struct bitlinear_cuda_groups {
  int64_t size;     // weights of a group, a multiple of BITLINEAR_GROUP_UNIT; 0: no groups
  int count;        // of a row
  uint64_t factor;  // times block, over 2^32: the group of a block of BITLINEAR_GROUP_UNIT weights
  const int16_t* multipliers;  // (N, count), of all weights; set by bitlinear_cuda_linear()
};

// y = epilogue(quantize(prologue(x)) @ w^T) on the current device, for the rows of all weights.
// Every array is contiguous. Kernels get a task by value: what a product with one weight reads
// comes first, so that it is in few lines of the cache for constants.
struct bitlinear_cuda_task {
  const void* x;                         // (tokens, K), or (tokens, 2 K) with a gate
  int64_t M, N, K;                       // M: rows of q, that is tokens, or twice as many
  void* y;                               // (tokens, N), at a multiple of 16 bytes
  const void* residual;                  // (tokens, N), added last; or null
  int x_dtype, y_dtype, residual_dtype;  // enum bitlinear_dtype, as all dtypes here
  int act_bits;                          // 8, or 16: two rows of q per token
  float eps;
  int weight_count;
  bitlinear_cuda_weight weights[BITLINEAR_MAX_WEIGHTS];  // those that are not used begin at N
  bitlinear_cuda_groups groups;
  bitlinear_prologue prologue;
  void* workspace;  // bitlinear_cuda_workspace_bytes() bytes, at a multiple of 256
  // Not 0: all weights, and scales of groups, were written before the previous kernel in this
  // stream started, so the kernels may read them while that kernel still runs.
  int w_prefetchable;
};

// Tokens that are already quantised to 8 bits, in the order of x.
struct bitlinear_cuda_tokens {
  const int8_t* q;       // (M, K)
  const float* s_x;      // (M,)
  const int32_t* q_sum;  // (M,): the sum of each token
};

// Attention of one query token for each sequence. The last dimension of each array is contiguous,
// its rows start at multiples of 16 bytes, and its other strides count values.
struct bitlinear_cuda_attention {
  int dtype;  // BITLINEAR_F16 or BITLINEAR_BF16
  int64_t batch, heads, key_heads, head_dim, length;
  const void* query;  // (batch, heads, head_dim)
  int64_t query_strides[2];
  void *key, *value;  // (batch, key_heads, length, head_dim); rows are contiguous
  int64_t key_strides[2], value_strides[2];
  // (batch, length): numbers to add to the scores, or bool, true where a token takes part.
  const void* mask;
  int64_t mask_stride;
  int mask_is_bool;
  float scale;
  void* output;  // (batch, heads, head_dim), contiguous
  // Not null: query and the new key are rotated first, and the new key and value are written to
  // this position of all keys and values.
  const int64_t* position;
  const void *new_key, *new_value;  // (batch, key_heads, head_dim)
  int64_t new_key_strides[2], new_value_strides[2];
  const void *cosine, *sine;  // (batch, head_dim)
  int64_t angle_stride;       // of both
};

inline bitlinear_cuda_groups bitlinear_cuda_make_groups(int64_t K, int64_t group_size) {
  if (group_size == 0) return {};
  const auto units = static_cast<uint64_t>(group_size / BITLINEAR_GROUP_UNIT);
  return {group_size, static_cast<int>((K + group_size - 1) / group_size),
          (uint64_t{1} << 32) / units + 1, nullptr};
}

// The kernels that compute a product. supports() in heuristics.h says for which shapes.
enum bitlinear_cuda_kernel {
  BITLINEAR_CUDA_AUTO = 0,         // the choice of heuristics.h
  BITLINEAR_CUDA_DP4A = 1,         // any shape, sm_61 and later
  BITLINEAR_CUDA_GEMV = 2,         // up to 4 rows of q, sm_80 and later
  BITLINEAR_CUDA_SMALL_BATCH = 3,  // up to 32 rows of q, sm_90 and later
  BITLINEAR_CUDA_MMA = 4,          // any shape, sm_80 and later
  BITLINEAR_CUDA_WGMMA = 5,        // any number of tokens, sm_90a only
  BITLINEAR_CUDA_SMALL_LAYER = 6,  // up to 1024 inputs, sm_80 and later
};

extern "C" {
// Bytes of workspace that this kernel needs on the current device; can be 0. Reads no output or
// workspace pointer of the task.
int64_t bitlinear_cuda_workspace_bytes(const bitlinear_cuda_task* task,
                                       const bitlinear_cuda_tokens* tokens, int kernel);
// Queues the product on the stream (a cudaStream_t) of the current device, without waiting or
// allocating. If `tokens` is not null, it is the input of a single weight without a prologue, and x
// is not read. Returns null or an error message. A kernel that does not support the task is an
// error.
const char* bitlinear_cuda_linear(const bitlinear_cuda_task* task,
                                  const bitlinear_cuda_tokens* tokens, int kernel, void* stream);
// For training, on the current device. Each function queues its work on the stream and returns null
// or an error message.
//
// w: (N, K), of any bitlinear_dtype. packed: (N, ceil(K/4)). s_w: (1,), (N,) or, with groups of
// group_size weights, (N, groups), by the stride as in the task: the larger of the mean of the
// magnitudes and eps, of groups rounded to what products compute with; not finite if a weight is
// not. The workspace is at a multiple of 8.
int64_t bitlinear_cuda_weight_workspace_bytes(int64_t N, int64_t K);
const char* bitlinear_cuda_quantize_weight(const void* w, int dtype, int64_t N, int64_t K,
                                           float eps, uint8_t* packed, float* s_w,
                                           int64_t s_w_stride, int64_t group_size, void* workspace,
                                           void* stream);
// w: (N, K), at a multiple of 16 bytes, with the values -s_w, 0 and s_w. s_w: as above, or null for
// 1.
const char* bitlinear_cuda_expand_weight(const uint8_t* packed, int64_t N, int64_t K,
                                         const float* s_w, int64_t s_w_stride, int64_t group_size,
                                         void* w, int dtype, void* stream);
// x: (M, K). q: (M, K) of int8 or int16, at a multiple of 16 bytes; 0 where s_x, (M,), is NaN.
// q_sum: (M,), the sums of int8 tokens; or null.
const char* bitlinear_cuda_quantize_activations(const void* x, int dtype, int64_t M, int64_t K,
                                                float eps, int64_t act_bits, void* q, float* s_x,
                                                int32_t* q_sum, void* stream);
// x: (M, K), at a multiple of 16 bytes: q * s_x.
const char* bitlinear_cuda_expand_activations(const void* q, int64_t act_bits, const float* s_x,
                                              int64_t M, int64_t K, void* x, int dtype,
                                              void* stream);
// Finds the position of the first byte that holds a code 3, or a weight other than 0 past K, and
// that byte, and waits for the result; position -1 if there is none. packed: (N, ceil(K/4)), N >=
// 1. The workspace is 8 bytes, at a multiple of 8.
const char* bitlinear_cuda_find_invalid_byte(const uint8_t* packed, int64_t N, int64_t K,
                                             int64_t* position, uint8_t* byte, void* workspace,
                                             void* stream);
// Queues the attention on the stream of the current device (sm_90 and later). head_dim is 64 or
// 128, and at most 8 query heads share a key head.
const char* bitlinear_cuda_attend(const bitlinear_cuda_attention* attention, void* stream);
// Compares every kernel that the device can run with the reference in ../selftest. Returns 0 if
// all bits are equal; 1 with the first difference; 2 with the reason if the device cannot be used.
int bitlinear_cuda_selftest(int device, char* message, int64_t message_size);
}
