// SPDX-License-Identifier: BSD-3-Clause
// Argument checks of every operator: an error names the argument, what came, and what was expected.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dynconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

// check_equal("offset.shape[1]", 17, "2 * offset_groups * kH * kW", 18)
inline void check_equal(const char* what, int64_t got, const char* expression, int64_t expected) {
  if (got != expected) fail(what, ": got ", got, ", expected ", expression, " = ", expected);
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim, const char* layout) {
  if (tensor.dim() != dim)
    fail(name, ": got shape ", shape_text(tensor), ", expected ", dim, " dimensions ", layout);
}

// like: the argument that sets the device or dtype, called like_name.
inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like,
                              const char* like_name = "input") {
  const auto got = tensor.device(), expected = like.device();
  if (got.type() != expected.type() || got.index() != expected.index()) {
    auto text = [](const auto& device) {
      std::ostringstream stream;
      switch (device.type()) {
        case torch::headeronly::DeviceType::CPU: stream << "cpu"; break;
        case torch::headeronly::DeviceType::CUDA: stream << "cuda:" << int(device.index()); break;
        case torch::headeronly::DeviceType::Meta: stream << "meta"; break;
        default: stream << "device type " << int(device.type());
      }
      return stream.str();
    };
    fail(name, ": got a tensor on ", text(got), ", expected the device of ", like_name, ", ",
         text(expected));
  }
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double && type != ScalarType::BFloat16 &&
      type != ScalarType::Half)
    fail(name, ".dtype: got ", dtype_name(type), ", expected float32, float64, bfloat16 or float16");
}

inline void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& like,
                             const char* like_name = "input") {
  if (tensor.scalar_type() != like.scalar_type())
    fail(name, ".dtype: got ", dtype_name(tensor.scalar_type()), ", expected ", like_name, ".dtype = ",
         dtype_name(like.scalar_type()));
}

// For coordinates and mixing weights, which may stay float32 beside 16-bit tensors.
inline void check_same_dtype_or_float32(const char* name, const Tensor& tensor, const Tensor& like,
                                        const char* like_name = "input") {
  const ScalarType type = tensor.scalar_type(), expected = like.scalar_type();
  const bool half = expected == ScalarType::BFloat16 || expected == ScalarType::Half;
  if (type != expected && !(half && type == ScalarType::Float))
    fail(name, ".dtype: got ", dtype_name(type), ", expected ", like_name, ".dtype = ", dtype_name(expected),
         half ? " or float32" : "");
}

inline void check_pair(const char* name, const std::vector<int64_t>& values, int64_t lowest) {
  if (values.size() != 2) fail(name, ": got ", values.size(), " values, expected 2 (height, width)");
  for (int64_t value : values)
    if (value < lowest) fail(name, ": got (", values[0], ", ", values[1], "), expected values >= ", lowest);
}

// The gradient that comes into a convolution's backward. out_channels_name: the argument's size that sets O.
template <class Params>
void check_grad_out(const Tensor& grad_out, const Tensor& input, const Params& p, const char* out_channels_name) {
  check_dim("grad_out", grad_out, 4, "(N, O, Ho, Wo)");
  check_same_dtype("grad_out", grad_out, input);
  check_same_device("grad_out", grad_out, input);
  check_equal("grad_out.shape[0]", grad_out.size(0), "input.shape[0]", p.batch);
  check_equal("grad_out.shape[1]", grad_out.size(1), out_channels_name, p.out_channels);
  check_equal("grad_out.shape[2]", grad_out.size(2), "output height", p.out_height);
  check_equal("grad_out.shape[3]", grad_out.size(3), "output width", p.out_width);
}

// The library's one rule for the layout of an output: channels_last if the input is so and not contiguous as well.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

}  // namespace dynconv
