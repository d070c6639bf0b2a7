// The C interface of the CUDA kernels: what the torch file, the self-test and the test driver call.
#pragma once

#include <stdint.h>

#include "../abi.h"

// y = epilogue(quantize(x) @ w^T) on the current device. Every array is contiguous.
struct bitlinear_cuda_task {
  const void* x;  // (M, K)
  int x_dtype;    // enum bitlinear_dtype, as all dtypes here
  int64_t M, N, K;
  float eps;
  const uint8_t* w;    // (N, ceil(K/4)): packed weights, format version 1
  const float* s_w;    // (1,) or (N,)
  int64_t s_w_stride;  // 0: one scale per tensor; 1: one per output channel
  const void* bias;    // (N,) or null
  int bias_dtype;
  void* y;  // (M, N), at a multiple of 16 bytes
  int y_dtype;
  void* workspace;  // as bitlinear_cuda_workspace_bytes() says, at a multiple of 256
  // Whether whatever wrote w had ended before the work just ahead in the stream began. If so, the
  // kernels may start to read w while that work is still running.
  int w_prefetchable;
};

// What computes a product. Each handles every M, N and K that its row in heuristics.h supports.
enum bitlinear_cuda_kernel {
  BITLINEAR_CUDA_AUTO = 0,         // whichever heuristics.h prefers
  BITLINEAR_CUDA_DP4A = 1,         // any shape, sm_61 and later
  BITLINEAR_CUDA_GEMV = 2,         // up to 4 tokens, sm_90 and later
  BITLINEAR_CUDA_SMALL_BATCH = 3,  // up to 32 tokens, sm_90 and later
  BITLINEAR_CUDA_MMA = 4,          // any shape, sm_80 and later
  BITLINEAR_CUDA_WGMMA = 5,        // any number of tokens, sm_90a only
  BITLINEAR_CUDA_SMALL_LAYER = 6,  // up to 1024 inputs, sm_80 and later
};

extern "C" {
// Bytes of workspace that this kernel needs on the current device, for the task as far as it is
// known without; 0 for some.
int64_t bitlinear_cuda_workspace_bytes(const bitlinear_cuda_task* task, int kernel);
// Queues the product on the stream (a cudaStream_t) of the current device; nothing is waited for or
// allocated. Null, or what is wrong; a kernel that is named but cannot serve the task is an error.
const char* bitlinear_cuda_linear(const bitlinear_cuda_task* task, int kernel, void* stream);
// For training; both operands as they are, on the current device. Each queues its work on the
// stream and returns null, or what is wrong.
//
// w: (N, K), of any bitlinear_dtype. packed: (N, ceil(K/4)). s_w: (1,), the mean of the magnitudes
// or, if that is less, eps; a weight that is not finite shows in it. The workspace is at a multiple
// of 8.
int64_t bitlinear_cuda_weight_workspace_bytes(int64_t N, int64_t K);
const char* bitlinear_cuda_quantize_weight(const void* w, int dtype, int64_t N, int64_t K,
                                           float eps, uint8_t* packed, float* s_w, void* workspace,
                                           void* stream);
// w: (N, K), at a multiple of 16 bytes: -s_w, 0 and s_w, which is (1,), or 1 where that is null.
const char* bitlinear_cuda_expand_weight(const uint8_t* packed, int64_t N, int64_t K,
                                         const float* s_w, void* w, int dtype, void* stream);
// x: (M, K). q: (M, K), at a multiple of 16 bytes; 0 where s_x, (M,), is NaN.
const char* bitlinear_cuda_quantize_activations(const void* x, int dtype, int64_t M, int64_t K,
                                                float eps, int8_t* q, float* s_x, void* stream);
// x: (M, K), at a multiple of 16 bytes: q * s_x.
const char* bitlinear_cuda_expand_activations(const int8_t* q, const float* s_x, int64_t M,
                                              int64_t K, void* x, int dtype, void* stream);
// Waits for the position of the first byte that holds a code 3, or other weights than 0 past K, and
// for that byte; position -1 if there is none. packed: (N, ceil(K/4)), N >= 1. The workspace is 8
// bytes, at a multiple of 8.
const char* bitlinear_cuda_find_invalid_byte(const uint8_t* packed, int64_t N, int64_t K,
                                             int64_t* position, uint8_t* byte, void* workspace,
                                             void* stream);
// Compares every kernel that the device can run with the numerics as they are written down.
// 0: equal to the bit. 1: not, with the first difference. 2: the device cannot be used, with why.
int bitlinear_cuda_selftest(int device, char* message, int64_t message_size);
}
