// SPDX-License-Identifier: BSD-3-Clause
// Which kernels compute dynamic_conv2d, and its launchers. The one rule, by sizes alone:
//
//   few outputs a group (dynamic_conv2d_direct.h)   direct kernels, without tiles
//   one sample                                       its kernels are mixed first: then it is an ordinary convolution
//   few pixels a sample (is_wide)                    the depth runs over the bank: nothing is mixed
//   else                                             tiles whose kernels are mixed on the way
//
// All give the same results but for rounding.
#include "common/cuda/launch.h"
#include "common/cuda/pixel_sums.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda_conv.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda_weight.h"
#include "dynamic_conv2d/dynamic_conv2d_direct.h"

namespace dynconv {
namespace dynamic_cuda {
namespace {

// Cuts a workspace. Without memory it only adds up.
class Cutter {
 public:
  explicit Cutter(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  void* take(int64_t bytes) {
    unsigned char* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(bytes, kWorkspaceAlignment);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

// The bank that products read: the one given, or that of one kernel which a single sample's kernels were mixed to.
template <class T>
struct Bank {
  const void *weight, *bias, *mix;
  int64_t num_kernels;

  static bool is_mixed_first(const DynamicConv2dParams& p) { return p.batch == 1 && p.bank.num_kernels > 1; }

  // Does nothing but cut where memory is null.
  static cudaError_t make(Precision precision, const DynamicCall& call, bool wants_bias, Cutter* cutter, bool runs,
                          cudaStream_t stream, Bank* bank) {
    const KernelBankParams& p = call.params.bank;
    *bank = {call.weight, wants_bias ? call.bias : nullptr, call.mix, p.num_kernels};
    if (!is_mixed_first(call.params)) return cudaSuccess;
    constexpr int64_t size = sizeof(typename T::storage_t);
    void* const weight = cutter->take(p.kernel_size() * size);
    void* const bias = cutter->take(p.out_channels * size);
    void* const zero = cutter->take(sizeof(typename T::acc_t));
    void* const one = cutter->take(sizeof(typename T::acc_t));
    *bank = {weight, bank->bias == nullptr ? nullptr : bias, one, 1};
    if (!runs) return cudaSuccess;
    DYNCONV_RETURN_IF_ERROR(launch_aggregate_kernels(precision, p, call.weight, bank->bias == nullptr ? nullptr : call.bias,
                                                     call.mix, weight, bank->bias == nullptr ? nullptr : bias, stream));
    // The softmax over one kernel.
    KernelBankParams single = p;
    single.num_kernels = 1, single.softmax = true, single.temperature = 1;
    DYNCONV_RETURN_IF_ERROR(cudaMemsetAsync(zero, 0, sizeof(typename T::acc_t), stream));
    return launch_mixing_weights(precision, single, zero,
                                 sizeof(typename T::acc_t) == 8 ? StorageType::float64 : StorageType::float32, one, stream);
  }
};

template <class T>
cudaError_t forward(Precision precision, const DynamicCall& call, void* out, bool runs, Cutter* cutter,
                    cudaStream_t stream) {
  const DynamicConv2dParams& p = call.params;
  if (direct_forward(p)) return runs ? run_direct_forward<T>(call, out, stream) : cudaSuccess;
  Bank<T> bank;
  DYNCONV_RETURN_IF_ERROR(Bank<T>::make(precision, call, true, cutter, runs, stream, &bank));
  const ConvProduct product{Gather::forward(p),
                            p.batch,
                            p.group_channels(),
                            p.group_out_channels(),
                            int(p.groups),
                            call.input,
                            image_strides(p.channels, p.height, p.width, p.channels_last),
                            out,
                            image_strides(p.out_channels, p.out_height, p.out_width, p.channels_last)};
  void* const packed = cutter->take(conv_workspace<T>(product, bank.num_kernels));
  return runs ? run_conv<T>(product, bank.num_kernels, bank.weight, bank.bias, bank.mix, packed, stream) : cudaSuccess;
}

template <class T>
cudaError_t grad_input(Precision precision, const DynamicBackwardCall& call, bool runs, Cutter* cutter,
                       cudaStream_t stream) {
  const DynamicConv2dParams& p = call.forward.params;
  if (direct_grad_input(p)) return runs ? run_direct_grad_input<T>(call, stream) : cudaSuccess;
  Bank<T> bank;
  DYNCONV_RETURN_IF_ERROR(Bank<T>::make(precision, call.forward, false, cutter, runs, stream, &bank));
  const ConvProduct product{Gather::grad_input(p),
                            p.batch,
                            p.group_out_channels(),
                            p.group_channels(),
                            int(p.groups),
                            call.grad_out,
                            image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last),
                            call.gradients.input,
                            image_strides(p.channels, p.height, p.width, p.channels_last)};
  void* const packed = cutter->take(conv_workspace<T>(product, bank.num_kernels));
  return runs ? run_conv<T>(product, bank.num_kernels, bank.weight, nullptr, bank.mix, packed, stream) : cudaSuccess;
}

template <class T>
cudaError_t backward(Precision precision, const DynamicBackwardCall& call, bool runs, Cutter* cutter, cudaStream_t stream) {
  using acc_t = typename T::acc_t;
  const DynamicConv2dParams& p = call.forward.params;
  const DynamicGradients& wanted = call.gradients;
  if (wanted.input != nullptr) DYNCONV_RETURN_IF_ERROR(grad_input<T>(precision, call, runs, cutter, stream));
  const bool wants_attention = wanted.attention != nullptr;
  int64_t parts = 0;
  void* dots = nullptr;
  if (wanted.weight != nullptr || wants_attention) {
    int64_t bytes = 0;
    const bool direct = direct_weight(p);
    if (direct) bytes = direct_weight_workspace<T>(call, &parts);
    else bytes = weight_workspace<T>(call), parts = weight_dot_parts<T>(p);
    void* const sums = cutter->take(bytes);
    if (wants_attention) dots = cutter->take(parts * p.batch * p.bank.num_kernels * int64_t(sizeof(acc_t)));
    if (runs) DYNCONV_RETURN_IF_ERROR(direct ? run_direct_weight<T>(call, sums, dots, stream) : run_weight<T>(call, dots, sums, stream));
  }
  void* sums = nullptr;
  const bool needs_sums = call.forward.bias != nullptr && (wants_attention || wanted.bias != nullptr);
  if (needs_sums) sums = cutter->take(p.batch * p.out_channels * int64_t(sizeof(acc_t)));
  if (!runs || (!wants_attention && wanted.bias == nullptr)) return cudaSuccess;
  if (needs_sums)
    DYNCONV_RETURN_IF_ERROR(launch_pixel_sums<T>(
        static_cast<const typename T::storage_t*>(call.grad_out),
        image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last), p.out_pixels(),
        p.batch * p.out_pixels(), p.out_pixels(), int(p.out_channels), static_cast<acc_t*>(sums), stream));
  return launch_finish_attention(precision, p.bank, dots, parts, call.forward.bias, sums, call.forward.mix, wanted.bias,
                                 wanted.attention, call.attention_type, stream);
}

}  // namespace
}  // namespace dynamic_cuda

int64_t dynamic_conv2d_forward_workspace(Precision precision, const DynamicConv2dParams& p) {
  return dispatch_precision(precision, [&](auto types) {
    dynamic_cuda::Cutter cutter(nullptr);
    dynamic_cuda::forward<decltype(types)>(precision, {p, nullptr, nullptr, nullptr, nullptr}, nullptr, false, &cutter, nullptr);
    return cutter.used();
  });
}

cudaError_t launch_dynamic_conv2d_forward(Precision precision, const DynamicCall& call, void* out, void* workspace,
                                          cudaStream_t stream) {
  return dispatch_precision(precision, [&](auto types) {
    dynamic_cuda::Cutter cutter(workspace);
    return dynamic_cuda::forward<decltype(types)>(precision, call, out, true, &cutter, stream);
  });
}

int64_t dynamic_conv2d_backward_workspace(Precision precision, const DynamicBackwardCall& call) {
  return dispatch_precision(precision, [&](auto types) {
    dynamic_cuda::Cutter cutter(nullptr);
    dynamic_cuda::backward<decltype(types)>(precision, call, false, &cutter, nullptr);
    return cutter.used();
  });
}

cudaError_t launch_dynamic_conv2d_backward(Precision precision, const DynamicBackwardCall& call, void* workspace,
                                           cudaStream_t stream) {
  return dispatch_precision(precision, [&](auto types) {
    dynamic_cuda::Cutter cutter(workspace);
    return dynamic_cuda::backward<decltype(types)>(precision, call, true, &cutter, stream);
  });
}

}  // namespace dynconv
