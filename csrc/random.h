// The random bits of stochastic rounding: a function of the step's seed, the tensor's number in the
// step and the weight's place in memory, so that every backend rounds alike, in any order. Written
// again in backends/reference.py and triton_tiles.py; tests compare the bits.

#pragma once

#include <stdint.h>

#include "prox_math.h"

namespace tl1 {

// One tensor's, in one step.
struct RandomKey {
  uint32_t low, high;
};

inline namespace TL1_ISA {

// MurmurHash3's last step: each bit of h changes each bit of the result half of the time.
TL1_ONCE uint32_t mixed(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6b;
  h = (h ^ (h >> 13)) * 0xc2b2ae35;
  return h ^ (h >> 16);
}

TL1_ONCE RandomKey random_key(int64_t seed, int64_t tensor) {
  const uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  const uint32_t low = mixed(mixed(second) + first + static_cast<uint32_t>(tensor));
  return {low, mixed(mixed(low) + second)};
}

// 16 bits for the weight at `place`, modulo 2^32. The same step without what the upper half of its
// result does not need.
TL1_INLINE uint32_t random_bits(RandomKey key, uint32_t place) {
  const uint32_t h = place * 0x85ebca6b + key.low;
  return ((h ^ (h >> 13) ^ key.high) * 0xc2b2ae35) >> 16;
}

}  // namespace TL1_ISA
}  // namespace tl1
