// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d on the CPU, sample by sample: a sample's kernel is mixed into a thread's scratch memory, and torch
// convolves that one sample with it. Any geometry; fast where a map is large against its kernel.
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
                  params.groups} {
    // One after the other: oneDNN plans a convolution for all threads even inside parallel_for, where it has one, and
    // then leaves parts of a weight gradient undone.
    side_by_side_ = 1;
    scratch_.resize(side_by_side_);
  }

  void forward(storage_t* out) {
    const int64_t per_thread = blocks_of(p.batch, side_by_side_);
    each(side_by_side_, [&](int64_t worker) {
      const int64_t end = std::min(p.batch, (worker + 1) * per_thread);
      for (int64_t n = worker * per_thread; n < end; ++n) {
        const Tensor kernel = mixed(scratch_[worker], n);
        Tensor bias;
        if (t.bias) {
          Scratch& s = scratch_[worker];
          if (!s.bias.size()) s.bias = Buffer<product_t>(p.out_channels);
          mix_bias(p.bank, t.bias, mix_ + n * p.bank.num_kernels, s.bias.data());
          bias = tensor_of(s.bias.data(), std::array{p.out_channels}, std::array<int64_t, 1>{1});
        }
        write(convolution(input(scratch_[worker], n), kernel, t.bias ? &bias : nullptr, geometry_), p.channels_last,
              out + n * out_size());
      }
    });
  }

  void backward(const DynamicGradients<storage_t, acc_t>& wanted) {
    const bool want_kernel = wanted.weight || wanted.mix;
    const int64_t size = p.bank.kernel_size(), blocks = blocks_of(size, kBankBlock), kernels = p.bank.num_kernels;
    GradBank<storage_t, acc_t> grad_bank(wanted.weight, kernels * size);
    BlockDots<acc_t> dots(wanted.mix != nullptr, blocks, side_by_side_ * kernels);
    // Gradients of the mixed kernels of the samples in progress.
    Buffer<product_t> grads(want_kernel ? side_by_side_ * size : 0);
    for (int64_t first = 0; first < p.batch; first += side_by_side_) {
      const int64_t count = std::min(side_by_side_, p.batch - first);
      if (wanted.input || want_kernel)
        each(count, [&](int64_t i) {
          Scratch& s = scratch_[i];
          const int64_t n = first + i;
          const Tensor kernel = wanted.input ? mixed(s, n) : unmixed(s);
          const auto [grad_input, grad_kernel] =
              convolution_backward(grad_out(s, n), input(s, n), kernel, geometry_, wanted.input, want_kernel);
          if (wanted.input) write(grad_input, p.channels_last, wanted.input + n * in_size());
          if (want_kernel)
            std::copy_n(const_data<product_t>(with_layout(grad_kernel, false)), size, grads.data() + i * size);
        });
      if (!want_kernel) continue;
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t from = b * kBankBlock, length = std::min(kBankBlock, size - from);
          acc_t* sums = grad_bank.sums() ? grad_bank.sums() + from : nullptr;
          k.unmix({t.weight + from, kernels, size, 1, size, length}, grads.data() + from, size, 0,
                  mix_ + first * kernels, count, {sums, size, size}, first > 0, dots.of(b));
          if (first + count == p.batch && sums)
            for (int64_t j = 0; j < kernels; ++j)
              grad_bank.finish(k.from_acc, j * size + from, j * size + from + length);
        }
      });
      dots.add_to(wanted.mix + first * kernels, count * kernels);
    }
  }

 private:
  struct Scratch {
    Buffer<product_t> kernel, bias, input, grad_out;
  };
  static constexpr bool direct = std::is_same_v<storage_t, product_t>;

  int64_t in_size() const { return p.channels * p.in_pixels(); }
  int64_t out_size() const { return p.out_channels * p.out_pixels(); }

  // f(0..count-1), in parallel if the samples are computed side by side.
  template <class F>
  void each(int64_t count, F f) const {
    if (side_by_side_ == 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  Tensor kernel_tensor(Scratch& s) const {
    const std::array<int64_t, 4> sizes{p.out_channels, p.group_channels(), p.kernel_height, p.kernel_width};
    const std::array<int64_t, 4> strides{p.bank.row, p.taps(), p.kernel_width, 1};
    return tensor_of(s.kernel.data(), sizes, strides);
  }

  Tensor mixed(Scratch& s, int64_t n) const {
    const int64_t size = p.bank.kernel_size();
    if (!s.kernel.size()) s.kernel = Buffer<product_t>(size);
    const acc_t* a = mix_ + n * p.bank.num_kernels;
    // On one thread inside parallel_for, on all of them outside.
    torch::stable::parallel_for(0, blocks_of(size, kBankBlock), 16, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * kBankBlock, to = std::min(size, end * kBankBlock);
      k.mix({t.weight + from, p.bank.num_kernels, size, 1, size, to - from}, a, 1, s.kernel.data() + from, 0, 0);
    });
    return kernel_tensor(s);
  }

  // For a backward that needs the kernel's shape only.
  Tensor unmixed(Scratch& s) const {
    if (!s.kernel.size()) {
      s.kernel = Buffer<product_t>(p.bank.kernel_size());
      s.kernel.zero();
    }
    return kernel_tensor(s);
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
  Tensor input(Scratch& s, int64_t n) const {
    return sample(s.input, t.input + n * in_size(), p.channels, p.height, p.width, p.channels_last);
  }
  Tensor grad_out(Scratch& s, int64_t n) const {
    return sample(s.grad_out, t.grad_out + n * out_size(), p.out_channels, p.out_height, p.out_width,
                  t.grad_out_channels_last);
  }

  void write(const Tensor& result, bool channels_last, storage_t* out) const {
    const Tensor image = with_layout(result, channels_last);
    k.from_product(const_data<product_t>(image), out, image.numel());
  }

  const DynamicConv2dParams& p;
  const DynamicTensors<storage_t>& t;
  const DynamicKernels<storage_t, acc_t, product_t>& k;
  const acc_t* mix_;
  const ConvolutionGeometry geometry_;
  int64_t side_by_side_;
  std::vector<Scratch> scratch_;
};

}  // namespace dynconv
