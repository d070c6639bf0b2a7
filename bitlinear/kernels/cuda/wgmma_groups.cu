// The kernel of wgmma.cuh for scales of groups, several weights and residuals.
//
// Each product is two, of the high and the low bytes of groups.cuh. So the bound is twice the bound
// with a scale of the tensor. Measured on an H100, groups of 128, in us, and divided by the time
// with a scale of the tensor: 4096 x 4096 with M = 64 17.4 (1.7), 256 24.5 (1.85), 1024 58 (2.1);
// 28672 x 8192 with M = 32 67 (2.0), 256 216 (2.5). It is above 2 where fragments, of twice as many
// instructions, take turns with the products, as wgmma.cuh says. Untried: the bytes expanded into
// shared memory by other warps. The tile of 64 rows and 128 tokens spills 24 bytes.
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
