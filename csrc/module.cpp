// SPDX-License-Identifier: BSD-3-Clause
// The pybind11 module _C. Importing it registers the operators; build_info() tells how it was built.
#include "common/cpu_level.h"

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#define DYNCONV_TEXT_OF(x) #x
#define DYNCONV_TEXT(x) DYNCONV_TEXT_OF(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_built_with"] =
      DYNCONV_TEXT(TORCH_VERSION_MAJOR) "." DYNCONV_TEXT(TORCH_VERSION_MINOR) "." DYNCONV_TEXT(TORCH_VERSION_PATCH);
  info["torch_at_least"] = "2.11";
  // The CUDA library tells its own; this one has none.
  info["cuda"] = pybind11::none();
  info["cuda_archs"] = pybind11::list();
  info["cpu_level"] = dynconv::cpu_level_name();
  info["cpu_bfloat16"] = dynconv::bfloat16_level_name();
  info["native_bfloat16"] = dynconv::has_native_bfloat16();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of dynconv_ext: registers torch.ops.dynconv_ext.*";
  m.def("build_info", &build_info,
        "Compiler, torch built with, oldest torch it runs with, CUDA version and archs (none), CPU levels in use.");
}
