// SPDX-License-Identifier: BSD-3-Clause
// Every check of aggregate_kernels and dynamic_conv2d, used by both backends: wrong arguments never reach a kernel.
#pragma once

#include "common/checks.h"
#include "common/dispatch.h"
#include "dynamic_conv2d/dynamic_conv2d.h"

#include <tuple>

namespace dynconv {

// batch: what attention.shape[0] has to be and the expression for it, or -1 where attention alone says it.
inline KernelBankParams make_params(const Tensor& weight, const Tensor& attention, const std::optional<Tensor>& bias,
                                    const std::optional<double>& temperature, int64_t batch = -1) {
  check_dim("weight", weight, 5, "(K, O, C / groups, kH, kW)");
  check_dim("attention", attention, 2, "(N, K)");
  check_floating("weight", weight);
  check_same_dtype_or_float32("attention", attention, weight, "weight");
  check_same_device("attention", attention, weight, "weight");
  for (int64_t i = 0; i < 5; ++i)
    if (weight.size(i) < 1) fail("weight: got shape ", shape_text(weight), ", expected every size >= 1");
  if (batch >= 0) check_equal("attention.shape[0]", attention.size(0), "input.shape[0]", batch);
  check_equal("attention.shape[1]", attention.size(1), "weight.shape[0]", weight.size(0));
  // Written so that NaN fails as well.
  if (temperature && !(*temperature > 0 && *temperature * 0 == 0))
    fail("temperature: got ", *temperature, ", expected a finite number > 0, or None");
  if (bias) {
    check_dim("bias", *bias, 2, "(K, O)");
    check_same_device("bias", *bias, weight, "weight");
    check_same_dtype("bias", *bias, weight, "weight");
    check_equal("bias.shape[0]", bias->size(0), "weight.shape[0]", weight.size(0));
    check_equal("bias.shape[1]", bias->size(1), "weight.shape[1]", weight.size(1));
  }
  KernelBankParams p{};
  p.batch = attention.size(0), p.num_kernels = weight.size(0), p.out_channels = weight.size(1);
  p.row = weight.size(2) * weight.size(3) * weight.size(4);
  p.softmax = temperature.has_value();
  p.temperature = temperature.value_or(1.0);
  return p;
}

inline DynamicConv2dParams make_params(const Tensor& input, const Tensor& weight, const Tensor& attention,
                                       const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                       int64_t groups, const std::optional<double>& temperature) {
  check_dim("input", input, 4, "(N, C, H, W)");
  check_dim("weight", weight, 5, "(K, O, C / groups, kH, kW)");
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_floating("input", input);
  check_same_dtype("weight", weight, input);
  check_same_device("weight", weight, input);
  DynamicConv2dParams p{};
  p.bank = make_params(weight, attention, bias, temperature, input.size(0));
  p.batch = input.size(0), p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
  p.out_channels = weight.size(1), p.kernel_height = weight.size(3), p.kernel_width = weight.size(4);
  p.stride_height = stride[0], p.stride_width = stride[1];
  p.padding_height = padding[0], p.padding_width = padding[1];
  p.dilation_height = dilation[0], p.dilation_width = dilation[1];
  p.groups = groups;
  if (groups < 1) fail("groups: got ", groups, ", expected at least 1");
  if (p.channels < 1 || p.channels % groups != 0)
    fail("input.shape[1]: got ", p.channels, ", expected a positive multiple of groups = ", groups);
  check_equal("weight.shape[2]", weight.size(2), "input.shape[1] / groups", p.channels / groups);
  if (p.out_channels % groups != 0)
    fail("weight.shape[1]: got ", p.out_channels, ", expected a multiple of groups = ", groups);
  auto out_size = [](int64_t size, int64_t pad, int64_t dil, int64_t kernel, int64_t step) {
    const int64_t span = size + 2 * pad - (dil * (kernel - 1) + 1);
    return span < 0 ? int64_t(0) : span / step + 1;
  };
  p.out_height = out_size(p.height, p.padding_height, p.dilation_height, p.kernel_height, p.stride_height);
  p.out_width = out_size(p.width, p.padding_width, p.dilation_width, p.kernel_width, p.stride_width);
  if (p.height < 1 || p.width < 1 || p.out_height < 1 || p.out_width < 1)
    fail("input: got size ", p.height, " x ", p.width, ", which gives an output of ", p.out_height, " x ", p.out_width,
         ", expected at least 1 x 1 for this weight, stride, padding and dilation");
  p.channels_last = is_channels_last(input);
  return p;
}

inline void check_output_mask(const std::vector<bool>& output_mask, size_t expected) {
  if (output_mask.size() != expected) fail("output_mask: got ", output_mask.size(), " values, expected ", expected);
}

// What comes into aggregate_kernels' backward.
inline void check_backward(const Tensor& grad_kernels, const std::optional<Tensor>& grad_biases, const Tensor& weight,
                           const std::optional<Tensor>& bias, const KernelBankParams& p,
                           const std::vector<bool>& output_mask) {
  check_output_mask(output_mask, 3);
  check_dim("grad_kernels", grad_kernels, 5, "(N, O, C / groups, kH, kW)");
  check_same_dtype("grad_kernels", grad_kernels, weight, "weight");
  check_same_device("grad_kernels", grad_kernels, weight, "weight");
  check_equal("grad_kernels.shape[0]", grad_kernels.size(0), "attention.shape[0]", p.batch);
  const char* names[] = {"grad_kernels.shape[1]", "grad_kernels.shape[2]", "grad_kernels.shape[3]",
                         "grad_kernels.shape[4]"};
  const char* expected[] = {"weight.shape[1]", "weight.shape[2]", "weight.shape[3]", "weight.shape[4]"};
  for (int i = 0; i < 4; ++i) check_equal(names[i], grad_kernels.size(i + 1), expected[i], weight.size(i + 1));
  if (!grad_biases) return;
  if (!bias) fail("grad_biases: got a tensor, expected None without a bias");
  check_dim("grad_biases", *grad_biases, 2, "(N, O)");
  check_same_dtype("grad_biases", *grad_biases, weight, "weight");
  check_same_device("grad_biases", *grad_biases, weight, "weight");
  check_equal("grad_biases.shape[0]", grad_biases->size(0), "attention.shape[0]", p.batch);
  check_equal("grad_biases.shape[1]", grad_biases->size(1), "weight.shape[1]", p.out_channels);
}

// What comes into dynamic_conv2d's backward.
inline void check_backward(const Tensor& grad_out, const Tensor& input, const DynamicConv2dParams& p,
                           const std::vector<bool>& output_mask) {
  check_grad_out(grad_out, input, p, "weight.shape[1]");
  check_output_mask(output_mask, 4);
}

// The gradients that dynamic_conv2d's backward makes; those not wanted have shape (0,).
struct DynamicBackwardTensors {
  Tensor input, weight, attention, bias;

  DynamicBackwardTensors(const DynamicConv2dParams& p, const Tensor& input_, const Tensor& weight_,
                         const Tensor& attention_, bool has_bias, const std::vector<bool>& output_mask)
      : input(new_gradient(output_mask[0], input_, {p.batch, p.channels, p.height, p.width}, p.channels_last)),
        weight(new_gradient(output_mask[1], weight_,
                            {p.bank.num_kernels, p.out_channels, p.group_channels(), p.kernel_height, p.kernel_width})),
        attention(new_gradient(output_mask[2], attention_, {p.batch, p.bank.num_kernels})),
        bias(new_gradient(output_mask[3] && has_bias, weight_, {p.bank.num_kernels, p.out_channels})) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {input, weight, attention, bias}; }
  // Of a batch without samples.
  std::tuple<Tensor, Tensor, Tensor, Tensor> zeroed() {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
    return all();
  }
};

}  // namespace dynconv
