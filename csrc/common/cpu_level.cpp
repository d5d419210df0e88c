// SPDX-License-Identifier: BSD-3-Clause
#include "common/cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(__x86_64__)
// Bits of a word of the CPU's features (leaf 7): eax of subleaf 1, edx of subleaf 0.
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return detect() == CpuLevel::avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
bool has_amx_bf16() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile);
}

// The tiles' registers are so large that Linux gives them to a process only on request (since 5.16).
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

Bfloat16Level detect_bfloat16() {
#if defined(__x86_64__)
  if (cpu_level() != CpuLevel::avx512 || !has_avx512_bf16()) return Bfloat16Level::none;
  return has_amx_bf16() && request_amx() ? Bfloat16Level::amx : Bfloat16Level::avx512_bf16;
#else
  return Bfloat16Level::none;
#endif
}

// Whether vdpbf16ps beats a float32 multiply-add: see Bfloat16Level.
bool has_fast_avx512_bf16() {
#if defined(__x86_64__)
  return has_avx512_bf16() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512"};
constexpr const char* kBfloat16LevelNames[] = {"none", "avx512_bf16", "amx"};

// The level that an environment variable asks for, up to best; usual without it.
template <class Level>
Level choose(const char* variable, const char* const (&names)[3], Level best, Level usual) {
  const char* wish = std::getenv(variable);
  if (wish == nullptr || *wish == '\0') return usual;
  for (int i = 0; i < 3; ++i) {
    if (std::string(wish) != names[i]) continue;
    if (Level(i) > best) throw std::runtime_error(std::string(variable) + ": got " + wish + ", which this CPU lacks");
    return Level(i);
  }
  throw std::runtime_error(std::string(variable) + ": got " + wish + ", expected " + names[0] + ", " + names[1] + " or " +
                           names[2]);
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = [] {
    const CpuLevel best = detect();
    return choose("DYNCONV_CPU_LEVEL", kLevelNames, best, best);
  }();
  return level;
}
const char* cpu_level_name() { return kLevelNames[int(cpu_level())]; }

Bfloat16Level bfloat16_level() {
  static const Bfloat16Level level = [] {
    const Bfloat16Level best = detect_bfloat16();
    const bool gains = best == Bfloat16Level::amx || has_fast_avx512_bf16();
    return choose("DYNCONV_CPU_BFLOAT16", kBfloat16LevelNames, best, gains ? best : Bfloat16Level::none);
  }();
  return level;
}
const char* bfloat16_level_name() { return kBfloat16LevelNames[int(bfloat16_level())]; }

bool has_native_bfloat16() {
#if defined(__x86_64__)
  static const bool native = has_avx512_bf16() || has_amx_bf16();
  return native;
#else
  return false;
#endif
}

}  // namespace dynconv
