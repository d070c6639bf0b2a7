// The kernel of wgmma.cuh for several weights, or with a residual.
#include "wgmma.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t wgmma_general(const Call& call, const Activations& q, const WgmmaPlan& plan) {
  return launch<true>(call, q, plan);
}

}  // namespace cuda
}  // namespace bitlinear
