// SPDX-License-Identifier: BSD-3-Clause
#include "common/cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dynconv {
namespace {

CpuLevel detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuLevel::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::avx2;
#endif
  return CpuLevel::baseline;
}

CpuLevel choose() {
  const CpuLevel best = detect();
  const char* wish = std::getenv("DYNCONV_CPU_LEVEL");
  if (wish == nullptr || *wish == '\0') return best;
  for (CpuLevel level : {CpuLevel::baseline, CpuLevel::avx2, CpuLevel::avx512}) {
    const char* name = level == CpuLevel::baseline ? "baseline" : level == CpuLevel::avx2 ? "avx2" : "avx512";
    if (std::string(wish) != name) continue;
    if (level > best) throw std::runtime_error(std::string("DYNCONV_CPU_LEVEL: got ") + wish + ", which this CPU lacks");
    return level;
  }
  throw std::runtime_error(std::string("DYNCONV_CPU_LEVEL: got ") + wish + ", expected baseline, avx2 or avx512");
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose();
  return level;
}

const char* cpu_level_name() {
  switch (cpu_level()) {
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    default: return "baseline";
  }
}

bool has_native_bfloat16() {
#if defined(__x86_64__)
  static const bool native = [] {
    if (detect() != CpuLevel::avx512) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool amx_bf16 = d & (1u << 22);
    const bool avx512_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
    return amx_bf16 || avx512_bf16;
  }();
  return native;
#else
  return false;
#endif
}

}  // namespace dynconv
