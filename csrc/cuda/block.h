// What a thread can ask of its block and of others: on a GPU, or emulated on the host.

#pragma once

#include <stdint.h>

#include "work.h"

#ifdef __CUDACC__
#define TL1_DEVICE __device__ __forceinline__

namespace tl1::gpu {

TL1_DEVICE int thread() { return threadIdx.x; }
// The same, asked for anew, so that the compiler keeps nothing that it computes from it in registers
// from one item to the next: the loops over weights have none to spare.
TL1_DEVICE int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
TL1_DEVICE int block() { return blockIdx.x; }
TL1_DEVICE int blocks() { return gridDim.x; }
TL1_DEVICE void sync() { __syncthreads(); }
TL1_DEVICE unsigned char* shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
// What lies in global memory, in one access: the compiler, which has the address from a table, could
// not tell that it does. Volatile keeps them in the order of the source: loads in flight together.
template <class T>
TL1_DEVICE void load_global(T& x, const T* at) {
  const size_t from = __cvta_generic_to_global(at);
  uint32_t raw[4];
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3]) : "l"(from));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(raw[0]), "=r"(raw[1]) : "l"(from));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(raw[0]) : "l"(from));
  } else {
    uint16_t narrow;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(narrow) : "l"(from));
    raw[0] = narrow;
  }
  __builtin_memcpy(&x, raw, sizeof(T));
}
template <class T>
TL1_DEVICE void store_global(const T& x, T* at) {
  const size_t to = __cvta_generic_to_global(at);
  uint32_t raw[4] = {};
  __builtin_memcpy(raw, &x, sizeof(T));
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(raw[0]), "r"(raw[1]), "r"(raw[2]), "r"(raw[3]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(to), "r"(raw[0]), "r"(raw[1]) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.u32 [%0], %1;" :: "l"(to), "r"(raw[0]) : "memory");
  } else {
    asm volatile("st.global.u16 [%0], %1;" :: "l"(to), "h"(static_cast<uint16_t>(raw[0])) : "memory");
  }
}
// Into the L2 cache.
TL1_DEVICE void bring_near(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" :: "l"(__cvta_generic_to_global(at)));
}
// A thread's copies to shared memory, 8 or 16 bytes each. What it asks for until `commit_copies` is a
// batch; `await_copies` returns when all batches but the last N are there, for this thread to read.
template <int BYTES>
TL1_DEVICE void copy_ahead(unsigned char* to, const void* from) {
  static_assert(BYTES == 8 || BYTES == 16);
  const uint32_t there = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const size_t at = __cvta_generic_to_global(from);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(there), "l"(at) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(there), "l"(at) : "memory");
  }
}
TL1_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
TL1_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
TL1_DEVICE int exponent_of(int power_of_two) { return __ffs(power_of_two) - 1; }
TL1_DEVICE uint32_t product_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
template <class T>
TL1_DEVICE T shuffle_xor(T x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Between blocks. A post is written and read in one access, which no cache of a multiprocessor answers.
TL1_DEVICE int take_ticket(int32_t* counter) { return atomicAdd(counter, 1); }
TL1_DEVICE void put(Post* at, Post post) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;"
               :: "l"(__cvta_generic_to_global(at)), "l"(uint64_t(post.launch) << 32 | post.number)
               : "memory");
}
TL1_DEVICE Post look(const Post* at) {
  uint64_t both;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
               : "=l"(both) : "l"(__cvta_generic_to_global(at)) : "memory");
  return {static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)};
}
TL1_DEVICE uint32_t await(const Post* at, uint32_t launch) {
  Post post;
  do post = look(at);
  while (post.launch != launch);
  return post.number;
}

}  // namespace tl1::gpu
#else
#include "emulation.h"
#endif
