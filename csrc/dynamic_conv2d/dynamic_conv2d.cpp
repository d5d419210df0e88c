// SPDX-License-Identifier: BSD-3-Clause
// Schemas of aggregate_kernels and dynamic_conv2d. Shapes and formulas: dynamic_conv2d.h.
#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DYNCONV_LIBRARY, m) {
  // allow_tf32: float32 products may be done in TF32 (CUDA). Every sum has a fixed order on both devices.
  // weight (K,O,C/G,kH,kW), attention (N,K), bias (K,O) -> kernels (N,O,C/G,kH,kW), biases (N,O), (0,) without a bias
  m.def(
      "aggregate_kernels(Tensor weight, Tensor attention, Tensor? bias, float? temperature) "
      "-> (Tensor kernels, Tensor biases)");
  // output_mask: whether to compute the gradient of weight, attention, bias; one not asked for has shape (0,)
  m.def(
      "aggregate_kernels_backward(Tensor grad_kernels, Tensor? grad_biases, Tensor weight, Tensor attention, "
      "Tensor? bias, float? temperature, bool[3] output_mask) "
      "-> (Tensor grad_weight, Tensor grad_attention, Tensor grad_bias)");
  // input (N,C,H,W), weight (K,O,C/G,kH,kW), attention (N,K), bias (K,O) -> (N,O,Ho,Wo)
  m.def(
      "dynamic_conv2d(Tensor input, Tensor weight, Tensor attention, Tensor? bias, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, float? temperature, bool allow_tf32=False) -> Tensor");
  // output_mask: whether to compute the gradient of input, weight, attention, bias; one not asked for has shape (0,)
  m.def(
      "dynamic_conv2d_backward(Tensor grad_out, Tensor input, Tensor weight, Tensor attention, Tensor? bias, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float? temperature, "
      "bool[4] output_mask, bool allow_tf32=False) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_attention, Tensor grad_bias)");
}
