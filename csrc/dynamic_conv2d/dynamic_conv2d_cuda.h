// SPDX-License-Identifier: BSD-3-Clause
// Launchers of the CUDA kernels of aggregate_kernels and dynamic_conv2d: plain structs and pointers to device memory, no
// torch. Nothing here waits for the device or allocates: the caller brings a workspace.
#pragma once

#include "common/cuda/types.h"
#include "dynamic_conv2d/dynamic_conv2d.h"

namespace dynconv {

// ------------------------------------------------------------------------------------------- mixing (dynamic_conv2d_mix.cu)

// Numbers called acc below are float, double for float64. mix: (N, K) acc, the mixing weights of all samples.

// attention (N, K), contiguous, of any floating type.
cudaError_t launch_mixing_weights(Precision, const KernelBankParams&, const void* attention, StorageType attention_type,
                                  void* mix, cudaStream_t);

// kernels (N, O, row) and biases (N, O) from weight (K, O, row) and bias (K, O). bias and biases: null for none.
cudaError_t launch_aggregate_kernels(Precision, const KernelBankParams&, const void* weight, const void* bias,
                                     const void* mix, void* kernels, void* biases, cudaStream_t);

// Device memory for launch_aggregate_kernels_backward, in bytes.
int64_t aggregate_kernels_backward_workspace(Precision, const KernelBankParams&, bool wants_attention);

// grad_weight (K, O, row), grad_bias (K, O), grad_attention (N, K) in attention_type: null where not wanted.
// bias, grad_biases: null for none.
cudaError_t launch_aggregate_kernels_backward(Precision, const KernelBankParams&, const void* grad_kernels,
                                              const void* grad_biases, const void* weight, const void* bias,
                                              const void* mix, void* grad_weight, void* grad_bias, void* grad_attention,
                                              StorageType attention_type, void* workspace, cudaStream_t);

// The last steps of both backwards: the bias' part, and the way through the softmax.
// dots: (parts, N, K) acc, whose sum over parts is the gradient of mix without the bias' part; part 0 is overwritten.
// Null only where grad_attention is.
// pixel_sums: (N, O) acc, the gradient of the mixed biases; null: no bias, and no grad_bias.
cudaError_t launch_finish_attention(Precision, const KernelBankParams&, void* dots, int64_t parts, const void* bias,
                                    const void* pixel_sums, const void* mix, void* grad_bias, void* grad_attention,
                                    StorageType attention_type, cudaStream_t);

// ------------------------------------------------------------------------------------------------------ dynamic_conv2d

// How a convolution is computed; which way is taken where: dynamic_conv2d_launch.cu. All give the same results but for
// rounding. automatic: the best by its sizes. A wish that a convolution cannot have counts as automatic.
enum class DynamicWay { automatic, direct, mixed_first, mixed, wide };

struct DynamicCall {
  DynamicConv2dParams params;
  DynamicWay way;
  const void* input;   // layout: params.channels_last
  const void* weight;  // (K, O, C/G, kH, kW), contiguous
  const void* bias;    // (K, O), or null
  const void* mix;     // (N, K) acc
};

int64_t dynamic_conv2d_forward_workspace(Precision, const DynamicCall&);

// out (N, O, Ho, Wo) in the layout of input.
cudaError_t launch_dynamic_conv2d_forward(Precision, const DynamicCall&, void* out, void* workspace, cudaStream_t);

// null where not wanted. input: in the layout of the input; the others contiguous; attention in attention_type.
struct DynamicGradients {
  void* input;
  void* weight;
  void* attention;
  void* bias;
};

struct DynamicBackwardCall {
  DynamicCall forward;
  const void* grad_out;  // (N, O, Ho, Wo), dense
  bool grad_out_channels_last;
  DynamicGradients gradients;
  StorageType attention_type;
};

int64_t dynamic_conv2d_backward_workspace(Precision, const DynamicBackwardCall&);
cudaError_t launch_dynamic_conv2d_backward(Precision, const DynamicBackwardCall&, void* workspace, cudaStream_t);

}  // namespace dynconv
