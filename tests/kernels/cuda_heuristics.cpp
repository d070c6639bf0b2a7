// The CUDA heuristics as a library that ctypes can load. No CUDA header is needed.
#include "cuda/heuristics.h"

using bitlinear::cuda::Device;
using bitlinear::cuda::Shape;

namespace {

Shape shape_of(const int64_t* shape) {
  return {shape[0],  shape[1],       shape[2],      shape[3] != 0, shape[4] != 0,
          shape[5],  shape[6] != 0,  shape[7],      shape[8] != 0, shape[9] != 0,
          shape[10], shape[11] != 0, shape[12] != 0};
}

Device device_of(int capability, int multiprocessors) {
  // What a block can have: most of a server's multiprocessor, less on other GPUs.
  constexpr int kImaginary = 999;  // more than any device has
  const bool server = capability == 90 || capability == 100;
  const int shared_kb = capability < 80            ? 48
                        : capability == kImaginary ? 1024
                        : server                   ? 227
                        : capability == 80         ? 163
                                                   : 99;
  return {capability, capability == 90, multiprocessors, shared_kb * 1024, 0};
}

}  // namespace

extern "C" {

bool supports(int kernel, int capability, const int64_t* shape) {
  return bitlinear::cuda::supports(kernel, device_of(capability, 132), shape_of(shape));
}

int choose_kernel(int capability, const int64_t* shape) {
  return bitlinear::cuda::choose_kernel(device_of(capability, 132), shape_of(shape));
}

void plan_gemv(int capability, int multiprocessors, const int64_t* shape, int* out) {
  const Device device = device_of(capability, multiprocessors);
  const bitlinear::cuda::GemvPlan plan = bitlinear::cuda::plan_gemv(device, shape_of(shape));
  out[0] = plan.blocks;
  out[1] = plan.log_split;
  out[2] = plan.ring_bytes;
  out[3] = static_cast<int>(
      bitlinear::cuda::gemv_room(device, shape_of(shape), plan.resident, plan.blocks));
  out[4] = static_cast<int>(bitlinear::cuda::gemv_stage_bytes((shape[2] + 3) / 4, plan.log_split));
  out[5] = plan.resident;
}

void plan_small_batch(int capability, int multiprocessors, const int64_t* shape, int* out) {
  const Device device = device_of(capability, multiprocessors);
  const auto plan = bitlinear::cuda::plan_small_batch(device, shape_of(shape));
  out[0] = plan.row_parts;
  out[1] = plan.token_parts;
  out[2] = plan.blocks;
  out[3] = plan.stages;
  out[4] = static_cast<int>(bitlinear::cuda::small_batch_shared_bytes(shape_of(shape), plan) +
                            bitlinear::cuda::kSmallBatchStaticBytes);
  out[5] = device.shared_bytes;
}

void plan_small_layer(int capability, int multiprocessors, const int64_t* shape, int* out) {
  const Device device = device_of(capability, multiprocessors);
  const auto plan = bitlinear::cuda::plan_small_layer(device, shape_of(shape));
  out[0] = plan.rows;
  out[1] = plan.tokens;
  out[2] = static_cast<int>(bitlinear::cuda::small_layer_bytes(plan, shape[2]) +
                            bitlinear::cuda::kSmallLayerStaticBytes);
  out[3] = device.shared_bytes;
}

// max_cluster: of the clusters that the device runs.
void plan_wgmma(int multiprocessors, int max_cluster, const int64_t* shape, int* out) {
  using bitlinear::cuda::WgmmaPlan;
  const Device device = device_of(90, multiprocessors);
  const auto runs_clusters = [&](const WgmmaPlan& plan) { return plan.splits <= max_cluster; };
  const WgmmaPlan plan = bitlinear::cuda::plan_wgmma(device, shape_of(shape), runs_clusters);
  out[0] = plan.rows;
  out[1] = plan.tokens;
  out[2] = plan.halves;
  out[3] = plan.splits;
  out[4] = plan.is_short;
}

void plan_quantizer(int multiprocessors, int64_t M, int64_t K, bool has_prologue, int* out) {
  const Device device = device_of(90, multiprocessors);
  const auto plan = bitlinear::cuda::plan_quantizer(device, M, K, has_prologue);
  out[0] = plan.warps;
  out[1] = plan.tokens;
}

int64_t short_bytes(int64_t rows, int64_t tokens, int64_t K) {
  return bitlinear::cuda::short_bytes(rows, tokens, K) + bitlinear::cuda::kShortStaticBytes;
}

int row_pitch(int row_bytes) { return bitlinear::cuda::row_pitch(row_bytes); }

int64_t padded_tokens(int64_t M) { return bitlinear::cuda::padded_tokens(M); }
}
