// A GPU's blocks on the host: for tests of the kernels' indexing, reductions and barriers.
//
// The threads of a grid are fibers, which go on in turn, forwards and backwards, until the next barrier.
// What a GPU would do in silence, or never end, ends the program with a word.

#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "sanitizers.h"
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
    char order[2];  // in turn, what the watcher knows it by
  };

  // What is done while there is one is the machine's doing, not a thread's.
  struct Outside {
    TL1_UNWATCHED Outside() { watched::go_back_to(now->machine); }
    TL1_UNWATCHED ~Outside() { watched::go_on_with(now->fibers[now->current].watched); }
  };

  // What a block's threads do before comes before what they do afterwards.
  TL1_UNWATCHED void sync() {
    Barrier& barrier = of_blocks[current / THREADS];
    char* const order = barrier.order + barrier.generation % 2;
    watched::arrive(order);
    {
      Outside outside;
      wait(barrier);
    }
    watched::leave(order);
  }
  TL1_UNWATCHED void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    progress++;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      barrier.generation++;
      return;
    }
    while (barrier.generation == generation) yield();
  }

  TL1_UNWATCHED void yield() { fibers[current].context.leave_for(scheduler); }

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

  struct Copy {  // to shared memory, under way
    unsigned char* to;
    const void* from;
    int bytes, batch;
  };
  struct Copies {
    std::vector<Copy> under_way;
    int batch = 0;
  };
  std::vector<Copies> copies;  // of each fiber

 private:
  static constexpr size_t STACK = 128 << 10;
  static constexpr size_t GUARD = 1 << 10;  // bytes behind a block's shared memory
  struct Fiber {
    Context context;
    watched::Thread watched;
    bool done = false;
  };
  const std::function<void()>& kernel;
  std::vector<Fiber> fibers;
  unsigned char* stacks;
  Context scheduler;
  watched::Thread machine = watched::begin_machine();
  char finish;  // what the watcher knows the grid's end by
  bool backwards = false;  // every second round, so that who is first differs

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
    watched::end_machine();
  }

  static TL1_UNWATCHED void enter() {
    watched::go_on_with(now->fibers[now->current].watched);
    now->kernel();
    watched::arrive(&now->finish);
    watched::go_back_to(now->machine);
    if (!now->copies[now->current].under_way.empty()) fail("a thread ends before its copies are there");
    now->fibers[now->current].done = true;
    now->progress++;
    now->yield();
  }

  TL1_UNWATCHED void run() {
    // What a kernel does not write, it must not read: a NaN in every type.
    for (auto& bytes : memory) memset(bytes.data(), 0xff, bytes.size());
    for (size_t i = 0; i < fibers.size(); i++) {
      fibers[i].watched = watched::begin();
      fibers[i].context.begin_at(&Emulation::enter, stacks + i * STACK, STACK);
    }
    for (bool left = true; left;) {
      left = false;
      const long before = progress;
      backwards = !backwards;
      for (int turn = 0; turn < blocks * THREADS; turn++) {  // each fiber goes on once
        current = backwards ? blocks * THREADS - 1 - turn : turn;
        if (fibers[current].done) continue;
        left = true;
        scheduler.leave_for(fibers[current].context);
      }
      if (left && progress == before) fail("threads wait for what the others never do");
    }
    watched::leave(&finish);
    for (Fiber& fiber : fibers) watched::end(fiber.watched);
    for (const auto& bytes : memory) {
      for (size_t i = 0; i < GUARD; i++) {
        if (bytes[bytes.size() - 1 - i] != 0xff) fail("a block writes beyond its shared memory");
      }
    }
  }
};

TL1_UNWATCHED int fiber() { return Emulation::now->current; }
TL1_DEVICE int thread() { return fiber() % THREADS; }
TL1_DEVICE int thread_anew() { return thread(); }
TL1_DEVICE int block() { return fiber() / THREADS; }
TL1_UNWATCHED int blocks() { return Emulation::now->blocks; }
TL1_UNWATCHED void sync() { Emulation::now->sync(); }
TL1_UNWATCHED unsigned char* shared() {
  unsigned char* const bytes = Emulation::now->memory[block()].data();
  return bytes + (16 - reinterpret_cast<uintptr_t>(bytes) % 16) % 16;
}
// Not watched: what one block measures another may write, with what the former's measures come to. No
// barrier says that it does so later, but that it needs them.
template <class T>
TL1_UNWATCHED void load_global(T& x, const T* at) {
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
TL1_UNWATCHED void copy_ahead(unsigned char* to, const void* from) {
  struct alignas(BYTES) Unit { unsigned char bytes[BYTES]; };
  Emulation::check_aligned(static_cast<const Unit*>(from));
  Emulation::check_aligned(reinterpret_cast<const Unit*>(to));
  watched::write(to, BYTES);
  Emulation::Outside outside;
  memset(to, 0xff, BYTES);
  Emulation::Copies& mine = Emulation::now->copies[fiber()];
  mine.under_way.push_back({to, from, BYTES, mine.batch});
}
TL1_UNWATCHED void commit_copies() { Emulation::now->copies[fiber()].batch++; }
template <int N>
TL1_UNWATCHED void await_copies() {
  Emulation::Outside outside;
  Emulation::Copies& mine = Emulation::now->copies[fiber()];
  std::vector<Emulation::Copy>& all = mine.under_way;
  const auto later = std::find_if(all.begin(), all.end(), [&](auto& one) { return one.batch >= mine.batch - N; });
  std::for_each(all.begin(), later, [](auto& one) { memcpy(one.to, one.from, one.bytes); });
  all.erase(all.begin(), later);
}
TL1_DEVICE int exponent_of(int power_of_two) { return __builtin_ctz(power_of_two); }
TL1_DEVICE uint32_t product_high(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
template <class T>
TL1_UNWATCHED T shuffle_xor(T x, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Emulation::Outside outside;
  Emulation& machine = *Emulation::now;
  Emulation::Barrier& warp = machine.of_warps[fiber() / WARP];
  memcpy(&machine.exchanged[fiber()], &x, sizeof(T));
  machine.wait(warp);
  memcpy(&x, &machine.exchanged[fiber() ^ lanes], sizeof(T));
  machine.wait(warp);
  return x;
}
TL1_UNWATCHED int take_ticket(int32_t* counter) {
  Emulation::Outside outside;
  return (*counter)++;
}
TL1_UNWATCHED void put(Post* at, Post post) {
  Emulation::Outside outside;
  *at = post;
  Emulation::now->progress++;
}
TL1_UNWATCHED Post look(const Post* at) {
  Emulation::Outside outside;
  return *at;
}
TL1_UNWATCHED uint32_t await(const Post* at, uint32_t launch) {
  Emulation::Outside outside;
  while (at->launch != launch) Emulation::now->yield();
  Emulation::now->progress++;
  return at->number;
}

}  // namespace tl1::gpu
