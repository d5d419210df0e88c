// SPDX-License-Identifier: BSD-3-Clause
// Storage-only 16-bit floating types of the CPU kernels, and conversions between storage and accumulation types.
// Arithmetic is done in float.
#pragma once

#include "common/host_device.h"

#include <cstdint>

#define DYNCONV_INLINE DYNCONV_HOST_DEVICE

namespace dynconv {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DYNCONV_INLINE float to_acc(float value) { return value; }
DYNCONV_INLINE double to_acc(double value) { return value; }
DYNCONV_INLINE float to_acc(bfloat16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }
DYNCONV_INLINE float to_acc(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  // The exponent is rebased by a product with 2^112, which makes subnormals right as well.
  float magnitude = __builtin_bit_cast(float, rest << 13) * 0x1p112f;
  if (rest >= 0x7c00u) magnitude = __builtin_bit_cast(float, 0x7f800000u | (rest << 13));
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | sign);
}

DYNCONV_INLINE void from_acc(float value, float* out) { *out = value; }
DYNCONV_INLINE void from_acc(double value, double* out) { *out = value; }
DYNCONV_INLINE void from_acc(float value, bfloat16* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  out->bits = value != value ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
DYNCONV_INLINE void from_acc(float value, float16* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x47800000u) {
    half = 0x7c00u;  // at least 65536; what rounds up to it carries into the exponent below
  } else if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the mantissa rounded to nearest even in the last bits.
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

// *to = from, in any types.
template <class from_t, class to_t>
DYNCONV_INLINE void convert(from_t from, to_t* to) {
  from_acc(to_acc(from), to);
}
DYNCONV_INLINE void convert(double from, float* to) { *to = float(from); }

// Scalars of a tensor whose type is known at run time only, as acc_t.
enum class StorageType { float32, float64, bfloat16, float16 };

template <class acc_t>
struct ScalarReader {
  const void* data;
  StorageType type;

  DYNCONV_INLINE acc_t operator[](int64_t i) const {
    switch (type) {
      case StorageType::float32: return acc_t(static_cast<const float*>(data)[i]);
      case StorageType::float64: return acc_t(static_cast<const double*>(data)[i]);
      case StorageType::bfloat16: return acc_t(to_acc(static_cast<const bfloat16*>(data)[i]));
      default: return acc_t(to_acc(static_cast<const float16*>(data)[i]));
    }
  }
};

template <class acc_t>
struct ScalarWriter {
  void* data;
  StorageType type;

  DYNCONV_INLINE void write(int64_t i, acc_t value) const {
    switch (type) {
      case StorageType::float32: static_cast<float*>(data)[i] = float(value); return;
      case StorageType::float64: static_cast<double*>(data)[i] = double(value); return;
      case StorageType::bfloat16: from_acc(float(value), static_cast<bfloat16*>(data) + i); return;
      default: from_acc(float(value), static_cast<float16*>(data) + i);
    }
  }
};

}  // namespace dynconv
