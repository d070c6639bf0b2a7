// The kernel of wgmma.cuh for scales of groups, several weights and residuals.
//
// Each product is two, of the high and the low bytes of groups.cuh.
#include "wgmma.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t wgmma_groups(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  return with_group_tile(plan, cudaErrorInvalidValue, [&](auto tile) {
    return launch<decltype(tile)>(call, q, plan.splits);
  });
}

bool wgmma_groups_run_clusters(const Device& device, const WgmmaPlan& plan) {
  return with_group_tile(
      plan, false, [&](auto tile) { return runs_clusters<decltype(tile)>(device, plan.splits); });
}

}  // namespace cuda
}  // namespace bitlinear
