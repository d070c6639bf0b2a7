// What compilers, operating systems and architectures spell differently. Nothing else in the
// torch-free code asks which of them it is compiled for.
//
// GCC and clang share one branch, the other one is for MSVC. MSVC has never compiled it: a test
// defines BITLINEAR_MSVC, compiles it with clang for Windows, and runs it.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER)
#define BITLINEAR_MSVC
// Before Visual Studio 2022, MSVC contracts a * b + c to one rounding unless it is told not to.
#pragma fp_contract(off)
#endif

#if defined(BITLINEAR_MSVC)
#include <intrin.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
// As windows.h declares them. That header would also define min, max and other macros.
struct HINSTANCE__;
extern "C" __declspec(dllimport) HINSTANCE__* __stdcall GetModuleHandleA(const char* name);
extern "C" __declspec(dllimport) long long(__stdcall* __stdcall GetProcAddress(HINSTANCE__* module,
                                                                               const char* name))();
#elif defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && !defined(BITLINEAR_MSVC)
#include <cpuid.h>
#endif

// --- Declarations --------------------------------------------------------------------------------

#if defined(_WIN32)
#define BITLINEAR_EXPORT extern "C" __declspec(dllexport)
#else
#define BITLINEAR_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(BITLINEAR_MSVC)
#define BITLINEAR_NOINLINE __declspec(noinline)
#define BITLINEAR_UNROLL_4
#define BITLINEAR_UNROLL_8
#else
#define BITLINEAR_NOINLINE __attribute__((noinline))
#define BITLINEAR_UNROLL_4 _Pragma("GCC unroll 4")
#define BITLINEAR_UNROLL_8 _Pragma("GCC unroll 8")
#endif

// --- Inline assembly -----------------------------------------------------------------------------

// BITLINEAR_ASM(statement, assembly): the assembly, or the statement where there is no inline
// assembly. BITLINEAR_GCC_ASM: the assembly for GCC alone. It is for intrinsics to which GCC adds
// register moves, and clang does not.
#if defined(BITLINEAR_MSVC)
#define BITLINEAR_ASM(statement, ...) statement
#else
#define BITLINEAR_ASM(statement, ...) __asm__(__VA_ARGS__)
#endif
#if defined(BITLINEAR_MSVC) || defined(__clang__)
#define BITLINEAR_GCC_ASM(statement, ...) statement
#else
#define BITLINEAR_GCC_ASM(statement, ...) __asm__(__VA_ARGS__)
#endif

// --- Intrinsics of F16C --------------------------------------------------------------------------

// One number from fp16 to fp32, and back. MSVC has the intrinsics for vectors only.
#if defined(BITLINEAR_MSVC)
#define BITLINEAR_CVTSH_SS(half) _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)))
#define BITLINEAR_CVTSS_SH(value) \
  static_cast<uint16_t>(          \
      _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)))
#else
#define BITLINEAR_CVTSH_SS(half) _cvtsh_ss(half)
#define BITLINEAR_CVTSS_SH(value) _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)
#endif

// --- Barriers ------------------------------------------------------------------------------------

