// SPDX-License-Identifier: BSD-3-Clause
// Schemas of deform_conv2d. Shapes, channel order and formula: deform_conv2d.h.
#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DYNCONV_LIBRARY, m) {
  // allow_tf32: float32 products may be done in TF32 (CUDA). deterministic: every sum in a fixed order (always so on the
  // CPU).
  // input (N,C,H,W), offset (N,2*D*K,Ho,Wo), weight (O,C/G,kH,kW), bias (O), mask (N,D*K,Ho,Wo) -> (N,O,Ho,Wo)
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, Tensor? mask, bool allow_tf32=False) -> Tensor");
  // output_mask: whether to compute the gradient of input, offset, weight, bias, mask; one not asked for has shape (0,)
  m.def(
      "deform_conv2d_backward(Tensor grad_out, Tensor input, Tensor offset, Tensor weight, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, Tensor? mask, bool[5] output_mask, bool allow_tf32=False, "
      "bool deterministic=False) "
      "-> (Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_bias, Tensor grad_mask)");
}
