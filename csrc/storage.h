// The stored types and their conversion to the arithmetic type, in integer operations that every
// instruction set vectorises. 16-bit floats are read exactly and rounded to nearest, ties to even.

#pragma once

#include <stdint.h>

#include "random.h"

namespace tl1 {
inline namespace TL1_ISA {

struct BFloat16 {
  static constexpr bool BRAIN = true;
  uint16_t bits;
};
struct Float16 {
  static constexpr bool BRAIN = false;
  uint16_t bits;
};
// The same bits, in kernels that round stochastically.
struct StochasticBFloat16 : BFloat16 {};

template <class P>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<BFloat16> = true;
template <class P>
constexpr bool IS_STOCHASTIC = false;
template <>
constexpr bool IS_STOCHASTIC<StochasticBFloat16> = true;

TL1_INLINE float load(float x) { return x; }
TL1_INLINE double load(double x) { return x; }
TL1_INLINE float load(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

TL1_INLINE float load(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#endif
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // Exponents are re-biased by 112; infinity and NaN by twice that. Subnormals are multiples of
  // 2^-24: the conversion of a small integer is exact.
  const uint32_t normal = (magnitude << 13) + ((magnitude < 0x7c00 ? 112u : 224u) << 23);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400 ? subnormal : normal));
}

// `clean` turns -0 into +0: a dead weight has one bit pattern.
TL1_INLINE void store(float x, bool clean, float& out) { out = clean ? x + 0.0f : x; }
TL1_INLINE void store(double x, bool clean, double& out) { out = clean ? x + 0.0 : x; }

// By mask, not by `?`: GCC would follow both branches with masks of its own.
TL1_INLINE uint32_t mask(bool all) { return all ? 0xffffffffu : 0; }

// `clean` for the 16-bit types: what would be rounded to 0 (up to half the least number) is +0 before.
TL1_INLINE float cleaned(float x, bool clean, float half_the_least) {
  return clean ? from_bits(bits_of(x) & ~mask(magnitude_of(x) <= half_the_least)) : x;
}

TL1_INLINE void store(float x, bool clean, BFloat16& out) {
  x = cleaned(x, clean, 0x1p-134f);
  const uint32_t bits = bits_of(x);
  uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  rounded |= mask(x != x);  // rounding could carry a NaN over to -0
  out.bits = static_cast<uint16_t>(rounded >> 16);
}

TL1_INLINE void store(float x, bool clean, Float16& out) {
  x = cleaned(x, clean, 0x1p-25f);
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14 the unit is 2^-24: adding 1/2 in float32 rounds to it and leaves it in the low bits.
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t stored = magnitude < (113u << 23) ? subnormal : normal;
  stored = magnitude >= 0x477ff000 ? 0x7c00 : stored;  // 65520 and up round to infinity
  stored = magnitude > 0x7f800000 ? 0x7e00 : stored;
  out.bits = static_cast<uint16_t>(stored | sign);
}

// Stochastically: up with a probability of what is cut off. 16 random bits are added to those.
TL1_INLINE uint32_t at_random(float x, uint32_t random) { return (bits_of(x) + random) | mask(x != x); }
TL1_INLINE void store_at_random(float x, bool clean, uint32_t random, BFloat16& out) {
  const uint32_t rounded = at_random(x, random);
  const bool zero = (rounded & 0x7fff0000) == 0;
  out.bits = static_cast<uint16_t>((rounded & ~mask(clean && zero)) >> 16);
}

// Two neighbours. Of a register with two bfloat16, each is one instruction away.
template <class P, class A>
TL1_INLINE void load_pair(const P* from, A& x, A& y) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(P) == 2) {
    if constexpr (P::BRAIN) {
      uint32_t both;
      __builtin_memcpy(&both, from, 4);
      x = from_bits(both << 16);
      y = from_bits(both & 0xffff0000);
      return;
    }
  }
#endif
  x = load(from[0]);
  y = load(from[1]);
}

// Two bfloat16 in a register; + 0 turns -0 into +0.
#ifdef __CUDA_ARCH__
TL1_INLINE void store_brain(uint32_t both, bool clean, BFloat16* out) {
  if (clean) asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(both) : "r"(0x3f803f80), "r"(0));
  __builtin_memcpy(out, &both, 4);
}
#endif

template <class P, class A>
TL1_INLINE void store_pair(A x, A y, bool clean, P* out) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(P) == 2) {
    uint32_t both;
    if constexpr (P::BRAIN) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
      return store_brain(both, clean, out);
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
      if (clean) asm("add.rn.f16x2 %0, %0, %1;" : "+r"(both) : "r"(0));
      __builtin_memcpy(out, &both, 4);
      return;
    }
  }
#endif
  store(x, clean, out[0]);
  store(y, clean, out[1]);
}

// The same, rounded stochastically: the first one at `place`, the other `apart` from there.
TL1_INLINE void store_pair_at_random(float x, float y, bool clean, RandomKey key, uint32_t place,
                                     uint32_t apart, StochasticBFloat16* out) {
  const uint32_t of_x = random_bits(key, place), of_y = random_bits(key, place + apart);
#ifdef __CUDA_ARCH__
  return store_brain(__byte_perm(at_random(x, of_x), at_random(y, of_y), 0x7632), clean, out);
#endif
  store_at_random(x, clean, of_x, out[0]);
  store_at_random(y, clean, of_y, out[1]);
}

// float64 for itself, float32 for all that is smaller.
template <class P>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class P>
using Arithmetic = typename ArithmeticOf<P>::type;

}  // namespace TL1_ISA
}  // namespace tl1
