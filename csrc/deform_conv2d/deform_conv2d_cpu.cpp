// SPDX-License-Identifier: BSD-3-Clause
// CPU backend of deform_conv2d: chooses the instruction set and the types, and registers the operators.
#include "common/cpu_level.h"
#include "common/dispatch.h"
#include "common/host_device.h"
#include "deform_conv2d/deform_conv2d_cpu_backward.h"
#include "deform_conv2d/deform_conv2d_cpu_forward.h"
#include "deform_conv2d/deform_conv2d_params.h"

#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DYNCONV_KERNELS "deform_conv2d/deform_conv2d_cpu_kernels.h"
#include "common/foreach_cpu_level.h"

namespace dynconv {
namespace deform {

template <class storage_t, class acc_t, class gemm_t>
const DeformKernels<storage_t, acc_t, gemm_t>& kernels() {
  static const auto chosen = [] {
#if defined(__x86_64__)
    if (cpu_level() == CpuLevel::avx512) return avx512::deform_kernels<storage_t, acc_t, gemm_t>();
    if (cpu_level() == CpuLevel::avx2) return avx2::deform_kernels<storage_t, acc_t, gemm_t>();
#endif
    return baseline::deform_kernels<storage_t, acc_t, gemm_t>();
  }();
  return chosen;
}

}  // namespace deform

namespace {

template <class acc_t>
ScalarReader<acc_t> reader(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, StorageType::float32};
  return {tensor->const_data_ptr(), storage_type_of(*tensor)};
}
template <class acc_t>
ScalarWriter<acc_t> writer(Tensor& tensor) {
  return {tensor.numel() ? tensor.mutable_data_ptr() : nullptr, storage_type_of(tensor)};
}

Tensor deform_conv2d_cpu(const Tensor& input, const Tensor& offset, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         const std::optional<Tensor>& mask) {
  const DeformConv2dParams p = make_params(input, offset, weight, bias, stride, padding, dilation, mask);
  Tensor out = new_tensor(input, {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (p.batch == 0) return out;
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  dispatch_types(input.scalar_type(), [&](auto storage, auto acc, auto product) {
    using storage_t = typename decltype(storage)::type;
    using acc_t = typename decltype(acc)::type;
    using gemm_t = typename decltype(product)::type;
    deform::DeformForward<storage_t, acc_t, gemm_t> call(p, const_data<storage_t>(x),
                                                 reader<acc_t>(offset), reader<acc_t>(mask),
                                                 const_data<storage_t>(w));
    call.run(const_data<storage_t>(b), static_cast<storage_t*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    const std::optional<Tensor>& mask, const std::vector<bool>& output_mask) {
  const DeformConv2dParams p = make_params(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_dim("grad_out", grad_out, 4, "(N, O, Ho, Wo)");
  check_same_dtype("grad_out", grad_out, input);
  check_same_device("grad_out", grad_out, input);
  check_equal("grad_out.shape[0]", grad_out.size(0), "input.shape[0]", p.batch);
  check_equal("grad_out.shape[1]", grad_out.size(1), "weight.shape[0]", p.out_channels);
  check_equal("grad_out.shape[2]", grad_out.size(2), "output height", p.out_height);
  check_equal("grad_out.shape[3]", grad_out.size(3), "output width", p.out_width);
  if (output_mask.size() != 5) fail("output_mask: got ", output_mask.size(), " values, expected 5");
  const int64_t taps = p.taps();
  Tensor grad_input = new_gradient(output_mask[0], input, {p.batch, p.channels, p.height, p.width}, p.channels_last);
  Tensor grad_offset =
      new_gradient(output_mask[1], offset, {p.batch, 2 * p.offset_groups * taps, p.out_height, p.out_width});
  Tensor grad_weight =
      new_gradient(output_mask[2], weight, {p.out_channels, p.group_channels(), p.kernel_height, p.kernel_width});
  Tensor grad_bias = new_gradient(output_mask[3], weight, {p.out_channels});
  Tensor grad_mask = new_gradient(output_mask[4] && mask, mask ? *mask : offset,
                            {p.batch, p.offset_groups * taps, p.out_height, p.out_width});
  if (p.batch == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
  }
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const bool grad_channels_last = is_channels_last(grad_out);
  const Tensor g = dense(grad_out, grad_channels_last);
  dispatch_types(input.scalar_type(), [&](auto storage, auto acc, auto product) {
    using storage_t = typename decltype(storage)::type;
    using acc_t = typename decltype(acc)::type;
    using gemm_t = typename decltype(product)::type;
    deform::DeformBackward<storage_t, acc_t, gemm_t> call(p, const_data<storage_t>(x),
                                                  reader<acc_t>(offset), reader<acc_t>(mask),
                                                  const_data<storage_t>(w));
    deform::DeformGradients<storage_t, acc_t> gradients{mutable_data<storage_t>(grad_input), writer<acc_t>(grad_offset),
                                                writer<acc_t>(grad_mask), mutable_data<storage_t>(grad_weight), mutable_data<storage_t>(grad_bias)};
    call.run(const_data<storage_t>(g), grad_channels_last, gradients);
  });
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace
}  // namespace dynconv

STABLE_TORCH_LIBRARY_IMPL(dynconv_ext, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dynconv::deform_conv2d_cpu));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dynconv::deform_conv2d_backward_cpu));
}
