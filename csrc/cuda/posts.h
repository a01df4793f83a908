// What the blocks of a team leave for each other in global memory: numbers, each in one access with the
// launch that it is of. Who sees the launch has the number: no fence, and nothing to be reset.

#pragma once

#include <string.h>

#include "block.h"
#include "work.h"

namespace tl1::gpu {

// An X is as many posts as it has words.
template <class X>
constexpr int WORDS = sizeof(X) / sizeof(uint32_t);

template <class X>
TL1_DEVICE void leave_for_others(const X& x, Post* at, uint32_t launch) {
  static_assert(sizeof(X) % sizeof(uint32_t) == 0);
  uint32_t words[WORDS<X>];
  memcpy(words, &x, sizeof(X));
  _Pragma("unroll") for (int i = 0; i < WORDS<X>; i++) put(at + i, {words[i], launch});
}

// x[j] = what another block leaves at the j * apart-th X of `at`, for j < n, 0 < n. All are asked for
// before the first is waited for. Returns whether they are there, as they are if it `waits`.
template <int MOST, class X>
TL1_DEVICE bool from_others(X (&x)[MOST], const Post* at, int apart, int n, uint32_t launch, bool waits) {
  Post seen[MOST][WORDS<X>];
  bool there = true;
  _Pragma("unroll") for (int j = 0; j < MOST; j++) {
    const Post* const of = at + int64_t(j < n ? j : n - 1) * apart * WORDS<X>;
    _Pragma("unroll") for (int i = 0; i < WORDS<X>; i++) seen[j][i] = look(of + i);
  }
  _Pragma("unroll") for (int j = 0; j < MOST; j++) {
    const Post* const of = at + int64_t(j < n ? j : n - 1) * apart * WORDS<X>;
    uint32_t words[WORDS<X>];
    _Pragma("unroll") for (int i = 0; i < WORDS<X>; i++) {
      const bool seen_it = seen[j][i].launch == launch;
      words[i] = seen_it || !waits ? seen[j][i].number : await(of + i, launch);
      there &= seen_it || waits;
    }
    memcpy(&x[j], words, sizeof(X));
  }
  return there;
}

}  // namespace tl1::gpu
