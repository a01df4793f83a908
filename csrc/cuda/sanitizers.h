// What the compiler's sanitizers have to know of emulated threads (emulation.h): who runs, in what order,
// and when stacks change. In other builds only the stacks are left of it.
//
// To ThreadSanitizer each of them is a thread, and only barriers put threads in an order. So it finds what
// compute-sanitizer's racecheck finds on a GPU, and two writes to one place of global memory.

#pragma once

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_write_range(void*, long);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
// Of functions whose accesses are the machine's, not a thread's.
#define TL1_UNWATCHED __attribute__((noinline, no_sanitize("thread"))) inline
#else
#define TL1_UNWATCHED inline
#endif

namespace tl1::gpu::watched {

using Thread = void*;

#ifdef __SANITIZE_THREAD__
// Of the thread in which the machine runs, whose accesses count for nothing until `end_machine`.
inline Thread begin_machine() {
  __tsan_ignore_thread_begin();
  return __tsan_get_current_fiber();
}
inline void end_machine() { __tsan_ignore_thread_end(); }
inline Thread begin() { return __tsan_create_fiber(0); }
inline void end(Thread x) { __tsan_destroy_fiber(x); }
// What the machine has done comes before what the thread does; not the other way round.
inline void go_on_with(Thread x) { __tsan_switch_to_fiber(x, 0); }
inline void go_back_to(Thread machine) { __tsan_switch_to_fiber(machine, 1); }
// What is done before any thread arrives at a barrier comes before what is done once one has left it.
inline void arrive(char* barrier) { __tsan_release(barrier); }
inline void leave(char* barrier) {
  static const bool planted = getenv("TL1KERNELS_PLANTED_RACES");  // as if there were no barriers
  if (!planted) __tsan_acquire(barrier);
}
inline void write(void* at, int bytes) { __tsan_write_range(at, bytes); }
#else
inline Thread begin_machine() { return nullptr; }
inline void end_machine() {}
inline Thread begin() { return nullptr; }
inline void end(Thread) {}
inline void go_on_with(Thread) {}
inline void go_back_to(Thread) {}
inline void arrive(char*) {}
inline void leave(char*) {}
inline void write(void*, int) {}
#endif

}  // namespace tl1::gpu::watched

namespace tl1::gpu {

// Where a stack has been left.
class Context {
  ucontext_t at;
  jmp_buf back;
  bool left = false;

 public:
  void begin_at(void (*function)(), unsigned char* stack, size_t bytes) {
    getcontext(&at);
    at.uc_stack.ss_sp = stack;
    at.uc_stack.ss_size = bytes;
    at.uc_link = nullptr;
    makecontext(&at, function, 0);
  }

  // Leaves the running stack here and goes on with the other. A frame of its own, which setjmp needs.
  __attribute__((noinline)) TL1_UNWATCHED void leave_for(Context& other) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    swapcontext(&at, &other.at);
#else  // twice as fast: no signal masks
    left = true;
    if (_setjmp(back)) return;
    if (other.left) _longjmp(other.back, 1);
    setcontext(&other.at);
#endif
  }
};

}  // namespace tl1::gpu