namespace bitlinear {

// Hides from the compiler how a pointer or an integer was computed.
template <class T>
inline void hide_origin(T& value) {
  BITLINEAR_ASM((void)value, "" : "+r"(value));
}

// Makes the compiler finish every store, and read memory again after it.
inline void compiler_barrier() {
#if defined(BITLINEAR_MSVC)
  _ReadWriteBarrier();
#else
  __asm__ volatile("" : : : "memory");
#endif
}

// As compiler_barrier(), also for a local variable whose address no other code has.
inline void compiler_barrier(const void* local) {
#if defined(BITLINEAR_MSVC)
  (void)local;
  _ReadWriteBarrier();
#else
  __asm__ volatile("" : : "r"(local) : "memory");
#endif
}

// --- Memory --------------------------------------------------------------------------------------

inline void prefetch(const void* address) {
#if !defined(BITLINEAR_MSVC)
  __builtin_prefetch(address);
#elif defined(__x86_64__) || defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
#else
  __prefetch(address);
#endif
}

// Into the L2 cache only: for what is needed later than prefetch()'s.
inline void prefetch_l2(const void* address) {
#if !defined(BITLINEAR_MSVC)
  __builtin_prefetch(address, 0, 2);
#elif defined(__x86_64__) || defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
#else
  __prefetch(address);
#endif
}

// Exactly `bytes` bytes at a multiple of `alignment`; null if there is no memory.
inline void* allocate_aligned(size_t alignment, size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
#endif
}

inline void free_aligned(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  free(memory);
#endif
}

// --- Vectors -------------------------------------------------------------------------------------

// A vector of int16 lanes with +, - and +=.
template <int64_t kBytes>
struct Int16Vector {
#if !defined(BITLINEAR_MSVC)
  typedef int16_t Type __attribute__((vector_size(kBytes)));
#else
  // Plain loops, which the compiler vectorises.
  struct alignas(kBytes) Type {
    static constexpr int kLanes = kBytes / 2;
    int16_t lane[kLanes];
    Type& operator+=(const Type& other) { return *this = *this + other; }
    friend Type operator+(const Type& a, const Type& b) {
      Type sum;
      for (int i = 0; i < kLanes; ++i) sum.lane[i] = static_cast<int16_t>(a.lane[i] + b.lane[i]);
      return sum;
    }
    friend Type operator-(const Type& a, const Type& b) {
      Type sum;
      for (int i = 0; i < kLanes; ++i) sum.lane[i] = static_cast<int16_t>(a.lane[i] - b.lane[i]);
      return sum;
    }
    Type operator-() const { return Type{} - *this; }
  };
#endif
};

// Transposes a 4 x 4 matrix of 32-bit elements.
template <class Row>
inline void transpose_4x4(Row (&rows)[4]) {
  static_assert(sizeof(rows) == 64, "16 elements");
#if !defined(BITLINEAR_MSVC)
  // GCC copies single elements of arrays through memory, where vectors of them are not ready yet.
  typedef uint32_t Elements __attribute__((vector_size(16)));
#else
  struct Elements {
    uint32_t element[4];
    uint32_t operator[](int i) const { return element[i]; }
  };
#endif
  Elements from[4], to[4];
  memcpy(from, rows, sizeof(from));
  for (int c = 0; c < 4; ++c) to[c] = Elements{from[0][c], from[1][c], from[2][c], from[3][c]};
  memcpy(rows, to, sizeof(to));
}

// --- The register that flushes subnormal numbers to zero -----------------------------------------

#if defined(__x86_64__) || defined(_M_X64)
constexpr uint32_t kFlushBits = 0x8040;  // MXCSR.FTZ for results, .DAZ for operands
#if defined(BITLINEAR_MSVC)
inline uint32_t read_float_control() { return _mm_getcsr(); }
inline void write_float_control(uint32_t control) { _mm_setcsr(control); }
#else
inline uint32_t read_float_control() {
  uint32_t control;
  __asm__ volatile("stmxcsr %0" : "=m"(control) : : "memory");
  return control;
}
inline void write_float_control(uint32_t control) {
  __asm__ volatile("ldmxcsr %0" : : "m"(control) : "memory");
}
#endif
#elif defined(__aarch64__) && !defined(BITLINEAR_MSVC)
constexpr uint64_t kFlushBits = 1u << 24 | 1u << 19;  // FPCR.FZ, and .FZ16 for fp16
inline uint64_t read_float_control() {
  uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control) : : "memory");
  return control;
}
inline void write_float_control(uint64_t control) {
  __asm__ volatile("msr fpcr, %0" : : "r"(control) : "memory");
}
#else
constexpr uint32_t kFlushBits = 0;
inline uint32_t read_float_control() { return 0; }
inline void write_float_control(uint32_t) {}
#endif

// --- The CPU -------------------------------------------------------------------------------------

#if defined(__x86_64__) || defined(_M_X64)
// The family as CPUID gives it, extended family included: 6 of most Intel CPUs, 0x19 of Zen 3
// and 4.
inline uint32_t cpu_family() {
#if defined(BITLINEAR_MSVC)
  int registers[4];
  __cpuid(registers, 1);
  const uint32_t eax = static_cast<uint32_t>(registers[0]);
#else
  uint32_t eax = 0, ebx, ecx, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
#endif
  const uint32_t family = eax >> 8 & 0xF;
  return family == 0xF ? family + (eax >> 20 & 0xFF) : family;
}
#endif

// --- Permission for AMX --------------------------------------------------------------------------

// Asks the system for the use of AMX tiles, by this process and for good. Returns false if it
// refuses. No Mac has AMX.
inline bool request_amx_tiles() {
  // Numbers of the states that XSAVE saves.
  [[maybe_unused]] constexpr int kTileConfig = 17, kTileData = 18;
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#elif defined(_WIN32)
  // Since Windows 11 and Server 2022. It fails if the CPU or the system lacks a state.
  using Enable = int(__stdcall*)(unsigned long long states);
  const auto enable = reinterpret_cast<Enable>(
      GetProcAddress(GetModuleHandleA("kernel32.dll"), "EnableProcessOptionalXStateFeatures"));
  return enable != nullptr && enable(1ull << kTileConfig | 1ull << kTileData) != 0;
#else
  return false;
#endif
}

}  // namespace bitlinear
