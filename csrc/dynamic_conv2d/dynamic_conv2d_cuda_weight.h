// SPDX-License-Identifier: BSD-3-Clause
// The gradients of bank and mixing weights as dynamic_conv2d_weight.cu computes them.
#pragma once

#include "dynamic_conv2d/dynamic_conv2d_cuda_tiles.h"

namespace dynconv {
namespace dynamic_cuda {

// How many parts the dots have.
template <class T>
int64_t weight_dot_parts(const DynamicConv2dParams&);
// Bytes for the shares' sums.
template <class T>
int64_t weight_workspace(const DynamicBackwardCall&);
// call.gradients.weight, unless null. dots: (parts, N, K) acc, every one of them written: parts of the gradient of mix; null:
// not wanted.
template <class T>
cudaError_t run_weight(const DynamicBackwardCall&, void* dots, void* workspace, cudaStream_t);

}  // namespace dynamic_cuda
}  // namespace dynconv
