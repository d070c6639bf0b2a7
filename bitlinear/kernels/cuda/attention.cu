// Attention of one query token for each sequence (sm_90 and later), between two products of a
// decoder's layer. In a step of a captured model it also rotates queries and the new key, and
// writes the new key and value into the cache.
//
// A block, or a cluster of eight if there are many keys, has the query heads that share a key head.
// Each warp takes 16 keys at a time and keeps a maximum, a sum and an output of its own; the block
// joins what its warps have, the cluster what its blocks have. Scores are key fragments times query
// fragments of mma.m16n8k16, eight heads wide; outputs are value fragments times probabilities. A
// lane loads 16 bytes of a row at a time directly into fragments: the order of k that results is
// the same for both operands.
//
// Numerics: scores, maximum, sums and outputs in fp32; probabilities are rounded to 16 bits before
// they are multiplied with values, as in other kernels of attention. The rotation rounds to 16 bits
// where apply_rotary_pos_emb does. A key that is masked by -inf counts nothing, and 16 of them are
// not read: a longer cache gives the same bits.
//
// Bound: latency. 20 heads of 128, 5 key heads, bf16, us a call in a graph of 30 on an H100, with
// 131 and 2051 keys that count: 4.8 and 9.8 for one sequence, 7.9 and 46 for 16 (86 MB, which
// memory reads in 29). cuDNN takes 6.3 and 10.3 for one, without the three kernels of rotation and
// cache. Between the products of a decoder's layer it takes 8: a block of 16 warps shares no
// multiprocessor with a block of theirs. Blocks of 8 warps do, and take 0.6 us more for one
// sequence and 2.8 for 4 (two rounds, or clusters of blocks of 128 keys); products that leave 6
// multiprocessors to it gain 0.5 for one sequence and lose 0.3 after 2048 tokens.
//
// Before the predecessor has ended, keys and values are prefetched into L2. The mask can change
// until then, so it serves as a hint only, and is read again.
#include "ampere.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarpKeys = 16;
constexpr int kMaxHeads = 8;   // that share a key head
constexpr int kMaxSplits = 8;  // blocks of a cluster
// A block takes so many keys before the next block of the cluster does, in one round of 16 warps or
// in two of 8. So where a key is computed does not depend on the length of the cache.
constexpr int kBlockKeys = 256;
// With more key heads than that (of all sequences) two blocks of 8 warps share a multiprocessor.
constexpr int64_t kManyHeads = 48;
constexpr float kLog2E = 1.44269504f;

// Of a warp or of a block: the maximum of the scores, and the sum of exp2(score - maximum).
struct Softmax {
  float maximum, sum;
};

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Joins the outputs of kCount parts. One without keys has the maximum -inf and an output of 0.
template <int kCount, class StateOf, class OutputOf>
__device__ inline float join(const StateOf& state_of, const OutputOf& output_of, Softmax* joined) {
  Softmax states[kCount];
  float outputs[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) states[i] = state_of(i);
#pragma unroll
  for (int i = 0; i < kCount; ++i) outputs[i] = output_of(i);
  *joined = {-INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) joined->maximum = fmaxf(joined->maximum, states[i].maximum);
  const float base = joined->maximum == -INFINITY ? 0.0f : joined->maximum;
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float weight = exp2_of(states[i].maximum - base);
    joined->sum += weight * states[i].sum;
    result += weight * outputs[i];
  }
  return result;
}

// 0 if no key counts.
__device__ inline float average(float total, float sum) {
  return sum == 0.0f ? 0.0f : __fdiv_rn(total, sum);
}

template <class Half>
__device__ inline float low_half(uint32_t pair) {
  if constexpr (std::is_same<Half, __half>::value) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xFFFF)));
  } else {
    return __uint_as_float(pair << 16);
  }
}
template <class Half>
__device__ inline uint32_t pack_halves(float low, float high) {
  const Half halves[2] = {from_float<Half>(low), from_float<Half>(high)};
  uint32_t pair;
  memcpy(&pair, halves, sizeof(pair));
  return pair;
}
template <class Half>
__device__ inline float rounded(float value) {
  return to_float(from_float<Half>(value));
}

