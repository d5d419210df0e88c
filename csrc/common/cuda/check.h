// SPDX-License-Identifier: BSD-3-Clause
// Turns an error of the CUDA runtime into an exception that says what mends it. For host files; kernels include none of it.
#pragma once

#include "common/checks.h"

#include <cuda_runtime_api.h>

#include <string>

namespace dynconv {

// what: the operator.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // The runtime would report it again to whoever asks next.
  (void)cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    std::string arch = "(unknown)";
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
      arch = std::to_string(major) + "." + std::to_string(minor);
    }
    fail(what, ": got tensors on a GPU of architecture ", arch, ", expected one of those built for, ",
         DYNCONV_CUDA_ARCHS, " (", cudaGetErrorString(error), "). Build for it:  TORCH_CUDA_ARCH_LIST=\"", arch,
         "\" DYNCONV_CUDA=1 pip install --no-build-isolation -e .  (in the source folder)");
  }
  fail(what, ": CUDA reports ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

}  // namespace dynconv
