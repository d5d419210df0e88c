// SPDX-License-Identifier: BSD-3-Clause
// Launchers of deform_conv2d's CUDA kernels: plain structs and pointers to device memory, no torch. Nothing here waits
// for the device or allocates: the caller brings a workspace.
#pragma once

#include "common/cuda/types.h"
#include "deform_conv2d/deform_conv2d.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace dynconv {

// What both directions read. offset and mask have any strides (those in params).
struct DeformCall {
  DeformConv2dParams params;
  const void* input;   // layout: params.channels_last
  const void* weight;  // (O, C/G, kH, kW), contiguous
  const void* offset;
  const void* mask;  // null: none
  StorageType offset_type;  // of offset and mask
};

// Device memory that the forward needs beside its tensors, in bytes.
int64_t deform_conv2d_forward_workspace(Precision, const DeformConv2dParams&);

// bias (O) or null; out (N, O, Ho, Wo) in the layout of input.
cudaError_t launch_deform_conv2d_forward(Precision, const DeformCall&, const void* bias, void* out, void* workspace,
                                       cudaStream_t);

// null where not wanted. input: in the layout of the input; the others contiguous; offset and mask in offset_type.
struct DeformGradients {
  void* input;
  void* offset;
  void* weight;
  void* bias;
  void* mask;
};

struct DeformBackwardCall {
  DeformCall forward;
  const void* grad_out;  // (N, O, Ho, Wo), dense
  bool grad_out_channels_last;
  DeformGradients gradients;
  bool deterministic;  // every sum in a fixed order
};

int64_t deform_conv2d_backward_workspace(Precision, const DeformBackwardCall&);
cudaError_t launch_deform_conv2d_backward(Precision, const DeformBackwardCall&, void* workspace, cudaStream_t);

}  // namespace dynconv