// Rotates values d and d + kDim / 2 of a row, with the roundings of apply_rotary_pos_emb.
template <class Half>
__device__ inline void rotate(Half (&pair)[2], const Half (&cosine)[2], const Half (&sine)[2]) {
  const auto combine = [&](float x, float other, int i) {
    const float product = rounded<Half>(__fmul_rn(x, to_float(cosine[i])));
    return from_float<Half>(__fadd_rn(product, rounded<Half>(__fmul_rn(other, to_float(sine[i])))));
  };
  const float first = to_float(pair[0]), second = to_float(pair[1]);
  pair[0] = combine(first, -second, 0);
  pair[1] = combine(second, first, 1);
}

// The part of a row of kDim values that a lane has for a product along the row: 16 bytes at value
// 8 (lane % 4), and again every 32 values.
template <int kDim>
struct RowPart {
  static constexpr int kVectors = kDim / 32;
  uint4 vectors[kVectors];

  __device__ void load(const void* row, int lane) {
    const uint4* const source = static_cast<const uint4*>(row) + lane % 4;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) vectors[j] = source[4 * j];
  }
};

// What a lane adds to the score of a key, times log2(e); -inf beyond the end. It can be read before
// the predecessor has ended, so not through L1, which would keep it.
template <class Half>
__device__ inline float mask_of(const bitlinear_cuda_attention& task, int key) {
  if (key >= task.length) return -INFINITY;
  const int64_t i = blockIdx.z * task.mask_stride + key;
  if (task.mask_is_bool) {
    return __ldcg(static_cast<const unsigned char*>(task.mask) + i) ? 0.0f : -INFINITY;
  }
  return low_half<Half>(__ldcg(static_cast<const unsigned short*>(task.mask) + i)) * kLog2E;
}

template <class Half>
__device__ inline const Half* row_at(const void* array, const int64_t (&strides)[2], int64_t head) {
  return static_cast<const Half*>(array) + blockIdx.z * strides[0] + head * strides[1];
}

