// The kernel of gemv.cuh for scales of tensors or of output features.
#include "gemv.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t gemv(const Call& call, const GemvPlan& plan) {
  return call.task.groups.size > 0 ? gemv_groups(call, plan) : launch<0>(call, plan);
}

}  // namespace cuda
}  // namespace bitlinear
