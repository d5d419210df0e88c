// SPDX-License-Identifier: BSD-3-Clause
// CPU backend of aggregate_kernels and dynamic_conv2d. The kernels of all samples are never in memory at once, unless
// aggregate_kernels is asked for them.
#include "dynamic_conv2d/dynamic_conv2d_cpu.h"
#include "dynamic_conv2d/dynamic_conv2d_cpu_depthwise.h"
#include "dynamic_conv2d/dynamic_conv2d_cpu_samples.h"
#include "dynamic_conv2d/dynamic_conv2d_cpu_tiles.h"
#include "dynamic_conv2d/dynamic_conv2d_params.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>

namespace dynconv {
namespace {

template <class acc_t>
ScalarReader<acc_t> reader_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), storage_type_of(tensor)};
}
template <class acc_t>
ScalarWriter<acc_t> writer_of(Tensor& tensor) {
  return {tensor.mutable_data_ptr(), storage_type_of(tensor)};
}

// Calls f with tags of storage_t, acc_t, product_t.
template <class F>
void dispatch(const Tensor& tensor, F f) {
  dispatch_types(tensor.scalar_type(), has_native_bfloat16(), f);
}

// ------------------------------------------------------------------------------------------------- aggregate_kernels

std::tuple<Tensor, Tensor> aggregate_kernels_cpu(const Tensor& weight, const Tensor& attention,
                                                 const std::optional<Tensor>& bias,
                                                 const std::optional<double>& temperature) {
  const KernelBankParams p = make_params(weight, attention, bias, temperature);
  Tensor kernels = new_tensor(weight, {p.batch, p.out_channels, weight.size(2), weight.size(3), weight.size(4)});
  Tensor biases = new_gradient(bias.has_value(), weight, {p.batch, p.out_channels});
  if (p.batch == 0) return {kernels, biases};
  const Tensor w = dense(weight, false), a = dense(attention, false);
  const std::optional<Tensor> b = dense(bias);
  dispatch(weight, [&]<class S, class A, class P>(TypeTag<S>, TypeTag<A>, TypeTag<P>) {
    // The tensors' own type takes the place of the product's: the kernels are a result.
    const auto& k = dynamic_kernels<S, A, S>();
    const Buffer<A> mix = mixing_weights_of(p, reader_of<A>(a));
    const int64_t size = p.kernel_size();
    S* out = mutable_data<S>(kernels);
    torch::stable::parallel_for(0, ceil_div(size, kBankBlock), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t from = block * kBankBlock;
        k.mix({const_data<S>(w) + from, p.num_kernels, size, 1, size, std::min(kBankBlock, size - from)}, mix.data(),
              p.batch, out + from, size, 0);
      }
    });
    for (int64_t n = 0; b && n < p.batch; ++n)
      mix_bias(p, const_data<S>(b), mix.data() + n * p.num_kernels, mutable_data<S>(biases) + n * p.out_channels);
  });
  return {kernels, biases};
}

std::tuple<Tensor, Tensor, Tensor> aggregate_kernels_backward_cpu(
    const Tensor& grad_kernels, const std::optional<Tensor>& grad_biases, const Tensor& weight, const Tensor& attention,
    const std::optional<Tensor>& bias, const std::optional<double>& temperature, const std::vector<bool>& output_mask) {
  const KernelBankParams p = make_params(weight, attention, bias, temperature);
  check_backward(grad_kernels, grad_biases, weight, bias, p, output_mask);
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
  const Tensor g = dense(grad_kernels, false), w = dense(weight, false), a = dense(attention, false);
  const std::optional<Tensor> gb = dense(grad_biases), b = dense(bias);
  dispatch(weight, [&]<class S, class A, class P>(TypeTag<S>, TypeTag<A>, TypeTag<P>) {
    const auto& k = dynamic_kernels<S, A, S>();
    const Buffer<A> mix = mixing_weights_of(p, reader_of<A>(a));
    const int64_t size = p.kernel_size(), blocks = ceil_div(size, kBankBlock);
    GradBank<S, A> grad_bank(mutable_data<S>(grad_weight), p.num_kernels * size);
    Buffer<A> grad_mix(output_mask[1] ? p.batch * p.num_kernels : 0);
    grad_mix.zero();
    BlockDots<A> dots(output_mask[1], blocks, p.batch * p.num_kernels);
    if (output_mask[0] || output_mask[1])
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        Buffer<A> lanes(output_mask[1] ? p.batch * p.num_kernels * k.lanes : 0);
        lanes.zero();
        for (int64_t block = begin; block < end; ++block) {
          const int64_t from = block * kBankBlock, length = std::min(kBankBlock, size - from);
          A* sums = grad_bank.sums() ? grad_bank.sums() + from : nullptr;
          k.unmix({const_data<S>(w) + from, p.num_kernels, size, 1, size, length}, const_data<S>(g) + from, size, 0,
                  mix.data(), p.batch, {sums, size, size}, false, lanes.data());
          if (output_mask[1]) k.add_lanes(lanes.data(), p.batch * p.num_kernels, dots.of(block));
          for (int64_t j = 0; sums && j < p.num_kernels; ++j)
            grad_bank.finish(k.from_acc, j * size + from, j * size + from + length);
        }
      });
    dots.add_to(grad_mix.data(), p.batch * p.num_kernels);
    if (gb)
      unmix_bias(p, const_data<S>(b), mix.data(), const_data<S>(gb), grad_mix.data(), mutable_data<S>(grad_bias));
    if (output_mask[1]) write_grad_attention(p, mix.data(), grad_mix.data(), writer_of<A>(grad_attention));
  });
  return {grad_weight, grad_attention, grad_bias};
}

