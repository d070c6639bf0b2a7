// The tokens of the GEMV: how one block quantises them, with their prologue, to shared memory.
//
// Two things bound this: a warp takes some four cycles for each of its instructions, because few
// others share its scheduler, and it waits for instructions that no cache near it holds. So all
// that needs no token is computed before the predecessor has ended, and all products with a
// prologue share one kernel, which they find in the cache one after the other.
#pragma once

#include "hopper.cuh"
#include "prologue.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {

constexpr int kConsumers = 32 * kGemvWarps;  // threads that quantise and multiply
static_assert(kGemvRegisterValues == kGemvGroups * kGroup * kConsumers, "see heuristics.h");

__device__ inline void sync_consumers() { sync_leading_threads<kConsumers>(); }

// What the quantiser leaves in shared memory beside q, and what it needs there.
struct Tokens {
  uint32_t warp_max[kGemvWarps];
  float norm_sums[kGemvPrologueValues / kWarpValues];
  float s_x[kGemvTokens];
  int32_t q_sum[kGemvTokens];  // 0 before
};

// The groups of token m that a thread quantises: at `first` and then every `step` values, all
// before `end`. The thread's warp is `member` of the `members` warps of the token.
struct Part {
  int m, first, step, end, member, members;

  __device__ Part(const bitlinear_cuda_task& task, int tokens) {
    const int warp = threadIdx.x / 32, log_members = tokens > 2 ? 1 : tokens > 1 ? 2 : 3;
    members = 1 << log_members;
    m = warp >> log_members;
    member = warp & (members - 1);
    first = (member * 32 + threadIdx.x % 32) * kGroup;
    step = (32 << log_members) * kGroup;
    end = m < tokens ? static_cast<int>(task.K) : 0;
  }
};

// What the quantiser reads: x in its dtype. A source is constructed before the predecessor has
// ended. load() also calls load_rows(), which starts the loads of the epilogue.
template <class X>
struct PlainSource {
  static constexpr bool kFused = false, kWide = sizeof(X) == 4;
  static constexpr int kGroups = kGemvGroups;
  using Values = Group<X>;
  const X* x;

  __device__ PlainSource(const bitlinear_cuda_task& task, const Part& part)
      : x(static_cast<const X*>(task.x) + part.m * task.K + part.first) {
    compute_now(x);
  }

  template <class LoadRows>
  __device__ void load(const bitlinear_cuda_task&, const Part& part, Values (&groups)[kGroups],
                       float*, const LoadRows& load_rows) const {
    load_rows();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) groups[i].load(x + i * part.step);
    }
  }
};

// The fp32 values of the prologue. kWide: x is fp32, else of a 16-bit type.
template <bool kWide_>
struct FusedSource {
  static constexpr bool kFused = true, kWide = kWide_;
  static constexpr int kGroups = kGemvPrologueGroups;
  using Values = FloatGroup;
  const char *a, *b, *weights;

  __device__ FusedSource(const bitlinear_cuda_task& task, const Part& part) {
    const bool has_gate = task.prologue.activation != BITLINEAR_NO_GATE;
    const int64_t begin = (has_gate ? 2 * part.m : part.m) * task.K + part.first;
    a = static_cast<const char*>(task.x) + begin * kBytes;
    b = a + task.K * kBytes;
    weights = static_cast<const char*>(task.prologue.norm_weight) +
              part.first * (task.prologue.norm_dtype == BITLINEAR_F32 ? 4 : 2);
    compute_now(a);
    compute_now(b);
    compute_now(weights);
  }

