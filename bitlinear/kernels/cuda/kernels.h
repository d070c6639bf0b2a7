// The C interface between the CUDA kernels and whoever drives them. Torch-free.
#pragma once

#include <stdint.h>

#include "../abi.h"

// 0: the results on this device have the right bits. 1: they have not, and `message` says which. 2:
// the CUDA runtime failed (out of memory, a busy device), which says nothing about the kernels.
BITLINEAR_EXPORT int bitlinear_cuda_selftest(int device, char* message, int64_t message_size);

// Placeholder: y[i] = x[i].
BITLINEAR_EXPORT int bitlinear_cuda_copy(const float* x, float* y, int64_t size, void* stream);
