// SPDX-License-Identifier: BSD-3-Clause
// Launchers of deform_conv2d's CUDA kernels: plain structs and pointers to device memory, no torch. Nothing here waits
// for the device or allocates: the caller brings a workspace.
#pragma once

#include "common/half_types.h"
#include "deform_conv2d/deform_conv2d.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace dynconv {

// What the tensors hold and what is multiplied; tf32: float tensors, operands rounded to TF32. 16-bit types and TF32 are
// multiplied on tensor cores and accumulated in float.
enum class DeformPrecision { float64, float32, tf32, bfloat16, float16 };

// In elements; of a dense (N, C, H, W) tensor in either layout.
struct ImageStrides {
  int64_t batch, channel, row, pixel;
};
inline ImageStrides image_strides(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  if (channels_last) return {channels * height * width, 1, channels * width, channels};
  return {channels * height * width, height * width, width, 1};
}

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
int64_t deform_conv2d_forward_workspace(DeformPrecision, const DeformConv2dParams&);

// bias (O) or null; out (N, O, Ho, Wo) in the layout of input.
cudaError_t launch_deform_conv2d_forward(DeformPrecision, const DeformCall&, const void* bias, void* out, void* workspace,
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

int64_t deform_conv2d_backward_workspace(DeformPrecision, const DeformBackwardCall&);
cudaError_t launch_deform_conv2d_backward(DeformPrecision, const DeformBackwardCall&, void* workspace, cudaStream_t);

}  // namespace dynconv
