// SPDX-License-Identifier: BSD-3-Clause
// A block's threads as threads of the operating system, for ThreadSanitizer.
//
// Blocks run one after another, but the launch learns of a block's end only through a relaxed atomic, and joins its
// threads when many are left over. So to ThreadSanitizer the accesses of two blocks are unordered, as on the device.
#include "block.h"

#include <pthread.h>

#include <chrono>
#include <memory>
#include <thread>

namespace dynconv_emulation {
namespace {

// ThreadSanitizer has room for 8000.
constexpr size_t max_threads_left = 2048;

void run_os_thread(Thread& thread) {
  // ThreadSanitizer's report shows it.
  const std::string name = "b" + std::to_string(thread.block->index) + " t" + std::to_string(thread.index);
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
  enter(thread);
  run_thread(thread);
  thread.block->running.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace

bool sleep(Thread& thread, Barrier& barrier, Lock& lock) {
  const uint64_t round = barrier.round;
  const std::atomic<bool>& failed = thread.block->failed;
  barrier.opened.wait(lock, [&] { return barrier.round != round || failed.load(std::memory_order_relaxed); });
  return barrier.round != round;
}

void wake_all(Barrier& barrier) { barrier.opened.notify_all(); }

void run_blocks(const Launch& launch) {
  std::deque<std::unique_ptr<Block>> blocks;  // with their shared memory, which another block's must not overlap
  std::vector<std::thread> threads;
  std::exception_ptr error;
  const auto join = [&] {
    for (std::thread& thread : threads) thread.join();
    threads.clear();
    for (const auto& block : blocks)
      if (!error) error = block->error;
    blocks.clear();
  };
  for (unsigned index = 0; index < launch.blocks; ++index) {
    blocks.push_back(std::make_unique<Block>(launch, index));
    Block& block = *blocks.back();
    block.running.store(launch.threads, std::memory_order_relaxed);
    for (Thread& thread : block.threads) threads.emplace_back([&] { run_os_thread(thread); });
    while (block.running.load(std::memory_order_relaxed)) std::this_thread::sleep_for(std::chrono::microseconds(50));
    const bool failed = block.failed.load(std::memory_order_relaxed);
    if (failed || threads.size() + launch.threads > max_threads_left) join();
    if (failed) break;
  }
  join();
  if (error) std::rethrow_exception(error);
}

}  // namespace dynconv_emulation