template <class Half, int kDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 16 / kWarps)
    attention_kernel(const __grid_constant__ bitlinear_cuda_attention task) {
#if __CUDA_ARCH__ >= 900
  using Part = RowPart<kDim>;
  constexpr int kThreads = 32 * kWarps;
  constexpr int kRoundKeys = kWarps * kWarpKeys, kRounds = kBlockKeys / kRoundKeys;
  constexpr int kTiles = kDim / 16;  // of an output
  constexpr int kValueVectors = kDim / 64;
  extern __shared__ __align__(16) float outputs[];  // of the warps, then of the block
  __shared__ Softmax states[kWarps + 1][kMaxHeads];
  __shared__ __align__(16) Half rows[kMaxHeads + 2][kDim];  // queries, the new key and value

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, tig = lane % 4;
  const int heads = static_cast<int>(task.heads / task.key_heads);
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);
  const int length = static_cast<int>(task.length);
  const auto first_key = [&](int round) {
    return (round / kRounds * splits + split) * kBlockKeys + round % kRounds * kRoundKeys +
           warp * kWarpKeys;
  };
  Half* const keys = const_cast<Half*>(row_at<Half>(task.key, task.key_strides, blockIdx.y));
  Half* const values = const_cast<Half*>(row_at<Half>(task.value, task.value_strides, blockIdx.y));
  const auto is_visible = [](float mask) { return mask != -INFINITY; };

  allow_successor();
  bool is_hinted = false;  // that keys of the first round count
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int key = first_key(round) + lane / 2;
    const bool counts = is_visible(mask_of<Half>(task, key));
    if (round == 0) is_hinted = __any_sync(~0u, counts);
    if (!counts) continue;
    constexpr int kSecond = kDim * sizeof(Half) / 2;  // a row has one line or two
    prefetch_line(reinterpret_cast<const char*>(keys + int64_t{key} * kDim) + lane % 2 * kSecond);
    prefetch_line(reinterpret_cast<const char*>(values + int64_t{key} * kDim) + lane % 2 * kSecond);
  }
  // All that needs no data is computed before the wait. The threads share the rows of the queries,
  // the new key and the new value, two values of a row each.
  const bool has_new = task.position != nullptr;
  constexpr int kPairs = kDim / 2;
  const int d = threadIdx.x % kPairs;
  const auto row_of_step = [&](int row) {
    return d + (row < heads ? row_at<Half>(task.query, task.query_strides, blockIdx.y * heads + row)
                : row == heads ? row_at<Half>(task.new_key, task.new_key_strides, blockIdx.y)
                               : row_at<Half>(task.new_value, task.new_value_strides, blockIdx.y));
  };
  const Half* first_row = row_of_step(threadIdx.x / kPairs);
  const int64_t angles = blockIdx.z * task.angle_stride + d;
  const Half* cosines = static_cast<const Half*>(task.cosine) + angles;
  const Half* sines = static_cast<const Half*>(task.sine) + angles;
  const int64_t* position_address = task.position;
  compute_now(first_row);
  compute_now(cosines);
  compute_now(sines);
  compute_now(position_address);
  wait_for_predecessor();

  // -1: none, or beyond the cache. (The host cannot know it.)
  const int64_t given_position = has_new ? *position_address : -1;
  const int position =
      given_position >= 0 && given_position < length ? static_cast<int>(given_position) : -1;
  float masks[2];  // of keys g and g + 8
  Part low, high;
  uint4 v[4][kValueVectors];  // of keys value_key(0) to value_key(3)
  const auto value_key = [&](int i) { return 2 * tig + i % 2 + 8 * (i / 2); };
  const auto row_of = [&](int key) { return int64_t{minimum(key, length - 1)} * kDim; };
  const auto load_value = [&](uint4(&to)[kValueVectors], const Half* row) {
#pragma unroll
    for (int h = 0; h < kValueVectors; ++h) to[h] = reinterpret_cast<const uint4*>(row)[g + 8 * h];
  };
  const auto load_masks = [&](int begin) {
    masks[0] = mask_of<Half>(task, begin + g);
    masks[1] = mask_of<Half>(task, begin + g + 8);
  };
  const auto load_keys = [&](int begin) {
    low.load(keys + row_of(begin + g), lane);
    high.load(keys + row_of(begin + g + 8), lane);
  };
  const auto load_values = [&](int begin) {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_value(v[i], values + row_of(begin + value_key(i)));
  };
  const auto is_new = [&](int begin) { return position >= begin && position < begin + kWarpKeys; };
  const auto counts_at = [&](int begin) {
    return __any_sync(~0u, is_visible(masks[0]) || is_visible(masks[1])) || is_new(begin);
  };
  load_masks(first_key(0));
  if (is_hinted) {
    load_keys(first_key(0));
    load_values(first_key(0));
  }

  // The block rotates the queries and the new key while the first keys arrive. One block writes.
  const bool writes = position >= 0 && position / kBlockKeys % splits == split;
  Half cosine[2], sine[2];
  if (has_new) {
    cosine[0] = cosines[0];
    cosine[1] = cosines[kPairs];
    sine[0] = sines[0];
    sine[1] = sines[kPairs];
  }
  for (int row = threadIdx.x / kPairs; row < heads + 2 * has_new; row += kThreads / kPairs) {
    const Half* const from =
        row == static_cast<int>(threadIdx.x) / kPairs ? first_row : row_of_step(row);
    Half pair[2] = {from[0], from[kPairs]};
    if (has_new && row <= heads) rotate<Half>(pair, cosine, sine);
    rows[row][d] = pair[0];
    rows[row][d + kPairs] = pair[1];
    if (writes && row >= heads) {
      Half* const to = (row == heads ? keys : values) + int64_t{position} * kDim + d;
      to[0] = pair[0];
      to[kPairs] = pair[1];
    }
  }
  __syncthreads();

  bool counts = counts_at(first_key(0));
  if (counts && !is_hinted) {
    load_keys(first_key(0));
    load_values(first_key(0));
  }

  // A lane has the scores of keys g and g + 8 for heads 2 tig and 2 tig + 1.
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float output[kTiles][4] = {};
  for (int round = 0; first_key(round) < length; ++round) {
    const int begin = first_key(round), next = first_key(round + 1);
    float scores[4] = {};
    if (counts) {
      if (is_new(begin)) {
        const int key = position - begin;
        if (key == g) low.load(rows[heads], lane);
        if (key == g + 8) high.load(rows[heads], lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key == value_key(i)) load_value(v[i], rows[heads + 1]);
        }
      }
      Part query;
      query.load(rows[g < heads ? g : 0], lane);  // columns beyond the last head are dropped
#pragma unroll
      for (int j = 0; j < Part::kVectors; ++j) {
        const uint4 a = low.vectors[j], b = high.vectors[j], q = query.vectors[j];
        mma_half<Half>(scores, a.x, b.x, a.y, b.y, q.x, q.y);
        mma_half<Half>(scores, a.z, b.z, a.w, b.w, q.z, q.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[i] = scores[i] * (task.scale * kLog2E) + masks[i / 2];
      }
    }
    // The next keys arrive meanwhile.
    load_masks(next);
    const bool next_counts = counts_at(next);
    if (next_counts) load_keys(next);
    if (counts) {
      float factors[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float largest = fmaxf(maximum[h], fmaxf(scores[h], scores[2 + h]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
        }
        const float base = is_visible(largest) ? largest : 0.0f;
        factors[h] = exp2_of(maximum[h] - base);
        maximum[h] = largest;
        scores[h] = exp2_of(scores[h] - base);
        scores[2 + h] = exp2_of(scores[2 + h] - base);
        sum[h] = sum[h] * factors[h] + (scores[h] + scores[2 + h]);
      }
      const uint32_t p0 = transpose_halves(pack_halves<Half>(scores[0], scores[1]));
      const uint32_t p1 = transpose_halves(pack_halves<Half>(scores[2], scores[3]));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        // Value t of the row, and value t + kTiles, of four keys.
        const auto pair = [&](int first, int value) {
          const uint32_t a = (&v[first][value / 8].x)[value % 8 / 2];
          const uint32_t b = (&v[first + 1][value / 8].x)[value % 8 / 2];
          return __byte_perm(a, b, value % 2 ? 0x7632 : 0x5410);
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) output[t][i] *= factors[i % 2];
        mma_half<Half>(output[t], pair(0, t), pair(0, t + kTiles), pair(2, t), pair(2, t + kTiles),
                       p0, p1);
      }
    }
    if (next_counts) load_values(next);
    counts = next_counts;
  }

  // Join the warps. A lane has values 8 g to 8 g + 7 (and 64 more) of heads 2 tig and 2 tig + 1.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], step);
    const int head = 2 * tig + h;
    if (head >= heads) continue;
    if (g == 0) states[warp][head] = {maximum[h], sum[h]};
    float* const row = outputs + (warp * heads + head) * kDim;
