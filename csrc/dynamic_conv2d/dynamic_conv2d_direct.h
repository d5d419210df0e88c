// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d's direct kernels: for convolutions with few outputs a group, depthwise ones above all, where a tile of
// a matrix product would be nearly empty. A block mixes the kernels of its groups once, in shared memory.
#pragma once

#include "common/cuda/operands.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda.h"

namespace dynconv {
namespace dynamic_cuda {

// A thread keeps all outputs of a group in registers, and a product on tensor cores does at least 64 of them: with 8 or
// fewer it would spend over 7/8 of its work on padding, as much as tensor cores gain over plain multiply-add.
constexpr int64_t kDirectOutputs = 8;

inline bool direct_forward(const DynamicConv2dParams& p) { return p.group_out_channels() <= kDirectOutputs; }
inline bool direct_grad_input(const DynamicConv2dParams& p) { return p.group_channels() <= kDirectOutputs; }
// A group's gradient at a tap is group_out_channels x group_channels.
inline bool direct_weight(const DynamicConv2dParams& p) { return direct_forward(p) && direct_grad_input(p); }

// T: Types<...> of any precision. TF32 would round where nothing is gained: such tensors are computed as float32.
template <class T>
using Exact = Types<typename T::storage_t, typename T::storage_t, typename T::acc_t>;

// out in the layout of input.
template <class T>
cudaError_t run_direct_forward(const DynamicCall&, void* out, cudaStream_t);

template <class T>
cudaError_t run_direct_grad_input(const DynamicBackwardCall&, cudaStream_t);

// Device memory for run_direct_weight, in bytes, and how many parts its dots have.
template <class T>
int64_t direct_weight_workspace(const DynamicBackwardCall&, int64_t* parts);

// gradients.weight (null: not wanted), and dots (parts, N, K) acc, null if and only if gradients.attention is:
// <weight[k], gradient of W[n]>, cut in parts; every one of these is written.
template <class T>
cudaError_t run_direct_weight(const DynamicBackwardCall&, void* workspace, void* dots, cudaStream_t);

}  // namespace dynamic_cuda
}  // namespace dynconv
