// SPDX-License-Identifier: BSD-3-Clause
// DYNCONV_HOST_DEVICE marks maths that host and CUDA code share. The only place that asks which compiler reads it.
#pragma once

#ifdef __CUDACC__
#define DYNCONV_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DYNCONV_HOST_DEVICE inline __attribute__((always_inline))
#endif
