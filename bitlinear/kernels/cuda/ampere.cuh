// Wrappers around PTX of sm_80 and later that CUDA C++ has no functions for.
#pragma once

#include "common.cuh"

namespace bitlinear {
namespace cuda {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// c += a * b for 16 rows of 32 unsigned bytes and 8 columns of 32 signed bytes. A lane holds eight
// of the 32 bytes of each row and column. Any order of k is valid if a and b have the same.
__device__ inline void mma_u8s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// The same of signed bytes.
__device__ inline void mma_s8s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// c += a * b for 16 rows of 16 values and 8 columns, of the type Half. A lane holds the values 2 t,
// 2 t + 1, 2 t + 8 and 2 t + 9 (t = lane % 4) of rows l and l + 8 (l = lane / 4) of a, and of
// column l of b. Any order of k is valid if a and b have the same.
template <class Half>
__device__ inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<Half, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

// Reads four matrices of 8 x 8 values of 16 bits from shared memory. Each lane has the address of a
// row; lanes 0 to 7 have the rows of the first matrix. It gets two values of row lane / 4 of each.
__device__ inline void load_matrices(uint32_t address, uint32_t (&matrices)[4]) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
#endif
}

// Transposes 8 x 8 values of 16 bits, of which a lane holds two neighbours of a row: 2 t and 2 t +
// 1 of row l.
__device__ inline uint32_t transpose_halves(uint32_t pair) {
  uint32_t transposed = pair;
#if __CUDA_ARCH__ >= 750
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
#endif
  return transposed;
}

// Stores the sums of parts of 16 rows and 8 columns. `first` is the address of this lane's first
// sum: row lane / 4 and column lane % 4 * 2 of the first part. Columns are kPitch apart.
template <int kPitch, class Sum, int kRowParts, int kColumnParts>
__device__ inline void store_sums(Sum* first, const Sum (&sums)[kRowParts][kColumnParts][4]) {
#pragma unroll
  for (int r = 0; r < kRowParts; ++r) {
#pragma unroll
    for (int t = 0; t < kColumnParts; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        first[(8 * t + i % 2) * kPitch + 16 * r + 8 * (i / 2)] = sums[r][t][i];
      }
    }
  }
}

// Copies 16 bytes from global to shared memory asynchronously. If not valid, writes zeros and reads
// nothing.
__device__ inline void copy_async(uint8_t* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// The same of 4 bytes.
__device__ inline void copy_word_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#endif
}

// Closes a group of copies, which can be empty.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the latest kPending groups of this thread are in flight.
template <int kPending>
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// A barrier in shared memory (mbarrier). A phase completes when all threads have arrived, and all
// copies that it counts have ended.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
  }
  // Also lets the phase wait for bytes that copy_bulk() copies (sm_90).
  __device__ void arrive_expecting(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }
  // Arrives when all copies that this thread has started with copy_async() have ended.
  __device__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&state))
                 : "memory");
  }
  // Returns when the phase of this parity has completed. Only sm_90 can suspend a thread meanwhile.
  __device__ void wait(uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define BITLINEAR_PROBE_BARRIER "mbarrier.try_wait.parity.shared.b64"
#else
#define BITLINEAR_PROBE_BARRIER "mbarrier.test_wait.parity.shared.b64"
#endif
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n" BITLINEAR_PROBE_BARRIER
          " done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}\n"
          : "=r"(done)
          : "r"(shared_address(&state)), "r"(parity)
          : "memory");
    } while (done == 0);
#undef BITLINEAR_PROBE_BARRIER
  }
};

// The position in a ring of stages: the stage, and the parity of the phase of its barriers.
struct RingPosition {
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ explicit RingPosition(int stages) : stages(stages) {}
  // By several stages, perhaps by more than the ring has.
  __device__ void advance(int count) {
    for (stage += count; stage >= stages; stage -= stages) parity ^= 1;
  }
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

}  // namespace cuda
}  // namespace bitlinear
