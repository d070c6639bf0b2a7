// Wrappers around PTX of sm_90: barriers in shared memory and bulk copies.
#pragma once

#include "common.cuh"

namespace bitlinear {
namespace cuda {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A barrier in shared memory (mbarrier). A phase completes when all threads have arrived and all
// expected bytes have been copied.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state))
                 : "memory");
  }
  __device__ void arrive_expecting(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }
  // Returns when the phase of this parity has completed.
  __device__ void wait(uint32_t parity) {
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}\n"
          : "=r"(done)
          : "r"(shared_address(&state)), "r"(parity)
          : "memory");
    } while (done == 0);
  }
};

// The position in a ring of stages: the stage, and the parity of the phase of its barriers.
struct RingPosition {
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ explicit RingPosition(int stages) : stages(stages) {}
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Synchronises the first kThreads threads of a block; the other threads do not take part.
template <int kThreads>
__device__ inline void sync_leading_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Makes initialised barriers visible to the copy engine. A __syncthreads() makes them visible to
// the threads.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
