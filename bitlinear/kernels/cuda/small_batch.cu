// y = epilogue(q @ w^T) for up to 32 tokens (sm_90 and later), which quantize.cu has quantised.
//
// As in the GEMV, a block has a range of weight rows, and one warp copies them into a ring in
// shared memory before the predecessor in the stream has ended. Eight warps share K; each has all
// rows and tokens of a tile. So one warp loads each activation once per tile, through L2, and
// directly into registers, because the quantiser stores activations in the order of the fragments.
//
// Bound, for 16 tokens and 4096 x 4096 on an H100: each of 132 multiprocessors fetches all 64 KB of
// the activations, together 8.4 MB through L2, in 1.5 us. mma.m16n8k32 takes 16 cycles of a quarter
// of a multiprocessor, a quarter of what wgmma reaches, together 1.2 us. The quantiser takes 1.4 us
// before. The rest is latency: 5.1 us in all; the GEMV takes 3.05 for one token in the same run.
// 13824 x 2560 takes 6.5 us for 8 tokens and 7.9 for 16 (GEMV 4.3). 28672 x 8192 takes 26 and 30 us
// (22.4; reading the weights 20): there 16 tokens keep the tensor cores busy for 16 us. 96
// registers if two blocks share a multiprocessor, up to 168 for one block; no spills in the loop
// over K.
//
// The quantiser of the next call starts early where a multiprocessor has one block or none: two
// leave no registers for it. And a part, 16 rows, takes as long with 15. So the number of blocks
// suits whole parts, and is at most 260 where 264 would run. On an H200, 8 tokens of 8192 x 2048
// take 5.4 us by 264 blocks of 31 or 32 rows, and 4.0 by 256 of 32; of 6144 x 4096 6.2 by 264 of 23
// or 24 rows, and 4.6 by 192 of 32.
//
// Scales of groups: a block splits the scales of its rows while the quantiser runs. Weights become
// signed bytes, 64 times t, in fragments of which each has 32 of 64 consecutive values of k; so no
// sum of q is needed for each group. The sums of a group are multiplied in 64 bits. On an H200,
// groups of 128, in us, in brackets over a scale of the tensor: 2560 x 2560 3.9 (1.15) with 8
// tokens and 7.0 (1.40) with 32, 4096 x 4096 4.6 (1.11) and 9.2 (1.38), 14336 x 4096 9.7 (1.35),
// and 13.7 (1.41) with 16, where the additional instructions are not hidden.
//
// Tried, and slower: activations by bulk copies into shared memory, also by multicast to clusters;
// wgmma, which takes 50 cycles for 64 rows and any number of tokens up to 32; two slices of
// activations in flight instead of one; more than one warp that copies weights; the activations of
// the first tile kept in shared memory for the next ones; the loop of the GEMV for 5 to 8 quantised
// tokens (5.9 us instead of 4.2 for 2560 x 2560).
//
// Also tried: clusters of 2, 4 or 8 blocks that quantise an eighth of the tokens each, send q to
// each other's shared memory, and divide rows, K or both. 16 tokens of 2560 x 2560 took 5.8 us (the
// two kernels 4.4): 3000 cycles to fetch and quantise, 1700 until q has come from the other blocks,
// 1900 to multiply, 400 for the sums, 1300 to write y. A store that counts at a remote barrier
// (st.async) is one transaction each; a release or acquire at the scope of the cluster waits for
// all memory or empties L1; a bulk copy takes some 40 cycles to issue. At most 15 clusters of 8, or
// 30 of 4, run at a time.
#include "groups.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kWarps = kSmallBatchWarps;  // that multiply; one more warp copies
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kPartRows = kSmallBatchStageRows;
constexpr int kChunkSlices = kChunkBytes / kSliceBytes;
static_assert(kChunkSlices % kWarps == 0, "a warp's slices are as far apart at the end of a chunk");

template <class T>
class CodeProduct;
template <class T>
class GroupProduct;

