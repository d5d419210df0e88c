// SPDX-License-Identifier: BSD-3-Clause
// Matrix products of raw memory on the CPU, by torch's own (MKL, oneDNN), callable from inside parallel_for.
#pragma once

#include "common/half_types.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <type_traits>

namespace dynconv {

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  else if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<T, bfloat16>) return ScalarType::BFloat16;
  else return ScalarType::Half;
}

// A matrix in memory; one of the strides is 1.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

template <class T>
torch::stable::Tensor as_tensor(const Matrix<T>& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
  return torch::stable::from_blob(const_cast<void*>(static_cast<const void*>(m.data)), {sizes.data(), 2},
                                  {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<std::remove_const_t<T>>());
}

// out = a * b, or out += a * b. The shims call the CPU kernels themselves: no dispatcher, no autograd.
template <class T, class A, class B>
void gemm(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b, bool accumulate) {
  static_assert(std::is_same_v<std::remove_const_t<A>, T> && std::is_same_v<std::remove_const_t<B>, T>);
  const auto out_tensor = as_tensor(out), a_tensor = as_tensor(a), b_tensor = as_tensor(b);
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out_tensor.get(), out_tensor.get(), a_tensor.get(),
                                                           b_tensor.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out_tensor.get(), a_tensor.get(), b_tensor.get()));
  }
}

}  // namespace dynconv
