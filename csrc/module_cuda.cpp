// SPDX-License-Identifier: BSD-3-Clause
// The pybind11 module _cuda. Importing it registers the CUDA kernels of the operators; build_info() tells what for.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  pybind11::list archs;
  const std::string all = DYNCONV_CUDA_ARCHS;
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
    end = all.find(';', begin);
    if (end != begin) archs.append(all.substr(begin, end - begin));
  }
  info["cuda_archs"] = archs;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Compiled part of dynconv_ext: registers the CUDA kernels of torch.ops.dynconv_ext.*";
  m.def("build_info", &build_info, "CUDA version compiled with, and archs as in TORCH_CUDA_ARCH_LIST.");
}
