// The kernel of mma.cuh for scales of groups: each product is two, of the high and the low bytes of
// groups.cuh.
#include "mma.cuh"

namespace bitlinear {
namespace cuda {
namespace {

constexpr Candidate kCandidates[] = {
    candidate<Tile<2, 4, 4, 4, 2, 1, true>>(), candidate<Tile<2, 2, 4, 4, 2, 1, true>>(),
    candidate<Tile<2, 1, 2, 4, 2, 2, true>>(), candidate<Tile<2, 1, 2, 2, 3, 2, true>>()};

}  // namespace

cudaError_t mma_groups(const Call& call, const Activations& q) {
  return choose_tile(kCandidates, call.task.M, call.task.N, call.device).launch(call, q);
}

}  // namespace cuda
}  // namespace bitlinear
