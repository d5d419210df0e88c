// SPDX-License-Identifier: BSD-3-Clause
// Every check of deform_conv2d, and the outputs of its backward, for both backends: wrong arguments never reach a kernel.
#pragma once

#include "common/checks.h"
#include "common/dispatch.h"
#include "deform_conv2d/deform_conv2d.h"

#include <tuple>

namespace dynconv {

inline DeformConv2dParams make_params(const Tensor& input, const Tensor& offset, const Tensor& weight,
                                      const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                      const std::optional<Tensor>& mask) {
  check_dim("input", input, 4, "(N, C, H, W)");
  check_dim("offset", offset, 4, "(N, 2 * offset_groups * kH * kW, Ho, Wo)");
  check_dim("weight", weight, 4, "(O, C / groups, kH, kW)");
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_floating("input", input);
  check_same_dtype("weight", weight, input);
  check_same_dtype_or_float32("offset", offset, input);
  check_same_device("offset", offset, input);
  check_same_device("weight", weight, input);

  DeformConv2dParams p{};
  p.batch = input.size(0), p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
  p.out_channels = weight.size(0), p.kernel_height = weight.size(2), p.kernel_width = weight.size(3);
  p.stride_height = stride[0], p.stride_width = stride[1];
  p.padding_height = padding[0], p.padding_width = padding[1];
  p.dilation_height = dilation[0], p.dilation_width = dilation[1];
  if (p.out_channels < 1 || weight.size(1) < 1 || p.taps() < 1)
    fail("weight: got shape ", shape_text(weight), ", expected every size >= 1");
  if (p.channels < 1 || p.channels % weight.size(1) != 0)
    fail("weight.shape[1]: got ", weight.size(1), ", expected a divisor of input.shape[1] = ", p.channels);
  p.groups = p.channels / weight.size(1);
  if (p.out_channels % p.groups != 0)
    fail("weight.shape[0]: got ", p.out_channels, ", expected a multiple of groups = input.shape[1] / weight.shape[1] = ",
         p.groups);
  auto out_size = [](int64_t size, int64_t pad, int64_t dil, int64_t kernel, int64_t step) {
    const int64_t span = size + 2 * pad - (dil * (kernel - 1) + 1);
    return span < 0 ? int64_t(0) : span / step + 1;
  };
  p.out_height = out_size(p.height, p.padding_height, p.dilation_height, p.kernel_height, p.stride_height);
  p.out_width = out_size(p.width, p.padding_width, p.dilation_width, p.kernel_width, p.stride_width);
  if (p.height < 1 || p.width < 1 || p.out_height < 1 || p.out_width < 1)
    fail("input: got size ", p.height, " x ", p.width, ", which gives an output of ", p.out_height, " x ", p.out_width,
         ", expected at least 1 x 1 for this weight, stride, padding and dilation");

  const int64_t taps = p.taps();
  p.offset_groups = offset.size(1) / (2 * taps);
  if (p.offset_groups < 1 || p.channels % p.offset_groups != 0) {
    // The likeliest intention: as many groups as fit, else one.
    const int64_t groups = p.offset_groups < 1 ? 1 : p.offset_groups;
    if (offset.size(1) != 2 * groups * taps)
      check_equal("offset.shape[1]", offset.size(1), "2 * offset_groups * kH * kW", 2 * groups * taps);
    fail("offset.shape[1]: got ", offset.size(1), ", which means offset_groups = ", groups,
         ", expected a divisor of input.shape[1] = ", p.channels);
  }
  check_equal("offset.shape[1]", offset.size(1), "2 * offset_groups * kH * kW", 2 * p.offset_groups * taps);
  check_equal("offset.shape[0]", offset.size(0), "input.shape[0]", p.batch);
  check_equal("offset.shape[2]", offset.size(2), "output height", p.out_height);
  check_equal("offset.shape[3]", offset.size(3), "output width", p.out_width);
  for (int i = 0; i < 4; ++i) p.offset_stride[i] = offset.stride(i);

  p.has_mask = mask.has_value();
  if (mask) {
    check_dim("mask", *mask, 4, "(N, offset_groups * kH * kW, Ho, Wo)");
    check_same_device("mask", *mask, input);
    if (mask->scalar_type() != offset.scalar_type())
      fail("mask.dtype: got ", dtype_name(mask->scalar_type()), ", expected offset.dtype = ",
           dtype_name(offset.scalar_type()));
    check_equal("mask.shape[1]", mask->size(1), "offset_groups * kH * kW", p.offset_groups * taps);
    check_equal("mask.shape[0]", mask->size(0), "input.shape[0]", p.batch);
    check_equal("mask.shape[2]", mask->size(2), "output height", p.out_height);
    check_equal("mask.shape[3]", mask->size(3), "output width", p.out_width);
    for (int i = 0; i < 4; ++i) p.mask_stride[i] = mask->stride(i);
  }
  if (bias) {
    check_dim("bias", *bias, 1, "(O,)");
    check_same_device("bias", *bias, input);
    check_same_dtype("bias", *bias, input);
    check_equal("bias.shape[0]", bias->size(0), "weight.shape[0]", p.out_channels);
  }
  p.channels_last = is_channels_last(input);
  return p;
}

inline void check_backward(const DeformConv2dParams& p, const Tensor& grad_out, const Tensor& input,
                           const std::vector<bool>& output_mask) {
  check_grad_out(grad_out, input, p, "weight.shape[0]");
  if (output_mask.size() != 5) fail("output_mask: got ", output_mask.size(), " values, expected 5");
}

// Gradients, uninitialised; of shape (0,) where not wanted.
struct BackwardTensors {
  Tensor input, offset, weight, bias, mask;

  BackwardTensors(const DeformConv2dParams& p, const Tensor& x, const Tensor& offset_, const Tensor& weight_,
                  const std::optional<Tensor>& mask_, const std::vector<bool>& wanted)
      : input(new_gradient(wanted[0], x, {p.batch, p.channels, p.height, p.width}, p.channels_last)),
        offset(new_gradient(wanted[1], offset_, {p.batch, 2 * p.offset_groups * p.taps(), p.out_height, p.out_width})),
        weight(new_gradient(wanted[2], weight_,
                            {p.out_channels, p.group_channels(), p.kernel_height, p.kernel_width})),
        bias(new_gradient(wanted[3], weight_, {p.out_channels})),
        mask(new_gradient(wanted[4] && mask_, mask_ ? *mask_ : offset_,
                          {p.batch, p.offset_groups * p.taps(), p.out_height, p.out_width})) {}
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all() const { return {input, offset, weight, bias, mask}; }
  // Of an empty batch.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zeroed() {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
    return all();
  }
};

}  // namespace dynconv