#pragma unroll
    for (int value = 0; value < kDim / 8; value += 4) {
      const auto at = [&](int i) {
        return value + i < kTiles ? output[value + i][h] : output[value + i - kTiles][2 + h];
      };
      *reinterpret_cast<float4*>(row + value / 8 * 64 + 8 * g + value % 8) =
          make_float4(at(0), at(1), at(2), at(3));
    }
  }
  __syncthreads();
  const int count = heads * kDim;
  Half* const y = static_cast<Half*>(task.output) +
                  (blockIdx.z * task.heads + int64_t{blockIdx.y} * heads) * kDim;
  float* const block_output = outputs + kWarps * count;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    Softmax joined;
    const float result = join<kWarps>([&](int w) { return states[w][i / kDim]; },
                                      [&](int w) { return outputs[w * count + i]; }, &joined);
    if (splits == 1) {
      y[i] = from_float<Half>(average(result, joined.sum));
    } else {
      block_output[i] = result;
      if (i % kDim == 0) states[kWarps][i / kDim] = joined;
    }
  }
  if (splits == 1) return;
  sync_cluster();
  for (int i = split * kThreads + threadIdx.x; i < count; i += splits * kThreads) {
    const Softmax& state = states[kWarps][i / kDim];
    Softmax joined;
    const float result = join<kMaxSplits>(
        [&](int s) {
          // All loads are in flight at once.
          const int rank = minimum(s, splits - 1);
          const Softmax remote = {load_remote(&state.maximum, rank), load_remote(&state.sum, rank)};
          return s < splits ? remote : Softmax{-INFINITY, 0.0f};
        },
        [&](int s) {
          const float remote = load_remote(block_output + i, minimum(s, splits - 1));
          return s < splits ? remote : 0.0f;
        },
        &joined);
    y[i] = from_float<Half>(average(result, joined.sum));
  }
  sync_cluster();  // no block may leave while others read its sums