// kSliceParts: with scales of groups the parts of a slice, 2 or 4, of which each lies in one group;
// else 0. kIsPlain: for what is_plain_product() says.
template <int kRowParts_, int kTokenParts_, int kSliceParts_, bool kIsPlain_>
struct Tile {
  static constexpr bool kIsPlain = kIsPlain_;
  static constexpr int kRowParts = kRowParts_, kTokenParts = kTokenParts_;
  static constexpr int kSliceParts = kSliceParts_;
  static constexpr bool kGrouped = kSliceParts > 0;
  using Sum = std::conditional_t<kGrouped, int64_t, int32_t>;
  using Product = std::conditional_t<kGrouped, GroupProduct<Tile>, CodeProduct<Tile>>;
  static constexpr int kRows = kPartRows * kRowParts;
  static constexpr int kTokens = 8 * kTokenParts;
  static constexpr int kPitch = small_batch_sum_pitch(kRowParts);
  static constexpr int kTokensOfThread = ceil_div(kTokens * kRows, kConsumers);  // at most
  // The large tiles need the registers.
  static constexpr int kBlocks = has_registers_for_two(kTokenParts, kGrouped) ? 2 : 1;
};

// The fragments of a slice of the tokens that a lane has.
template <class T>
struct TokenFragments {
  const int8_t* q[T::kTokenParts];
  uint4 words[4][T::kTokenParts];  // by plane; with groups, by quarter of the slice

  __device__ TokenFragments(const Activations& activations, int tokens) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < T::kTokenParts; ++t) {
      // Columns beyond the last token repeat it, and are dropped.
      const int m = minimum(8 * t + lane / 4, tokens - 1);
      q[t] = activations.q + ((m - m % 8) * activations.q_stride + m % 8 * 64 + lane % 4 * 16);
    }
  }
  __device__ void load(int slice, int i) {
#pragma unroll
    for (int t = 0; t < T::kTokenParts; ++t) {
      words[i][t] = *reinterpret_cast<const uint4*>(q[t] + (4 * slice + i) * 512);
    }
  }
};

// What a lane has of the product of a tile: rows lane / 4 and eight further of each part. add()
// adds the products with a slice of the weights, whose parts begin at w + my_offset(), and calls
// load_next(i) when fragments i of the tokens are not needed any more.
template <class T>
class CodeProduct {
 public:
  __device__ static int my_offset(int pitch) {
    return static_cast<int>(threadIdx.x) % 32 / 4 * pitch + threadIdx.x % 4 * 16;
  }
  __device__ CodeProduct(const bitlinear_cuda_task&, const int32_t*, int, int) {}
  template <class LoadNext>
  __device__ void add(const uint8_t* const (&w)[T::kRowParts], int pitch, int,
                      const TokenFragments<T>& tokens, const LoadNext& load_next) {
    uint4 low[T::kRowParts], high[T::kRowParts];
#pragma unroll
    for (int r = 0; r < T::kRowParts; ++r) {
      low[r] = *reinterpret_cast<const uint4*>(w[r]);
      high[r] = *reinterpret_cast<const uint4*>(w[r] + 8 * pitch);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      constexpr uint32_t kCodes = 0x03030303u;
      const auto code = [&](uint32_t word) {
        return kPlaneSums == 4 ? word & kCodes << 2 * p : word >> 2 * p & kCodes;
      };
      auto& plane_sums = sums_[kPlaneSums == 4 ? p : 0];
#pragma unroll
      for (int r = 0; r < T::kRowParts; ++r) {
#pragma unroll
        for (int t = 0; t < T::kTokenParts; ++t) {
          const uint4& words = tokens.words[p][t];
          mma_u8s8(plane_sums[r][t], code(low[r].x), code(high[r].x), code(low[r].y),
                   code(high[r].y), words.x, words.y);
          mma_u8s8(plane_sums[r][t], code(low[r].z), code(high[r].z), code(low[r].w),
                   code(high[r].w), words.z, words.w);
        }
      }
      load_next(p);
    }
  }
  __device__ void store(int32_t* first) {
#pragma unroll
    for (int p = 1; p < kPlaneSums; ++p) {
#pragma unroll
      for (int r = 0; r < T::kRowParts; ++r) {
#pragma unroll
        for (int t = 0; t < T::kTokenParts; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums_[0][r][t][i] += sums_[p][r][t][i] >> 2 * p;
        }
      }
    }
    store_sums<T::kPitch>(first, sums_[0]);
  }

 private:
  // Planes with sums of their own, as in the GEMV: they spare shifts of fragments, and products
  // that wait for each other's sums. More tokens leave no registers for them.
  static constexpr int kPlaneSums = T::kTokenParts == 1 ? 4 : 1;
  int32_t sums_[kPlaneSums][T::kRowParts][T::kTokenParts][4] = {};
};

