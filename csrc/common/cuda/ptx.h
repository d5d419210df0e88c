// SPDX-License-Identifier: BSD-3-Clause
// The instructions that CUDA C++ has no name for, and what belongs to them; nothing else holds inline assembly.
//
// The host emulation (tests/cuda_emulation/ptx.h) defines the same functions: kernels include <ptx.h>, and the include
// path decides. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "for mma.m16n8k8", with
// g = lane / 4 and t = lane % 4.
#pragma once

#include "common/half_types.h"

#include <cuda_runtime.h>

#include <cstdint>

#define DYNCONV_DEVICE __device__ __forceinline__

namespace dynconv {

// The block's dynamic shared memory, aligned to 128 bytes.
DYNCONV_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynconv_dynamic_shared[];
  return dynconv_dynamic_shared;
}

// ------------------------------------------------------------------------------------------------- matrix fragments

// Loads four 8x8 matrices of 16-bit numbers (or 8x4 of 32-bit numbers). Lane l passes the address of the 16 bytes of
// row l % 8 of matrix l / 8; it receives, of matrix i in r[i], the 32 bits at row g, bytes 4t to 4t + 3.
DYNCONV_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed: r[i] holds the 16-bit numbers at rows 2t (low half) and 2t + 1, column g.
DYNCONV_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d (16x8) += a (16x16) b (16x8), of 16-bit numbers.
// a[0] rows g, columns 2t, 2t + 1; a[1] rows g + 8; a[2], a[3] the same at columns + 8.
// b[0] rows 2t, 2t + 1, column g; b[1] rows + 8. d[0], d[1] row g, columns 2t, 2t + 1; d[2], d[3] row g + 8.
DYNCONV_DEVICE void mma_m16n8k16(bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DYNCONV_DEVICE void mma_m16n8k16(float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16x8) += a (16x8) b (8x8), of TF32 numbers (float bits whose last 13 bits don't count).
// a[0] row g, column t; a[1] row g + 8; a[2], a[3] the same at column + 4. b[0] row t, column g; b[1] row t + 4.
DYNCONV_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ----------------------------------------------------------------------------------------------------- conversions

// Rounded to TF32's 10 bits of mantissa, to nearest, ties away from zero.
DYNCONV_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Two numbers rounded to nearest even, the first in the low half.
DYNCONV_DEVICE uint32_t pack_halves(bfloat16, float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DYNCONV_DEVICE uint32_t pack_halves(float16, float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DYNCONV_DEVICE void unpack_halves(bfloat16, uint32_t bits, float* low, float* high) {
  *low = __uint_as_float(bits << 16);
  *high = __uint_as_float(bits & 0xffff0000u);
}
DYNCONV_DEVICE void unpack_halves(float16, uint32_t bits, float* low, float* high) {
  asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
      : "=f"(*low), "=f"(*high)
      : "r"(bits));
}

// ----------------------------------------------------------------------------------------------------------- memory

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16 bytes, around the first-level cache.
DYNCONV_DEVICE void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// The same through the first-level cache, for what is read again soon; zeros where `exists` is false.
DYNCONV_DEVICE void copy_async_16_cached(void* shared, const void* global, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(exists ? 16 : 0) : "memory");
}
// Closes this thread's group of copies started since the last commit.
DYNCONV_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way; a barrier then shows the rest to the block.
template <int pending>
DYNCONV_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Adds to global memory, without an order among threads, and without reading back.
DYNCONV_DEVICE void add_global(float* to, float value) { atomicAdd(to, value); }
DYNCONV_DEVICE void add_global(double* to, double value) { atomicAdd(to, value); }
// to[i] += value[i], i < 4; to is aligned to 16 bytes.
DYNCONV_DEVICE void add_global_x4(float* to, const float (&value)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(value[0]),
               "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, value[i]);
#endif
}

}  // namespace dynconv
