// Native test of one kernel variant, linked with its sources: every tail of every tile, all dtypes,
// adversarial data. Built with sanitizers by tests/kernels/test_driver.py; runs under emulators.
//
// Usage: driver [all | sparse | quick]; sparse: for emulators
#include <stdio.h>
#include <string.h>

#include "selftest/check.h"

using bitlinear::selftest::Case;
using bitlinear::selftest::check_case;
using bitlinear::selftest::Data;
using bitlinear::selftest::Random;

namespace {

int64_t passed = 0;
int64_t failed = 0;

// Both numbers of bits, in one dtype. The other options are drawn: bound to a counter, some of them
// would only occur together.
void check_one_dtype(Case c, int dtype, int64_t group_size = 0) {
  c.dtype = dtype;
  c.group_size = group_size;
  for (const int64_t act_bits : {8, 16}) {
    const uint64_t seed = static_cast<uint64_t>(passed + failed);
    Random random{seed * 2654435761u};
    random.next();
    c.act_bits = act_bits;
    c.bias = random.next() % 2 == 0;
    c.per_channel = random.next() % 5 == 0;
    c.n_begin = c.N > 1 ? static_cast<int64_t>(random.next() % 3) % c.N : 0;
    c.flushes_subnormals = random.next() % 2 == 0;
    // A quarter of the cases have a gate, a norm or both. Emulators take long for them.
    const uint32_t prologue = random.next() % 32;
    c.activation = prologue < 26 ? BITLINEAR_NO_GATE : static_cast<int>(prologue % 2) + 1;
    c.norm = prologue >= 24 && prologue < 30;
    c.residual = random.next() % 4 == 0;
    const uint32_t groups = random.next() % 64;
    if (group_size == 0) c.group_size = groups < 4 ? 32 << groups : groups == 4 ? 96 : 0;
    const std::string difference = check_case(*bitlinear_kernels(), c, seed);
    if (difference.empty()) {
      ++passed;
    } else if (++failed <= 10) {
      printf("%s\n", difference.c_str());
    }
  }
}

void check(const Case& c) {
  for (const int dtype : {BITLINEAR_F32, BITLINEAR_F16, BITLINEAR_BF16}) check_one_dtype(c, dtype);
}

// As abi.h says: memory for a number of rows of q suffices for fewer.
void check_scratch(int64_t group_size) {
  for (int64_t K = 1; K <= BITLINEAR_MAX_K; K = 3 * K + 1) {
    int64_t largest = 0;
    for (int64_t M = 1; M <= 300; ++M) {
      const int64_t bytes = bitlinear_kernels()->scratch_bytes(M, (K + 3) / 4, group_size / 4);
      if (bytes < largest && ++failed <= 10) {
        printf("%lld bytes of scratch memory, less than for fewer rows: M = %lld, K = %lld\n",
               static_cast<long long>(bytes), static_cast<long long>(M), static_cast<long long>(K));
      }
      largest = bytes > largest ? bytes : largest;
    }
  }
}

// For products that take long, and are the same in each dtype: the dtypes take turns.
void check_large(const Case& c) { check_one_dtype(c, static_cast<int>((c.M + c.N + c.K) % 3)); }

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
  const bool sparse = argc > 1 && strcmp(argv[1], "sparse") == 0;
  char message[512];
  if (bitlinear_selftest(message, sizeof(message)) != 0) {
    printf("self-test: %s\n", message);
    ++failed;
  }
  if (bitlinear_kernels() == nullptr) return 1;
  const Data kinds[] = {Data::kRandom, Data::kLargestSums, Data::kZero, Data::kNonFinite,
                        Data::kSubnormal};
  for (const int64_t group_size : {0, 32, 128, 4096}) check_scratch(group_size);
  // Every K around the vectors of every variant, against one, several and many tokens; from the
  // second of the longest vectors on, a third of them.
  for (int64_t K = 1; K <= (quick ? 70 : 530); K += K < 140 ? 1 : sparse ? 7 : K < 330 ? 1 : 3) {
    for (const int64_t M : {1, 2, 3}) check({M, 6, K, 0, false, false, Data::kRandom, 0});
    for (const int64_t M : {13, 33}) check_large({M, 6, K, 0, false, false, Data::kRandom, 0});
    check({1 + K % 3, 6, K, 0, false, false, kinds[K % 5], 0});
  }
  // Every M and N around the tiles.
  for (int64_t M = 1; M <= (quick ? 5 : 19); ++M) {
    for (int64_t N = 1; N <= 10; ++N) check({M, N, 70, 0, false, false, Data::kRandom, 0});
  }
  for (const int64_t N : {63, 64, 65, 127, 128, 129, 200}) {
    for (const int64_t M : {1, 2, 9}) check({M, N, 37, 0, false, false, Data::kRandom, 0});
  }
  // Every M and N around the tiles of the large products.
  for (const int64_t M : {11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 40}) {
    for (const int64_t N : {1, 15, 16, 17, 24, 25, 31, 32, 33, 47, 48, 49, 65}) {
      if (quick && M * N % 3 != 0) continue;
      check({M, N, 70, 0, false, false, kinds[N % 5], 0});
    }
  }
  // Their slices of K, of rows and of tokens.
  for (const int64_t K : {511, 512, 513, 2047, 2048, 2049, 4100}) {
    for (const int64_t M : {17, 33}) check_large({M, 50, K, 0, false, false, kinds[K % 2], 0});
  }
  if (!quick) {
    for (const int64_t M : {127, 128, 129, 255, 256, 257, 290}) {
      check_large({M, 50, 300, 0, false, false, Data::kRandom, 0});
    }
    for (const int64_t N : {2047, 2048, 2049, 2100}) {
      if (sparse && N != 2049) continue;
      check_large({20, N, 260, 0, false, false, Data::kRandom, 0});
    }
  }
  if (!quick && !sparse) {
    // Sizes from which AVX512-VNNI takes tables on Zen 4, and slightly smaller ones.
    for (const int64_t N : {639, 701}) {
      for (const int64_t M : {33, 64}) check_large({M, N, 1100, 0, false, false, kinds[N % 2], 0});
    }
    for (const int64_t group_size : {32, 96, 128, 1024}) {
      check_one_dtype({40, 701, 1100, 0, false, false, Data::kRandom, 0}, 0, group_size);
    }
    check_large({40, 645, 1020, 0, false, false, Data::kRandom, 0});
    check_large({270, 645, 1030, 0, false, false, Data::kRandom, 0});
  }
  // Long rows: the limits of the 16-bit and 32-bit sums.
  for (const int64_t K : {4095, 4096, 4097, 65535, 65536, 65540}) {
    if (quick && K > 5000) break;
    for (const int64_t M : {1, 3, 20}) {
      if (sparse && K > 5000 && M != 3) continue;
      check_large({M, 3, K, 0, false, false, Data::kLargestSums, 0});
      check_large({M, 3, K, 0, false, false, Data::kRandom, 0});
    }
  }
  // Groups of every number of lanes and blocks, in one run of blocks and in several.
  for (const int64_t K : {1000, 2100, 4190, 8260}) {
    if ((quick && K > 1000) || (sparse && K > 2100)) break;
    for (const int64_t group_size : {32, 64, 96, 128, 160, 192, 256, 320, 512, 4096}) {
      for (const int64_t M : {1, 3, 6, 20}) {
        const Data kind = (M + group_size / 32) % 2 == 0 ? Data::kLargestSums : Data::kRandom;
        check_one_dtype({M, 5, K, 0, false, false, kind, 0}, static_cast<int>(M % 3), group_size);
      }
    }
  }
  if (!quick) {
    check_large({1, 2, BITLINEAR_MAX_K, 0, false, false, Data::kLargestSums, 0});
    check_large({2, 2, BITLINEAR_MAX_K, 0, false, false, Data::kLargestSums, 0});
    check_large({17, 2, BITLINEAR_MAX_K, 0, false, false, Data::kLargestSums, 0});
  }
  printf("%s: %lld passed, %lld failed\n", bitlinear_kernels()->name,
         static_cast<long long>(passed), static_cast<long long>(failed));
  return failed == 0 ? 0 : 1;
}