// The same with scales of groups.
template <class T>
class GroupProduct {
 public:
  // Of the row of a matrix that this lane reads: 16 rows of 16 bytes, and the same of the next 16.
  __device__ static int my_offset(int pitch) {
    return static_cast<int>(threadIdx.x) % 16 * pitch + threadIdx.x % 32 / 16 * 16;
  }
  // multipliers: of `rows` rows, of which `row` is the first one of this tile.
  __device__ GroupProduct(const bitlinear_cuda_task& task, const int32_t* multipliers, int row,
                          int rows)
      : groups_(task.groups), multipliers_(multipliers) {
#pragma unroll
    for (int r = 0; r < T::kRowParts; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = row + kPartRows * r + 8 * i + static_cast<int>(threadIdx.x) % 32 / 4;
        offsets_[r][i] = minimum(at, rows - 1) * multiplier_pitch(task.groups.count);
      }
    }
  }
  template <class LoadNext>
  __device__ void add(const uint8_t* const (&w)[T::kRowParts], int, int slice,
                      const TokenFragments<T>& tokens, const LoadNext& load_next) {
    int32_t sums[T::kRowParts][T::kTokenParts][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t packed[T::kRowParts][4];  // low and high row of a quarter, the same of the next one
#pragma unroll
      for (int r = 0; r < T::kRowParts; ++r) {
        load_matrices(shared_address(w[r] + 16 * i), packed[r]);
      }
#pragma unroll
      for (int quarter = i; quarter < i + 2; ++quarter) {
#pragma unroll
        for (int r = 0; r < T::kRowParts; ++r) {
          const uint32_t low = signed_codes(packed[r][2 * (quarter - i)]);
          const uint32_t high = signed_codes(packed[r][2 * (quarter - i) + 1]);
#pragma unroll
          for (int t = 0; t < T::kTokenParts; ++t) {
            const uint4& words = tokens.words[quarter][t];
            mma_s8s8(sums[r][t], signed_plane(low, 0), signed_plane(high, 0), signed_plane(low, 1),
                     signed_plane(high, 1), words.x, words.y);
            mma_s8s8(sums[r][t], signed_plane(low, 2), signed_plane(high, 2), signed_plane(low, 3),
                     signed_plane(high, 3), words.z, words.w);
          }
        }
        load_next(quarter);
        if ((quarter + 1) % (4 / T::kSliceParts) == 0) add_group(slice, quarter, sums);
      }
    }
  }
  __device__ void store(int64_t* first) {
#pragma unroll
    for (auto& part : totals_) {
#pragma unroll
      for (auto& tile : part) {
#pragma unroll
        for (int64_t& total : tile) total >>= kSignedShift;
      }
    }
    store_sums<T::kPitch>(first, totals_);
  }

 private:
  // Multiplies the sums, of the group of a quarter of a slice, and clears them.
  __device__ void add_group(int slice, int quarter,
                            int32_t (&sums)[T::kRowParts][T::kTokenParts][4]) {
    constexpr int kBlocks = kPartValues / BITLINEAR_GROUP_UNIT;
    const int group = group_of(groups_, (4 * slice + quarter) * kBlocks);
#pragma unroll
    for (int r = 0; r < T::kRowParts; ++r) {
      const int32_t multipliers[] = {multipliers_[offsets_[r][0] + group],
                                     multipliers_[offsets_[r][1] + group]};
#pragma unroll
      for (int t = 0; t < T::kTokenParts; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          totals_[r][t][i] += int64_t{sums[r][t][i]} * multipliers[i / 2];
          sums[r][t][i] = 0;
        }
      }
    }
  }

  const bitlinear_cuda_groups& groups_;
  const int32_t* multipliers_;
  int offsets_[T::kRowParts][2];  // of the multipliers of this lane's rows
  int64_t totals_[T::kRowParts][T::kTokenParts][4] = {};
};

struct Shared {
  Barrier full[kSmallBatchStages], empty[kSmallBatchStages];
  float s_x[kSmallBatchTokens];
  int32_t q_sum[kSmallBatchTokens];
};
static_assert(sizeof(Shared) <= kSmallBatchStaticBytes, "see heuristics.h");