// ---------------------------------------------------------------------------------------------------- dynamic_conv2d

enum class Way { depthwise, tiles, samples };

// How to compute: channels side by side where each has its own kernel, by tiles elsewhere, sample by sample where tiles
// don't fit. The environment variable DYNCONV_DYNAMIC_CONV2D=depthwise|tiles|samples decides instead where several can: for
// tests and measurements.
Way way_of(const DynamicConv2dParams& p) {
  const char* const value = std::getenv("DYNCONV_DYNAMIC_CONV2D");
  const std::string wish = value == nullptr ? "" : value;
  if (!wish.empty() && wish != "depthwise" && wish != "tiles" && wish != "samples")
    fail("DYNCONV_DYNAMIC_CONV2D: got ", wish, ", expected depthwise, tiles or samples");
  if (wish == "samples") return Way::samples;
  if (depthwise_fits(p) && wish != "tiles") return Way::depthwise;
  return tiles_fit(p) ? Way::tiles : Way::samples;
}

// Calls f with the tiles: of bfloat16 itself where the CPU multiplies it, of acc_t elsewhere.
template <class S, class A, class F>
void with_tiles(const DynamicConv2dParams& p, const DynamicTensors<S>& tensors, const A* mix, F f) {
  if constexpr (std::is_same_v<S, bfloat16>)
    if (bfloat16_level() != Bfloat16Level::none) return f(DynamicTiles<S, A, S>(p, tensors, mix));
  f(DynamicTiles<S, A, A>(p, tensors, mix));
}

Tensor dynamic_conv2d_cpu(const Tensor& input, const Tensor& weight, const Tensor& attention,
                          const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                          const std::optional<double>& temperature, bool /*allow_tf32*/) {
  const DynamicConv2dParams p =
      make_params(input, weight, attention, bias, stride, padding, dilation, groups, temperature);
  Tensor out = new_tensor(input, {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (p.batch == 0) return out;
  const Tensor x = dense(input, p.channels_last), w = dense(weight, false), a = dense(attention, false);
  const std::optional<Tensor> b = dense(bias);
  dispatch(input, [&]<class S, class A, class P>(TypeTag<S>, TypeTag<A>, TypeTag<P>) {
    const Buffer<A> mix = mixing_weights_of(p.bank, reader_of<A>(a));
    const DynamicTensors<S> tensors{const_data<S>(x), const_data<S>(w), const_data<S>(b), nullptr, false};
    const Way way = way_of(p);
    if (way == Way::depthwise) DynamicDepthwise<S, A>(p, tensors, mix.data()).forward(mutable_data<S>(out));
    else if (way == Way::tiles)
      with_tiles<S, A>(p, tensors, mix.data(), [&](auto tiles) { tiles.forward(mutable_data<S>(out)); });
    else DynamicSamples<S, A, P>(p, tensors, mix.data()).forward(mutable_data<S>(out));
  });
  return out;
}

// At stride 1 the gradient of input is itself a dynamic convolution, of grad_out with the kernels turned round: as tiles
// it needs no sums over overlapping columns. This is its geometry.
DynamicConv2dParams grad_input_params(const DynamicConv2dParams& p) {
  DynamicConv2dParams q = p;
  q.channels = p.out_channels, q.height = p.out_height, q.width = p.out_width;
  q.out_channels = p.channels, q.out_height = p.height, q.out_width = p.width;
  q.padding_height = p.dilation_height * (p.kernel_height - 1) - p.padding_height;
  q.padding_width = p.dilation_width * (p.kernel_width - 1) - p.padding_width;
  q.bank.out_channels = p.channels, q.bank.row = p.group_out_channels() * p.taps();
  return q;
}

// Whether it is that, and is worth turning the bank round.
bool grad_input_is_convolution(const DynamicConv2dParams& p, const DynamicConv2dParams& q) {
  return p.stride_height == 1 && p.stride_width == 1 && q.padding_height >= 0 && q.padding_width >= 0 && tiles_fit(q) &&
         p.bank.num_kernels * p.group_out_channels() <= p.batch * p.out_pixels();
}

// (K, O, C / G, kH, kW) -> (K, C, O / G, kH, kW), taps in reverse order.
template <class S>
Buffer<S> turned_bank(const DynamicConv2dParams& p, const S* weight) {
  const int64_t taps = p.taps(), channels = p.group_channels(), outs = p.group_out_channels();
  Buffer<S> turned(p.bank.num_kernels * p.bank.kernel_size());
  torch::stable::parallel_for(0, p.bank.num_kernels * p.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t kernel = i / p.channels, group = i % p.channels / channels, channel = i % channels;
      const S* from = weight + ((kernel * p.out_channels + group * outs) * channels + channel) * taps;
      S* to = turned.data() + i * outs * taps;
      for (int64_t o = 0; o < outs; ++o, from += channels * taps, to += taps) std::reverse_copy(from, from + taps, to);
    }
  });
  return turned;
}

