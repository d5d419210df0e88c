// SPDX-License-Identifier: BSD-3-Clause
// What the operators' CUDA host files share: precision, workspaces, and sizes that kernels can count.
#pragma once

#include "common/cuda/types.h"
#include "common/dispatch.h"

#include <initializer_list>
#include <utility>

namespace dynconv {

// Device memory from torch's allocator, in the order of the current stream: it may be given up as soon as the kernels
// that use it have been launched.
inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  const int64_t shape[] = {bytes};
  return torch::stable::empty({shape, 1}, ScalarType::Byte, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

inline Precision precision_of(const Tensor& input, bool allow_tf32) {
  switch (input.scalar_type()) {
    case ScalarType::Double: return Precision::float64;
    case ScalarType::BFloat16: return Precision::bfloat16;
    case ScalarType::Half: return Precision::float16;
    default: return allow_tf32 ? Precision::tf32 : Precision::float32;
  }
}

// Kernels count a dimension in 32 bits (tensors may have any number of elements).
inline void check_countable(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [what, size] : sizes)
    if (size >= (int64_t(1) << 31)) fail(what, ": got ", size, ", expected less than 2^31 on a GPU");
}

}  // namespace dynconv
