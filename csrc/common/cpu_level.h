// SPDX-License-Identifier: BSD-3-Clause
// Which instruction set the CPU kernels run with, chosen once at run time.
#pragma once

namespace dynconv {

enum class CpuLevel { baseline, avx2, avx512 };

// The best level this CPU has and this binary contains, or the one that the environment variable DYNCONV_CPU_LEVEL
// (baseline, avx2, avx512) asks for. Throws if that is unknown or not to be had here.
CpuLevel cpu_level();
const char* cpu_level_name();

// What multiplies bfloat16 in the library's own products, at the level avx512: amx where the CPU has it and the system
// grants it, avx512_bf16 on AMD's CPUs that have it, else none, which is float32. The environment variable
// DYNCONV_CPU_BFLOAT16 (none, avx512_bf16, amx) decides instead; throws if that is unknown or not to be had here. amx
// includes avx512_bf16, which is no default on Intel's CPUs: where it was measured, vdpbf16ps does half the products a
// second of a float32 multiply-add there, and twice as many on AMD's (Zen 4).
enum class Bfloat16Level { none, avx512_bf16, amx };
Bfloat16Level bfloat16_level();
const char* bfloat16_level_name();

// Whether torch's bfloat16 matrix product runs on native instructions (AMX or AVX512-BF16), so that it beats float32.
bool has_native_bfloat16();

}  // namespace dynconv
