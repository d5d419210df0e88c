// SPDX-License-Identifier: BSD-3-Clause
// The direct way of deform_conv2d on CUDA, for small weight groups (depthwise above all), whose matrix products are too
// small for tiles: when it is taken, and its launchers.
#pragma once

#include "deform_conv2d/deform_conv2d_cuda_backward.h"

namespace dynconv {
namespace deform_cuda {

// A tile of a product has 64 outputs and 128 bytes of channels (64 of 16 bits) of one group, however few of them exist:
// 4096 multiplications and 64 channel slots a pixel and tap. Plain arithmetic goes at about 1/12 of the tensor cores'
// rate, so that it wins below some 340 multiplications, and by more the fewer of the slots hold a channel.
constexpr int kDirectOutputs = 8, kDirectChannels = 16;
inline bool is_direct(const DeformConv2dParams& p) {
  return p.groups > 1 && p.group_out_channels() <= kDirectOutputs && p.group_channels() <= kDirectChannels;
}

// Float products are exact whatever the precision allows.
template <class storage_t>
cudaError_t run_direct_forward(const DeformCall&, const void* bias, void* out, cudaStream_t);

// Gradients of input, offset and mask, as the data kernel of deform_conv2d_backward.cu gives them; no packed weight.
template <class storage_t>
cudaError_t run_direct_data(const DeformConv2dParams&, const DataArguments&, const void* weight, cudaStream_t);

// Gradient of the weight; sums are in a workspace of that many bytes.
template <class storage_t>
int64_t direct_weight_workspace(const DeformConv2dParams&);
template <class storage_t>
cudaError_t run_direct_weight(const DeformBackwardCall&, void* workspace, cudaStream_t);

}  // namespace deform_cuda
}  // namespace dynconv
