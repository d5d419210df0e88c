// SPDX-License-Identifier: BSD-3-Clause
// CUDA backend of aggregate_kernels and dynamic_conv2d: device, stream, layouts, workspaces, registration. Kernels:
// dynamic_conv2d_*.cu. The kernels of all samples are never in memory at once, unless aggregate_kernels is asked for
// them.
#include "common/cuda/call.h"
#include "common/library.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda.h"
#include "dynamic_conv2d/dynamic_conv2d_params.h"

#include <device_context.h>

#include <cstdlib>
#include <string>
#include <tuple>

namespace dynconv {
namespace {

void check_sizes(const KernelBankParams& p) {
  check_countable({{"attention.shape[0]", p.batch},
                   {"weight.shape[0]", p.num_kernels},
                   {"weight.shape[1]", p.out_channels},
                   {"weight.shape[2] * kH * kW", p.row}});
}

void check_sizes(const DynamicConv2dParams& p) {
  check_sizes(p.bank);
  check_countable({{"input.shape[1] * kH * kW", p.channels * p.taps()},
                   {"weight.shape[1] * kH * kW", p.out_channels * p.taps()},
                   {"input.shape[2] + 2 * padding[0]", p.height + 2 * p.padding_height},
                   {"input.shape[3] + 2 * padding[1]", p.width + 2 * p.padding_width},
                   {"input.shape[2] * input.shape[3]", p.in_pixels()},
                   {"output height * output width", p.out_pixels()},
                   {"dilation[0] * kH", p.dilation_height * p.kernel_height},
                   {"dilation[1] * kW", p.dilation_width * p.kernel_width},
                   {"stride[0]", p.stride_height},
                   {"stride[1]", p.stride_width}});
}

// (N, K), of the type that sums have.
Tensor mixing_weights(Precision precision, const KernelBankParams& p, const Tensor& attention, const DeviceContext& context) {
  const Tensor a = torch::stable::contiguous(attention);
  Tensor mix = new_workspace(attention, p.batch * p.num_kernels * (precision == Precision::float64 ? 8 : 4));
  check_cuda(launch_mixing_weights(precision, p, a.const_data_ptr(), storage_type_of(attention), mix.mutable_data_ptr(),
                                   context.stream()),
             "dynamic_conv2d");
  return mix;
}

// The environment variable DYNCONV_DYNAMIC_CONV2D_CUDA=direct|mixed_first|mixed|wide decides where several ways can be:
// for tests and measurements.
DynamicWay wished_way() {
  const char* const wish = std::getenv("DYNCONV_DYNAMIC_CONV2D_CUDA");
  if (wish == nullptr || *wish == '\0') return DynamicWay::automatic;
  const std::string name = wish;
  if (name == "direct") return DynamicWay::direct;
  if (name == "mixed_first") return DynamicWay::mixed_first;
  if (name == "mixed") return DynamicWay::mixed;
  if (name == "wide") return DynamicWay::wide;
  fail("DYNCONV_DYNAMIC_CONV2D_CUDA: got ", name, ", expected direct, mixed_first, mixed or wide");
}

void* workspace_data(Tensor& workspace) { return workspace.numel() ? workspace.mutable_data_ptr() : nullptr; }

// ------------------------------------------------------------------------------------------------- aggregate_kernels

std::tuple<Tensor, Tensor> aggregate_kernels_cuda(const Tensor& weight, const Tensor& attention,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<double>& temperature) {
  const KernelBankParams p = make_params(weight, attention, bias, temperature);
  check_sizes(p);
  const DeviceContext context(weight);
  Tensor kernels = new_tensor(weight, {p.batch, p.out_channels, weight.size(2), weight.size(3), weight.size(4)});
  Tensor biases = new_gradient(bias.has_value(), weight, {p.batch, p.out_channels});
  if (p.batch == 0) return {kernels, biases};
  const Tensor w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  const Precision precision = precision_of(weight, false);
  const Tensor mix = mixing_weights(precision, p, attention, context);
  check_cuda(launch_aggregate_kernels(precision, p, w.const_data_ptr(), const_data<void>(b), mix.const_data_ptr(),
                                      kernels.mutable_data_ptr(), mutable_data<void>(biases), context.stream()),
             "aggregate_kernels");
  return {kernels, biases};
}

std::tuple<Tensor, Tensor, Tensor> aggregate_kernels_backward_cuda(
    const Tensor& grad_kernels, const std::optional<Tensor>& grad_biases, const Tensor& weight, const Tensor& attention,
    const std::optional<Tensor>& bias, const std::optional<double>& temperature, const std::vector<bool>& output_mask) {
  const KernelBankParams p = make_params(weight, attention, bias, temperature);
  check_backward(grad_kernels, grad_biases, weight, bias, p, output_mask);
  check_sizes(p);
  const DeviceContext context(weight);
  Tensor grad_weight = new_gradient(output_mask[0], weight,
                                    {p.num_kernels, p.out_channels, weight.size(2), weight.size(3), weight.size(4)});
  Tensor grad_attention = new_gradient(output_mask[1], attention, {p.batch, p.num_kernels});
  const bool want_bias = output_mask[2] && bias;
  Tensor grad_bias = new_gradient(want_bias, weight, {p.num_kernels, p.out_channels});
  if (p.batch == 0 || (want_bias && !grad_biases)) torch::stable::zero_(grad_bias);
  if (p.batch == 0) {
    torch::stable::zero_(grad_weight);
    return {grad_weight, grad_attention, grad_bias};
  }
  const Tensor g = torch::stable::contiguous(grad_kernels), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> gb = dense(grad_biases), b = dense(bias);
  const Precision precision = precision_of(weight, false);
  const Tensor mix = mixing_weights(precision, p, attention, context);
  Tensor workspace = new_workspace(weight, aggregate_kernels_backward_workspace(precision, p, output_mask[1]));
  check_cuda(launch_aggregate_kernels_backward(
                 precision, p, g.const_data_ptr(), const_data<void>(gb), w.const_data_ptr(), const_data<void>(b),
                 mix.const_data_ptr(), mutable_data<void>(grad_weight),
                 grad_biases ? mutable_data<void>(grad_bias) : nullptr, mutable_data<void>(grad_attention),
                 storage_type_of(attention), workspace_data(workspace), context.stream()),
             "aggregate_kernels_backward");
  return {grad_weight, grad_attention, grad_bias};
}

// ---------------------------------------------------------------------------------------------------- dynamic_conv2d

Tensor dynamic_conv2d_cuda(const Tensor& input, const Tensor& weight, const Tensor& attention,
                           const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                           const std::optional<double>& temperature, bool allow_tf32) {
  const DynamicConv2dParams p =
      make_params(input, weight, attention, bias, stride, padding, dilation, groups, temperature);
  check_sizes(p);
  const DeviceContext context(input);
  Tensor out = new_tensor(input, {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (p.batch == 0) return out;
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  const Precision precision = precision_of(input, allow_tf32);
  const Tensor mix = mixing_weights(precision, p.bank, attention, context);
  const DynamicCall call{p, wished_way(), x.const_data_ptr(), w.const_data_ptr(), const_data<void>(b), mix.const_data_ptr()};
  Tensor workspace = new_workspace(input, dynamic_conv2d_forward_workspace(precision, call));
  check_cuda(launch_dynamic_conv2d_forward(precision, call, out.mutable_data_ptr(), workspace_data(workspace),
                                           context.stream()),
             "dynamic_conv2d");
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_conv2d_backward_cuda(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& attention,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, const std::optional<double>& temperature,
    const std::vector<bool>& output_mask, bool allow_tf32) {
  const DynamicConv2dParams p =
      make_params(input, weight, attention, bias, stride, padding, dilation, groups, temperature);
  check_backward(grad_out, input, p, output_mask);
  check_sizes(p);
  const DeviceContext context(input);
  DynamicBackwardTensors grads(p, input, weight, attention, bias.has_value(), output_mask);
  if (p.batch == 0) return grads.zeroed();
  const bool grad_out_channels_last = is_channels_last(grad_out);
  const Tensor g = dense(grad_out, grad_out_channels_last), x = dense(input, p.channels_last),
               w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  const Precision precision = precision_of(input, allow_tf32);
  const Tensor mix = mixing_weights(precision, p.bank, attention, context);
  const DynamicBackwardCall call{{p, wished_way(), x.const_data_ptr(), w.const_data_ptr(), const_data<void>(b),
                                  mix.const_data_ptr()},
                                 g.const_data_ptr(),
                                 grad_out_channels_last,
                                 {mutable_data<void>(grads.input), mutable_data<void>(grads.weight),
                                  mutable_data<void>(grads.attention), mutable_data<void>(grads.bias)},
                                 storage_type_of(attention)};
  Tensor workspace = new_workspace(input, dynamic_conv2d_backward_workspace(precision, call));
  check_cuda(launch_dynamic_conv2d_backward(precision, call, workspace_data(workspace), context.stream()),
             "dynamic_conv2d_backward");
  return grads.all();
}

}  // namespace
}  // namespace dynconv

STABLE_TORCH_LIBRARY_IMPL(DYNCONV_LIBRARY, DYNCONV_KERNEL_KEY, m) {
  m.impl("aggregate_kernels", TORCH_BOX(&dynconv::aggregate_kernels_cuda));
  m.impl("aggregate_kernels_backward", TORCH_BOX(&dynconv::aggregate_kernels_backward_cuda));
  m.impl("dynamic_conv2d", TORCH_BOX(&dynconv::dynamic_conv2d_cuda));
  m.impl("dynamic_conv2d_backward", TORCH_BOX(&dynconv::dynamic_conv2d_backward_cuda));
}