// (N, O): sums of grad_out over pixels.
template <class S, class A>
Buffer<A> pixel_sums(const DynamicConv2dParams& p, const DynamicTensors<S>& t) {
  const auto& k = dynamic_kernels<S, A, S>();
  Buffer<A> sums(p.batch * p.out_channels);
  sums.zero();
  const int64_t pixels = p.out_pixels();
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const S* grad = t.grad_out + n * p.out_channels * pixels;
      A* sum = sums.data() + n * p.out_channels;
      if (t.grad_out_channels_last)
        for (int64_t i = 0; i < pixels; ++i) k.add_row(grad + i * p.out_channels, sum, p.out_channels);
      else
        for (int64_t o = 0; o < p.out_channels; ++o) sum[o] = k.sum_row(grad + o * pixels, pixels);
    }
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_conv2d_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& attention,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, const std::optional<double>& temperature,
    const std::vector<bool>& output_mask, bool /*allow_tf32*/) {
  const DynamicConv2dParams p =
      make_params(input, weight, attention, bias, stride, padding, dilation, groups, temperature);
  check_backward(grad_out, input, p, output_mask);
  const bool want_attention = output_mask[2], want_bias = output_mask[3] && bias;
  DynamicBackwardTensors grads(p, input, weight, attention, bias.has_value(), output_mask);
  if (p.batch == 0) return grads.zeroed();
  const bool grad_channels_last = is_channels_last(grad_out);
  const Tensor g = dense(grad_out, grad_channels_last), x = dense(input, p.channels_last), w = dense(weight, false),
               a = dense(attention, false);
  const std::optional<Tensor> b = dense(bias);
  dispatch(input, [&]<class S, class A, class P>(TypeTag<S>, TypeTag<A>, TypeTag<P>) {
    const Buffer<A> mix = mixing_weights_of(p.bank, reader_of<A>(a));
    const DynamicTensors<S> tensors{const_data<S>(x), const_data<S>(w), const_data<S>(b), const_data<S>(g),
                                    grad_channels_last};
    Buffer<A> grad_mix(want_attention ? p.batch * p.bank.num_kernels : 0);
    grad_mix.zero();
    DynamicGradients<S, A> wanted{mutable_data<S>(grads.input), mutable_data<S>(grads.weight),
                                  mutable_data<S>(grads.bias), grad_mix.data()};
    const Way way = way_of(p);
    const DynamicConv2dParams q = grad_input_params(p);
    if (wanted.input && way == Way::tiles && grad_input_is_convolution(p, q)) {
      const Tensor image = with_layout(g, p.channels_last);
      const Buffer<S> turned = turned_bank(p, const_data<S>(w));
      const DynamicTensors<S> convolved{const_data<S>(image), turned.data(), nullptr, nullptr, false};
      with_tiles<S, A>(q, convolved, mix.data(), [&](auto tiles) { tiles.forward(wanted.input); });
      wanted.input = nullptr;
    }
    if (way == Way::depthwise) DynamicDepthwise<S, A>(p, tensors, mix.data()).backward(wanted);
    else if (way == Way::tiles) with_tiles<S, A>(p, tensors, mix.data(), [&](auto tiles) { tiles.backward(wanted); });
    else DynamicSamples<S, A, P>(p, tensors, mix.data()).backward(wanted);
    if (b && (want_bias || want_attention)) {
      const Buffer<A> sums = pixel_sums<S, A>(p, tensors);
      unmix_bias(p.bank, tensors.bias, mix.data(), sums.data(), wanted.mix, wanted.bias);
    }
    if (want_attention) write_grad_attention(p.bank, mix.data(), grad_mix.data(), writer_of<A>(grads.attention));
  });
  return grads.all();
}

}  // namespace
}  // namespace dynconv

STABLE_TORCH_LIBRARY_IMPL(dynconv_ext, CPU, m) {
  m.impl("aggregate_kernels", TORCH_BOX(&dynconv::aggregate_kernels_cpu));
  m.impl("aggregate_kernels_backward", TORCH_BOX(&dynconv::aggregate_kernels_backward_cpu));
  m.impl("dynamic_conv2d", TORCH_BOX(&dynconv::dynamic_conv2d_cpu));
  m.impl("dynamic_conv2d_backward", TORCH_BOX(&dynconv::dynamic_conv2d_backward_cpu));
}
