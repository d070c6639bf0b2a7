// Wrappers around PTX of sm_90: bulk copies and clusters.
#pragma once

#include <cuda.h>

#include "ampere.cuh"

namespace bitlinear {
namespace cuda {

// Makes initialised barriers visible to the copy engine. A __syncthreads() makes them visible to
// the threads.
__device__ inline void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Copies bytes into shared memory; `barrier` counts them. Size and addresses are multiples of 16.
__device__ inline void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                 Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(&barrier.state))
      : "memory");
}

// Copies a tile of two dimensions into shared memory, from column x and row y of the map on;
// `barrier` counts its bytes. What lies outside the map is 0.
__device__ inline void copy_tile(void* shared, const CUtensorMap& map, int x, int y,
                                 Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(&barrier.state))
      : "memory");
}

// Makes this thread's writes to shared memory visible to the copy engine and to wgmma, after a
// barrier.
__device__ inline void publish_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits for all threads of the blocks of a cluster.
__device__ inline void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
}

// Reads, in the shared memory of block `rank` of this cluster, the address that `p` has in this
// block.
__device__ inline float load_remote(const float* p, int rank) {
  float v;
  asm volatile(
      "{\n.reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n}\n"
      : "=f"(v)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
}

}  // namespace cuda
}  // namespace bitlinear
