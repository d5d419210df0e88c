// SPDX-License-Identifier: BSD-3-Clause
// Barriers, exchanges, asynchronous copies and their errors.
#include "block.h"
#include "cuda_runtime.h"

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace dynconv_emulation {

namespace {

size_t from_environment(const char* name, size_t otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr && *value != '\0' ? size_t(std::stoull(value)) : otherwise;
}

}  // namespace

int num_multiprocessors() { return int(from_environment("DYNCONV_EMULATION_MULTIPROCESSORS", 4)); }
size_t max_shared_bytes() { return from_environment("DYNCONV_EMULATION_SHARED_BYTES", 227 * 1024); }


constinit thread_local Thread* current = nullptr;

namespace {

// Ends the other threads of a block in which one failed.
struct Cancelled {};

// While one lives, ThreadSanitizer sees neither this thread's accesses nor what it waits for: shuffles and the like
// don't order the lanes' accesses to memory on the device, so they must not hide a missing __syncwarp.
struct Unordered {
#ifdef __SANITIZE_THREAD__
  Unordered() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unordered() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
#else
  Unordered() {}
#endif
  Unordered(const Unordered&) = delete;
};

std::string kernel_name(const void* kernel) {
  char name[1024] = "";
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  // It looks up what lies before an address, for return addresses.
  __sanitizer_symbolize_pc(const_cast<char*>(static_cast<const char*>(kernel)) + 1, "%f", name, sizeof(name));
#else
  std::snprintf(name, sizeof(name), "at %p", kernel);
#endif
  return name;
}

std::string location(const Thread& thread) {
  return "kernel " + kernel_name(thread.block->launch.kernel) + ", block " + std::to_string(thread.block->index) +
         ", thread " + std::to_string(thread.index);
}

Thread& running_thread() {
  if (!current) throw Error("CUDA emulation: called outside a kernel");
  return *current;
}

void arrive_and_wait(Barrier& barrier, int members, const char* operation) {
  Thread& thread = *current;
  Block& block = *thread.block;
  Lock lock(barrier.mutex);
  if (block.failed.load(std::memory_order_relaxed)) throw Cancelled();
  if (barrier.returned) {
    fail(std::string(operation) + ": " + std::to_string(barrier.returned) + " of the " + std::to_string(members) +
         " threads that must take part have returned");
  }
  if (barrier.arrived && std::strcmp(barrier.operation, operation) != 0) {
    fail(std::string(operation) + ": threads that must take part are at " + barrier.operation);
  }
  barrier.operation = operation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.round;
    block.waiting.fetch_sub(members - 1, std::memory_order_relaxed);
    wake_all(barrier);
    return;
  }
  // A thread counts as waiting until its barrier opens, so this is exact.
  if (block.waiting.fetch_add(1, std::memory_order_relaxed) + 1 == int(block.launch.threads)) {
    fail(std::string(operation) + ": all threads of the block wait, " + std::to_string(barrier.arrived) + " of the " +
         std::to_string(members) + " that must take part are here");
  }
  if (!sleep(thread, barrier, lock)) throw Cancelled();
}

// Nobody may wait for a thread that returns.
void leave(Barrier& barrier) {
  Lock lock(barrier.mutex);
  if (barrier.arrived) {
    fail("returns while " + std::to_string(barrier.arrived) + " threads wait for it at " + barrier.operation);
  }
  ++barrier.returned;
}

void record_error(Block& block) {
  {
    std::lock_guard<std::mutex> lock(block.error_mutex);
    if (!block.error) block.error = std::current_exception();
  }
  block.failed.store(true, std::memory_order_relaxed);
  const auto wake = [](Barrier& barrier) {
    Lock lock(barrier.mutex);
    wake_all(barrier);
  };
  wake(block.barrier);
  for (Warp& warp : block.warps) wake(warp.barrier);
}

Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.index / warp_size]; }

void require_aligned_16(const void* address, const char* operation) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    fail(std::string(operation) + ": an address is not aligned to 16 bytes");
  }
}

bool overlaps_shared_memory(const void* address, size_t bytes) {
  const Block& block = *running_thread().block;
  const auto begin = reinterpret_cast<uintptr_t>(block.shared), at = reinterpret_cast<uintptr_t>(address);
  return at < begin + block.launch.shared_bytes && at + bytes > begin;
}

