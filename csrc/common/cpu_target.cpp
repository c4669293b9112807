#include "common/cpu_target.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

static CpuTarget widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? CpuTarget::avx512 : avx2 ? CpuTarget::avx2 : CpuTarget::generic;
#else
  return CpuTarget::generic;
#endif
}

static CpuTarget choose() {
  const char* name = std::getenv("DINOV2_KERNELS_CPU_TARGET");
  if (name == nullptr) return widest();
  for (const CpuTarget target : {CpuTarget::generic, CpuTarget::avx2, CpuTarget::avx512}) {
    if (target <= widest() && name == std::string(name_of(target))) return target;
  }
  throw std::runtime_error(std::string("DINOV2_KERNELS_CPU_TARGET: expected generic, avx2 or avx512, as far as this "
                                       "processor has them, got ") + name);
}

const char* name_of(CpuTarget target) {
  return target == CpuTarget::avx512 ? "avx512" : target == CpuTarget::avx2 ? "avx2" : "generic";
}

CpuTarget cpu_target() {
  static const CpuTarget target = choose();
  return target;
}
