// Native test of the CUDA kernels, linked with their sources: every tail of every tile, all dtypes,
// adversarial data, unaligned operands. Torch-free, so that compute-sanitizer can watch it;
// tests/kernels/test_cuda_sources.py builds and runs it.
//
// Usage: cuda_driver [quick]
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/selftest.cuh"

using bitlinear::cuda::Call;
using bitlinear::cuda::CudaFailure;
using bitlinear::cuda::Device;
using bitlinear::cuda::GemvPlan;
using bitlinear::cuda::Input;
using bitlinear::cuda::Placement;
using bitlinear::cuda::Shape;
using bitlinear::cuda::SmallBatchPlan;
using bitlinear::cuda::SmallLayerPlan;
using bitlinear::cuda::Stream;
using bitlinear::cuda::WgmmaPlan;
using bitlinear::selftest::Case;
using bitlinear::selftest::Data;
using bitlinear::selftest::Example;

namespace {

constexpr Data kDataKinds[] = {Data::kRandom, Data::kLargestSums, Data::kZero, Data::kNonFinite,
                               Data::kSubnormal};
constexpr int kKernels = 7, kPlans = kKernels, kTraining = kKernels + 1, kTallies = 9;
const char* const kNames[kTallies] = {"auto",  "dp4a",        "gemv",  "small_batch", "mma",
                                      "wgmma", "small_layer", "plans", "training"};

struct Tally {
  int64_t passed = 0, failed = 0;
};

class Driver {
 public:
  explicit Driver(const Device& device) : device_(device), small_device_(device) {
    small_device_.multiprocessors = 3;
  }

  // One shape through every kernel that takes it; dtype, bias, scales and placement take turns, so
  // that neighbouring shapes have others.
  void check(int64_t M, int64_t N, int64_t K, Data data) {
    for (const int64_t act_bits : {8, 16}) {
      check(Example(next_case(M, N, K, data, act_bits), cases_));
    }
  }
  void check(const Example& example) {
    const Placement placement = cases_ % 7 == 0 ? Placement::kUnaligned : Placement::kAligned;
    for (int kernel = 0; kernel < kKernels; ++kernel) {
      for (const Input input : {Input::kValues, Input::kTokens}) {
        if (!supports_case(kernel, device_, example.operands.shape, placement, input)) continue;
        record(kernel, bitlinear::cuda::check_case(kernel, example, placement, input, stream_));
      }
    }
  }

  // What training needs of as many rows.
  void check_training(int64_t M, int64_t K, Data data) {
    Case c = next_case(M, 1, K, data, cases_ % 4 < 2 ? 8 : 16);
    c.activation = BITLINEAR_NO_GATE;  // training quantises x as it is
    c.norm = false;
    const Placement placement = cases_ % 7 == 0 ? Placement::kUnaligned : Placement::kAligned;
    record(kTraining, bitlinear::cuda::check_training(c, cases_, placement, stream_));
    if (data != Data::kSubnormal || c.group_size > 0) return;
    c.group_size = 64;  // scales whose unit is the smallest normal number
    record(kTraining, bitlinear::cuda::check_training(c, cases_, placement, stream_));
  }

