// Attention of one new token in bf16, by parts of the keys, and the rotation of its heads.
//
// Bound: memory; keys and values are read once. Each key and value is converted to fp32 once for
// all queries that share it; then a query takes two multiply-adds per element. All sums are fp32.
// The loops are plain, with one vector of lanes whose order is fixed: every variant gives the same
// bits. Two cores of Zen 4, 20 heads of 128, 5 key heads: 30 us at 128 keys (sdpa 63, without the
// rotation and the cache), 245 at 2048 (sdpa 640; reading them at 40 GB/s takes 131). The sums
// across lanes and the exponentials take a third of the time.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../integers.h"
#include "prologue.h"

namespace bitlinear {

// Each product and the sum are rounded to bf16, as in transformers.
void rotate_heads(const uint16_t* x, int64_t heads, int64_t D, const uint16_t* cos,
                  const uint16_t* sin, uint16_t* y) {
  const int64_t half = D / 2;
  const auto product = [](uint16_t a, uint16_t b) {
    return float_from_bf16(bf16_from_float(float_from_bf16(a) * float_from_bf16(b)));
  };
  for (int64_t h = 0; h < heads; ++h, x += D, y += D) {
    for (int64_t d = 0; d < half; ++d) {
      const float other = product(x[d + half], sin[d]);
      y[d] = bf16_from_float(product(x[d], cos[d]) - other);
    }
    for (int64_t d = half; d < D; ++d) {
      const float other = product(x[d - half], sin[d]);
      y[d] = bf16_from_float(product(x[d], cos[d]) + other);
    }
  }
}

inline void floats_from_bf16(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = float_from_bf16(x[i]);
}

constexpr int kLanes = 16;
static_assert(BITLINEAR_HEAD_UNIT % kLanes == 0, "a head must hold whole lanes");

// products[j] = the sum of a[i] * b[i] over i = j, j + kLanes, ..., count a multiple of kLanes.
inline void multiply_lanes(const float* a, const float* b, int64_t count, float* products) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  memcpy(products, lanes, sizeof(lanes));
}

// Adds the lanes of kLanes rows: sums[t] is the sum of row t. Overwrites the lanes. All rows at
// once take a third of the instructions of one row after the other.
inline void add_all_lanes(float (&lanes)[kLanes * kLanes], float* sums) {
  static_assert(kLanes == 16, "four halvings");
  float half[kLanes * kLanes / 2];
  add_neighbours(lanes, 8 * kLanes, half);
  add_neighbours(half, 4 * kLanes, lanes);
  add_neighbours(lanes, 2 * kLanes, half);
  add_neighbours(half, kLanes, sums);
}

// scores[0:count] become exp(score - largest); 0 where a score is -inf. The array is filled up to
// whole lanes.
inline void exponentials(float* scores, int64_t count, float* largest, float* sum) {
  const int64_t filled = round_up(count, kLanes);
  for (int64_t i = count; i < filled; ++i) scores[i] = -HUGE_VALF;
  float lanes[kLanes];
  for (float& lane : lanes) lane = -HUGE_VALF;
  for (int64_t i = 0; i < filled; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] =
          scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];  // without NaNs, which the sum has
    }
  }
  float maximum = lanes[0];
  for (const float lane : lanes) maximum = lane > maximum ? lane : maximum;
  for (float& lane : lanes) lane = 0.0f;
  for (int64_t i = 0; i < filled; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float weight = exp_of(scores[i + j] - maximum);
      scores[i + j] = scores[i + j] == -HUGE_VALF ? 0.0f : weight;
      lanes[j] += scores[i + j];
    }
  }
  *largest = maximum;
  *sum = add_halves<kLanes>(lanes);
}

// Queries row .. row + kRows of the task. kSize: the size of a head; 0 for any.
template <int kSize, int kRows>
void attend_rows(const bitlinear_attention& task, int64_t row) {
  const int64_t D = kSize > 0 ? kSize : task.head_size;
  float q[kRows][BITLINEAR_MAX_HEAD], element[BITLINEAR_MAX_HEAD];
  float lanes[kRows][kLanes * kLanes] = {};
  float weights[kRows][BITLINEAR_ATTENTION_TOKENS];
  for (int r = 0; r < kRows; ++r) floats_from_bf16(task.q + (row + r) * D, D, q[r]);
  for (int64_t begin = 0; begin < task.count; begin += kLanes) {
    const int64_t count = minimum(task.count - begin, kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t i = (begin + t) * D;
      floats_from_bf16(task.keys + i, D, element);
      for (int r = 0; r < kRows; ++r) multiply_lanes(element, q[r], D, lanes[r] + t * kLanes);
    }
    for (int r = 0; r < kRows; ++r) add_all_lanes(lanes[r], weights[r] + begin);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < task.count; ++i) weights[r][i] *= task.scale;
    for (int64_t i = 0; task.mask != nullptr && i < task.count; ++i) {
      if (task.mask[i] == 0) weights[r][i] = -HUGE_VALF;
    }
    exponentials(weights[r], task.count, task.largest + row + r, task.sums + row + r);
  }
  float* const totals = task.totals + row * D;
  for (int64_t d = 0; d < kRows * D; ++d) totals[d] = 0.0f;
  for (int64_t i = 0; i < task.count; ++i) {
    floats_from_bf16(task.values + i * D, D, element);
    for (int r = 0; r < kRows; ++r) {
      for (int64_t d = 0; d < D; ++d) totals[r * D + d] += weights[r][i] * element[d];
    }
  }
}

template <int kSize>
void attend_head(const bitlinear_attention& task) {
  constexpr int kRows = 4;
  int64_t row = 0;
  for (; row + kRows <= task.rows; row += kRows) attend_rows<kSize, kRows>(task, row);
  for (; row < task.rows; ++row) attend_rows<kSize, 1>(task, row);
}

void attend(const bitlinear_attention* task) {
  switch (task->head_size) {
    case 64:
      return attend_head<64>(*task);
    case 128:
      return attend_head<128>(*task);
    default:
      return attend_head<0>(*task);
  }
}

// y = the average of the values over all parts, in bf16.
void join_parts(const bitlinear_attention* parts, int64_t count, int64_t row, uint16_t* y) {
  const int64_t D = parts[0].head_size;
  float largest = -HUGE_VALF;
  for (int64_t p = 0; p < count; ++p) {
    const float other = parts[p].largest[row];
    largest = other > largest ? other : largest;
  }
  float sum = 0.0f, totals[BITLINEAR_MAX_HEAD] = {};
  for (int64_t p = 0; p < count; ++p) {
    if (parts[p].sums[row] == 0.0f) continue;  // no key that the query sees
    const float weight = exp_of(parts[p].largest[row] - largest);
    sum += weight * parts[p].sums[row];
    for (int64_t d = 0; d < D; ++d) totals[d] += weight * parts[p].totals[row * D + d];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int64_t d = 0; d < D; ++d) y[d] = bf16_from_float(totals[d] * factor);
}

}  // namespace bitlinear
