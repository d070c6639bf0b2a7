// The tokens of the GEMV: how one block quantises them, with their prologue, to shared memory.
//
// A quantiser makes up to three passes over a token: the sum of squares, the maximum, the rounding.
// Tokens are resident if all of their values stay in registers meanwhile. Of longer ones the
// registers hold a chunk at a time. The next pass begins with the chunk at which the last one has
// ended and loads the others again: plain values from L2, values of a prologue from shared memory,
// because a gate takes longer than a load.
//
// Two things bound this: a warp takes some four cycles for each of its instructions, because few
// others share its scheduler, and it waits for instructions that no cache near it holds. So all
// that needs no token is computed before the predecessor has ended, and all products with a
// prologue share one kernel, which they find in the cache one after the other.
#pragma once

#include "ampere.cuh"
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
  float s_x[kGemvTokens];
  int32_t q_sum[kGemvTokens];  // 0 before
};

// The groups of token m that a thread quantises: at `first` and then every `step` values, all
// before `end`. The `members` warps of a token take turns at its blocks of 512 values; `block` is
// the first of this warp.
struct Part {
  int m, first, step, end, block, members;

  __device__ Part(const bitlinear_cuda_task& task, int tokens) {
    const int warp = threadIdx.x / 32, log_members = tokens > 2 ? 1 : tokens > 1 ? 2 : 3;
    members = 1 << log_members;
    m = warp >> log_members;
    block = warp & (members - 1);
    first = (block * 32 + threadIdx.x % 32) * kGroup;
    step = (32 << log_members) * kGroup;
    end = m < tokens ? static_cast<int>(task.K) : 0;
  }

  // Without the groups of the first `values` values, a multiple of `step`.
  __device__ Part after(int values) const {
    Part rest = *this;
    rest.first += values;
    rest.block += values / kWarpValues;
    return rest;
  }
};

// Groups of 16-bit values that a thread holds of tokens that are not resident, with 168 registers
// instead of 96. Code for sm_100 and later would spill 12.
#if __CUDA_ARCH__ >= 1000
constexpr int kNarrowGroups = 11;
#else
constexpr int kNarrowGroups = 12;
#endif

// What the quantiser reads: x in its dtype. A source is constructed before the predecessor has
// ended. load() loads the groups of the part, as many as fit the registers; it also calls
// load_rows(), which starts the loads of the epilogue.
template <class X, bool kResident_>
struct PlainSource {
  static constexpr bool kFused = false, kWide = sizeof(X) == 4, kResident = kResident_;
  static constexpr int kGroups = kResident ? kGemvGroups : kWide ? 6 : kNarrowGroups;
  using Values = Group<X>;
  const X* x;

  __device__ PlainSource(const bitlinear_cuda_task& task, const Part& part)
      : x(static_cast<const X*>(task.x) + part.m * task.K + part.first) {
    compute_now(x);
  }

  template <class LoadRows>
  __device__ void load(const bitlinear_cuda_task&, const Part& part, Values (&groups)[kGroups],
                       const LoadRows& load_rows) const {
    load_rows();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) groups[i].load(x + i * part.step);
    }
  }
};

// The fp32 values of the gate. The other functions are for the norm: add_squares() and
// normalize_groups() are called if there is one. kWide: x is fp32, else of a 16-bit type.
template <bool kWide_, bool kResident_>
struct FusedSource {
  static constexpr bool kFused = true, kWide = kWide_, kResident = kResident_;
  static constexpr int kGroups = kResident || !kWide ? kGemvPrologueGroups : 1;
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

  template <class LoadRows>
  __device__ void load(const bitlinear_cuda_task& task, const Part& part, Values (&groups)[kGroups],
                       const LoadRows& load_rows) const {
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
  }

  struct NormWeights {
    RawGroup<true> raw[kGroups];
  };
  __device__ void load_norm_weights(const bitlinear_prologue& prologue, const Part& part,
                                    NormWeights& norm_weights) const {
    const int step = part.step * (prologue.norm_dtype == BITLINEAR_F32 ? 4 : 2);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) {
        norm_weights.raw[i].load(weights + i * step, prologue.norm_dtype);
      }
    }
  }
  // Stores the sums of squares of the warp's blocks.
  __device__ void add_squares(int64_t K, const Part& part, const Values (&groups)[kGroups],
                              float* sums) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int block = i * part.members + part.block;
      if (block * kWarpValues >= K) break;
      const float sum = warp_sum_of_squares(groups[i]);
      if (threadIdx.x % 32 == 0) sums[block] = sum;
    }
  }
  __device__ void normalize_groups(const bitlinear_prologue& prologue, const Part& part,
                                   Values (&groups)[kGroups], const NormWeights& norm_weights,
                                   float factor) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) {
        normalize(groups[i], norm_weights.raw[i], prologue.norm_dtype, factor);
      }
    }
  }

 private:
  static constexpr int kBytes = kWide ? 4 : 2;
};