template <class T>
__global__ void __launch_bounds__(kThreads, T::kBlocks)
    small_batch_kernel(const __grid_constant__ bitlinear_cuda_task task,
                       const __grid_constant__ Activations activations, int stages) {
#if __CUDA_ARCH__ >= 900
  using Sum = typename T::Sum;
  constexpr int kRowParts = T::kRowParts;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = static_cast<int>(task.M);
  const int row_bytes = static_cast<int>((task.K + 3) / 4);
  const int slices = ceil_div(row_bytes, kSliceBytes);
  const int chunks = ceil_div(row_bytes, kChunkBytes);
  const int pitch = small_batch_pitch(row_bytes, T::kGrouped);
  const int stage_bytes = kPartRows * pitch;
  const int n_begin = static_cast<int>(task.N * blockIdx.x / gridDim.x);
  const int rows = static_cast<int>(task.N * (blockIdx.x + 1) / gridDim.x) - n_begin;
  const int tiles = ceil_div(rows, T::kRows);

  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < stages; ++s) {
      shared.full[s].init(1);
      shared.empty[s].init(kConsumers);
    }
    publish_barriers();
  }
  __syncthreads();
  allow_successor();

  RingPosition ring(stages);
  if (warp == kWarps) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int tile_end = minimum(rows, (tile + 1) * T::kRows);
      for (int begin = 0; begin < row_bytes; begin += kChunkBytes) {
        const int bytes = minimum(kChunkBytes, row_bytes - begin);
        for (int first = tile * T::kRows; first < tile_end; first += kPartRows, ring.advance()) {
          const int present = minimum(kPartRows, tile_end - first);
          Barrier& full = shared.full[ring.stage];
          if (lane == 0) {
            shared.empty[ring.stage].wait(ring.parity ^ 1);
            full.arrive_expecting(present * bytes);
          }
          __syncwarp();
          if (lane < present) {
            copy_bulk(dynamic + ring.stage * stage_bytes + lane * pitch,
                      weight_row<T::kIsPlain>(task, n_begin + first + lane, row_bytes) + begin,
                      bytes, full);
          }
        }
      }
    }
    return;
  }

  float* units = nullptr;
  int32_t* multipliers = nullptr;
  if constexpr (T::kGrouped) {
    constexpr int kSums = kWarps * T::kTokens * T::kPitch;
    units =
        reinterpret_cast<float*>(reinterpret_cast<Sum*>(dynamic + stages * stage_bytes) + kSums);
    multipliers = reinterpret_cast<int32_t*>(units + rows);
    split_scales_of_rows<kConsumers>(task, n_begin, rows, units, multipliers);
  }
  wait_for_predecessor();
  TokenFragments<T> fragments(activations, tokens);
  if (warp < slices) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments.load(warp, i);
  }
  if (threadIdx.x < tokens) {
    shared.s_x[threadIdx.x] = activations.s_x[threadIdx.x];
    shared.q_sum[threadIdx.x] = activations.q_sum[threadIdx.x];
  }

  if constexpr (T::kGrouped) sync_leading_threads<kConsumers>();  // the multipliers are there
  Sum* const partial = reinterpret_cast<Sum*>(dynamic + stages * stage_bytes);
  const int my_weights = T::Product::my_offset(pitch);
  const int row = threadIdx.x % T::kRows;  // that this thread writes
  for (int tile = 0; tile < tiles; ++tile) {
    const int left = rows - tile * T::kRows;
    const int n = n_begin + tile * T::kRows + row;
    RowScale scale = {};
    uint32_t residual[T::kTokensOfThread];
    if (row < left) {
      const bitlinear_cuda_weight& weight = weight_at<T::kIsPlain>(task, n);
      scale = RowScale(weight, n - weight.begin);
      if (!T::kIsPlain && task.residual != nullptr) {
        const int step = token_rows_of(task);
#pragma unroll
        for (int i = 0; i < T::kTokensOfThread; ++i) {
          const int m = threadIdx.x / T::kRows + i * (kConsumers / T::kRows);
          if (m * step < tokens) {
            residual[i] = load_bits(task.residual, task.residual_dtype, m * task.N + n);
          }
        }
      }
    }

    const int parts = minimum(kRowParts, ceil_div(left, kPartRows));
    typename T::Product product(task, multipliers, tile * T::kRows, rows);
    int slice = warp;
    for (int c = 0; c < chunks; ++c) {
      const uint8_t* w[kRowParts];
      RingPosition ready = ring;
#pragma unroll
      for (int r = 0; r < kRowParts; ++r) {
        if (r < parts) {
          shared.full[ready.stage].wait(ready.parity);
          w[r] = dynamic + ready.stage * stage_bytes + my_weights;
          ready.advance();
        } else {
          w[r] = w[0];  // computed again, and dropped
        }
      }
      const int end = minimum(slices, (c + 1) * kChunkSlices);
#pragma unroll 1
      for (; slice < end; slice += kWarps) {
        const int offset = (slice - c * kChunkSlices) * kSliceBytes;
        const uint8_t* slices_of_rows[kRowParts];
#pragma unroll
        for (int r = 0; r < kRowParts; ++r) slices_of_rows[r] = w[r] + offset;
        const bool last = slice + kWarps >= slices;  // of the tile, for this warp
        const int next = last ? warp : slice + kWarps;
        product.add(slices_of_rows, pitch, slice, fragments, [&](int i) {
          if (!last || tile + 1 < tiles) fragments.load(next, i);
        });
      }
#pragma unroll
      for (int r = 0; r < kRowParts; ++r) {
        if (r < parts) {
          shared.empty[ring.stage].arrive();
          ring.advance();
        }
      }
    }

    product.store(partial + (warp * T::kTokens + lane % 4 * 2) * T::kPitch + lane / 4);
    sync_leading_threads<kConsumers>();
    if (row < left) {
      const float bias = scale.bias(weight_at<T::kIsPlain>(task, n));
      const float s_w = T::kGrouped ? units[tile * T::kRows + row] : scale.s_w;
      with_token_rows<T::kIsPlain>(task, [&](auto token_rows) {
        constexpr int kTokenRows = decltype(token_rows)::value;
        with_dtype(task.y_dtype, [&](auto zero) {
          using Y = decltype(zero);
          const int first = threadIdx.x / T::kRows * kTokenRows;
#pragma unroll
          for (int i = 0; i < T::kTokensOfThread; ++i) {
            const int m = first + i * (kConsumers / T::kRows * kTokenRows);
            if (m >= tokens) break;
            Sum codes[kTokenRows] = {};
#pragma unroll
            for (int r = 0; r < kTokenRows; ++r) {
#pragma unroll
              for (int v = 0; v < kWarps; ++v) {
                codes[r] += partial[(v * T::kTokens + m + r) * T::kPitch + row];
              }
            }
            float value = dequantize(codes, shared.q_sum + m, shared.s_x[m], s_w);
            value = __fadd_rn(value, bias);
            if (!T::kIsPlain && task.residual != nullptr) {
              value = __fadd_rn(value, float_from_bits(residual[i], task.residual_dtype));
            }
            static_cast<Y*>(task.y)[m / kTokenRows * task.N + n] = from_float<Y>(value);
          }
        });
      });
    }
    if (tile + 1 < tiles) sync_leading_threads<kConsumers>();
  }
