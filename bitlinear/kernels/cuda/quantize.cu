// The row quantiser: absmax, scale, rounding, plane order and sum. One or more warps per token, one
// or more tokens per block.
//
// Bound: memory. x is read once, as long as the threads can keep a token in registers (up to 32768
// values), and 1 byte per value is written. Measured on an H100: 4096 x 8192 in bf16 (100 MB) takes
// 33 us, 77 % of the memory's peak by the profiler; a few tokens take 1.4 us, which is latency. 50
// to 61 registers, no spills, so a multiprocessor has 32 warps: on an H200 1024 x 6912 takes 5.9 us
// in two rounds with 7 warps a token, and 7.6 us in four with 14. With a prologue 112 to 120
// registers, and half as many warps: 1024 tokens of 6912 values take 24.3 us with a gate and 16.3
// with a norm (30.2 and 29.2 with twice the warps), three and four times the bound.
#include "launch.cuh"
#include "prologue.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

// Stores the first `count` values of a group in the order of x, from its planes.
__device__ inline void store_in_order(int8_t* q, const uint32_t (&planes)[4], int count,
                                      bool aligned) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Value j of the word is byte i of plane 3 - j.
    const uint32_t low = __byte_perm(planes[3], planes[2], 0x40 + 0x11 * i);
    const uint32_t high = __byte_perm(planes[1], planes[0], 0x40 + 0x11 * i);
    words[i] = __byte_perm(low, high, 0x5410);
  }
  if (aligned) {
    *reinterpret_cast<uint4*>(q) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) q[i] = static_cast<int8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

// The same for 16 bits, from values that need only be rounded.
__device__ inline void store_in_order(int16_t* q, const float (&values)[kGroup], int count,
                                      bool aligned) {
  alignas(16) int16_t rounded[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    rounded[i] = static_cast<int16_t>(__float_as_uint(round_magically(values[i])) -
                                      __float_as_uint(kRoundMagic));
  }
  if (aligned) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      reinterpret_cast<uint4*>(q)[v] = reinterpret_cast<const uint4*>(rounded)[v];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) q[i] = rounded[i];
  }
}

