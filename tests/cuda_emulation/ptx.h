// SPDX-License-Identifier: BSD-3-Clause
// The functions of csrc/common/cuda/ptx.h on the host emulation: what each does is said there.
#pragma once

#include "common/half_types.h"

#include <cuda_runtime.h>

#include <cstdint>

#define DYNCONV_DEVICE __device__ __forceinline__

namespace dynconv {

DYNCONV_DEVICE unsigned char* dynamic_shared() { return dynconv_emulation::shared_memory(); }

// ------------------------------------------------------------------------------------------------- matrix fragments

namespace emulation_detail {

// Each lane reads the row it points to itself, so that ThreadSanitizer sees whose access it is.
struct Row {
  uint32_t words[4];
};
inline dynconv_emulation::Exchanged<Row> exchange_rows(const char* operation, const void* row) {
  dynconv_emulation::require_shared_16(row, operation);
  Row own;
  std::memcpy(&own, row, sizeof(own));
  return dynconv_emulation::exchange(operation, own);
}

// What a lane holds of two operands.
struct Operands {
  uint32_t a[4], b[2];
};

// The low (0) or high (1) half of a register.
inline float half_of(bfloat16, uint32_t word, int half) { return to_acc(bfloat16{uint16_t(word >> (16 * half))}); }
inline float half_of(float16, uint32_t word, int half) { return to_acc(float16{uint16_t(word >> (16 * half))}); }

template <class T>
void mma_of_halves(const char* operation, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lanes = dynconv_emulation::exchange(operation, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = dynconv_emulation::lane() / 4, t = dynconv_emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int below = i / 2, column = 2 * t + i % 2;  // d[i] is at row g + 8 * below
    // Products are exact in float. The device adds them up in another order, and with other rounding.
    for (int k = 0; k < 16; ++k) {
      const int right = k / 8, quad = k % 8 / 2, half = k % 2;
      d[i] += half_of(T{}, lanes[4 * g + quad].a[below + 2 * right], half) *
              half_of(T{}, lanes[4 * column + quad].b[right], half);
    }
  }
}

}  // namespace emulation_detail

DYNCONV_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto rows = emulation_detail::exchange_rows("ldmatrix_x4", row);
  const int g = dynconv_emulation::lane() / 4, t = dynconv_emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) r[i] = rows[8 * i + g].words[t];
}

DYNCONV_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const auto rows = emulation_detail::exchange_rows("ldmatrix_x4_trans", row);
  const int g = dynconv_emulation::lane() / 4, t = dynconv_emulation::lane() % 4;
  const auto number = [&](int matrix, int matrix_row) {
    return rows[8 * matrix + matrix_row].words[g / 2] >> (16 * (g % 2)) & 0xffffu;
  };
  for (int i = 0; i < 4; ++i) r[i] = number(i, 2 * t) | number(i, 2 * t + 1) << 16;
}

DYNCONV_DEVICE void mma_m16n8k16(bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation_detail::mma_of_halves<bfloat16>("mma_m16n8k16(bfloat16)", d, a, b);
}
DYNCONV_DEVICE void mma_m16n8k16(float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation_detail::mma_of_halves<float16>("mma_m16n8k16(float16)", d, a, b);
}

DYNCONV_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lanes = dynconv_emulation::exchange("mma_m16n8k8_tf32",
                                                 emulation_detail::Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = dynconv_emulation::lane() / 4, t = dynconv_emulation::lane() % 4;
  const auto number = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
  for (int i = 0; i < 4; ++i) {
    const int below = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 8; ++k) {
      const int right = k / 4, quad = k % 4;
      d[i] += number(lanes[4 * g + quad].a[below + 2 * right]) * number(lanes[4 * column + quad].b[right]);
    }
  }
}

// ----------------------------------------------------------------------------------------------------- conversions

DYNCONV_DEVICE uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value != value ? 0x7fffffffu : bits;
  // Half a unit of the 10th bit more, then cut off; the sign stands apart, so ties go away from zero.
  return (bits + 0x1000u) & 0xffffe000u;
}

namespace emulation_detail {

template <class T>
uint32_t pack(float low, float high) {
  T bits[2];
  from_acc(low, &bits[0]);
  from_acc(high, &bits[1]);
  return bits[0].bits | uint32_t(bits[1].bits) << 16;
}

}  // namespace emulation_detail

DYNCONV_DEVICE uint32_t pack_halves(bfloat16, float low, float high) {
  return emulation_detail::pack<bfloat16>(low, high);
}
DYNCONV_DEVICE uint32_t pack_halves(float16, float low, float high) {
  return emulation_detail::pack<float16>(low, high);
}
template <class T>
DYNCONV_DEVICE void unpack_halves(T, uint32_t bits, float* low, float* high) {
  *low = emulation_detail::half_of(T{}, bits, 0);
  *high = emulation_detail::half_of(T{}, bits, 1);
}

// ----------------------------------------------------------------------------------------------------------- memory

DYNCONV_DEVICE void copy_async_16(void* shared, const void* global) {
  dynconv_emulation::copy_async_start(shared, global);
}
DYNCONV_DEVICE void copy_async_16_cached(void* shared, const void* global, bool exists) {
  dynconv_emulation::copy_async_start(shared, exists ? global : nullptr);
}
DYNCONV_DEVICE void copy_async_commit() { dynconv_emulation::copy_async_commit(); }
template <int pending>
DYNCONV_DEVICE void copy_async_wait() {
  dynconv_emulation::copy_async_wait(pending);
}

DYNCONV_DEVICE void add_global(float* to, float value) { atomicAdd(to, value); }
DYNCONV_DEVICE void add_global(double* to, double value) { atomicAdd(to, value); }
DYNCONV_DEVICE void add_global_x4(float* to, const float (&value)[4]) {
  dynconv_emulation::require_global_16(to, "add_global_x4");
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, value[i]);
}

}  // namespace dynconv
