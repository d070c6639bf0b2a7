// The kernel of gemv.cuh for scales of groups, whose sums it multiplies one by one, and for up to two
// rows of q.
#include "gemv.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t gemv_groups(const Call& call, const GemvPlan& plan) {
  return call.task.groups.size % (kSliceValues / 2) == 0 ? launch<2>(call, plan)
                                                         : launch<4>(call, plan);
}

}  // namespace cuda
}  // namespace bitlinear
