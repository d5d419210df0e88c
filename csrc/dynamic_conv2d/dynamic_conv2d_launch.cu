// SPDX-License-Identifier: BSD-3-Clause
// Which kernels compute dynamic_conv2d, and its launchers. The one rule, by sizes alone:
//
//   direct       few results a group (dynamic_conv2d_direct.h): without tiles
//   mixed_first  one sample: its kernels are mixed first, and the rest is an ordinary convolution
//   wide         few pixels a sample: the depth runs over the bank, nothing is mixed
//   mixed        else: tiles whose kernels are mixed on the way
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

// direct: whether direct kernels can be; pixels: of a sample in the result.
DynamicWay way_of(const DynamicCall& call, bool direct, int64_t pixels) {
  const DynamicConv2dParams& p = call.params;
  const bool first = p.batch == 1 && p.bank.num_kernels > 1;
  const DynamicWay wish = call.way;
  if (wish == DynamicWay::mixed || wish == DynamicWay::wide || (wish == DynamicWay::mixed_first && first) ||
      (wish == DynamicWay::direct && direct))
    return wish;
  if (direct) return DynamicWay::direct;
  if (first) return DynamicWay::mixed_first;
  // Of a tile, a sample's rows are at least 64, and mixing for them costs about as much as another 64.
  return pixels * p.bank.num_kernels <= 128 ? DynamicWay::wide : DynamicWay::mixed;
}
bool weight_is_direct(const DynamicCall& call) {
  const bool wishes_tiles = call.way == DynamicWay::mixed || call.way == DynamicWay::wide;
  return direct_weight(call.params) && !wishes_tiles;
}

// The bank that a product reads, and its mixing weights: those given, or one kernel, mixed first, with weight 1.
struct Bank {
  const void *weight, *bias, *mix;
  int64_t num_kernels;
};

template <class T>
cudaError_t mix_first(Precision precision, const DynamicCall& call, const void* bias, bool runs, Cutter* cutter,
                      cudaStream_t stream, Bank* bank) {
  const KernelBankParams& p = call.params.bank;
  constexpr int64_t size = sizeof(typename T::storage_t), acc_size = sizeof(typename T::acc_t);
  void* const weight = cutter->take(p.kernel_size() * size);
  void* const mixed_bias = bias != nullptr ? cutter->take(p.out_channels * size) : nullptr;
  void* const zero = cutter->take(acc_size);
  void* const one = cutter->take(acc_size);
  *bank = {weight, mixed_bias, one, 1};
  if (!runs) return cudaSuccess;
  DYNCONV_RETURN_IF_ERROR(launch_aggregate_kernels(precision, p, call.weight, bias, call.mix, weight, mixed_bias, stream));
  // The softmax over one kernel.
  KernelBankParams single = p;
  single.num_kernels = 1, single.softmax = true, single.temperature = 1;
  DYNCONV_RETURN_IF_ERROR(cudaMemsetAsync(zero, 0, size_t(acc_size), stream));
  return launch_mixing_weights(precision, single, zero, acc_size == 8 ? StorageType::float64 : StorageType::float32, one,
                               stream);
}

template <class T>
cudaError_t tiled(Precision precision, const DynamicCall& call, const void* bias, DynamicWay way, ConvProduct product,
                  bool runs, Cutter* cutter, cudaStream_t stream) {
  Bank bank{call.weight, bias, call.mix, call.params.bank.num_kernels};
  if (way == DynamicWay::mixed_first) DYNCONV_RETURN_IF_ERROR(mix_first<T>(precision, call, bias, runs, cutter, stream, &bank));
  product.wide = way == DynamicWay::wide;
  void* const packed = cutter->take(conv_workspace<T>(product, bank.num_kernels));
  return runs ? run_conv<T>(product, bank.num_kernels, bank.weight, bank.bias, bank.mix, packed, stream) : cudaSuccess;
}

template <class T>
cudaError_t forward(Precision precision, const DynamicCall& call, void* out, bool runs, Cutter* cutter,
                    cudaStream_t stream) {
  const DynamicConv2dParams& p = call.params;
  const DynamicWay way = way_of(call, direct_forward(p), p.out_pixels());
  if (way == DynamicWay::direct) return runs ? run_direct_forward<T>(call, out, stream) : cudaSuccess;
  const ConvProduct product{Gather::forward(p),
                            p.batch,
                            p.group_channels(),
                            p.group_out_channels(),
                            int(p.groups),
                            call.input,
                            image_strides(p.channels, p.height, p.width, p.channels_last),
                            out,
                            image_strides(p.out_channels, p.out_height, p.out_width, p.channels_last),
                            false};
  return tiled<T>(precision, call, call.bias, way, product, runs, cutter, stream);
}

template <class T>
cudaError_t grad_input(Precision precision, const DynamicBackwardCall& call, bool runs, Cutter* cutter,
                       cudaStream_t stream) {
  const DynamicConv2dParams& p = call.forward.params;
  const DynamicWay way = way_of(call.forward, direct_grad_input(p), p.in_pixels());
  if (way == DynamicWay::direct) return runs ? run_direct_grad_input<T>(call, stream) : cudaSuccess;
  const ConvProduct product{Gather::grad_input(p),
                            p.batch,
                            p.group_out_channels(),
                            p.group_channels(),
                            int(p.groups),
                            call.grad_out,
                            image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last),
                            call.gradients.input,
                            image_strides(p.channels, p.height, p.width, p.channels_last),
                            false};
  return tiled<T>(precision, call.forward, nullptr, way, product, runs, cutter, stream);
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
    const bool direct = weight_is_direct(call.forward);
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

int64_t dynamic_conv2d_forward_workspace(Precision precision, const DynamicCall& call) {
  return dispatch_precision(precision, [&](auto types) {
    dynamic_cuda::Cutter cutter(nullptr);
    dynamic_cuda::forward<decltype(types)>(precision, call, nullptr, false, &cutter, nullptr);
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
