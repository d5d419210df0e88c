// SPDX-License-Identifier: BSD-3-Clause
// From tensors to typed memory: types as template parameters, layouts, new outputs.
#pragma once

#include "common/checks.h"
#include "common/half_types.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dynconv {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f with tags of storage_t (in the tensors), acc_t (computed in) and product_t (what a matrix product or a
// convolution multiplies). 16-bit types multiply in float, but bfloat16 as itself where that is wanted.
template <class F>
void dispatch_types(ScalarType type, bool multiplies_bfloat16, F f) {
  switch (type) {
    case ScalarType::Float: return f(TypeTag<float>(), TypeTag<float>(), TypeTag<float>());
    case ScalarType::Double: return f(TypeTag<double>(), TypeTag<double>(), TypeTag<double>());
    case ScalarType::Half: return f(TypeTag<float16>(), TypeTag<float>(), TypeTag<float>());
    default:
      if (multiplies_bfloat16) return f(TypeTag<bfloat16>(), TypeTag<float>(), TypeTag<bfloat16>());
      return f(TypeTag<bfloat16>(), TypeTag<float>(), TypeTag<float>());
  }
}

inline StorageType storage_type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return StorageType::float32;
    case ScalarType::Double: return StorageType::float64;
    case ScalarType::BFloat16: return StorageType::bfloat16;
    default: return StorageType::float16;
  }
}

template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}
// null for an empty tensor: a gradient that is not wanted.
template <class T>
T* mutable_data(Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// The tensor, or a copy of it, dense in one of the library's two layouts.
inline Tensor dense(const Tensor& tensor, bool channels_last) {
  return channels_last ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Asks for huge pages under large fresh memory: writing it for the first time costs a page fault a page, which at 4 KiB
// can take a third of a memory-bound pass. Only advice: where it is not followed nothing changes.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 * 1024 * 1024;
  if (bytes < int64_t(2 * page)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised, of like's dtype and device.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  Tensor tensor = torch::stable::empty({shape.data(), shape.size()}, like.scalar_type(), std::nullopt, like.device(),
                                       std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (tensor.device().type() == torch::headeronly::DeviceType::CPU && tensor.numel())
    prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
  return tensor;
}
// An output of a backward: of shape (0,) where not wanted.
inline Tensor new_gradient(bool wanted, const Tensor& like, const std::vector<int64_t>& shape,
                           bool channels_last = false) {
  return wanted ? new_tensor(like, shape, channels_last) : new_tensor(like, {0});
}

}  // namespace dynconv