  // All consumers call this, also those without a token: they synchronise.
  template <class LoadRows>
  __device__ void load(const bitlinear_cuda_task& task, const Part& part, Values (&groups)[kGroups],
                       float* norm_sums, const LoadRows& load_rows) const {
    const bitlinear_prologue& prologue = task.prologue;
    const bool has_gate = prologue.activation != BITLINEAR_NO_GATE;
    const int dtype = kWide ? BITLINEAR_F32 : task.x_dtype;
    RawGroup<kWide> raw_a[kGroups], raw_b[kGroups];
    const auto load_group = [&](int i) {
      if (part.first + i * part.step < part.end) {
        raw_a[i].load(a + i * part.step * kBytes, dtype);
        if (has_gate) raw_b[i].load(b + i * part.step * kBytes, dtype);
      }
    };
    // Wide groups come one after the other, to spare registers.
    if (kWide) load_rows();
    load_group(0);
    if (!kWide) load_group(1);
    if (!kWide) load_rows();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (kWide && i > 0) load_group(i);
      groups[i] = {};
      if (part.first + i * part.step < part.end) {
        groups[i] = apply_gate(prologue.activation, raw_a[i], raw_b[i], dtype);
      }
    }
    if (prologue.norm_weight == nullptr) return;
    RawGroup<true> raw_weights[kGroups];
    const int weight_step = part.step * (prologue.norm_dtype == BITLINEAR_F32 ? 4 : 2);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) {
        raw_weights[i].load(weights + i * weight_step, prologue.norm_dtype);
      }
    }
    float* const sums = norm_sums + part.m * part.members * kGroups;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int warp = i * part.members + part.member;
      if (warp * kWarpValues >= task.K) break;
      const float sum = warp_sum_of_squares(groups[i]);
      if (threadIdx.x % 32 == 0) sums[warp] = sum;
    }
    sync_consumers();
    const float factor = norm_factor<kGemvPrologueValues>(prologue, sums, task.K);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) {
        normalize(groups[i], raw_weights[i], prologue.norm_dtype, factor);
      }
    }
  }

 private:
  static constexpr int kBytes = kWide ? 4 : 2;
};

// Quantises all tokens at once, each to kTokenRows rows of q. Each token has its share of the
// warps, which keep the values in registers between the maximum and the rounding. It is constructed
// before the predecessor has ended.
template <class Source, int kTokenRows>
struct Quantizer {
  static constexpr int kGroups = Source::kGroups;
  Part part;
  Source source;
  uint32_t* words;  // of the first group, in q

  __device__ Quantizer(const bitlinear_cuda_task& task, int q_stride, int8_t* q)
      : part(task, static_cast<int>(task.M) / kTokenRows), source(task, part) {
    const int slice = part.first / kSliceValues * kSliceValues;
    words = reinterpret_cast<uint32_t*>(q + part.m * kTokenRows * q_stride + slice) +
            part.first / kGroup % 16;
    compute_now(words);
  }

  template <class LoadRows>
  __device__ void run(const bitlinear_cuda_task& task, int q_stride, Tokens& shared,
                      const LoadRows& load_rows) const {
    const int lane = threadIdx.x % 32;
    typename Source::Values groups[kGroups];
    source.load(task, part, groups, shared.norm_sums, load_rows);
    uint32_t absmax = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) absmax = max(absmax, groups[i].magnitude_bits());
    }
    absmax = warp_reduce_max(absmax);
    if (lane == 0) shared.warp_max[threadIdx.x / 32] = absmax;
    sync_consumers();
    if (part.end == 0) return;

    absmax = warp_reduce_max(shared.warp_max[part.m * part.members + (lane & (part.members - 1))]);
    const TokenScale<kTokenRows> scale(absmax, task.eps);
    int32_t sums[kTokenRows] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int k = part.first + i * part.step;
      if (k >= q_stride - kGemvTokenPad) break;
      float values[kGroup] = {};
      if (k < part.end) groups[i].convert(values);
      uint32_t planes[kTokenRows][4];
      quantize_group(values, scale.inv, planes, sums);
#pragma unroll
      for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          words[(i * part.step + r * q_stride) / 4 + 16 * p] = planes[r][p];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTokenRows; ++r) {
      const int32_t sum = warp_reduce_add(sums[r]);
      if (lane == 0) atomicAdd(&shared.q_sum[part.m * kTokenRows + r], sum);
    }
    if (part.first == 0) {
#pragma unroll
      for (int r = 0; r < kTokenRows; ++r) shared.s_x[part.m * kTokenRows + r] = scale.s_x;
    }
  }
};

}  // namespace cuda
}  // namespace bitlinear