#endif
}

template <int kRowParts, int kTokenParts, int kSliceParts, bool kIsPlain = false>
cudaError_t launch(const Call& call, const Activations& q, const SmallBatchPlan& plan) {
  const bitlinear_cuda_task& task = call.task;
  if constexpr (!kIsPlain) {
    if (is_plain_product(task)) {
      return launch<kRowParts, kTokenParts, kSliceParts, true>(call, q, plan);
    }
  }
  Shape shape = {task.M, task.N, task.K, true, true};
  shape.group_size = task.groups.size;
  const LaunchConfig config = {dim3(static_cast<unsigned>(plan.blocks)), kThreads,
                               static_cast<int>(small_batch_shared_bytes(shape, plan))};
  return launch_kernel<small_batch_kernel<Tile<kRowParts, kTokenParts, kSliceParts, kIsPlain>>>(
      config, call, task, q, plan.stages);
}

template <int kSliceParts>
cudaError_t launch(const Call& call, const Activations& q, const SmallBatchPlan& plan) {
  switch (10 * plan.row_parts + plan.token_parts) {
    case 11:
      return launch<1, 1, kSliceParts>(call, q, plan);
    case 12:
      return launch<1, 2, kSliceParts>(call, q, plan);
    case 14:
      return launch<1, 4, kSliceParts>(call, q, plan);
    case 21:
      return launch<2, 1, kSliceParts>(call, q, plan);
    case 22:
      return launch<2, 2, kSliceParts>(call, q, plan);
    case 24:
      if constexpr (kSliceParts == 0) return launch<2, 4, 0>(call, q, plan);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t small_batch(const Call& call, const Activations& q, const SmallBatchPlan& plan) {
  const int64_t group_size = call.task.groups.size;
  if (group_size == 0) return launch<0>(call, q, plan);
  return group_size % (kSliceValues / 2) == 0 ? launch<2>(call, q, plan) : launch<4>(call, q, plan);
}

}  // namespace cuda
}  // namespace bitlinear
