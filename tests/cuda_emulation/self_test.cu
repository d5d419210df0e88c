// SPDX-License-Identifier: BSD-3-Clause
// Kernels that are right, and kernels with a mistake each, to test the emulation: self_test NAME runs one, and ends
// with 0 if it computed what it should, 1 with a message if it did not.
#include <ptx.h>

#include "common/cuda/launch.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

using namespace dynconv;

namespace {

void check(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string("expected: ") + what);
}
void check(cudaError_t error) { check(error == cudaSuccess, cudaGetErrorString(error)); }

// Exactly that many numbers on the heap, for AddressSanitizer.
template <class T>
std::unique_ptr<T[]> numbers(int count) {
  return std::make_unique<T[]>(size_t(count));
}

// -------------------------------------------------------------------------------------------------------- reduction

// sum[block] = sum of the block's numbers. Without the barrier between, warp 0 reads what others may not have written.
template <bool with_barrier>
__global__ void __launch_bounds__(256) reduce(const float* values, float* sums, double* total) {
  auto* partial = reinterpret_cast<float*>(dynamic_shared());
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  float value = __ldg(values + blockIdx.x * blockDim.x + threadIdx.x);
  for (int step = 16; step; step /= 2) value += __shfl_down_sync(0xffffffffu, value, unsigned(step));
  if (lane == 0) partial[warp] = value;
  if (with_barrier) __syncthreads();
  if (warp != 0) return;
  value = lane < int(blockDim.x) / 32 ? partial[lane] : 0.0f;
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (lane != 0) return;
  sums[blockIdx.x] = value;
  add_global(total, double(value));
}

template <bool with_barrier>
void test_reduction() {
  const int blocks = 5, threads = 128;
  const auto values = numbers<float>(blocks * threads), sums = numbers<float>(blocks);
  double total = 0;
  std::iota(values.get(), values.get() + blocks * threads, 1.0f);
  check(launch(reduce<with_barrier>, blocks, threads, 4 * sizeof(float), nullptr, values.get(), sums.get(), &total));
  check(total == 640.0 * 641.0 / 2, "the sum of all numbers");
  for (int b = 0; b < blocks; ++b) {
    check(sums[b] == std::accumulate(&values[b * threads], &values[b * threads] + threads, 0.0f), "the block's sum");
  }
}

// --------------------------------------------------------------------------------------------------- matrix products

