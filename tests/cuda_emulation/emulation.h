// SPDX-License-Identifier: BSD-3-Clause
// A host emulation of CUDA's execution model: what cuda_runtime.h and ptx.h of this folder are built on.
//
// The blocks of a grid run one after another. The threads of a block are fibers of the calling thread, switched where
// they wait for each other (the default, for AddressSanitizer and UBSan), or, with DYNCONV_EMULATION_THREADS, threads
// of the operating system (for ThreadSanitizer, to which blocks look concurrent: nothing orders one block's accesses
// after another's). Blocks and grids have one dimension. Shared memory is dynamic only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dynconv_emulation {

constexpr int warp_size = 32;
constexpr int max_threads_per_block = 1024;
constexpr size_t max_shared_bytes_by_default = 48 * 1024;

// What devices differ in. The environment variables DYNCONV_EMULATION_MULTIPROCESSORS and DYNCONV_EMULATION_SHARED_BYTES
// replace 4, and the 227 KiB of compute capability 9.0; they are read each time.
int num_multiprocessors();
size_t max_shared_bytes();

// A mistake of a kernel. The message names the kernel, the block and the thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls thread() as every thread of every block; throws the first Error. kernel serves messages.
void run(const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
         const std::function<void()>& thread);

// The rest is called by the threads of a kernel.

// Throws an Error about the calling thread.
[[noreturn]] void fail(const std::string& message);

void block_barrier(const char* operation);
void warp_barrier(const char* operation);

// The block's dynamic shared memory: a heap block of exactly the bytes of the launch, filled with 0xFF.
unsigned char* shared_memory();
// Fails unless the 16 bytes are aligned to 16 bytes and lie in the block's shared memory.
void require_shared_16(const void* address, const char* operation);
// Fails unless the address is aligned to 16 bytes and lies outside the block's shared memory.
void require_global_16(const void* address, const char* operation);

// cp.async: reads global memory at once, writes shared memory in the wait, and until then fills that with 0xFF.
void copy_async_start(void* shared, const void* global);
void copy_async_commit();
void copy_async_wait(int pending);

// What the lanes of a warp show to each other in one operation, by lane.
constexpr size_t exchange_bytes = 32;
template <class T>
using Exchanged = std::array<T, warp_size>;

int lane();
void exchange_memory(const char* operation, const void* value, size_t bytes, void* values);

// Every lane shows a value and waits for the others'. This orders no accesses to memory in ThreadSanitizer's eyes.
template <class T>
Exchanged<T> exchange(const char* operation, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= exchange_bytes);
  Exchanged<T> values;
  exchange_memory(operation, &value, sizeof(T), values.data());
  return values;
}

}  // namespace dynconv_emulation
