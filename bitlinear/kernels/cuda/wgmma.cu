// The kernel of wgmma.cuh for a single weight without a residual and tokens of 8 bits, and the
// choice of a kernel.
#include "wgmma.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t wgmma(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  if (call.task.groups.size > 0) return wgmma_groups(call, q, plan);
  if (plan.is_short) return wgmma_short(call, q, plan);
  if (is_many_tile(plan) && wgmma_many_serves(call.task)) return wgmma_many(call, q, plan);
  return is_plain_product(call.task) ? launch<false>(call, q, plan) : wgmma_general(call, q, plan);
}

bool wgmma_runs_clusters(const Call& call, const WgmmaPlan& plan) {
  if (call.task.groups.size > 0) return wgmma_groups_run_clusters(call.device, plan);
  return with_tile<false>(plan, false, [&](auto tile) {
    return runs_clusters<decltype(tile)>(call.device, plan.splits);
  });
}

}  // namespace cuda
}  // namespace bitlinear
