// SPDX-License-Identifier: BSD-3-Clause
// Between torch's tensors and kernels on the GPU: the device, its current stream, errors (check_cuda).
//
// The host emulation (tests/cuda_emulation/device_context.h) defines the same for tensors on the CPU: host files include
// <device_context.h>, and the include path decides.
#pragma once

#include "common/checks.h"
#include "common/cuda/check.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// The dispatch key that the kernels are registered for.
#define DYNCONV_KERNEL_KEY CUDA

namespace dynconv {

// Makes the tensor's device the current one while it lives.
class DeviceContext {
 public:
  explicit DeviceContext(const Tensor& tensor) : guard_(tensor.device().index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.device().index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace dynconv
