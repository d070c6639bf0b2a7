// Runs the self-test of a variant with memory for so many allocations: whatever fails has to come
// back as its message.
//
// Usage: out_of_memory
#include <stdio.h>
#include <stdlib.h>

#include <new>

#include "abi.h"

namespace {
int allocations_left = 0;
}

void* operator new(size_t bytes) {
  if (allocations_left-- <= 0) throw std::bad_alloc();
  return malloc(bytes);
}
void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }

int main() {
  for (int allocations = 0; allocations < 20; ++allocations) {
    char message[512] = "";
    allocations_left = allocations;
    const int verdict = bitlinear_selftest(message, sizeof(message));
    printf("%d: %d, %s\n", allocations, verdict, message);
    if (verdict != 1) return 1;
  }
  return 0;
}