#endif
}

template <class Half, int kDim, int kWarps>
cudaError_t launch(const bitlinear_cuda_attention& task, const Call& call) {
  // As many blocks as keep all multiprocessors busy, if the keys are more than one block takes.
  int splits = task.length > kBlockKeys ? kMaxSplits : 1;
  while (splits > 1 && task.batch * task.key_heads * splits > 4 * call.device.multiprocessors) {
    splits /= 2;
  }
  const int64_t heads = task.heads / task.key_heads;
  LaunchConfig config = {dim3(static_cast<unsigned>(splits), static_cast<unsigned>(task.key_heads),
                              static_cast<unsigned>(task.batch)),
                         32 * kWarps,
                         static_cast<int>((kWarps + 1) * heads * kDim * int64_t{sizeof(float)})};
  config.cluster = splits;
  return launch_kernel<attention_kernel<Half, kDim, kWarps>>(config, call, task);
}

template <class Half, int kDim>
cudaError_t launch(const bitlinear_cuda_attention& task, const Call& call) {
  return task.batch * task.key_heads > kManyHeads ? launch<Half, kDim, 8>(task, call)
                                                  : launch<Half, kDim, 16>(task, call);
}

template <class Half>
cudaError_t launch(const bitlinear_cuda_attention& task, const Call& call) {
  return task.head_dim == 64 ? launch<Half, 64>(task, call) : launch<Half, 128>(task, call);
}

}  // namespace
}  // namespace cuda
}  // namespace bitlinear

BITLINEAR_EXPORT const char* bitlinear_cuda_attend(const bitlinear_cuda_attention* attention,
                                                   void* stream) {
  using namespace bitlinear::cuda;
  if (attention->batch == 0) return nullptr;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return report(error);
  if (device.capability < 90) return "no kernel was compiled for this GPU";
  if (attention->head_dim != 64 && attention->head_dim != 128) return "head_dim must be 64 or 128";
  if (attention->heads > kMaxHeads * attention->key_heads) {
    return "at most 8 query heads can share a key head";
  }
  if (attention->batch > 65535 || attention->key_heads > 65535 || attention->length > 1 << 30) {
    return "batch and key heads must be less than 65536, and the keys at most 2^30";
  }
  bitlinear_cuda_task none = {};
  none.w_prefetchable = 1;  // the kernel reads nothing but hints before its predecessor has ended
  const Call call = {none, device, static_cast<cudaStream_t>(stream)};
  return report(attention->dtype == BITLINEAR_F16 ? launch<__half>(*attention, call)
                                                  : launch<__nv_bfloat16>(*attention, call));
}
