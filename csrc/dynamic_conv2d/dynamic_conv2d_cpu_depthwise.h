// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d on the CPU where every channel has its own kernel (groups = C = O): no product to speak of, so channels
// stand in the lanes of vectors. A block of channels of a sample is copied, with its padding, to a plane of vectors, in
// whichever layout it comes; its kernels are mixed, and all that follows are sums over taps.
#pragma once

#include "dynamic_conv2d/dynamic_conv2d_cpu.h"

namespace dynconv {

template <class storage_t, class acc_t>
const DepthwiseKernels<storage_t, acc_t>& depthwise_kernels() {
  static const auto chosen = [] {
#if defined(__x86_64__)
    if (cpu_level() == CpuLevel::avx512) return avx512::depthwise_kernels<storage_t, acc_t>();
    if (cpu_level() == CpuLevel::avx2) return avx2::depthwise_kernels<storage_t, acc_t>();
#endif
    return baseline::depthwise_kernels<storage_t, acc_t>();
  }();
  return chosen;
}

// Whether a block's plane stays small: larger ones go the general way.
inline bool depthwise_fits(const DynamicConv2dParams& p) {
  constexpr double kMostVectors = 64 * 1024;  // 4 MiB of the widest
  const double padded = double(p.height + 2 * p.padding_height) * double(p.width + 2 * p.padding_width);
  return p.groups == p.channels && p.groups == p.out_channels && padded <= kMostVectors && p.taps() <= 1024;
}

template <class storage_t, class acc_t>
class DynamicDepthwise {
 public:
  DynamicDepthwise(const DynamicConv2dParams& params, const DynamicTensors<storage_t>& tensors, const acc_t* mix)
      : p(params),
        t(tensors),
        k(depthwise_kernels<storage_t, acc_t>()),
        mix_(mix),
        rows_(params.height + 2 * params.padding_height),
        columns_(params.width + 2 * params.padding_width),
        blocks_(ceil_div(params.channels, k.lanes)) {}

  void forward(storage_t* out) {
    torch::stable::parallel_for(0, blocks_ * p.batch, 1, [&](int64_t begin, int64_t end) {
      Buffer<acc_t> bank, kernel(p.taps() * k.lanes), bias(k.lanes), row(p.out_width * k.lanes);
      Buffer<acc_t> plane = zeros(rows_ * columns_);
      int64_t loaded = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / p.batch, n = i % p.batch;
        if (block != loaded) bank = bank_of(block), loaded = block;
        k.mix(bank.data(), mix_ + n * p.bank.num_kernels, p.bank.num_kernels, p.taps(), kernel.data());
        k.load(image(t.input, n, block, p.height, p.width, p.channels_last), plane.data(), columns_, p.padding_height,
               p.padding_width);
        const auto shape = image<storage_t>(out, n, block, p.out_height, p.out_width, p.channels_last);
        k.convolve(geometry(), plane.data(), columns_, kernel.data(), bias_of(n, block, bias), shape, row.data(),
                   const_cast<storage_t*>(shape.data));
      }
    });
  }

