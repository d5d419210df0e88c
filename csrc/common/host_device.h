// SPDX-License-Identifier: BSD-3-Clause
// DYNCONV_HOST_DEVICE marks maths that host and CUDA code share, DYNCONV_UNROLL a loop whose arrays must become
// registers, DYNCONV_NO_UNROLL one that must stay a loop. The only place that asks which compiler reads it.
#pragma once

#ifdef __CUDACC__
#define DYNCONV_HOST_DEVICE __host__ __device__ __forceinline__
#define DYNCONV_UNROLL _Pragma("unroll")
#define DYNCONV_NO_UNROLL _Pragma("unroll 1")
#else
#define DYNCONV_HOST_DEVICE inline __attribute__((always_inline))
#define DYNCONV_UNROLL
#define DYNCONV_NO_UNROLL
#endif
