// SPDX-License-Identifier: BSD-3-Clause
// Modulated deformable convolution (Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, "v2", arXiv:1811.11168, eq. 1).
//
//   N batch, C in, O out, H W input size, Ho Wo output size, G weight groups, D offset groups, K = kH*kW taps,
//   p an output pixel, tap k = i*kW + j, g(c) = c / (C/G), d(c) = c / (C/D)
//
//   input  (N, C, H, W)              offset (N, D*2*K, Ho, Wo): channel 2*(d*K + k) is dy of tap k, the next one dx
//   weight (O, C/G, kH, kW)          mask   (N, D*K, Ho, Wo): any real values, absent = 1
//   bias   (O)                       out    (N, O, Ho, Wo)
//
//   out[n,o,p] = bias[o] + sum_{c in group of o, k} weight[o,c,k] * mask[n,d(c),k,p]
//                          * sample(input[n,c], p*stride - padding + k*dilation + offset[n,d(c),k,p])
//
// sample is bilinear; a corner outside the image counts 0. The value is 0, and so are its gradients, unless
// -1 < y < H and -1 < x < W. A NaN coordinate gives NaN.
#pragma once

#include "common/host_device.h"

#include <cstdint>

namespace dynconv {

// Sizes, and strides in elements where a tensor may have any.
struct DeformConv2dParams {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  int64_t groups, offset_groups;
  int64_t offset_stride[4], mask_stride[4];  // batch, channel, row, column
  bool has_mask;
  bool channels_last;  // layout of input, output and their gradients

  DYNCONV_HOST_DEVICE int64_t taps() const { return kernel_height * kernel_width; }
  DYNCONV_HOST_DEVICE int64_t out_pixels() const { return out_height * out_width; }
  DYNCONV_HOST_DEVICE int64_t in_pixels() const { return height * width; }
  DYNCONV_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  DYNCONV_HOST_DEVICE int64_t group_out_channels() const { return out_channels / groups; }
};

}  // namespace dynconv
