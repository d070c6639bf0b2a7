// The kernel of wgmma.cuh for scales of groups, several weights and residuals.
//
// Each product is two, of the high and the low bytes of groups.cuh. So the bound is twice the bound
// with a scale of the tensor. Groups of 128, in us, and divided by the time with a scale of the
// tensor: on an H200 4096 x 4096 with M = 64 16.7 (1.8), 256 23.9 (1.8), 1024 58 (2.1); on an H100
// 28672 x 8192 with M = 32 67 (2.0), 256 216 (2.5). It is above 2 where fragments, of twice as many
// instructions, take turns with the products, as wgmma.cuh says. The tile of 64 rows and 128 tokens
// spills 16 bytes.
//
// Tried, and not faster: half the products, whose sums of 128 values of k are multiplied and added
// to totals. The copy engine brought packed weights to shared memory, ldmatrix and a lookup made
// signed bytes of them, tokens had an order in which a product has 32 of 64 consecutive values of
// k. On an H200 4096 x 4096 took 23.5 us with M = 256 and 71 with 1024 (24.5 and 59 here), 28672 x
// 8192 747 with 1024 (749). A product that adds to the same sums as the one before takes 130 cycles
// alone, and a multiplication in 64 bits 7 cycles of a scheduler, or 10 beside products, which use
// the same registers' ports (two in 32 bits: 4.3 and 5.6; one in fp64 2.8 and 6). Nor did it help
// that the two warpgroups took turns by barriers (867), that each had two chains of products for 64
// tokens (837), or both; nor 32-bit multiplications by the bytes of the multiplier (807).
//
// Untried: the bytes expanded into shared memory by other warps.
#include "wgmma.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t wgmma_groups(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  return with_group_tile(plan, cudaErrorInvalidValue,
                         [&](auto tile) { return launch<decltype(tile)>(call, q, plan.splits); });
}

bool wgmma_groups_run_clusters(const Device& device, const WgmmaPlan& plan) {
  return with_group_tile(
      plan, false, [&](auto tile) { return runs_clusters<decltype(tile)>(device, plan.splits); });
}

}  // namespace cuda
}  // namespace bitlinear
