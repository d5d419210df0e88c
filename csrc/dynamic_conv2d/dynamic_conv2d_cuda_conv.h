// SPDX-License-Identifier: BSD-3-Clause
// A product of dynamic_conv2d (forward, or the input's gradient) as dynamic_conv2d_conv.cu does it.
#pragma once

#include "dynamic_conv2d/dynamic_conv2d_cuda_tiles.h"

namespace dynconv {
namespace dynamic_cuda {

struct ConvProduct {
  Gather gather;
  int64_t batch, channels, results;  // of a group: of the source, of the result
  int groups;
  const void* source;
  ImageStrides source_stride;
  void* out;
  ImageStrides out_stride;
  bool wide;  // the depth runs over the kernels as well, instead of mixing them
};

// Bytes for the packed bank.
template <class T>
int64_t conv_workspace(const ConvProduct&, int64_t num_kernels);
// weight, bias: (K, O, C/G, kH, kW) and (K, results of all groups), or null; mix (N, K).
template <class T>
cudaError_t run_conv(const ConvProduct&, int64_t num_kernels, const void* weight, const void* bias, const void* mix,
                     void* workspace, cudaStream_t);

}  // namespace dynamic_cuda
}  // namespace dynconv
