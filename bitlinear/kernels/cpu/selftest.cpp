// The self-test of a variant, which runs in the process that built it, before the variant is used:
// over 100 small cases in some 100 milliseconds.
#include "../selftest/check.h"

#include <stdio.h>

#include <exception>
#include <string>

namespace {

using bitlinear::selftest::Case;
using bitlinear::selftest::Data;

// The first difference, or "".
std::string check_kernels(const bitlinear_kernel_table& kernels) {
  uint64_t seed = 0;
  for (const int64_t K : {1, 5, 67, 118, 255, 256, 515, 750, 1100}) {
    for (const int64_t M : {1, 3, 11, 35}) {
      for (const Data data :
           {Data::kRandom, Data::kLargestSums, Data::kZero, Data::kNonFinite, Data::kSubnormal}) {
        ++seed;
        const Case c = {M,
                        7 + static_cast<int64_t>(seed % 63),
                        K,
                        static_cast<int>(seed % 3),
                        seed % 2 == 0,
                        seed % 5 == 0,
                        data,
                        static_cast<int64_t>(seed % 4),
                        seed / 2 % 2 == 1,
                        seed / 4 % 3 == 0 ? 16 : 8,
                        seed % 7 < 4 ? BITLINEAR_NO_GATE : static_cast<int>(seed % 2) + 1,
                        seed % 7 % 3 == 0,
                        seed % 3 == 1,
                        1,
                        seed % 4 == 3 ? 32 << seed / 4 % 4 : 0};
        const std::string difference = bitlinear::selftest::check_case(kernels, c, seed);
        if (!difference.empty()) return difference;
      }
    }
  }
  // So large that a variant may choose another form.
  const Case large = {35, 643, 1030, BITLINEAR_BF16, true, true, Data::kRandom, 1};
  return bitlinear::selftest::check_case(kernels, large, seed);
}

}  // namespace

int bitlinear_selftest(char* message, int64_t message_size) {
  const size_t size = static_cast<size_t>(message_size);
  const bitlinear_kernel_table* kernels = bitlinear_kernels();
  if (kernels == nullptr) {
    snprintf(message, size, "the system refuses what they need");
    return 1;
  }
  try {
    const std::string difference = check_kernels(*kernels);
    if (difference.empty()) return 0;
    snprintf(message, size, "%s: %s", kernels->name, difference.c_str());
  } catch (const std::exception& error) {  // no exception may cross the C interface
    snprintf(message, size, "%s: %s", kernels->name, error.what());
  }
  return 1;
}
