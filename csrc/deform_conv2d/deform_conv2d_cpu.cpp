// SPDX-License-Identifier: BSD-3-Clause
// CPU backend of deform_conv2d: chooses the instruction set and the types, and registers the operators.
#include "common/cpu_level.h"
#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/library.h"
#include "deform_conv2d/deform_conv2d_cpu_backward.h"
#include "deform_conv2d/deform_conv2d_cpu_forward.h"
#include "deform_conv2d/deform_conv2d_params.h"

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
    if constexpr (!std::is_same_v<gemm_t, acc_t>) return avx512_bf16::deform_kernels<storage_t, acc_t, gemm_t>();
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
                         const std::optional<Tensor>& mask, bool /*allow_tf32*/) {
  const DeformConv2dParams p = make_params(input, offset, weight, bias, stride, padding, dilation, mask);
  Tensor out = new_tensor(input, {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (p.batch == 0) return out;
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  dispatch_types(input.scalar_type(), bfloat16_level() != Bfloat16Level::none, [&](auto storage, auto acc, auto gemm) {
    using storage_t = typename decltype(storage)::type;
    using acc_t = typename decltype(acc)::type;
    using gemm_t = typename decltype(gemm)::type;
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
    const std::optional<Tensor>& mask, const std::vector<bool>& output_mask, bool /*allow_tf32*/,
    bool /*deterministic*/) {
  const DeformConv2dParams p = make_params(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_backward(p, grad_out, input, output_mask);
  BackwardTensors grads(p, input, offset, weight, mask, output_mask);
  if (p.batch == 0) return grads.zeroed();
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const bool grad_channels_last = is_channels_last(grad_out);
  const Tensor g = dense(grad_out, grad_channels_last);
  dispatch_types(input.scalar_type(), bfloat16_level() != Bfloat16Level::none, [&](auto storage, auto acc, auto gemm) {
    using storage_t = typename decltype(storage)::type;
    using acc_t = typename decltype(acc)::type;
    using gemm_t = typename decltype(gemm)::type;
    deform::DeformBackward<storage_t, acc_t, gemm_t> call(p, const_data<storage_t>(x),
                                                  reader<acc_t>(offset), reader<acc_t>(mask),
                                                  const_data<storage_t>(w));
    deform::DeformGradients<storage_t, acc_t> gradients{
        mutable_data<storage_t>(grads.input), writer<acc_t>(grads.offset), writer<acc_t>(grads.mask),
        mutable_data<storage_t>(grads.weight), mutable_data<storage_t>(grads.bias)};
    call.run(const_data<storage_t>(g), grad_channels_last, gradients);
  });
  return grads.all();
}

}  // namespace
}  // namespace dynconv

STABLE_TORCH_LIBRARY_IMPL(DYNCONV_LIBRARY, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dynconv::deform_conv2d_cpu));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dynconv::deform_conv2d_backward_cpu));
}
