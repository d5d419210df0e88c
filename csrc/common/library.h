// SPDX-License-Identifier: BSD-3-Clause
// The namespace that the operators are registered in: torch.ops.dynconv_ext. The tests' emulation of CUDA registers the
// CUDA kernels under another name.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef DYNCONV_LIBRARY
#define DYNCONV_LIBRARY dynconv_ext
#endif
