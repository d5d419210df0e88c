// SPDX-License-Identifier: BSD-3-Clause
// A block's threads as fibers of the calling thread: one runs until it waits or returns, then the next that can.
#include "block.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dynconv_emulation {
namespace {

constexpr size_t page = 4096, stack_bytes = 256 * 1024;

struct Stack {
  // A page that can't be accessed lies below: an overflow is a crash.
  Stack() {
    void* memory = mmap(nullptr, page + stack_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    bottom = static_cast<unsigned char*>(memory) + page;
    if (mprotect(bottom, stack_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  Stack(const Stack&) = delete;  // kept until the process ends

  unsigned char* bottom;
};

struct Fiber {
  ucontext_t context;
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Thread* thread = nullptr;
  const Barrier* barrier = nullptr;  // where it sleeps, in which round
  uint64_t round = 0;
  bool returned = false;

  bool can_run() const {
    if (returned) return false;
    return !barrier || barrier->round != round || thread->block->failed.load(std::memory_order_relaxed);
  }
};

std::vector<std::unique_ptr<Stack>> stacks;
std::vector<Fiber> fibers;
Fiber host;  // the launch
Fiber* previous = nullptr;

// The C library's. AddressSanitizer's would forget, at every switch, which bytes of a stack are off limits.
const auto swap_context =
    reinterpret_cast<decltype(&swapcontext)>(dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "swapcontext"));

// Every fiber that begins or goes on calls this first.
void switched(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  // The host's own stack is known only from here.
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &previous->stack, &previous->bytes);
#else
  (void)fiber;
#endif
}

void switch_to(Fiber& from, Fiber& to) {
  previous = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from.returned ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
  swap_context(&from.context, &to.context);
  switched(from);
}

// The next fiber after this one that can run; the host if there is none.
Fiber& next(const Fiber& fiber) {
  const size_t index = size_t(&fiber - fibers.data());
  for (size_t i = index + 1; i < fibers.size(); ++i)
    if (fibers[i].can_run()) return fibers[i];
  for (size_t i = 0; i < index; ++i)
    if (fibers[i].can_run()) return fibers[i];
  return host;
}

void begin(int index) {
  Fiber& fiber = fibers[size_t(index)];
  switched(fiber);
  enter(*fiber.thread);
  run_thread(*fiber.thread);
  fiber.returned = true;
  switch_to(fiber, next(fiber));
}

// Makes the fiber one that will begin().
void prepare(Fiber& fiber, Thread& thread, int index) {
  unsigned char* stack = stacks[size_t(index)]->bottom;
#ifdef __SANITIZE_ADDRESS__
  // What the last fiber on this stack left.
  __asan_unpoison_memory_region(stack, stack_bytes);
#endif
  fiber.thread = &thread;
  fiber.stack = stack;
  fiber.bytes = stack_bytes;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(begin), 1, index);
}

}  // namespace

bool sleep(Thread& thread, Barrier& barrier, Lock& lock) {
  Fiber& fiber = fibers[thread.index];
  fiber.barrier = &barrier;
  fiber.round = barrier.round;
  lock.unlock();
  switch_to(fiber, next(fiber));
  enter(thread);
  fiber.barrier = nullptr;
  return barrier.round != fiber.round;
}

void wake_all(Barrier&) {}

void run_blocks(const Launch& launch) {
  while (stacks.size() < launch.threads) stacks.push_back(std::make_unique<Stack>());
  for (unsigned index = 0; index < launch.blocks; ++index) {
    Block block(launch, index);
    fibers = std::vector<Fiber>(launch.threads);
    for (unsigned i = 0; i < launch.threads; ++i) prepare(fibers[i], block.threads[i], int(i));
    switch_to(host, fibers[0]);
    current = nullptr;
    if (block.error) std::rethrow_exception(block.error);
    for (const Fiber& fiber : fibers)
      if (!fiber.returned) throw std::logic_error("CUDA emulation: a thread is left over");
  }
}

}  // namespace dynconv_emulation
