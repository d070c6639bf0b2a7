// Cuts a task along its tokens: for threads, and for kernels that suit some of them.
#pragma once

#include <stdint.h>

#include "../abi.h"

namespace bitlinear {

// The part of a task for rows begin .. end of q: whole tokens.
inline bitlinear_task tokens_of(const bitlinear_task& task, int64_t begin, int64_t end) {
  const int64_t token = begin / bitlinear_rows_per_token(task.act_bits);
  const auto offset = [&](int dtype) {
    return token * task.y_stride * (dtype == BITLINEAR_F32 ? 4 : 2);
  };
  bitlinear_task part = task;
  part.q += begin * task.q_stride;
  part.s_x += token;
  part.q_sum += begin;
  part.M = end - begin;
  part.y = static_cast<char*>(task.y) + offset(task.y_dtype);
  if (task.residual != nullptr) {
    part.residual = static_cast<const char*>(task.residual) + offset(task.residual_dtype);
  }
  return part;
}

}  // namespace bitlinear
