// The kernel of mma.cuh for scales of groups: each product is two, of the high and the low bytes of
// groups.cuh. Registers, no spills: 176 to 182 for 128 x 128 and 128 x 64, 128 for the others.
// Measured on an H100, groups of 128, 4096 x 4096 with the quantiser: 12.9 us for M = 3, 13.7 for
// 16, 17.6 for 64, 140 for 1024.
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
