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

// A penalty of single weights is chosen by every weight anew; memory hides that.
template <class A>
struct Others {
  static constexpr bool COUPLED = false, MANY = true;
  enum Which { pieces, log, half, two_thirds } which;
  union {
    Pieces<A> as_pieces;
    Log<A> as_log;
    Half<A> as_half;
    TwoThirds<A> as_two_thirds;
  };

  TL1_INLINE Others(Which which, const Coefficients& c) : which(which), as_pieces(c) {
    if (which == log) new (&as_log) Log<A>(c);
    if (which == half) new (&as_half) Half<A>(c);
    if (which == two_thirds) new (&as_two_thirds) TwoThirds<A>(c);
  }

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    switch (which) {
      case pieces: return as_pieces.with_prox(loop);
      case log: return as_log.with_prox(loop);
      case half: return as_half.with_prox(loop);
      case two_thirds: return as_two_thirds.with_prox(loop);
    }
  }
};

// No weight has a threshold of its own.
template <class A>
struct None {
  static constexpr bool COUPLED = true, MANY = false;
};

}  // namespace tl1::gpu
