// Which build of the hot code runs on this processor.
//
// A file named cpu_kernels.cpp is compiled once per target, with all code inside `namespace CPU_TARGET`. It has plain
// loops over pointers and includes neither PyTorch nor the standard library: the linker keeps one copy of an inline
// function for all targets, and this copy might be compiled for AVX-512. cpu.cpp declares these functions with
// FOR_EACH_CPU_TARGET and calls the right one through ON_CPU_TARGET.
#pragma once

enum class CpuTarget { generic, avx2, avx512, avx512bf16, amx };

// The widest target that this processor runs. For tests, DINOV2_KERNELS_CPU_TARGET=generic|avx2|avx512|avx512bf16|amx
// chooses another one.
CpuTarget cpu_target();

const char* name_of(CpuTarget target);

#if defined(__x86_64__)
#define FOR_EACH_CPU_TARGET(DECLARE) DECLARE(generic) DECLARE(avx2) DECLARE(avx512) DECLARE(avx512bf16) DECLARE(amx)
#define ON_CPU_TARGET(...) /* a function; variadic for the commas of its template arguments */ \
  (cpu_target() == CpuTarget::amx          ? &amx::__VA_ARGS__        \
   : cpu_target() == CpuTarget::avx512bf16 ? &avx512bf16::__VA_ARGS__ \
   : cpu_target() == CpuTarget::avx512     ? &avx512::__VA_ARGS__     \
   : cpu_target() == CpuTarget::avx2       ? &avx2::__VA_ARGS__       \
                                           : &generic::__VA_ARGS__)
#else
#define FOR_EACH_CPU_TARGET(DECLARE) DECLARE(generic)
#define ON_CPU_TARGET(...) (&generic::__VA_ARGS__)
#endif
