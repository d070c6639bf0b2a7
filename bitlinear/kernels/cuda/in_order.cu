// What stands between the kernels and tokens that are already quantised, in the order of x: in
// training, where the backward pass keeps them and a compiler can have quantised them.
//
// wgmma.cuh reads them as they are, because the copy engine brings tiles into the order of the
// tensor cores; the packed weights are rewritten in the order that fits. For the other kernels, and
// if K is not a multiple of 16, the tokens are arranged again.
//
// Bound: memory. A sixteenth of fp32 weights is read and written, or each activation.
#include "launch.cuh"
#include "quantize.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSliceWords = kSliceBytes / 4;

LaunchConfig threads_for(int64_t count) {
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads))), kThreads};
}

// In a slice, weight k = 64 p + 16 v + 4 t + i is in byte t of word 4 p + v, at bits 6 - 2 i. Here
// it moves to byte i of word 4 t + v, at bits 2 p: then a lane's words, plane by plane, are the
// fragments of wgmma for values of k in order.
__global__ void __launch_bounds__(kThreads)
    reorder_weights(const uint8_t* __restrict__ packed, bool aligned, int64_t count, int row_bytes,
                    int slices, uint32_t* __restrict__ reordered) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;  // of a row, slice and v
  allow_successor();
  wait_for_predecessor();
  if (index >= count) return;
  const int v = static_cast<int>(index % 4);
  const int64_t slice = index / 4;
  const uint8_t* const row = packed + slice / slices * row_bytes;
  const int first = static_cast<int>(slice % slices) * kSliceBytes + 4 * v;
  uint32_t words[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int byte = first + 16 * p;
    words[p] = 0;  // beyond the row, where q is 0
    if (byte >= row_bytes) continue;
    if (aligned) {
      words[p] = *reinterpret_cast<const uint32_t*>(row + byte);
    } else {
      for (int t = 0; t < 4; ++t) words[p] |= uint32_t{row[byte + t]} << 8 * t;
    }
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t out = 0;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t byte = words[p] >> 8 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) out |= (byte >> (6 - 2 * i) & 3) << (8 * i + 2 * p);
    }
    reordered[slice * kSliceWords + 4 * t + v] = out;
  }
}

// A thread moves a group of 16 values.
template <Layout kLayout>
__global__ void __launch_bounds__(kThreads)
    arrange_tokens(const bitlinear_cuda_tokens tokens, int64_t M, int K, bool aligned,
                   Activations out) {
  const int groups = static_cast<int>(out.q_stride / kGroup);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t m = index / groups;
  const int group = static_cast<int>(index % groups), k = group * kGroup;
  allow_successor();
  wait_for_predecessor();
  if (m >= M) return;
  uint32_t words[4] = {};
  if (aligned && k < K) {
    const uint4 v = *reinterpret_cast<const uint4*>(tokens.q + m * K + k);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int8_t value = k + i < K ? tokens.q[m * K + k + i] : int8_t{0};
      words[i / 4] |= uint32_t{static_cast<uint8_t>(value)} << 8 * (i % 4);
    }
  }
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    // Byte 3 - p of each word.
    const uint32_t low = __byte_perm(words[0], words[1], 0x40 + 0x11 * (3 - p));
    const uint32_t high = __byte_perm(words[2], words[3], 0x40 + 0x11 * (3 - p));
    const int64_t offset = word_offset<kLayout>(out, m, k / kSliceValues, p, group % 16);
    *reinterpret_cast<uint32_t*>(out.q + offset) = __byte_perm(low, high, 0x5410);
  }
  if (group == 0) {
    out.s_x[m] = tokens.s_x[m];
    out.q_sum[m] = tokens.q_sum[m];
  }
}

template <Layout kLayout>
cudaError_t launch(const Call& call, const bitlinear_cuda_tokens& tokens, const Activations& out) {
  const bool aligned = rows_aligned(tokens.q, call.task.K);
  return launch_kernel<arrange_tokens<kLayout>>(threads_for(call.task.M * (out.q_stride / kGroup)),
                                                call, tokens, call.task.M,
                                                static_cast<int>(call.task.K), aligned, out);
}

}  // namespace

int64_t reordered_bytes(int64_t N, int64_t K) {
  return N * ceil_div<int64_t>(K, kSliceValues) * kSliceBytes;
}

cudaError_t reorder(const Call& call, uint8_t* reordered) {
  const bitlinear_cuda_task& task = call.task;
  const uint8_t* const packed = task.weights[0].w;
  const int row_bytes = static_cast<int>(ceil_div<int64_t>(task.K, 4));
  const int slices = static_cast<int>(ceil_div<int64_t>(task.K, kSliceValues));
  const bool aligned = reinterpret_cast<uintptr_t>(packed) % 4 == 0;
  const int64_t count = task.N * slices * 4;
  return launch_kernel<reorder_weights>(threads_for(count), call, packed, aligned, count, row_bytes,
                                        slices, reinterpret_cast<uint32_t*>(reordered));
}

cudaError_t arrange(const Call& call, const bitlinear_cuda_tokens& tokens, const Activations& out,
                    Layout layout) {
  if (layout == Layout::kRows) return launch<Layout::kRows>(call, tokens, out);
  if (layout == Layout::kFragments) return launch<Layout::kFragments>(call, tokens, out);
  return launch<Layout::kTiles>(call, tokens, out);
}

}  // namespace cuda
}  // namespace bitlinear