// Called after AddressSanitizer's report.
[[maybe_unused]] void report_location() {
  if (current) std::fprintf(stderr, "CUDA emulation: in %s\n", location(*current).c_str());
}

}  // namespace

Block::Block(const Launch& launch, unsigned index)
    : launch(launch), index(index), warps((launch.threads + warp_size - 1) / warp_size), threads(launch.threads) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, launch.shared_bytes)) throw std::bad_alloc();
  shared = static_cast<unsigned char*>(memory);
  std::memset(shared, 0xFF, launch.shared_bytes);
  for (unsigned i = 0; i < launch.threads; ++i) {
    threads[i].block = this;
    threads[i].index = i;
  }
}

Block::~Block() { std::free(shared); }

void enter(Thread& thread) {
  current = &thread;
  threadIdx = {thread.index, 0, 0};
  blockIdx = {thread.block->index, 0, 0};
  blockDim = dim3(thread.block->launch.threads);
  gridDim = dim3(thread.block->launch.blocks);
}

void run_thread(Thread& thread) {
  Block& block = *thread.block;
  try {
    if (block.failed.load(std::memory_order_relaxed)) return;
    block.launch.thread();
    leave(warp_of(thread).barrier);
    leave(block.barrier);
  } catch (const Cancelled&) {
  } catch (...) {
    record_error(block);
  }
}

void run(const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
         const std::function<void()>& thread) {
  static std::mutex mutex;  // one grid at a time
  const std::lock_guard<std::mutex> lock(mutex);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_set_death_callback(report_location);
#endif
  run_blocks({kernel, blocks, threads, shared_bytes, thread});
}

void fail(const std::string& message) {
  throw Error("CUDA emulation: " + location(running_thread()) + ": " + message);
}

void block_barrier(const char* operation) {
  Block& block = *running_thread().block;
  arrive_and_wait(block.barrier, int(block.launch.threads), operation);
}

void warp_barrier(const char* operation) {
  Thread& thread = running_thread();
  if (thread.index / warp_size * warp_size + warp_size > thread.block->launch.threads) {
    fail(std::string(operation) + ": the block's last warp has only " +
         std::to_string(thread.block->launch.threads % warp_size) + " threads");
  }
  arrive_and_wait(warp_of(thread).barrier, warp_size, operation);
}

int lane() { return int(running_thread().index % warp_size); }

void exchange_memory(const char* operation, const void* value, size_t bytes, void* values) {
  Thread& thread = running_thread();
  const Unordered unordered;
  unsigned char* slot = warp_of(thread).slots[thread.exchanges++ % 2];
  std::memcpy(slot + size_t(lane()) * bytes, value, bytes);
  warp_barrier(operation);
  std::memcpy(values, slot, warp_size * bytes);
}

unsigned char* shared_memory() { return running_thread().block->shared; }

void require_shared_16(const void* address, const char* operation) {
  require_aligned_16(address, operation);
  const Block& block = *running_thread().block;
  const auto begin = reinterpret_cast<uintptr_t>(block.shared), at = reinterpret_cast<uintptr_t>(address);
  if (at < begin || at + 16 > begin + block.launch.shared_bytes) {
    fail(std::string(operation) + ": an address outside the " + std::to_string(block.launch.shared_bytes) +
         " bytes of shared memory, at byte " + std::to_string(int64_t(at - begin)));
  }
}

void require_global_16(const void* address, const char* operation) {
  require_aligned_16(address, operation);
  if (overlaps_shared_memory(address, 16)) fail(std::string(operation) + ": an address in shared memory");
}

void copy_async_start(void* shared, const void* global) {
  require_shared_16(shared, "copy_async_16");
  AsyncCopy copy = {shared, {}};
  if (global != nullptr) {
    require_global_16(global, "copy_async_16");
    std::memcpy(copy.bytes, global, 16);
  }
  std::memset(shared, 0xFF, 16);
  running_thread().open_group.push_back(copy);
}

void copy_async_commit() {
  Thread& thread = running_thread();
  thread.groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}

void copy_async_wait(int pending) {
  Thread& thread = running_thread();
  for (; thread.groups.size() > size_t(pending); thread.groups.pop_front())
    for (const AsyncCopy& copy : thread.groups.front()) std::memcpy(copy.to, copy.bytes, 16);
}

}  // namespace dynconv_emulation
