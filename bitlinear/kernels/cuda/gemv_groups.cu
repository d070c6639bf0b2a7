// The kernel of gemv.cuh for scales of groups of 64 weights or a multiple, and up to two rows of q.
//
// Bound: reading the weights, and 32 bits of scale for each group: with groups of 128 an eighth of
// the bytes of the weights. On an H100, one token, in brackets over a scale of the tensor: 2560 x
// 2560 3.6 us (1.24), 4096 x 4096 4.0 (1.21), 14336 x 4096 10.7 (1.35), 28672 x 8192 28.0 (1.25);
// two tokens of 4096 x 4096 4.7 (1.32).
//
// Where the time goes: 0.2 us of 4096 x 4096 read the scales. The rest is instructions, of which a
// block has twice as many: it splits the scales of its rows, and every fourth slice (of groups of
// 128, one token) multiplies the sums of eight parts.
//
// Tried, and slower for 4096 x 4096: sums of every slice multiplied (4.2 us, 28672 x 8192 31); the
// scales of a tile copied and split while the tile before it is multiplied (4.5); a warp for each
// row to split, with as many loads in flight as registers hold (4.7: code that runs once comes from
// far away) or with asynchronous copies (4.3); the sums of q in a pass of their own (4.4).
//
// With more than half of a multiprocessor's shared memory a block is alone, and its eight warps
// hide little: two tokens of 28672 x 8192 take 42 us. 96 registers, or up to 168 where a block is
// alone; no spills (for sm_120 up to 8 bytes with groups of 64).
#include "gemv.cuh"

namespace bitlinear {
namespace cuda {

cudaError_t gemv_groups(const Call& call, const GemvPlan& plan) {
  return call.task.groups.size % (kSliceValues / 2) == 0 ? launch<2>(call, plan)
                                                         : launch<4>(call, plan);
}

}  // namespace cuda
}  // namespace bitlinear
