// SPDX-License-Identifier: BSD-3-Clause
// CUDA backend of deform_conv2d: device, stream, layouts, workspaces, registration. Kernels: deform_conv2d_*.cu.
#include "common/cuda/call.h"
#include "common/library.h"
#include "deform_conv2d/deform_conv2d_cuda.h"
#include "deform_conv2d/deform_conv2d_params.h"

#include <device_context.h>

namespace dynconv {
namespace {

void check_sizes(const DeformConv2dParams& p) {
  check_countable({{"input.shape[0]", p.batch},
                   {"input.shape[1] * kH * kW", p.channels * p.taps()},
                   {"input.shape[2] + 2 * padding[0]", p.height + 2 * p.padding_height},
                   {"input.shape[3] + 2 * padding[1]", p.width + 2 * p.padding_width},
                   {"weight.shape[0] * kH * kW", p.out_channels * p.taps()},
                   {"dilation[0] * kH", p.dilation_height * p.kernel_height},
                   {"dilation[1] * kW", p.dilation_width * p.kernel_width},
                   {"stride[0]", p.stride_height},
                   {"stride[1]", p.stride_width}});
}

// x and w: dense tensors that hold what input and weight do.
DeformCall make_call(const DeformConv2dParams& p, const Tensor& x, const Tensor& w, const Tensor& offset,
                     const std::optional<Tensor>& mask) {
  return {p, x.const_data_ptr(), w.const_data_ptr(), offset.const_data_ptr(), const_data<void>(mask),
          storage_type_of(offset)};
}

Tensor deform_conv2d_cuda(const Tensor& input, const Tensor& offset, const Tensor& weight,
                          const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          const std::optional<Tensor>& mask, bool allow_tf32) {
  const DeformConv2dParams p = make_params(input, offset, weight, bias, stride, padding, dilation, mask);
  check_sizes(p);
  const DeviceContext context(input);
  Tensor out = new_tensor(input, {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (p.batch == 0) return out;
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  const DeformCall call = make_call(p, x, w, offset, mask);
  const Precision precision = precision_of(input, allow_tf32);
  Tensor workspace = new_workspace(input, deform_conv2d_forward_workspace(precision, p));
  check_cuda(launch_deform_conv2d_forward(precision, call, const_data<void>(b), out.mutable_data_ptr(),
                                          workspace.mutable_data_ptr(), context.stream()),
             "deform_conv2d");
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cuda(
    const Tensor& grad_out, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    const std::optional<Tensor>& mask, const std::vector<bool>& output_mask, bool allow_tf32, bool deterministic) {
  const DeformConv2dParams p = make_params(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_backward(p, grad_out, input, output_mask);
  check_sizes(p);
  const DeviceContext context(input);
  BackwardTensors grads(p, input, offset, weight, mask, output_mask);
  if (p.batch == 0) return grads.zeroed();
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const bool grad_out_channels_last = is_channels_last(grad_out);
  const Tensor g = dense(grad_out, grad_out_channels_last);
  const DeformBackwardCall call{make_call(p, x, w, offset, mask),
                                g.const_data_ptr(),
                                grad_out_channels_last,
                                {mutable_data<void>(grads.input), mutable_data<void>(grads.offset),
                                 mutable_data<void>(grads.weight), mutable_data<void>(grads.bias),
                                 mutable_data<void>(grads.mask)},
                                deterministic};
  const Precision precision = precision_of(input, allow_tf32);
  Tensor workspace = new_workspace(input, deform_conv2d_backward_workspace(precision, call));
  check_cuda(launch_deform_conv2d_backward(precision, call, workspace.numel() ? workspace.mutable_data_ptr() : nullptr,
                                           context.stream()),
             "deform_conv2d_backward");
  return grads.all();
}

}  // namespace
}  // namespace dynconv

STABLE_TORCH_LIBRARY_IMPL(DYNCONV_LIBRARY, DYNCONV_KERNEL_KEY, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dynconv::deform_conv2d_cuda));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dynconv::deform_conv2d_backward_cuda));
}
