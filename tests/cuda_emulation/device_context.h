// SPDX-License-Identifier: BSD-3-Clause
// csrc/common/cuda/device_context.h for tensors on the CPU: the kernels run in the emulation, before the launch returns.
#pragma once

#include "common/checks.h"

#include <cuda_runtime.h>

#define DYNCONV_KERNEL_KEY CPU

namespace dynconv {

class DeviceContext {
 public:
  explicit DeviceContext(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace dynconv
