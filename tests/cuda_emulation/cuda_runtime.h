// SPDX-License-Identifier: BSD-3-Clause
// What this project uses of CUDA C++ and the CUDA runtime, on the host emulation. Shared memory comes from
// dynconv::dynamic_shared() alone: __shared__ is not defined. Errors of a kernel are exceptions out of its launch.
#pragma once

#include "emulation.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---------------------------------------------------------------------------------------------------- vector types

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr double2 make_double2(double x, double y) { return {x, y}; }

// ---------------------------------------------------------------------------------------------------------- threads

inline constinit thread_local uint3 threadIdx = {}, blockIdx = {};
inline constinit thread_local dim3 blockDim = {}, gridDim = {};
constexpr int warpSize = dynconv_emulation::warp_size;

inline void __syncthreads() { dynconv_emulation::block_barrier("__syncthreads"); }

namespace dynconv_emulation {

inline void require_full(unsigned mask, const char* operation) {
  if (mask != 0xffffffffu) fail(std::string(operation) + ": a mask other than 0xffffffff");
}

// What CUDA can shuffle, without conversion.
template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// The value of lane source(first, end), [first, end) being the lanes of this lane's segment of `width`.
template <Shuffled T, class Source>
T shuffle(const char* operation, unsigned mask, T value, int width, Source source) {
  require_full(mask, operation);
  if (width < 1 || width > warp_size || (width & (width - 1))) {
    fail(std::string(operation) + ": width " + std::to_string(width) + " is no power of two up to 32");
  }
  const int first = lane() & ~(width - 1);
  return exchange(operation, value)[source(first, first + width)];
}

}  // namespace dynconv_emulation

// A barrier of the warp that also orders its lanes' accesses to memory, which shuffles and matrix products don't.
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  dynconv_emulation::require_full(mask, "__syncwarp");
  dynconv_emulation::warp_barrier("__syncwarp");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return dynconv_emulation::shuffle("__shfl_sync", mask, value, width,
                                    [=](int first, int) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = dynconv_emulation::lane(), source = lane - int(delta);
  return dynconv_emulation::shuffle("__shfl_up_sync", mask, value, width,
                                    [=](int first, int) { return source < first ? lane : source; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = dynconv_emulation::lane(), source = lane + int(delta);
  return dynconv_emulation::shuffle("__shfl_down_sync", mask, value, width,
                                    [=](int, int end) { return source >= end ? lane : source; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = dynconv_emulation::lane(), source = lane ^ lane_mask;
  return dynconv_emulation::shuffle("__shfl_xor_sync", mask, value, width,
                                    [=](int, int end) { return source >= end ? lane : source; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  dynconv_emulation::require_full(mask, "__ballot_sync");
  const auto predicates = dynconv_emulation::exchange("__ballot_sync", predicate);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(predicates[lane] != 0) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// ----------------------------------------------------------------------------------------------------------- memory

template <class T>
T __ldg(const T* from) {
  return *from;
}

// Relaxed, as on the device.
template <class T>
  requires std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, int> || std::same_as<T, unsigned>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

// ------------------------------------------------------------------------------------------------------------ maths

// CUDA's min and max for two values of one type; for mixed types CUDA has further ones, which the host has not.
template <std::integral T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <std::integral T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

constexpr unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
constexpr int __float_as_int(float value) { return std::bit_cast<int>(value); }
constexpr float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
constexpr float __int_as_float(int value) { return std::bit_cast<float>(value); }
constexpr long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
constexpr double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
constexpr int __popc(unsigned value) { return std::popcount(value); }
constexpr int __clz(int value) { return std::countl_zero(unsigned(value)); }
constexpr int __ffs(int value) { return value ? std::countr_zero(unsigned(value)) + 1 : 0; }
constexpr unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }

// Addresses of a state space; the emulation has one.
inline size_t __cvta_generic_to_shared(const void* address) { return reinterpret_cast<size_t>(address); }
inline size_t __cvta_generic_to_global(const void* address) { return reinterpret_cast<size_t>(address); }

// ---------------------------------------------------------------------------------------------------------- runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInvalidDevice = 101,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidMemcpyDirection: return "invalid copy direction for memcpy";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unrecognized error code";
}

namespace dynconv_emulation {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace dynconv_emulation

inline cudaError_t cudaPeekAtLastError() { return dynconv_emulation::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(dynconv_emulation::last_error, cudaSuccess); }

// Streams: every call is done when it returns.
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
  if (kind != cudaMemcpyDeviceToDevice) return dynconv_emulation::returned(cudaErrorInvalidMemcpyDirection);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return dynconv_emulation::returned(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

// CUDA's numbers.
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using namespace dynconv_emulation;
  if (device != 0) return returned(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = max_threads_per_block; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(max_shared_bytes_by_default); return cudaSuccess;
    case cudaDevAttrWarpSize: *value = warp_size; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = num_multiprocessors(); return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(max_shared_bytes()); return cudaSuccess;
  }
  return returned(cudaErrorInvalidValue);
}

// --------------------------------------------------------------------------------------------------------- launches

namespace dynconv_emulation {

// How much dynamic shared memory a kernel may be launched with.
struct SharedLimits {
  std::mutex mutex;
  std::map<const void*, size_t> bytes;
};
inline SharedLimits shared_limits;

inline size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(shared_limits.mutex);
  const auto found = shared_limits.bytes.find(kernel);
  return found == shared_limits.bytes.end() ? max_shared_bytes_by_default : found->second;
}

}  // namespace dynconv_emulation

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  using namespace dynconv_emulation;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > max_shared_bytes()) {
    return returned(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(shared_limits.mutex);
  shared_limits.bytes[kernel] = size_t(value);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  constexpr int threads_of_multiprocessor = 2048, max_blocks = 32;
  *blocks = std::min(max_blocks, threads_of_multiprocessor / threads);
  if (shared_bytes) *blocks = std::min(*blocks, int(dynconv_emulation::max_shared_bytes() / shared_bytes));
  return cudaSuccess;
}

struct cudaLaunchAttribute;  // none is offered
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace dynconv_emulation;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1) return returned(cudaErrorInvalidConfiguration);
  if (block.x < 1 || block.x > unsigned(max_threads_per_block) || block.y != 1 || block.z != 1) {
    return returned(cudaErrorInvalidConfiguration);
  }
  const auto address = reinterpret_cast<const void*>(kernel);
  if (config->dynamicSmemBytes > shared_limit(address) || config->numAttrs) return returned(cudaErrorInvalidValue);
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  run(address, grid.x, block.x, config->dynamicSmemBytes, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
