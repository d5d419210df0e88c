// SPDX-License-Identifier: BSD-3-Clause
// From tensors in global memory to operands of a product: types as template parameters, and chunks of 16 bytes.
#pragma once

#include "common/cuda/tile.h"
#include "common/cuda/types.h"

#include <cstdint>
#include <type_traits>

namespace dynconv {

// storage_: in the tensors; operand_: multiplied; acc_: coordinates and sums.
template <class storage_, class operand_, class acc_>
struct Types {
  using storage_t = storage_;
  using operand_t = operand_;
  using acc_t = acc_;
  static constexpr int kChunk = dynconv::kChunk<operand_>;
  static constexpr int kRow = dynconv::kRow<operand_>;
  static_assert(sizeof(storage_) == sizeof(operand_));
};

// Calls the macro with the Types of every precision, for explicit instantiations.
#define DYNCONV_FOR_EACH_TYPES(INSTANTIATE)       \
  INSTANTIATE(Types<double, double, double>)      \
  INSTANTIATE(Types<float, float, float>)         \
  INSTANTIATE(Types<float, tfloat32, float>)      \
  INSTANTIATE(Types<bfloat16, bfloat16, float>)   \
  INSTANTIATE(Types<float16, float16, float>)

// Calls f with the Types of a precision.
template <class F>
auto dispatch_precision(Precision precision, F f) {
  switch (precision) {
    case Precision::float64: return f(Types<double, double, double>());
    case Precision::float32: return f(Types<float, float, float>());
    case Precision::tf32: return f(Types<float, tfloat32, float>());
    case Precision::bfloat16: return f(Types<bfloat16, bfloat16, float>());
    default: return f(Types<float16, float16, float>());
  }
}

inline bool is_aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0;
}

// Numbers at `count` of kChunk neighbouring channels, the rest 0. vectors: 16 bytes at once, count is 0 or kChunk.
template <class T, bool vectors>
struct ChannelChunk;

template <class T>
struct ChannelChunk<T, true> {
  uint4 bits;
  DYNCONV_DEVICE void load(const typename T::storage_t* from, int64_t, int count) {
    bits = count > 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  }
  DYNCONV_DEVICE void get(typename T::acc_t (&v)[T::kChunk]) const { unpack(bits, typename T::storage_t(), v); }
};

template <class T>
struct ChannelChunk<T, false> {
  typename T::storage_t numbers[T::kChunk];
  DYNCONV_DEVICE void load(const typename T::storage_t* from, int64_t stride, int count) {
    DYNCONV_UNROLL
    for (int e = 0; e < T::kChunk; ++e, from += stride) numbers[e] = e < count ? *from : typename T::storage_t{};
  }
  DYNCONV_DEVICE void get(typename T::acc_t (&v)[T::kChunk]) const {
    DYNCONV_UNROLL
    for (int e = 0; e < T::kChunk; ++e) v[e] = to_acc(numbers[e]);
  }
};

// Which chunk of a tile of `rows` rows a thread handles: lanes run along the tensor's fastest dimension.
template <bool channels_fastest, int rows>
struct ChunkPlace {
  int row, chunk;
  DYNCONV_DEVICE explicit ChunkPlace(int item) {
    if constexpr (channels_fastest) row = item / kRowChunks, chunk = item % kRowChunks;
    else row = item % rows, chunk = item / rows;
  }
};

// How many of a chunk's numbers exist, of a step with `channels` channels.
template <class T>
DYNCONV_DEVICE int chunk_count(int channels, int chunk) {
  const int rest = channels - chunk * T::kChunk;
  return rest < 0 ? 0 : rest < T::kChunk ? rest : T::kChunk;
}

template <class storage_t, class operand_t>
DYNCONV_DEVICE operand_t as_operand(storage_t value) {
  if constexpr (sizeof(storage_t) == 4 && !std::is_same_v<storage_t, operand_t>) return operand_t{to_tf32(value)};
  else return value;
}

}  // namespace dynconv
