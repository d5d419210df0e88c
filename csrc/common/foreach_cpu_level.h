// SPDX-License-Identifier: BSD-3-Clause
// Includes DYNCONV_KERNELS once for each instruction set, in namespaces dynconv::baseline, ::avx2, ::avx512 and
// ::avx512_bf16. The last is avx512 with AVX512-BF16, for what gains from it: templates that nobody uses cost nothing.
// A kernels header must use no function of the standard library: a copy of one compiled for AVX-512 could be the copy
// that the linker keeps for everybody. No include guard: every operator includes this with its own kernels.

#ifndef DYNCONV_KERNELS
#error "define DYNCONV_KERNELS as the header to include"
#endif

#define DYNCONV_VECTOR_BYTES 16
#define DYNCONV_LEVEL 0
namespace dynconv::baseline {
#include "common/simd.inl"
#include DYNCONV_KERNELS
}  // namespace dynconv::baseline
#undef DYNCONV_VECTOR_BYTES
#undef DYNCONV_LEVEL

#if defined(__x86_64__)

#define DYNCONV_VECTOR_BYTES 32
#define DYNCONV_LEVEL 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace dynconv::avx2 {
#include "common/simd.inl"
#include DYNCONV_KERNELS
}  // namespace dynconv::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DYNCONV_VECTOR_BYTES
#undef DYNCONV_LEVEL

#define DYNCONV_VECTOR_BYTES 64
#define DYNCONV_LEVEL 2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace dynconv::avx512 {
#include "common/simd.inl"
#include DYNCONV_KERNELS
}  // namespace dynconv::avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DYNCONV_VECTOR_BYTES
#undef DYNCONV_LEVEL

#define DYNCONV_VECTOR_BYTES 64
#define DYNCONV_LEVEL 2
#define DYNCONV_AVX512_BF16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
namespace dynconv::avx512_bf16 {
#include "common/simd.inl"
#include DYNCONV_KERNELS
}  // namespace dynconv::avx512_bf16
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DYNCONV_VECTOR_BYTES
#undef DYNCONV_LEVEL
#undef DYNCONV_AVX512_BF16

#endif
#undef DYNCONV_KERNELS
