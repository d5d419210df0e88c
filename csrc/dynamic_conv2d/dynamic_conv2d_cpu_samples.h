// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d on the CPU, sample by sample: a sample's kernel is mixed into scratch memory, and torch convolves that one
// sample with it, on all threads. For the geometries that tiles don't take: very large kernels, and images so large that
// one of them keeps all threads busy.
//
// One sample after the other, never side by side inside parallel_for: oneDNN plans a convolution for as many threads as
// there are, has one inside parallel_for, and leaves the rest of a weight gradient undone.
#pragma once

#include "common/convolution.h"
#include "dynamic_conv2d/dynamic_conv2d_cpu.h"

namespace dynconv {

template <class storage_t, class acc_t, class product_t>
class DynamicSamples {
 public:
  DynamicSamples(const DynamicConv2dParams& params, const DynamicTensors<storage_t>& tensors, const acc_t* mix)
      : p(params),
        t(tensors),
        k(dynamic_kernels<storage_t, acc_t, product_t>()),
        mix_(mix),
        geometry_{{params.stride_height, params.stride_width},
                  {params.padding_height, params.padding_width},
                  {params.dilation_height, params.dilation_width},
                  params.groups} {}

  void forward(storage_t* out) {
    for (int64_t n = 0; n < p.batch; ++n) {
      const Tensor kernel = mixed(n);
      Tensor bias;
      if (t.bias) {
        if (!bias_.size()) bias_ = Buffer<product_t>(p.out_channels);
        mix_bias(p.bank, t.bias, mix_ + n * p.bank.num_kernels, bias_.data());
        bias = tensor_of(bias_.data(), std::array{p.out_channels}, std::array<int64_t, 1>{1});
      }
      write(convolution(input(n), kernel, t.bias ? &bias : nullptr, geometry_), out + n * out_size());
    }
  }

  void backward(const DynamicGradients<storage_t, acc_t>& wanted) {
    const bool want_kernel = wanted.weight || wanted.mix;
    if (!wanted.input && !want_kernel) return;
    const int64_t size = p.bank.kernel_size(), blocks = ceil_div(size, kBankBlock), kernels = p.bank.num_kernels;
    GradBank<storage_t, acc_t> grad_bank(wanted.weight, kernels * size);
    BlockDots<acc_t> dots(wanted.mix != nullptr, blocks, kernels);
    for (int64_t n = 0; n < p.batch; ++n) {
      const Tensor kernel = wanted.input ? mixed(n) : unmixed();
      const auto [grad_input, grad_kernel] =
          convolution_backward(grad_out(n), input(n), kernel, geometry_, wanted.input, want_kernel);
      if (wanted.input) write(grad_input, wanted.input + n * in_size());
      if (!want_kernel) continue;
      const Tensor grads = with_layout(grad_kernel, false);
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        Buffer<acc_t> lanes(wanted.mix ? kernels * k.lanes : 0);
        lanes.zero();
        for (int64_t b = begin; b < end; ++b) {
          const int64_t from = b * kBankBlock, length = std::min(kBankBlock, size - from);
          acc_t* sums = grad_bank.sums() ? grad_bank.sums() + from : nullptr;
          k.unmix({t.weight + from, kernels, size, 1, size, length}, const_data<product_t>(grads) + from, size, 0,
                  mix_ + n * kernels, 1, {sums, size, size}, n > 0, lanes.data());
          if (wanted.mix) k.add_lanes(lanes.data(), kernels, dots.of(b));
          for (int64_t j = 0; n == p.batch - 1 && sums && j < kernels; ++j)
            grad_bank.finish(k.from_acc, j * size + from, j * size + from + length);
        }
      });
      if (wanted.mix) dots.add_to(wanted.mix + n * kernels, kernels);
    }
  }

 private:
  static constexpr bool direct = std::is_same_v<storage_t, product_t>;

  int64_t in_size() const { return p.channels * p.in_pixels(); }
  int64_t out_size() const { return p.out_channels * p.out_pixels(); }

  Tensor kernel_tensor() const {
    const std::array<int64_t, 4> sizes{p.out_channels, p.group_channels(), p.kernel_height, p.kernel_width};
    const std::array<int64_t, 4> strides{p.bank.row, p.taps(), p.kernel_width, 1};
    return tensor_of(kernel_.data(), sizes, strides);
  }

  Tensor mixed(int64_t n) {
    const int64_t size = p.bank.kernel_size();
    if (!kernel_.size()) kernel_ = Buffer<product_t>(size);
    const acc_t* a = mix_ + n * p.bank.num_kernels;
    torch::stable::parallel_for(0, ceil_div(size, kBankBlock), 16, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * kBankBlock, to = std::min(size, end * kBankBlock);
      k.mix({t.weight + from, p.bank.num_kernels, size, 1, size, to - from}, a, 1, kernel_.data() + from, 0, 0);
    });
    return kernel_tensor();
  }

  // For a backward that needs the kernel's shape only.
  Tensor unmixed() {
    if (!kernel_.size()) {
      kernel_ = Buffer<product_t>(p.bank.kernel_size());
      kernel_.zero();
    }
    return kernel_tensor();
  }

  // A sample of a tensor as product_t; scratch keeps what has to be converted.
  Tensor sample(Buffer<product_t>& scratch, const storage_t* data, int64_t channels, int64_t height, int64_t width,
                bool channels_last) const {
    if constexpr (direct) {
      return as_tensor(Image<const product_t>{data, channels, height, width, channels_last});
    } else {
      const int64_t size = channels * height * width;
      if (!scratch.size()) scratch = Buffer<product_t>(size);
      k.to_product(data, scratch.data(), size);
      return as_tensor(Image<product_t>{scratch.data(), channels, height, width, channels_last});
    }
  }
  Tensor input(int64_t n) {
    return sample(input_, t.input + n * in_size(), p.channels, p.height, p.width, p.channels_last);
  }
  Tensor grad_out(int64_t n) {
    return sample(grad_out_, t.grad_out + n * out_size(), p.out_channels, p.out_height, p.out_width,
                  t.grad_out_channels_last);
  }

  // A result in the layout of input and output.
  void write(const Tensor& result, storage_t* out) const {
    const Tensor image = with_layout(result, p.channels_last);
    k.from_product(const_data<product_t>(image), out, image.numel());
  }

  const DynamicConv2dParams& p;
  const DynamicTensors<storage_t>& t;
  const DynamicKernels<storage_t, acc_t, product_t>& k;
  const acc_t* mix_;
  const ConvolutionGeometry geometry_;
  Buffer<product_t> kernel_, bias_, input_, grad_out_;
};

}  // namespace dynconv