  void backward(const DynamicGradients<storage_t, acc_t>& wanted) {
    const bool wants_kernels = wanted.weight || wanted.mix;
    if (!wanted.input && !wants_kernels) return;
    const int64_t kernels = p.bank.num_kernels, bank_size = kernels * p.taps() * k.lanes;
    BlockDots<acc_t> dots(wanted.mix != nullptr, blocks_, p.batch * kernels);
    // The gradient of the input, at stride 1, is a convolution of grad_out with the kernel turned over.
    const int64_t top = (p.kernel_height - 1) * p.dilation_height - p.padding_height;
    const int64_t left = (p.kernel_width - 1) * p.dilation_width - p.padding_width;
    const bool turns = p.stride_height == 1 && p.stride_width == 1 && top >= 0 && left >= 0;
    const int64_t grad_columns = turns ? p.out_width + 2 * left : p.out_width;
    const int64_t grad_rows = turns ? p.out_height + 2 * top : p.out_height;
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      Buffer<acc_t> kernel(p.taps() * k.lanes), grads(p.taps() * k.lanes), row(p.width * k.lanes);
      Buffer<acc_t> plane = zeros(wants_kernels ? rows_ * columns_ : 0);
      Buffer<acc_t> grad_plane = zeros(wanted.input && !turns ? rows_ * columns_ : 0);
      Buffer<acc_t> padded_grad = zeros(wanted.input && turns ? grad_rows * grad_columns : 0);
      Buffer<acc_t> grad_out(p.out_pixels() * k.lanes);
      for (int64_t block = begin; block < end; ++block) {
        const Buffer<acc_t> bank = bank_of(block);
        Buffer<acc_t> sums(wanted.weight ? bank_size : 0);
        sums.zero();
        for (int64_t n = 0; n < p.batch; ++n) {
          const acc_t* a = mix_ + n * kernels;
          const auto grad = image(t.grad_out, n, block, p.out_height, p.out_width, t.grad_out_channels_last);
          if (wants_kernels || !turns) k.load(grad, grad_out.data(), p.out_width, 0, 0);
          if (wanted.input) {
            const auto shape = image<storage_t>(wanted.input, n, block, p.height, p.width, p.channels_last);
            auto* const to = const_cast<storage_t*>(shape.data);
            k.mix(bank.data(), a, kernels, p.taps(), kernel.data());
            if (turns) {
              turn_over(kernel.data());
              k.load(grad, padded_grad.data(), grad_columns, top, left);
              k.convolve({p.kernel_height, p.kernel_width, 1, 1, p.dilation_height, p.dilation_width}, padded_grad.data(),
                         grad_columns, kernel.data(), nullptr, shape, row.data(), to);
            } else {
              grad_plane.zero();
              k.scatter(geometry(), grad_out.data(), p.out_height, p.out_width, kernel.data(), grad_plane.data(), columns_);
              k.store(grad_plane.data(), columns_, p.padding_height, p.padding_width, shape, to);
            }
          }
          if (wants_kernels) {
            k.load(image(t.input, n, block, p.height, p.width, p.channels_last), plane.data(), columns_, p.padding_height,
                   p.padding_width);
            k.correlate(geometry(), plane.data(), columns_, grad_out.data(), p.out_height, p.out_width, grads.data());
            acc_t* const dot = dots.of(block);
            k.unmix(bank.data(), a, grads.data(), kernels, p.taps(), sums.data(), dot ? dot + n * kernels : nullptr);
          }
        }
        for (int64_t i = 0; wanted.weight && i < kernels * p.taps(); ++i)
          for (int64_t lane = 0; lane < channels_of(block); ++lane)
            from_acc(sums.data()[i * k.lanes + lane], wanted.weight + place(block, lane, i));
      }
    });
    if (wanted.mix) dots.add_to(wanted.mix, p.batch * kernels);
  }

 private:
  DepthwiseGeometry geometry() const {
    return {p.kernel_height, p.kernel_width, p.stride_height, p.stride_width, p.dilation_height, p.dilation_width};
  }
  int64_t channels_of(int64_t block) const { return std::min(k.lanes, p.channels - block * k.lanes); }
  // In the bank (K, O, taps); i counts (kernel, tap).
  int64_t place(int64_t block, int64_t lane, int64_t i) const {
    return (i / p.taps() * p.channels + block * k.lanes + lane) * p.taps() + i % p.taps();
  }
  Buffer<acc_t> zeros(int64_t vectors) const {
    Buffer<acc_t> buffer(vectors * k.lanes);
    buffer.zero();
    return buffer;
  }
  Buffer<acc_t> bank_of(int64_t block) const {
    Buffer<acc_t> bank = zeros(p.bank.num_kernels * p.taps());
    for (int64_t i = 0; i < p.bank.num_kernels * p.taps(); ++i)
      for (int64_t lane = 0; lane < channels_of(block); ++lane)
        bank.data()[i * k.lanes + lane] = to_acc(t.weight[place(block, lane, i)]);
    return bank;
  }
  const acc_t* bias_of(int64_t n, int64_t block, Buffer<acc_t>& bias) const {
    if (t.bias == nullptr) return nullptr;
    bias.zero();
    for (int64_t j = 0; j < p.bank.num_kernels; ++j)
      for (int64_t lane = 0; lane < channels_of(block); ++lane)
        bias.data()[lane] += mix_[n * p.bank.num_kernels + j] * to_acc(t.bias[j * p.channels + block * k.lanes + lane]);
    return bias.data();
  }
  // The taps in reverse order.
  void turn_over(acc_t* kernel) const {
    for (int64_t i = 0, j = p.taps() - 1; i < j; ++i, --j)
      std::swap_ranges(kernel + i * k.lanes, kernel + (i + 1) * k.lanes, kernel + j * k.lanes);
  }
  template <class T>
  DepthwiseImage<storage_t> image(T* data, int64_t n, int64_t block, int64_t height, int64_t width,
                                  bool channels_last) const {
    const int64_t channel = block * k.lanes;
    const storage_t* first = data + n * p.channels * height * width;
    return {first + (channels_last ? channel : channel * height * width), channels_of(block), height, width,
            channels_last ? 1 : height * width, channels_last ? p.channels : 1};
  }

  const DynamicConv2dParams& p;
  const DynamicTensors<storage_t>& t;
  const DepthwiseKernels<storage_t, acc_t>& k;
  const acc_t* mix_;
  const int64_t rows_, columns_, blocks_;
};

}  // namespace dynconv
