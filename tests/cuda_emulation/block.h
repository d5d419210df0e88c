// SPDX-License-Identifier: BSD-3-Clause
// The state of a block that runs, inside the emulation. fibers.cpp or os_threads.cpp say how its threads run and sleep.
#pragma once

#include "emulation.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <vector>

namespace dynconv_emulation {

struct Block;

using Lock = std::unique_lock<std::mutex>;

struct Barrier {
  // Of this barrier alone: a mutex that barriers shared would order threads that nothing orders on the device.
  std::mutex mutex;
  std::condition_variable opened;  // os_threads.cpp
  int arrived = 0;                 // in this round
  int returned = 0;                // threads that have left the kernel
  uint64_t round = 0;
  const char* operation = nullptr;  // what those arrived call
};

struct AsyncCopy {
  void* to;
  unsigned char bytes[16];
};

struct Thread {
  Block* block = nullptr;
  unsigned index = 0;
  unsigned exchanges = 0;
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;  // committed, not waited for
};

struct Warp {
  Barrier barrier;
  // Exchanges take turns with two slots. That suffices: a lane writes to a slot again two exchanges later, and gets
  // there only through the barrier of the exchange between, which every lane reaches after it has read the first.
  unsigned char slots[2][warp_size * exchange_bytes];
};

struct Launch {
  const void* kernel;
  unsigned blocks, threads;
  size_t shared_bytes;
  const std::function<void()>& thread;
};

struct Block {
  Block(const Launch& launch, unsigned index);
  ~Block();
  Block(const Block&) = delete;

  const Launch& launch;
  unsigned index;
  unsigned char* shared;
  Barrier barrier;
  std::deque<Warp> warps;
  std::deque<Thread> threads;
  // Used relaxed: they must not order the threads' own accesses in ThreadSanitizer's eyes.
  std::atomic<int> waiting = 0;
  std::atomic<unsigned> running;  // os_threads.cpp
  std::atomic<bool> failed = false;
  std::mutex error_mutex;
  std::exception_ptr error;  // the first
};

// The emulated thread that runs now; null on the host.
extern constinit thread_local Thread* current;

// Makes a thread the current one, with its threadIdx and so on.
void enter(Thread& thread);
// The whole life of a thread; doesn't throw.
void run_thread(Thread& thread);

// ------------------------------------------------------------------------------- fibers.cpp or os_threads.cpp

// Sleeps until the barrier's round ends, or the block has failed; says whether the round has ended.
bool sleep(Thread& thread, Barrier& barrier, Lock& lock);
void wake_all(Barrier& barrier);
void run_blocks(const Launch& launch);

}  // namespace dynconv_emulation
