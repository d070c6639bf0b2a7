// The kernel of mma.cuh for scales of tensors or of output features.
#include "mma.cuh"

namespace bitlinear {
namespace cuda {
namespace {

using Tile256x128 = Tile<4, 2, 4, 8, 3, 1>;
using Tile128x128 = Tile<2, 4, 4, 4, 2, 1>;
using Tile128x64 = Tile<2, 2, 4, 4, 2, 1>;
using Tile64x32 = Tile<2, 1, 2, 4, 2, 2>;
using Tile32x16 = Tile<2, 1, 1, 2, 3, 2>;

constexpr Candidate kCandidates[] = {candidate<Tile256x128>(), candidate<Tile128x128>(),
                                     candidate<Tile128x64>(), candidate<Tile64x32>(),
                                     candidate<Tile32x16>()};

}  // namespace

cudaError_t mma(const Call& call, const Activations& q) {
  if (call.task.groups.size > 0) return mma_groups(call, q);
  return choose_tile(kCandidates, call.task.M, call.task.N, call.device).launch(call, q);
}

}  // namespace cuda
}  // namespace bitlinear
