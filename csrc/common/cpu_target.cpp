#include "common/cpu_target.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

constexpr CpuTarget kTargets[] = {CpuTarget::generic, CpuTarget::avx2, CpuTarget::avx512, CpuTarget::avx512bf16};

static CpuTarget widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return avx512bf16 ? CpuTarget::avx512bf16
         : avx512   ? CpuTarget::avx512
         : avx2     ? CpuTarget::avx2
                    : CpuTarget::generic;
#else
  return CpuTarget::generic;
#endif
}

static CpuTarget choose() {
  const char* name = std::getenv("DINOV2_KERNELS_CPU_TARGET");
  if (name == nullptr) return widest();
  for (const CpuTarget target : kTargets) {
    if (target <= widest() && name == std::string(name_of(target))) return target;
  }
  throw std::runtime_error(std::string("DINOV2_KERNELS_CPU_TARGET: expected generic, avx2, avx512 or avx512bf16, as "
                                       "far as this processor has them, got ") + name);
}

const char* name_of(CpuTarget target) {
  switch (target) {
    case CpuTarget::avx512bf16: return "avx512bf16";
    case CpuTarget::avx512: return "avx512";
    case CpuTarget::avx2: return "avx2";
    default: return "generic";
  }
}

CpuTarget cpu_target() {
  static const CpuTarget target = choose();
  return target;
}