  // One shape by every plan that a kernel can follow, not only by the one that suits it.
  void check_plans(int64_t M, int64_t N, int64_t K, Data data) {
    for (const int64_t act_bits : {8, 16}) {
      const Case c = next_case(M, N, K, data, act_bits);
      check_plans(Example(c, cases_));
    }
  }
  void check_plans(const Example& example) {
    const uint64_t seed = example.seed;
    const Case& c = example.operands.shape;
    const int64_t K = c.K;
    const Shape shape = bitlinear::cuda::shape_of(c, Placement::kAligned);
    if (supports(BITLINEAR_CUDA_GEMV, device_, shape)) {
      const GemvPlan best = plan_gemv(device_, shape);
      for (const int log_split : {1, 2, 3}) {
        for (const int blocks : {best.blocks, 1 + best.blocks / 50}) {
          const int64_t stage = bitlinear::cuda::gemv_stage_bytes((K + 3) / 4, log_split);
          const int64_t room = gemv_room(device_, shape, false, blocks);
          if (2 * stage > room) continue;
          const int ring = static_cast<int>(seed % 2 == 0 ? 2 * stage : std::min(5 * stage, room));
          if (best.resident) check_plan(GemvPlan{blocks, log_split, ring, true}, example);
          check_plan(GemvPlan{blocks, log_split, ring, false}, example);
        }
      }
    }
    if (supports(BITLINEAR_CUDA_SMALL_BATCH, device_, shape)) {
      const SmallBatchPlan best = plan_small_batch(device_, shape);
      for (const int row_parts : {1, 2}) {
        for (const int token_parts : {1, 2, 4}) {
          if (8 * token_parts < shape.M || !bitlinear::cuda::has_small_batch_tile(
                                               row_parts, token_parts, shape.group_size > 0)) {
            continue;
          }
          const int stages = seed % 2 == 0 ? row_parts : std::min(best.stages, row_parts + 3);
          if (stages < row_parts) continue;
          for (const int blocks : {best.blocks, 1 + best.blocks / 50}) {
            const SmallBatchPlan plan = {row_parts, token_parts, blocks, stages};
            const int64_t bytes = small_batch_shared_bytes(shape, plan);
            if (bytes + bitlinear::cuda::kSmallBatchStaticBytes <= device_.shared_bytes) {
              check_plan(plan, example);
            }
          }
        }
      }
    }
    if (supports(BITLINEAR_CUDA_SMALL_LAYER, device_, shape)) {
      for (const SmallLayerPlan& tile : bitlinear::cuda::kSmallLayerTiles) {
        const int64_t bytes = small_layer_bytes(tile, K) + bitlinear::cuda::kSmallLayerStaticBytes;
        if (bytes <= device_.shared_bytes) check_plan(tile, example);
      }
    }
    if (supports(BITLINEAR_CUDA_WGMMA, device_, shape)) {
      for (const bitlinear::cuda::WgmmaTile& tile : bitlinear::cuda::kWgmmaTiles) {
        for (const int splits : {1, 2, 4, 8}) {
          const bool fits = has_room(tile, shape.M) &&
                            (shape.group_size == 0 || has_groups(tile)) &&
                            (splits == 1 || 2 * splits <= (K + 255) / 256);
          if (fits) check_plan(WgmmaPlan{tile.rows, tile.tokens, tile.halves, splits}, example);
        }
      }
    }
  }

  // The sizes of tails at which some kernel's tiles end; of tokens, or of rows.
  void check_tiles(bool quick) {
    for (const int64_t M : kTails) {
      for (const int64_t N : kTails) {
        if (quick && (M * N % 5 != 0 || M * N > 5000)) continue;
        // With rows that are aligned, and not.
        check(M, N, 64, kDataKinds[N % 5]);
        check(M, N, 70, Data::kRandom);
      }
    }
  }

  void check_depths(bool quick) {
    for (int64_t K = 1; K <= 530; K += quick ? 13 : 1) {
      for (const int64_t M : {1, 3, 10, 33, 70}) {
        check(M, 1 + K % 80, K, kDataKinds[(K + M) % 5]);
        check_training(M, K, kDataKinds[(K + M) % 5]);
      }
    }
    // Whole slices and nearly: what is loaded in vectors, and in stages.
    for (int64_t K = 64; K <= (quick ? 700 : 5000); K += 64) {
      for (const int64_t M : {1, 2, 5, 8, 17, 65}) check(M, 35, K, kDataKinds[K / 64 % 2]);
    }
  }

  void check_long_rows(bool quick) {
    for (const int64_t K : {4095, 4096, 4097, 16384, 16448, 65535, 65536, 65540, 131136}) {
      if (quick && K > 5000) return;
      check_training(20, K, Data::kRandom);
      for (const int64_t M : {1, 4, 8, 20, 65}) {
        check(M, 3, K, Data::kLargestSums);
        check(M, 3, K, Data::kRandom);
      }
    }
    for (const int64_t M : {1, 2, 17, 129}) check(M, 2, BITLINEAR_MAX_K, Data::kLargestSums);
    for (const int64_t M : {1, 6}) check(M, 66, 499968, Data::kLargestSums);
  }

  // Tokens that the GEMV just holds, or does not hold any more, in registers: in one chunk of them,
  // or in the several chunks of a long token.
  void check_gemv_tokens(bool quick) {
    constexpr int64_t kThreadGroups[] = {1, 2, 4, 6, 11, 12};  // of a chunk, by kind of token
    for (const int64_t M : {1, 2, 3, 4}) {
      const int64_t shares = M == 3 ? 4 : M;
      for (const int64_t groups : kThreadGroups) {
        if (quick && groups > shares) break;
        for (const int64_t beyond : {-64, 0, 64, 832}) {
          check_plans(M, 5, groups * bitlinear::cuda::kGemvGroupValues / shares + beyond,
                      kDataKinds[groups % 2]);
        }
      }
      if (!quick) check_plans(M, 3, 131136 / M / 64 * 64, Data::kRandom);
    }
  }

