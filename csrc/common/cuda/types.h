// SPDX-License-Identifier: BSD-3-Clause
// What launchers of CUDA kernels are told about tensors: precision and layout. Plain structs, no torch.
#pragma once

#include "common/half_types.h"
#include "common/rounding.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace dynconv {

// What the tensors hold and what is multiplied; tf32: float tensors, operands rounded to TF32. 16-bit types and TF32 are
// multiplied on tensor cores and accumulated in float.
enum class Precision { float64, float32, tf32, bfloat16, float16 };

// In elements; of a dense (N, C, H, W) tensor in either layout.
struct ImageStrides {
  int64_t batch, channel, row, pixel;
};
inline ImageStrides image_strides(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  if (channels_last) return {channels * height * width, 1, channels * width, channels};
  return {channels * height * width, height * width, width, 1};
}

// Workspaces are cut at multiples of this many bytes.
constexpr int64_t kWorkspaceAlignment = 256;

}  // namespace dynconv