// Quantises all tokens at once, each to kTokenRows rows of q. Each token has its share of the
// warps. It is constructed before the predecessor has ended. kParts: the parts of a slice whose
// sums are wanted; 0: none.
template <class Source, int kTokenRows, int kParts>
struct Quantizer {
  static constexpr int kGroups = Source::kGroups;
  using Values = typename Source::Values;
  Part part;
  Source source;
  uint32_t* words;     // of the first group, in q
  int32_t* part_sums;  // (rows of q, slices, kParts), negative

  __device__ Quantizer(const bitlinear_cuda_task& task, int q_stride, int8_t* q, int32_t* part_sums)
      : part(task, static_cast<int>(task.M) / kTokenRows),
        source(task, part),
        part_sums(part_sums) {
    const int slice = part.first / kSliceValues * kSliceValues;
    words = reinterpret_cast<uint32_t*>(q + part.m * kTokenRows * q_stride + slice) +
            part.first / kGroup % 16;
    compute_now(words);
  }

  // All consumers call this, also those without a token: they synchronise. norm_sums: a float for
  // each block of 512 values. stash: room for all values of tokens that are fused and not resident.
  template <class LoadRows>
  __device__ void run(const bitlinear_cuda_task& task, int q_stride, float* norm_sums,
                      float4* stash, Tokens& shared, const LoadRows& load_rows) const {
    const int lane = threadIdx.x % 32;
    Values groups[kGroups];
    uint32_t absmax = Source::kResident ? measure(task, norm_sums, groups, load_rows)
                                        : measure_chunks(task, norm_sums, stash, groups, load_rows);
    absmax = warp_reduce_max(absmax);
    if (lane == 0) shared.warp_max[threadIdx.x / 32] = absmax;
    sync_consumers();
    if (part.end == 0) return;

    absmax = warp_reduce_max(shared.warp_max[part.m * part.members + (lane & (part.members - 1))]);
    const TokenScale<kTokenRows> scale(absmax, task.eps);
    int32_t sums[kTokenRows] = {};
    quantize(part, groups, scale.inv, q_stride, words, sums);
    if constexpr (!Source::kResident) {
#pragma unroll 1
      for (int c = 1; c <= last_chunk(task); ++c) {
        const Part chunk = part.after(c * chunk_values());
        if constexpr (Source::kFused) {
          get(groups, stash, c);
        } else {
          Source(task, chunk).load(task, chunk, groups, [] {});
        }
        quantize(chunk, groups, scale.inv, q_stride, words + c * chunk_values() / 4, sums);
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

 private:
  // Values of a token that its threads hold at a time, and the last such chunk.
  __device__ int chunk_values() const { return kGroups * part.step; }
  __device__ int last_chunk(const bitlinear_cuda_task& task) const {
    return (static_cast<int>(task.K) - 1) / chunk_values();
  }

  // Loads all groups of the thread, with their prologue. Returns their largest magnitude.
  template <class LoadRows>
  __device__ uint32_t measure(const bitlinear_cuda_task& task, float* norm_sums,
                              Values (&groups)[kGroups], const LoadRows& load_rows) const {
    source.load(task, part, groups, load_rows);
    if constexpr (Source::kFused) {
      const bitlinear_prologue& prologue = task.prologue;
      if (prologue.norm_weight != nullptr) {
        norm_sums += part.m * part.members * kGroups;
        typename Source::NormWeights norm_weights;
        source.load_norm_weights(prologue, part, norm_weights);
        source.add_squares(task.K, part, groups, norm_sums);
        sync_consumers();
        const float factor = norm_factor<kGemvPrologueValues>(prologue, norm_sums, task.K);
        source.normalize_groups(prologue, part, groups, norm_weights, factor);
      }
    }
    return max_magnitude(part, groups);
  }

  // The same for tokens that are not resident. Leaves the first chunk in the registers.
  template <class LoadRows>
  __device__ uint32_t measure_chunks(const bitlinear_cuda_task& task, float* norm_sums,
                                     float4* stash, Values (&groups)[kGroups],
                                     const LoadRows& load_rows) const {
    const bitlinear_prologue& prologue = task.prologue;
    const bool has_norm = Source::kFused && prologue.norm_weight != nullptr;
    const int last = last_chunk(task);
    float factor = 0.0f;
    if constexpr (Source::kFused) {
      if (has_norm) {
        norm_sums += part.m * ceil_div(static_cast<int>(task.K), kWarpValues);
#pragma unroll 1
        for (int c = 0; c <= last; ++c) {
          const Part chunk = part.after(c * chunk_values());
          Source(task, chunk).load(task, chunk, groups, [] {});
          source.add_squares(task.K, chunk, groups, norm_sums);
          if (c < last) put(groups, stash, c);
        }
        sync_consumers();
        factor = norm_factor<BITLINEAR_MAX_K>(prologue, norm_sums, task.K);
      }
    }
    uint32_t absmax = 0;
#pragma unroll 1
    for (int c = last; c >= 0; --c) {
      const Part chunk = part.after(c * chunk_values());
      const Source chunk_source(task, chunk);
      if (!has_norm) chunk_source.load(task, chunk, groups, [] {});
      if constexpr (Source::kFused) {
        if (has_norm) {
          typename Source::NormWeights norm_weights;
          chunk_source.load_norm_weights(prologue, chunk, norm_weights);
          if (c < last) get(groups, stash, c);
          chunk_source.normalize_groups(prologue, chunk, groups, norm_weights, factor);
        }
        if (c > 0) put(groups, stash, c);
      }
      absmax = max(absmax, max_magnitude(chunk, groups));
    }
    load_rows();
    return absmax;
  }

  // Puts the groups of chunk c into the stash, or gets them; each thread has its own.
  __device__ static void put(const Values (&groups)[kGroups], float4* stash, int c) {
    stash += c * kGroups * 4 * kConsumers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float* const values = groups[i].values + 4 * v;
        stash[(4 * i + v) * kConsumers] = make_float4(values[0], values[1], values[2], values[3]);
      }
    }
  }
  __device__ static void get(Values (&groups)[kGroups], const float4* stash, int c) {
    stash += c * kGroups * 4 * kConsumers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float4 values = stash[(4 * i + v) * kConsumers];
        groups[i].values[4 * v] = values.x;
        groups[i].values[4 * v + 1] = values.y;
        groups[i].values[4 * v + 2] = values.z;
        groups[i].values[4 * v + 3] = values.w;
      }
    }
  }
  __device__ static uint32_t max_magnitude(const Part& part, const Values (&groups)[kGroups]) {
    uint32_t absmax = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (part.first + i * part.step < part.end) absmax = max(absmax, groups[i].magnitude_bits());
    }
    return absmax;
  }
  // Stores the groups of the part to q, and adds to the sums of its rows.
  __device__ void quantize(const Part& part, const Values (&groups)[kGroups], float inv,
                           int q_stride, uint32_t* words, int32_t (&sums)[kTokenRows]) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int k = part.first + i * part.step;
      if (k >= q_stride - kGemvTokenPad) break;
      float values[kGroup] = {};
      if (k < part.end) groups[i].convert(values);
      uint32_t planes[kTokenRows][4];
      int32_t group_sums[kTokenRows] = {};
      quantize_group(values, inv, planes, group_sums);
#pragma unroll
      for (int r = 0; r < kTokenRows; ++r) {
        sums[r] += group_sums[r];
        if constexpr (kParts > 0) {
          const int token_parts = (q_stride - kGemvTokenPad) / (kSliceValues / kParts);
          store_part_sum(k, group_sums[r], part_sums + (part.m * kTokenRows + r) * token_parts);
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          words[(i * part.step + r * q_stride) / 4 + 16 * p] = planes[r][p];
        }
      }
    }
  }
  // Lanes with neighbouring groups, of k and more values, have a part together.
  __device__ static void store_part_sum(int k, int32_t sum, int32_t* token_sums) {
    constexpr int kPartValues = kSliceValues / kParts, kLanes = kPartValues / kGroup;
    const int lane = threadIdx.x % 32;
    const uint32_t together = ((1u << kLanes) - 1) << (lane & ~(kLanes - 1));
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) sum += __shfl_xor_sync(together, sum, mask);
    if (lane % kLanes == 0) token_sums[k / kPartValues] = -sum;
  }
};

}  // namespace cuda
}  // namespace bitlinear
