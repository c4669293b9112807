#include "common/cpu_target.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr CpuTarget kTargets[] = {CpuTarget::generic, CpuTarget::avx2, CpuTarget::avx512, CpuTarget::avx512bf16,
                                  CpuTarget::amx};

#if defined(__x86_64__)
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

  explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx); }
};

// These features are tested by their bits, because not every compiler has names for them.
static bool has_f16c() { return Cpuid(1).ecx >> 29 & 1; }

static bool has_amx() {
  const unsigned features = Cpuid(7).edx;
  if (!(features >> 22 & 1) || !(features >> 24 & 1)) return false;  // amx-bf16, amx-tile
  // Linux saves the 8 KB of a thread's tiles only for processes that have asked for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

static CpuTarget widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return avx512bf16 && has_amx() ? CpuTarget::amx
         : avx512bf16            ? CpuTarget::avx512bf16
         : avx512                ? CpuTarget::avx512
         : avx2                  ? CpuTarget::avx2
                                 : CpuTarget::generic;
#else
  return CpuTarget::generic;
#endif
}

static CpuTarget choose() {
  const CpuTarget most = widest();
  const char* name = std::getenv("DINOV2_KERNELS_CPU_TARGET");
  if (name == nullptr) return most;
  for (const CpuTarget target : kTargets) {
    if (target <= most && name == std::string(name_of(target))) return target;
  }
  throw std::runtime_error(std::string("DINOV2_KERNELS_CPU_TARGET: expected generic, avx2, avx512, avx512bf16 or "
                                       "amx, as far as this processor has them, got ") + name);
}

const char* name_of(CpuTarget target) {
  switch (target) {
    case CpuTarget::amx: return "amx";
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
