// A GPU's blocks on the host: for tests of the kernels' indexing, reductions and barriers.
//
// The threads of a grid are fibers, which go on in turn, forwards and backwards, until the next barrier.
// What a GPU would do in silence, or never end, ends the program with a word.

#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#include "work.h"

#define TL1_DEVICE __attribute__((always_inline)) inline

namespace tl1::gpu {

class Emulation {
 public:
  // Runs `kernel` in every thread of a grid.
  static void run(int blocks, size_t shared_bytes, const std::function<void()>& kernel) {
    Emulation(blocks, shared_bytes, kernel).run();
  }

  struct Barrier {
    int expected = 0, arrived = 0;
    unsigned generation = 0;
  };

  void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    progress++;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      barrier.generation++;
      return;
    }
    while (barrier.generation == generation) yield();
  }

  void yield() {
    if (!_setjmp(fibers[current].back)) _longjmp(scheduler, 1);
  }

  [[noreturn]] static void fail(const char* why) {
    fprintf(stderr, "tl1kernels: emulated: %s\n", why);
    abort();
  }
  template <class T>
  static void check_aligned(const T* at) {
    const bool aligned = reinterpret_cast<uintptr_t>(at) % sizeof(T) == 0;
    if (!aligned) fail("an access to memory at no multiple of its size");
  }

  static inline thread_local Emulation* now = nullptr;
  int blocks;
  int current = 0;  // fiber
  long progress = 0;
  std::vector<Barrier> of_warps, of_blocks;
  std::vector<std::vector<unsigned char>> memory;  // shared, of each block
  std::vector<uint64_t> exchanged;                 // by shuffles, of each fiber
  struct Copy {
    unsigned char* to;
    const void* from;
    int bytes, batch;
  };
  struct Copies {
    std::vector<Copy> under_way;
    int batch = 0;
  };
  std::vector<Copies> copies;  // to shared memory, of each fiber

 private:
  static constexpr size_t STACK = 128 << 10;
  static constexpr size_t GUARD = 1 << 10;  // bytes behind a block's shared memory
  struct Fiber {
    ucontext_t start;
    jmp_buf back;
    bool started = false, done = false;
  };
  const std::function<void()>& kernel;
  std::vector<Fiber> fibers;
  unsigned char* stacks;
  jmp_buf scheduler;
  int turn = 0;  // of a round, in which each fiber goes on once
  bool backwards = false;  // every second round, so that who is first differs
  bool left = false;  // fibers that are not done
  long before = 0;    // progress, at the beginning of a round

  Emulation(int blocks, size_t shared_bytes, const std::function<void()>& kernel)
      : blocks(blocks), of_warps(blocks * THREADS / WARP), of_blocks(blocks),
        memory(blocks, std::vector<unsigned char>(16 + shared_bytes + GUARD)), exchanged(blocks * THREADS),
        copies(blocks * THREADS), kernel(kernel), fibers(blocks * THREADS),
        stacks(static_cast<unsigned char*>(aligned_alloc(64, blocks * THREADS * STACK))) {
    for (Barrier& barrier : of_warps) barrier.expected = WARP;
    for (Barrier& barrier : of_blocks) barrier.expected = THREADS;
    now = this;
  }
  ~Emulation() {
    now = nullptr;
    free(stacks);
  }

  static void enter() {
    now->kernel();
    if (!now->copies[now->current].under_way.empty()) fail("a thread ends before its copies are there");
    now->fibers[now->current].done = true;
    now->progress++;
    now->yield();
  }

  void run() {
    // What a kernel does not write, it must not read: a NaN in every type.
    for (auto& bytes : memory) memset(bytes.data(), 0xff, bytes.size());
    for (size_t i = 0; i < fibers.size(); i++) {
      fibers[i].started = fibers[i].done = false;
      getcontext(&fibers[i].start);
      fibers[i].start.uc_stack.ss_sp = stacks + i * STACK;
      fibers[i].start.uc_stack.ss_size = STACK;
      fibers[i].start.uc_link = nullptr;
      makecontext(&fibers[i].start, &Emulation::enter, 0);
    }
    for (left = true; left;) {
      left = false;
      before = progress;
      backwards = !backwards;
      // No local variable counts: it would not outlive the jumps.
      for (turn = 0; turn < blocks * THREADS; turn++) {
        current = backwards ? blocks * THREADS - 1 - turn : turn;
        if (fibers[current].done) continue;
        left = true;
        if (_setjmp(scheduler)) continue;
        if (fibers[current].started) _longjmp(fibers[current].back, 1);
        fibers[current].started = true;
        progress++;
        setcontext(&fibers[current].start);
      }
      if (left && progress == before) fail("threads wait for what the others never do");
    }
    for (const auto& bytes : memory) {
      for (size_t i = 0; i < GUARD; i++) {
        if (bytes[bytes.size() - 1 - i] != 0xff) fail("a block writes beyond its shared memory");
      }
    }
  }
};