  void check_all_plans(bool quick) {
    for (const int64_t M : {1, 3, 8, 16, 40, 130}) {
      for (const int64_t N : {1, 70, 300, 2100}) {
        for (const int64_t K : {64, 512, 832, 2048, 4160}) {
          if (quick && M * N * K > 200000) continue;
          check_plans(M, N, K, kDataKinds[(M + N + K) % 2]);
        }
      }
    }
    if (quick) return;
    // More than 256 rows and several laps of the ring in a block; weights that exceed all rings.
    for (const int64_t M : {1, 3}) {
      check_plans(M, 70000, 64, Data::kRandom);
      check_plans(M, 5000, 4160, Data::kRandom);
      check_plans(M, 40000, 2048, Data::kRandom);
    }
    // Blocks that compute several of the smallest tiles of wgmma.
    check_plans(130, 4300, 512, Data::kRandom);
  }

  // Products that wgmma_many.cu serves, with tails of tokens and rows, and blocks that go round.
  void check_many_tokens() {
    for (const int64_t M : {70, 97, 130, 700}) {
      for (const int64_t N : {8, 200, 256, 1048}) {
        for (const int64_t K : {64, 320, 832, 1600}) {
          for (const int dtype : {BITLINEAR_F16, BITLINEAR_BF16}) {
            const Example example(plain_case(M, N, K, kDataKinds[(M + N + K) % 5], dtype), cases_);
            for (const int tokens : {96, 96, 128, 128}) {
              const WgmmaPlan plan = {256, tokens, 1, 1};
              check_plan(plan, example);
            }
          }
        }
      }
    }
    // The kernel's own plan, by both layouts of tokens.
    for (const int dtype : {BITLINEAR_F16, BITLINEAR_BF16}) {
      check(Example(plain_case(2113, 3000, 320, Data::kNonFinite, dtype), cases_));
    }
  }

  // Products that wgmma_short.cu serves, by every tile that has room.
  void check_short_rows() {
    for (const int64_t M : {33, 70, 128, 250}) {
      for (const int64_t N : {8, 77, 200, 256}) {
        for (const int64_t K : {64, 320, 576, 768, 1024}) {
          const int dtype = static_cast<int>(cases_ % 3);
          const Example example(plain_case(M, N, K, kDataKinds[(M + N + K) % 5], dtype), cases_);
          Shape shape = bitlinear::cuda::shape_of(example.operands.shape, Placement::kAligned);
          shape.for_short = true;
          for (const bitlinear::cuda::WgmmaTile& tile : bitlinear::cuda::kShortTiles) {
            const WgmmaPlan plan = {tile.rows, tile.tokens, 1, 1, true};
            if (is_short_tile(device_, shape, tile)) check_plan(plan, example);
          }
        }
      }
    }
    // The kernel's own plan.
    for (const int64_t M : {70, 300, 600}) {
      for (const int64_t K : {576, 1024}) {
        check(Example(plain_case(M, 900, K, Data::kNonFinite, BITLINEAR_BF16), cases_));
      }
    }
  }

  // More tiles than the device holds at a time, so that persistent blocks go round.
  void check_many_tiles() {
    for (const int64_t M : {1, 8, 32}) check(M, 20000, 256, Data::kRandom);
    for (const int64_t M : {200, 1100}) check(M, 3000, 320, Data::kNonFinite);
    check(20000, 70, 64, Data::kRandom);
    // Blocks that quantise several tokens, and those that could not end with the last one.
    for (const int64_t M : {1056, 1100, 2113}) {
      for (const int64_t K : {48, 700, 1024}) check_training(M, K, Data::kNonFinite);
    }
  }

  bool report() const {
    int64_t failed = 0;
    for (int kernel = 0; kernel < kTallies; ++kernel) {
      const Tally& tally = tallies_[kernel];
      failed += tally.failed;
      printf("%s: %lld passed, %lld failed\n", kNames[kernel], static_cast<long long>(tally.passed),
             static_cast<long long>(tally.failed));
    }
    return failed == 0;
  }

 private:
  // One weight, neither a prologue nor a residual.
  Case plain_case(int64_t M, int64_t N, int64_t K, Data data, int dtype) {
    Case c = next_case(M, N, K, data, 8);
    c.dtype = dtype;
    c.activation = BITLINEAR_NO_GATE;
    c.norm = c.residual = false;
    c.weights = 1;
    c.group_size = 0;
    return c;
  }

  Case next_case(int64_t M, int64_t N, int64_t K, Data data, int64_t act_bits) {
    const uint64_t seed = ++cases_;
    const int dtype = static_cast<int>(seed % 3);
    Case c = {M, N, K, dtype, seed % 2 == 0, seed % 5 == 0, data, 0, false, act_bits};
    // Half of the cases have no prologue; the others have a gate, a norm or both.
    c.activation = seed % 16 < 10 ? BITLINEAR_NO_GATE : static_cast<int>(seed % 2) + 1;
    c.norm = seed % 16 >= 8 && seed % 16 < 14;
    c.residual = seed % 3 == 1;
    c.weights = 1 + static_cast<int64_t>(seed / 4 % 4);
    // A third of the cases have scales of groups: often groups of 128 or 64.
    constexpr int64_t kGroupSizes[] = {128, 64, 32, 96, 128, 64, 160, 4096};
    c.group_size = seed / 2 % 3 == 0 ? kGroupSizes[seed / 6 % 8] : 0;
    return c;
  }

