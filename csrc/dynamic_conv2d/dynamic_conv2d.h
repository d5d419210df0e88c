// SPDX-License-Identifier: BSD-3-Clause
// Dynamic convolution: the kernel of each sample is a mix of K kernels (CondConv, Yang et al. 2019, arXiv:1904.04971,
// sec. 3; attention over kernels, Chen et al. 2020, arXiv:1912.03458, eq. 1-3).
//
//   N batch, C in, O out, H W input size, Ho Wo output size, G groups, K kernels of the bank
//
//   input  (N, C, H, W)                 attention (N, K)
//   weight (K, O, C/G, kH, kW)          bias      (K, O)           out (N, O, Ho, Wo)
//
//   a[n]   = softmax(attention[n] / temperature), or attention[n] itself without a temperature
//   W[n]   = sum_k a[n,k] weight[k]          b[n] = sum_k a[n,k] bias[k]
//   out[n] = conv2d(input[n], W[n], b[n], stride, padding, dilation, groups)
//
// Gradients, with g[n] the gradient of W[n] that conv2d's backward gives:
//   grad_weight[k] = sum_n a[n,k] g[n]       grad_a[n,k] = <weight[k], g[n]> + <bias[k], sum of grad_out[n] over pixels>
#pragma once

#include <cstdint>

namespace dynconv {

// The bank of kernels and how it is mixed: all that aggregate_kernels needs.
struct KernelBankParams {
  int64_t batch, num_kernels, out_channels;
  int64_t row;         // weights of an output channel: C/G * kH * kW
  bool softmax;        // whether attention are logits
  double temperature;  // of the softmax

  int64_t kernel_size() const { return out_channels * row; }
};

struct DynamicConv2dParams {
  KernelBankParams bank;
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  int64_t groups;
  bool channels_last;  // layout of input, output and their gradients

  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t out_pixels() const { return out_height * out_width; }
  int64_t in_pixels() const { return height * width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_out_channels() const { return out_channels / groups; }
};

}  // namespace dynconv
