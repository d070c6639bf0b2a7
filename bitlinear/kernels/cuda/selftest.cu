// The self-test of the kernels on a device, which runs before they are used there: some hundred
// small cases.
#include "selftest.cuh"

#include <stdio.h>

#include <exception>

#include "launch.cuh"

namespace bitlinear {
namespace cuda {
namespace {

using selftest::Case;
using selftest::Data;

// Makes a device current, and restores the previous one at the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    BITLINEAR_CUDA_CALL(cudaGetDevice(&previous_));
    BITLINEAR_CUDA_CALL(cudaSetDevice(device));
  }
  ~DeviceScope() { cudaSetDevice(previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
};

// Returns the first difference of a product, or "".
std::string check_products(const Device& device, const Stream& stream) {
  constexpr Data kDataKinds[] = {Data::kRandom, Data::kLargestSums, Data::kZero, Data::kNonFinite,
                                 Data::kSubnormal};
  constexpr int64_t kGroupSizes[] = {128, 64, 32, 96};
  uint64_t seed = 0;
  const auto check = [&](const Case& c, Placement placement) -> std::string {
    const selftest::Example example(c, seed);
    for (const int kernel : {BITLINEAR_CUDA_DP4A, BITLINEAR_CUDA_GEMV, BITLINEAR_CUDA_SMALL_BATCH,
                             BITLINEAR_CUDA_SMALL_LAYER, BITLINEAR_CUDA_MMA, BITLINEAR_CUDA_WGMMA,
                             BITLINEAR_CUDA_AUTO}) {
      for (const Input input : {Input::kValues, Input::kTokens}) {
        if (!supports_case(kernel, device, c, placement, input)) continue;
        const std::string difference = check_case(kernel, example, placement, input, stream);
        if (!difference.empty()) return difference;
      }
    }
    return "";
  };
  // Rows of 192, 256 and more are aligned, as the GEMV requires. The longest tokens do not fit the
  // registers of its blocks.
  for (const int64_t K : {5, 192, 255, 256, 1100, 4160, 16448}) {
    for (const int64_t M : {1, 2, 7, 20, 131}) {
      if (K > 10'000 && M > 2) continue;  // for the time that the reference takes
      ++seed;
      const Case c = {M,
                      7 + static_cast<int64_t>(seed * 31 % 150),
                      K,
                      static_cast<int>(seed % 3),
                      seed % 2 == 0,
                      seed % 4 == 0,
                      kDataKinds[seed / 2 % 5],
                      0,
                      false,
                      seed % 3 == 0 ? 16 : 8,
                      seed % 7 < 4 ? BITLINEAR_NO_GATE : static_cast<int>(seed % 2) + 1,
                      seed % 7 % 3 == 0,
                      seed % 3 == 1,
                      1 + static_cast<int64_t>(seed / 2 % 4),
                      seed % 5 < 2 ? kGroupSizes[seed / 5 % 4] : 0};
      const Placement placement = seed % 7 == 0 ? Placement::kUnaligned : Placement::kAligned;
      const std::string difference = check(c, placement);
      if (!difference.empty()) return difference;
    }
  }
  // The cases above with the longest tokens have a prologue. Without one the GEMV has other code
  // for each dtype and number of bits.
  for (const int dtype : {BITLINEAR_F32, BITLINEAR_BF16}) {
    for (const int64_t act_bits : {8, 16}) {
      ++seed;
      const Case c = {1, 9, 16448, dtype, true, false, Data::kRandom, 0, false, act_bits};
      const std::string difference = check(c, Placement::kAligned);
      if (!difference.empty()) return difference;
    }
  }
  // Tokens that are quantised already: rows of weights that are aligned, and not.
  for (const int64_t K : {80, 576, 1088}) {
    for (const int64_t M : {3, 70}) {
      ++seed;
      const Case c = {M, 41, K, BITLINEAR_F32, false, false, Data::kRandom, 0};
      const std::string difference = check(c, Placement::kAligned);
      if (!difference.empty()) return difference;
    }
  }
  return "";
}

std::string check_training(const Stream& stream) {
  constexpr Data kDataKinds[] = {Data::kRandom, Data::kNonFinite, Data::kZero, Data::kLargestSums,
                                 Data::kSubnormal};
  uint64_t seed = 0;
  for (const int64_t K : {1, 6, 15, 16, 100, 1030, 2048}) {
    for (const int64_t M : {1, 5, 300}) {
      ++seed;
      Case c = {M,
                1,
                K,
                static_cast<int>(seed % 3),
                false,
                seed % 2 == 0,
                kDataKinds[seed % 5],
                0,
                false,
                seed % 4 < 2 ? 16 : 8};
      c.group_size = seed % 3 == 0 ? 32 * static_cast<int64_t>(1 + seed % 5) : 0;
      const Placement placement = seed % 5 == 0 ? Placement::kUnaligned : Placement::kAligned;
      const std::string difference = check_training(c, seed, placement, stream);
      if (!difference.empty()) return difference;
    }
  }
  return "";
}

std::string check_device(int index) {
  const DeviceScope scope(index);
  const Stream stream;
  Device device;
  BITLINEAR_CUDA_CALL(current_device(&device));
  const std::string difference = check_products(device, stream);
  return difference.empty() ? check_training(stream) : difference;
}

}  // namespace
}  // namespace cuda
}  // namespace bitlinear

BITLINEAR_EXPORT int bitlinear_cuda_selftest(int device, char* message, int64_t message_size) {
  const size_t size = static_cast<size_t>(message_size);
  try {
    const std::string difference = bitlinear::cuda::check_device(device);
    if (difference.empty()) return 0;
    snprintf(message, size, "%s", difference.c_str());
    return 1;
  } catch (const bitlinear::cuda::CudaFailure& failure) {
    cudaGetLastError();  // clears the error, so that the next call does not report it
    snprintf(message, size, "%s (%s)", cudaGetErrorString(failure.error), failure.call);
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
  }
  return 2;
}