  void record(int tally, const std::string& difference) {
    if (difference.empty()) {
      ++tallies_[tally].passed;
    } else if (++tallies_[tally].failed <= 5) {
      printf("%s\n", difference.c_str());
    }
  }

  // `product` queues the product on activations that have been quantised for this kernel.
  template <class Product>
  void check_plan(const std::string& name, int kernel, const Product& product,
                  const Example& example) {
    const auto run = [&](const bitlinear_cuda_task& task, const bitlinear_cuda_tokens*,
                         cudaStream_t stream) {
      Call call = {task, plans_ % 2 == 0 ? device_ : small_device_, stream};
      cudaError_t error = cudaSuccess;
      if (!bitlinear::cuda::fuses_quantizer(kernel)) {
        error = quantize(call, bitlinear::cuda::activations_of(task),
                         bitlinear::cuda::layout_for(kernel));
        if (error == cudaSuccess && bitlinear::cuda::reads_split_scales(kernel)) {
          error = split_scales(&call);
        }
      }
      if (error == cudaSuccess) error = product(call);
      return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    };
    record(kPlans,
           check_case(name, kernel, run, example, Placement::kAligned, Input::kValues, stream_));
    ++plans_;
  }

  void check_plan(const GemvPlan& plan, const Example& example) {
    const std::string name = "gemv, blocks " + std::to_string(plan.blocks) + ", log_split " +
                             std::to_string(plan.log_split) + ", ring " +
                             std::to_string(plan.ring_bytes) + (plan.resident ? ", resident" : "");
    const auto product = [&](const Call& call) { return gemv(call, plan); };
    check_plan(name, BITLINEAR_CUDA_GEMV, product, example);
  }

  void check_plan(const SmallBatchPlan& plan, const Example& example) {
    const std::string name = "small_batch, row_parts " + std::to_string(plan.row_parts) +
                             ", token_parts " + std::to_string(plan.token_parts) + ", blocks " +
                             std::to_string(plan.blocks) + ", stages " +
                             std::to_string(plan.stages);
    const auto product = [&](const Call& call) {
      return small_batch(call, bitlinear::cuda::activations_of(call.task), plan);
    };
    check_plan(name, BITLINEAR_CUDA_SMALL_BATCH, product, example);
  }

  void check_plan(const SmallLayerPlan& plan, const Example& example) {
    const std::string name = "small_layer, rows " + std::to_string(plan.rows) + ", tokens " +
                             std::to_string(plan.tokens);
    const auto product = [&](const Call& call) { return small_layer(call, plan); };
    check_plan(name, BITLINEAR_CUDA_SMALL_LAYER, product, example);
  }

  void check_plan(const WgmmaPlan& plan, const Example& example) {
    const std::string name =
        "wgmma, rows " + std::to_string(plan.rows) + ", tokens " + std::to_string(plan.tokens) +
        ", halves " + std::to_string(plan.halves) + ", splits " + std::to_string(plan.splits);
    const auto product = [&](const Call& call) {
      return wgmma(call, bitlinear::cuda::activations_of(call.task), plan);
    };
    check_plan(name, BITLINEAR_CUDA_WGMMA, product, example);
  }

  static constexpr int64_t kTails[] = {1,  2,  3,  4,  5,  6,   7,   8,   9,   15,  16,  17, 31,
                                       32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257};
  const Device device_;
  Device small_device_;  // has few multiprocessors, so that blocks take several tiles, or tokens
  const Stream stream_;
  uint64_t cases_ = 0, plans_ = 0;
  Tally tallies_[kTallies];
};

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
  char message[512];
  const int verdict = bitlinear_cuda_selftest(0, message, sizeof(message));
  if (verdict != 0) {
    printf("self-test (%d): %s\n", verdict, message);
    return 1;
  }
  try {
    Device device;
    BITLINEAR_CUDA_CALL(bitlinear::cuda::current_device(&device));
    printf("sm_%d, %d multiprocessors\n", device.capability, device.multiprocessors);
    Driver driver(device);
    driver.check_tiles(quick);
    driver.check_depths(quick);
    driver.check_long_rows(quick);
    driver.check_gemv_tokens(quick);
    driver.check_all_plans(quick);
    driver.check_short_rows();
    if (!quick) driver.check_many_tokens();
    if (!quick) driver.check_many_tiles();
    return driver.report() ? 0 : 1;
  } catch (const CudaFailure& failure) {
    printf("%s: %s\n", failure.call, cudaGetErrorString(failure.error));
    return 2;
  }
}