// M counts tokens here. kRows: the rows of q of each.
//
// kFused: a prologue comes first. The threads then keep its fp32 values, if a token is not longer
// than they can keep.
template <class X, Layout kLayout, int kRows, bool kFused>
__global__ void __launch_bounds__(32 * (kFused ? kPrologueWarps : kQuantizerWarps))
    quantize_rows(const __grid_constant__ bitlinear_prologue prologue, const X* x, int64_t M, int K,
                  float eps, bool aligned, Activations out) {
  using Values = std::conditional_t<kFused, FloatGroup, Group<X>>;
  __shared__ uint32_t warp_max[kQuantizerWarps];
  __shared__ int32_t warp_sum[kRows][kQuantizerWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int first_warp = threadIdx.y * warps;  // the first warp of this token
  const int64_t m = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  // Threads beyond the last token quantise it again: the workspace has room for whole blocks.
  const bool is_gate = kFused && prologue.activation != BITLINEAR_NO_GATE;
  const X* row = x + minimum(m, M - 1) * (is_gate ? 2 * int64_t{K} : int64_t{K});
  const int first = static_cast<int>(threadIdx.x) * kGroup;
  const int step = static_cast<int>(blockDim.x) * kGroup;
  float factor = 0.0f;  // of the norm
  const auto load = [&](int k) -> Values {
    if constexpr (kFused) {
      const int dtype = dtype_of<X>();
      RawGroup<> a, b;
      load_raw(a, row, dtype, k, K - k, aligned);
      if (is_gate) load_raw(b, row + K, dtype, k, K - k, aligned);
      return apply_gate(prologue.activation, a, b, dtype);
    } else {
      return load_group(row + k, K - k, aligned);
    }
  };
  const auto normalize_at = [&](FloatGroup& values, int k) {
    RawGroup<> weights;
    load_raw(weights, prologue.norm_weight, prologue.norm_dtype, k, K - k, aligned);
    normalize(values, weights, prologue.norm_dtype, factor);
  };
  const auto load_normalized = [&](int k) {
    Values values = load(k);
    if constexpr (kFused) {
      if (prologue.norm_weight != nullptr) normalize_at(values, k);
    }
    return values;
  };
  allow_successor();
  wait_for_predecessor();

  Values kept[kQuantizerGroups] = {};
  uint32_t absmax = 0;
#pragma unroll
  for (int i = 0; i < kQuantizerGroups; ++i) {
    if (first + i * step < out.q_stride) kept[i] = load(first + i * step);
  }
  if constexpr (kFused) {
    if (prologue.norm_weight != nullptr) {
      __shared__ float warp_sums[ceil_div(BITLINEAR_MAX_K, kWarpValues)];
      float* const sums = warp_sums + threadIdx.y * ceil_div(K, kWarpValues);
      const auto add_squares = [&](const Values& values, int begin) {
        const float sum = warp_sum_of_squares(values);
        if (lane == 0) sums[begin / kWarpValues] = sum;
      };
      int begin = first - lane * kGroup;  // of the warp
#pragma unroll
      for (int i = 0; i < kQuantizerGroups; ++i, begin += step) {
        if (begin < K) add_squares(kept[i], begin);
      }
      for (; begin < K; begin += step) add_squares(load(begin + lane * kGroup), begin);
      __syncthreads();
      factor = norm_factor<BITLINEAR_MAX_K>(prologue, sums, K);
#pragma unroll
      for (int i = 0; i < kQuantizerGroups; ++i) {
        normalize_at(kept[i], first + i * step);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kQuantizerGroups; ++i) {
    if (first + i * step < out.q_stride) absmax = max(absmax, kept[i].magnitude_bits());
  }
  for (int k = first + kQuantizerGroups * step; k < K; k += step) {
    absmax = max(absmax, load_normalized(k).magnitude_bits());
  }
  absmax = warp_reduce_max(absmax);
  if (lane == 0) warp_max[first_warp + warp] = absmax;
  __syncthreads();
  absmax = warp_reduce_max(lane < warps ? warp_max[first_warp + lane] : 0);
  const TokenScale<kRows> scale(absmax, eps);

  int32_t sums[kRows] = {};
  const auto quantize = [&](int k, const Values& group) {
    float values[kGroup];
    group.convert(values);
    uint32_t planes[kRows][4];
    if constexpr (kLayout == Layout::kInOrder && kRows == 2) {
#pragma unroll
      for (float& value : values) value = isnan(scale.s_x) ? 0.0f : __fmul_rn(value, scale.inv);
      int16_t* const q = reinterpret_cast<int16_t*>(out.q) + m * K + k;
      store_in_order(q, values, K - k, K % kGroup == 0);
    } else if constexpr (kLayout == Layout::kInOrder) {
      quantize_group(values, scale.inv, planes, sums);
      if (isnan(scale.s_x)) planes[0][0] = planes[0][1] = planes[0][2] = planes[0][3] = 0;
      store_in_order(out.q + m * K + k, planes[0], K - k, K % kGroup == 0);
    } else {
      quantize_group(values, scale.inv, planes, sums);
      const int slice = k / kSliceValues;
      const int word = k / kGroup % 16;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const int64_t offset = word_offset<kLayout>(out, m * kRows + r, slice, p, word);
          *reinterpret_cast<uint32_t*>(out.q + offset) = planes[r][p];
        }
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kQuantizerGroups; ++i) {
    if (first + i * step < out.q_stride) quantize(first + i * step, kept[i]);
  }
  for (int k = first + kQuantizerGroups * step; k < out.q_stride; k += step) {
    quantize(k, load_normalized(k));
  }
  if constexpr (kLayout == Layout::kInOrder && kRows == 2) {
    if (threadIdx.x == 0) out.s_x[m] = scale.s_x;
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t sum = warp_reduce_add(sums[r]);
      if (lane == 0) warp_sum[r][first_warp + warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        int32_t sum = 0;
        for (int w = 0; w < warps; ++w) sum += warp_sum[r][first_warp + w];
        out.s_x[m * kRows + r] = scale.s_x;
        if (kLayout != Layout::kInOrder || out.q_sum != nullptr) out.q_sum[m * kRows + r] = sum;
      }
    }
  }
}

template <class X, Layout kLayout, int kRows, bool kFused>
cudaError_t launch(const Call& call, const Activations& out) {
  const bitlinear_cuda_task& task = call.task;
  const X* x = static_cast<const X*>(task.x);
  const int64_t tokens = task.M / kRows;
  const bool aligned = tokens_aligned(task);
  QuantizerPlan plan = plan_quantizer(call.device, tokens, task.K, kFused);
  if (kLayout == Layout::kInOrder && tokens % plan.tokens != 0)
    plan.tokens = 1;  // q has no room for whole blocks
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(ceil_div<int64_t>(tokens, plan.tokens))),
      dim3(static_cast<unsigned>(32 * plan.warps), static_cast<unsigned>(plan.tokens))};
  return launch_kernel<quantize_rows<X, kLayout, kRows, kFused>>(
      config, call, task.prologue, x, tokens, static_cast<int>(task.K), task.eps, aligned, out);
}

template <class X, int kRows, bool kFused>
cudaError_t launch(const Call& call, const Activations& out, Layout layout) {
  if (layout == Layout::kRows) return launch<X, Layout::kRows, kRows, kFused>(call, out);
  if (layout == Layout::kFragments) return launch<X, Layout::kFragments, kRows, kFused>(call, out);
  if (layout == Layout::kTiles) return launch<X, Layout::kTiles, kRows, kFused>(call, out);
  return launch<X, Layout::kInOrder, kRows, false>(call, out);  // for training: without a prologue
}

template <class X, int kRows>
cudaError_t launch(const Call& call, const Activations& out, Layout layout) {
  return bitlinear_is_plain(&call.task.prologue) ? launch<X, kRows, false>(call, out, layout)
                                                 : launch<X, kRows, true>(call, out, layout);
}

}  // namespace

cudaError_t quantize(const Call& call, const Activations& out, Layout layout) {
  return dispatch_dtype(call.task.x_dtype, [&](auto zero) {
    using X = decltype(zero);
    return call.task.act_bits == 8 ? launch<X, 1>(call, out, layout)
                                   : launch<X, 2>(call, out, layout);
  });
}

}  // namespace cuda
}  // namespace bitlinear
