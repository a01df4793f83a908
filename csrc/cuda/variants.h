// The penalties as a kernel is compiled for them: transformed l1, soft thresholds, all others of
// single weights together, and those of whole groups together.

#pragma once

#include <new>

#include "../penalties.h"
#include "../storage.h"
#include "block.h"

namespace tl1::gpu {

template <class A>
struct Soft : SoftThreshold<A> {
  static constexpr bool COUPLED = false, MANY = false;
  using SoftThreshold<A>::SoftThreshold;
};

template <class A>
struct Transformed : TransformedL1<A> {
  static constexpr bool COUPLED = false, MANY = false;
  using TransformedL1<A>::TransformedL1;
};

// The same coefficients, for 16 bits.
template <class Series>
struct TransformedShort : Transformed<float> {
  using Transformed<float>::Transformed;
  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    const TransformedShort self = *this;
    loop(dear([self](float x) TL1_LAMBDA { return self.template by_short_root<Series>(x); }));
  }
};
template <class Prox, class T>
struct ForStored {
  using type = Prox;
};
template <>
struct ForStored<Transformed<float>, BFloat16> {
  using type = TransformedShort<Tl1Shortest>;
};
template <>
struct ForStored<Transformed<float>, StochasticBFloat16> {
  using type = TransformedShort<Tl1Shortest>;
};
template <>
struct ForStored<Transformed<float>, Float16> {
  using type = TransformedShort<Tl1Short>;
};

// The structs of penalties.h that have no kernels of their own.
#define TL1_OTHERS(row) row(Pieces) row(Log) row(Half) row(TwoThirds)

// A penalty of single weights is chosen by every weight anew; memory hides that.
template <class A>
struct Others {
  static constexpr bool COUPLED = false, MANY = true;

#define TL1_NAME(Struct) of_##Struct,
  enum Which { TL1_OTHERS(TL1_NAME) } which;
#define TL1_MEMBER(Struct) Struct<A> as_##Struct;
  union { TL1_OTHERS(TL1_MEMBER) };

  TL1_INLINE Others(Which which, const Coefficients& c) : which(which) {
#define TL1_BEGIN(Struct) if (which == of_##Struct) new (&as_##Struct) Struct<A>(c);
    TL1_OTHERS(TL1_BEGIN)
  }

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    switch (which) {
#define TL1_CASE(Struct) case of_##Struct: return as_##Struct.with_prox(loop);
      TL1_OTHERS(TL1_CASE)
    }
  }
};

// No weight has a threshold of its own.
template <class A>
struct None {
  static constexpr bool COUPLED = true, MANY = false;
};

}  // namespace tl1::gpu
