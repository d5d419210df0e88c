// SPDX-License-Identifier: BSD-3-Clause
// One image's convolution by torch (oneDNN) on raw memory on the CPU. Not from inside parallel_for: oneDNN plans for all
// threads even there, runs on one, and leaves parts of some weight gradients undone.
#pragma once

#include "common/half_types.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <type_traits>
#include <utility>

namespace dynconv {

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  else if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<T, bfloat16>) return ScalarType::BFloat16;
  else return ScalarType::Half;
}

struct ConvolutionGeometry {
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

// An image (1, channels, height, width) in memory, dense in one of the two layouts.
template <class T>
struct Image {
  T* data;
  int64_t channels, height, width;
  bool channels_last;

  std::array<int64_t, 4> sizes() const { return {1, channels, height, width}; }
  std::array<int64_t, 4> strides() const {
    const int64_t size = channels * height * width;
    if (channels_last) return {size, 1, width * channels, channels};
    return {size, height * width, width, 1};
  }
};

template <class T, size_t dims>
torch::stable::Tensor tensor_of(T* data, const std::array<int64_t, dims>& sizes,
                                const std::array<int64_t, dims>& strides) {
  return torch::stable::from_blob(const_cast<void*>(static_cast<const void*>(data)), {sizes.data(), dims},
                                  {strides.data(), dims},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type_of<std::remove_const_t<T>>());
}
template <class T>
torch::stable::Tensor as_tensor(const Image<T>& image) {
  return tensor_of(image.data, image.sizes(), image.strides());
}

// Whether a tensor of shape (1, C, H, W) is dense in the layout; sizes of 1 have any stride.
inline bool has_layout(const torch::stable::Tensor& tensor, bool channels_last) {
  int64_t expected = 1;
  for (int64_t dim : channels_last ? std::array<int64_t, 3>{1, 3, 2} : std::array<int64_t, 3>{3, 2, 1}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// The tensor, or a copy of it, in the layout.
inline torch::stable::Tensor with_layout(torch::stable::Tensor tensor, bool channels_last) {
  if (has_layout(tensor, channels_last)) return tensor;
  using torch::headeronly::MemoryFormat;
  const std::array<int64_t, 4> sizes{tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
  torch::stable::Tensor copy =
      torch::stable::empty({sizes.data(), 4}, tensor.scalar_type(), std::nullopt, tensor.device(), std::nullopt,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// bias may be null. The result has the layout that torch chose.
inline torch::stable::Tensor convolution(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                         const torch::stable::Tensor* bias, const ConvolutionGeometry& g) {
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out = nullptr;
  const std::array<int64_t, 2> output_padding{0, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
      input.get(), weight.get(), bias ? &bias_handle : nullptr, g.stride.data(), 2, g.padding.data(), 2,
      g.dilation.data(), 2, 0, output_padding.data(), 2, g.groups, &out));
  return torch::stable::Tensor(out);
}

// (gradient of input, gradient of weight); one that is not wanted is undefined.
inline std::pair<torch::stable::Tensor, torch::stable::Tensor> convolution_backward(
    const torch::stable::Tensor& grad_out, const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
    const ConvolutionGeometry& g, bool want_input, bool want_weight) {
  AtenTensorHandle grad_input = nullptr, grad_weight = nullptr, grad_bias = nullptr;
  const std::array<int64_t, 2> output_padding{0, 0};
  const std::array<int32_t, 3> mask{want_input, want_weight, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      grad_out.get(), input.get(), weight.get(), nullptr, 0, g.stride.data(), 2, g.padding.data(), 2,
      g.dilation.data(), 2, 0, output_padding.data(), 2, g.groups, mask.data(), 3, &grad_input, &grad_weight,
      &grad_bias));
  torch::stable::Tensor unused(grad_bias);
  return {torch::stable::Tensor(grad_input), torch::stable::Tensor(grad_weight)};
}

}  // namespace dynconv