// out (16x8) = 1 + a (16x16) b (16x8). a lies by rows; b by rows (b_by_rows), or by columns.
template <class T, bool b_by_rows>
__global__ void product_of_halves(const T* a, const T* b, float* out) {
  T* shared_a = reinterpret_cast<T*>(dynamic_shared());
  T* shared_b = shared_a + 256;
  const int lane = int(threadIdx.x), row = lane % 8, matrix = lane / 8;
  for (int i = lane; i < 256; i += 32) shared_a[i] = a[i];
  // Twice: ldmatrix loads four tiles, and b has two.
  for (int i = lane; i < 256; i += 32) shared_b[i] = b[i % 128];
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared_a + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
  if (b_by_rows) {
    ldmatrix_x4_trans(fb, shared_b + lane * 8);
  } else {
    ldmatrix_x4(fb, shared_b + row * 16 + matrix * 8 % 16);
  }
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k16(T{}, d, fa, {fb[0], fb[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <class T, bool b_by_rows>
void test_product_of_halves() {
  const auto a = numbers<T>(256), b = numbers<T>(128);
  const auto out = numbers<float>(128);
  const auto value = [](int i) { return float(i * 37 % 101 - 50) / 16; };  // exact in all types
  for (int i = 0; i < 256; ++i) from_acc(value(i), &a[i]);
  for (int i = 0; i < 128; ++i) from_acc(value(i + 5), &b[i]);
  check(launch(product_of_halves<T, b_by_rows>, 1, 32, 1024, nullptr, a.get(), b.get(), out.get()));
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 1;
      for (int k = 0; k < 16; ++k) sum += value(m * 16 + k) * value((b_by_rows ? k * 8 + n : n * 16 + k) + 5);
      check(out[m * 8 + n] == sum, "the plain product");
    }
  }
}

// out (16x8) = a (16x8) b (8x8); a by rows, b by columns.
__global__ void product_tf32(const float* a, const float* b, float* out) {
  auto* shared_a = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* shared_b = shared_a + 128;
  const int lane = int(threadIdx.x), row = lane % 8, matrix = lane / 8;
  for (int i = lane; i < 128; i += 32) shared_a[i] = to_tf32(a[i]);
  for (int i = lane; i < 64; i += 32) shared_b[i] = to_tf32(b[i]);
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared_a + (row + matrix % 2 * 8) * 8 + matrix / 2 * 4);
  ldmatrix_x4(fb, shared_b + row * 8 + matrix % 2 * 4);
  float d[4] = {};
  mma_m16n8k8_tf32(d, fa, {fb[0], fb[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

void test_product_tf32() {
  const auto a = numbers<float>(128), b = numbers<float>(64), out = numbers<float>(128);
  const auto value = [](int i) { return float(i * 37 % 101 - 50) / 16; };
  // 2^-12 is below half a unit of the 10th bit of what it is added to: rounded off.
  for (int i = 0; i < 128; ++i) a[i] = value(i) + (std::abs(value(i)) >= 1 ? 0x1p-12f : 0.0f);
  for (int i = 0; i < 64; ++i) b[i] = value(i + 5);
  check(launch(product_tf32, 1, 32, 192 * sizeof(float), nullptr, a.get(), b.get(), out.get()));
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += value(m * 8 + k) * value(n * 8 + k + 5);
      check(out[m * 8 + n] == sum, "the plain product");
    }
  }
}

__global__ void conversions(const float* values, uint32_t* tf32, uint32_t* packed, float* unpacked) {
  for (int i = 0; i < 5; ++i) tf32[i] = to_tf32(values[i]);
  packed[0] = pack_halves(bfloat16{}, 1, -2);
  packed[1] = pack_halves(float16{}, 1, -2);
  unpack_halves(bfloat16{}, packed[0], unpacked, unpacked + 1);
  unpack_halves(float16{}, packed[1], unpacked + 2, unpacked + 3);
}

void test_conversions() {
  const float values[5] = {1 + 0x1p-11f, -1 - 0x1p-11f, 1 + 0x1p-12f, INFINITY, NAN};
  const float rounded[5] = {1 + 0x1p-10f, -1 - 0x1p-10f, 1, INFINITY, NAN};
  uint32_t tf32[5], packed[2];
  float result[5], unpacked[4];
  check(launch(conversions, 1, 1, 0, nullptr, &values[0], &tf32[0], &packed[0], &unpacked[0]));
  std::memcpy(result, tf32, sizeof(tf32));
  for (int i = 0; i < 4; ++i) check(result[i] == rounded[i], "10 bits, to nearest, ties away from zero");
  check(std::isnan(result[4]), "NaN");
  check(packed[0] == 0xc0003f80u && packed[1] == 0xc0003c00u, "the first in the low half");
  for (int i = 0; i < 4; ++i) check(unpacked[i] == (i % 2 ? -2 : 1), "the same numbers back");
}

// --------------------------------------------------------------------------------------------------------- shuffles

__global__ void shuffles(int* out) {
  const int lane = int(threadIdx.x);
  const unsigned all = 0xffffffffu;
  int* own = out + lane * 6;
  own[0] = __shfl_sync(all, lane, 3);
  own[1] = __shfl_sync(all, lane, 3, 8);
  own[2] = __shfl_up_sync(all, lane, 2);
  own[3] = __shfl_down_sync(all, lane, 2, 16);
  own[4] = __shfl_xor_sync(all, lane, 5);
  own[5] = int(__ballot_sync(all, lane % 2));
}

void test_shuffles() {
  const auto out = numbers<int>(32 * 6);
  check(launch(shuffles, 1, 32, 0, nullptr, out.get()));
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[6] = {3,        lane / 8 * 8 + 3, lane < 2 ? lane : lane - 2, lane % 16 < 14 ? lane + 2 : lane,
                             lane ^ 5, int(0xaaaaaaaau)};
    check(std::memcmp(&out[lane * 6], expected, sizeof(expected)) == 0, "lanes of the sources");
  }
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

// Each thread copies 4 numbers in each of two groups and writes what it sees before and after the waits.
__global__ void copy_in_two_groups(const float* from, float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x * 8;
  copy_async_16(shared, from);
  copy_async_commit();
  copy_async_16(shared + 4, from + 4);
  copy_async_commit();
  float* own = out + threadIdx.x * 4;
  own[0] = shared[3];
  copy_async_wait<1>();
  own[1] = shared[3];
  own[2] = shared[7];
  copy_async_wait<0>();
  own[3] = shared[7];
}

void test_copies() {
  alignas(16) const float from[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  const auto out = numbers<float>(2 * 4);
  check(launch(copy_in_two_groups, 1, 2, 64, nullptr, &from[0], out.get()));
  for (int i = 0; i < 8; i += 4) {
    check(std::isnan(out[i]) && std::isnan(out[i + 2]), "NaN before the wait");
    check(out[i + 1] == 3 && out[i + 3] == 7, "the numbers after the wait");
  }
}

// ---------------------------------------------------------------------------------------------------- shared memory

__global__ void read_uninitialized(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  out[blockIdx.x] = *shared;
  *shared = 1;
}

void test_fresh_shared_memory() {
  float out[3] = {};
  check(launch(read_uninitialized, 3, 1, 60 * 1024, nullptr, &out[0]));
  for (float value : out) check(std::isnan(value), "NaN in every block");
  int count = 0;
  check(launch(read_uninitialized, 1, 1, 1 << 20, nullptr, &out[0]) == cudaErrorInvalidValue, "too much shared memory");
  check(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess, "the error once");
  check(launch(read_uninitialized, 1, 1025, 4, nullptr, &out[0]) == cudaErrorInvalidConfiguration, "too many threads");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  check(count == 4 && multiprocessors() == 4, "4 multiprocessors");
}

// --------------------------------------------------------------------------------------------------------- mistakes

enum class Mistake {
  overrun_shared, overrun_global, misaligned_vector, skipped_barrier, mixed_barriers, other_operation, returned_lane,
  partial_warp, partial_mask, misaligned_row, row_outside, misaligned_copy, copy_outside, misaligned_add, blocks_race,
  missing_syncwarp,
};

template <Mistake mistake>
__global__ void mistaken(float* global, int end) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = int(threadIdx.x);
  const unsigned all = 0xffffffffu;
  uint32_t r[4];
  switch (mistake) {
    case Mistake::overrun_shared: shared[thread == 7 ? end : thread] = 1; break;
    case Mistake::overrun_global: global[thread == 7 ? end : thread] = 1; break;
    case Mistake::misaligned_vector: *reinterpret_cast<float4*>(global + thread) = {}; break;
    case Mistake::skipped_barrier: if (thread != 5) __syncthreads(); break;
    case Mistake::mixed_barriers: if (thread < 7) __syncthreads(); else __syncwarp(); break;
    case Mistake::other_operation: if (thread == 3) __shfl_xor_sync(all, 1, 1); else __shfl_sync(all, 1, 1); break;
    case Mistake::returned_lane: if (thread == 9) return; __shfl_xor_sync(all, 1, 1); break;
    case Mistake::partial_warp: if (thread >= 32) __syncwarp(); break;
    case Mistake::partial_mask: __shfl_xor_sync(0xffffu, 1, 1); break;
    case Mistake::misaligned_row: ldmatrix_x4(r, shared + (thread == 3)); break;
    case Mistake::row_outside: ldmatrix_x4(r, shared + (thread == 3 ? end : 0)); break;
    case Mistake::misaligned_copy: copy_async_16(shared, global + (thread == 3)); break;
    case Mistake::copy_outside: copy_async_16(thread == 3 ? global : shared, global); break;
    case Mistake::misaligned_add: add_global_x4(global + (thread == 3), {1, 1, 1, 1}); break;
    case Mistake::blocks_race: if (thread == 3) global[0] += 1; break;
    // A shuffle between orders nothing.
    case Mistake::missing_syncwarp:
      shared[thread] = 1;
      __shfl_sync(all, 1, 1);
      global[thread] = shared[thread ^ 1];
      break;
  }
}

template <Mistake mistake>
void test_mistake() {
  const int threads = mistake == Mistake::partial_warp ? 40 : 32;
  const auto global = numbers<float4>(10);
  const int blocks = mistake == Mistake::blocks_race ? 2 : 1;
  check(launch(mistaken<mistake>, blocks, threads, 40 * sizeof(float), nullptr, &global[0].x, 40));
}

struct Test {
  const char* name;
  void (*run)();
};
const Test tests[] = {
    {"reduction", test_reduction<true>},
    {"bfloat16", test_product_of_halves<bfloat16, false>},
    {"bfloat16_trans", test_product_of_halves<bfloat16, true>},
    {"float16", test_product_of_halves<float16, false>},
    {"float16_trans", test_product_of_halves<float16, true>},
    {"tf32", test_product_tf32},
    {"conversions", test_conversions},
    {"shuffles", test_shuffles},
    {"copies", test_copies},
    {"fresh_shared_memory", test_fresh_shared_memory},
    {"missing_barrier", test_reduction<false>},
#define MISTAKE(name) {#name, test_mistake<Mistake::name>}
    MISTAKE(overrun_shared),
    MISTAKE(overrun_global),
    MISTAKE(misaligned_vector),
    MISTAKE(skipped_barrier),
    MISTAKE(mixed_barriers),
    MISTAKE(other_operation),
    MISTAKE(returned_lane),
    MISTAKE(partial_warp),
    MISTAKE(partial_mask),
    MISTAKE(misaligned_row),
    MISTAKE(row_outside),
    MISTAKE(misaligned_copy),
    MISTAKE(copy_outside),
    MISTAKE(misaligned_add),
    MISTAKE(blocks_race),
    MISTAKE(missing_syncwarp),
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: self_test NAME\n");
    return 2;
  }
  for (const Test& test : tests) {
    if (std::strcmp(test.name, arguments[1]) != 0) continue;
    try {
      test.run();
      return 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 1;
    }
  }
  std::fprintf(stderr, "no test of the name %s\n", arguments[1]);
  return 2;
}