TL1_DEVICE int thread() { return Emulation::now->current % THREADS; }
TL1_DEVICE int thread_anew() { return thread(); }
TL1_DEVICE int block() { return Emulation::now->current / THREADS; }
TL1_DEVICE int blocks() { return Emulation::now->blocks; }
inline void sync() { Emulation::now->wait(Emulation::now->of_blocks[block()]); }
template <class T>
TL1_DEVICE void load_global(T& x, const T* at) {
  Emulation::check_aligned(at);
  x = *at;
}
template <class T>
TL1_DEVICE void store_global(const T& x, T* at) {
  Emulation::check_aligned(at);
  *at = x;
}
TL1_DEVICE void bring_near(const void*) {}
// What is under way is a NaN.
template <int BYTES>
void copy_ahead(unsigned char* to, const void* from) {
  struct alignas(BYTES) Unit { unsigned char bytes[BYTES]; };
  Emulation::check_aligned(static_cast<const Unit*>(from));
  Emulation::check_aligned(reinterpret_cast<const Unit*>(to));
  memset(to, 0xff, BYTES);
  Emulation::Copies& mine = Emulation::now->copies[Emulation::now->current];
  mine.under_way.push_back({to, from, BYTES, mine.batch});
}
inline void commit_copies() { Emulation::now->copies[Emulation::now->current].batch++; }
template <int N>
void await_copies() {
  Emulation::Copies& mine = Emulation::now->copies[Emulation::now->current];
  std::vector<Emulation::Copy> later;
  for (const Emulation::Copy& one : mine.under_way) {
    one.batch < mine.batch - N ? static_cast<void>(memcpy(one.to, one.from, one.bytes)) : later.push_back(one);
  }
  mine.under_way.swap(later);
}
TL1_DEVICE int exponent_of(int power_of_two) { return __builtin_ctz(power_of_two); }
TL1_DEVICE uint32_t product_high(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline unsigned char* aligned(unsigned char* bytes) {
  return bytes + (16 - reinterpret_cast<uintptr_t>(bytes) % 16) % 16;
}
TL1_DEVICE unsigned char* shared() { return aligned(Emulation::now->memory[block()].data()); }
template <class T>
T shuffle_xor(T x, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Emulation& machine = *Emulation::now;
  Emulation::Barrier& warp = machine.of_warps[machine.current / WARP];
  memcpy(&machine.exchanged[machine.current], &x, sizeof(T));
  machine.wait(warp);
  memcpy(&x, &machine.exchanged[machine.current ^ lanes], sizeof(T));
  machine.wait(warp);
  return x;
}
inline int take_ticket(int32_t* counter) { return (*counter)++; }
inline void put(Post* at, Post post) {
  *at = post;
  Emulation::now->progress++;
}
inline Post look(const Post* at) { return *at; }
inline uint32_t await(const Post* at, uint32_t launch) {
  while (at->launch != launch) Emulation::now->yield();
  Emulation::now->progress++;
  return at->number;
}

}  // namespace tl1::gpu
