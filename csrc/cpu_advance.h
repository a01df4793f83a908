// The way of a weight on the CPU: update rule and threshold, in registers, in one loop that reads and
// writes memory all the time. `advance` is a template over rule, penalty and stored type; BY_RULE has
// all of its instances. Included by cpu_kernels.cpp alone.

#pragma once

#include "cpu_sums.h"
#include "storage.h"

namespace tl1 {
inline namespace TL1_ISA {
namespace {

// v -> factor * v, never -0.
template <class A>
[[gnu::always_inline]] inline A scaled(A factor, A v) {
  // Not in one operation: a product too small for A would round to the zero of its sign.
  return factor * v + A(0);
}

// Earlier weights, as many as the next ones, whole chunks, which are scaled meanwhile.
template <class A>
struct Behind {
  A* weights = nullptr;  // null: there are none
  const A* factors;      // one for each chunk
};

// The next weights of a tensor: where they are read, and where their results go. For 16-bit weights
// `out` is no part of the tensor: they are rounded once, when all is done.
template <class P>
struct Weights {
  using A = Arithmetic<P>;
  const P* param;
  const P* grad;
  const A* state[MAX_STATES];
  A* new_state[MAX_STATES];
  A* out;
  int64_t ahead;  // from each chunk to the one that memory is asked for
  Behind<A> behind;
};

template <class P>
using Advance = void (*)(const Step&, const Weights<P>&, int64_t n);

// The threshold of a weight as a function; without a penalty nothing happens.
template <class A, class F>
struct Threshold {
  F prox;
  A cut;
  static constexpr bool dear = F::dear;
  [[gnu::always_inline]] A operator()(A v) const {
    const A size = magnitude_of(v);
    const A w = prox(size);
    return (size <= cut ? A(0) : with_sign_of(w, v)) + A(0);  // never -0
  }
};
struct NoThreshold {
  static constexpr bool dear = false;
  template <class A>
  [[gnu::always_inline]] A operator()(A v) const { return v; }
};
template <class A, bool Dear, class F>
Threshold<A, Prox<Dear, F>> as_threshold(Prox<Dear, F> prox, A cut) { return {prox, cut}; }
template <class A>
NoThreshold as_threshold(NoThreshold none, A) { return none; }

template <class A>
bool any_alive(const A* v, A cut) {
  int alive = 0;
  _Pragma("omp simd reduction(|:alive)") for (int64_t i = 0; i < CHUNK; i++) {
    alive |= !(magnitude_of(v[i]) <= cut);  // a NaN lives
  }
  return alive;
}

// Memory works while a chunk is computed and while groups are scaled: the hardware's prefetchers alone
// stop at the end of a page. One distance for all: a core loses the requests that it has no room for,
// so that others from further ahead cost more than they bring. Always inline: GCC drops a call of a
// function that only prefetches.
template <int Write, class T>
[[gnu::always_inline]] inline void prefetch(const T* chunk) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < CHUNK; i += LINE) __builtin_prefetch(chunk + i, Write);
}

// The whole chunks among n weights; returns how many weights are in them. Everything here is inline:
// a member read through a closure may alias what is written, and the loop would stay scalar.
template <bool PLAIN, class Rule, class P, class T>
[[gnu::always_inline]] inline int64_t advance_chunks(const Rule& numbers, const Weights<P>& weights,
                                                     int64_t n, T threshold) {
  using A = Arithmetic<P>;
  const Rule rule = numbers;
  const Weights<P> w = weights;
  int64_t at = 0;
  for (; at + CHUNK <= n; at += CHUNK) {
    const auto update = [=](int64_t i) __attribute__((always_inline)) {
      A s0 = Rule::STATES > 0 ? w.state[0][at + i] : A(0);
      A s1 = Rule::STATES > 1 ? w.state[1][at + i] : A(0);
      A s2 = Rule::STATES > 2 ? w.state[2][at + i] : A(0);
      const A v = rule.template take<PLAIN>(load(w.param[at + i]), load(w.grad[at + i]), s0, s1, s2);
      if constexpr (Rule::STATES > 0) w.new_state[0][at + i] = s0;
      if constexpr (Rule::STATES > 1) w.new_state[1][at + i] = s1;
      if constexpr (Rule::STATES > 2) w.new_state[2][at + i] = s2;
      return v;
    };
    prefetch<1>(w.param + at + w.ahead);
    prefetch<0>(w.grad + at + w.ahead);
    for (int k = 0; k < Rule::STATES; k++) prefetch<1>(w.state[k] + at + w.ahead);
    A* out = w.out + at;
    if constexpr (T::dear) {
      alignas(64) A v[CHUNK];
      const A* const values = v;
      SIMD for (int64_t i = 0; i < CHUNK; i++) v[i] = update(i);
      if (any_alive(values, threshold.cut)) {
        SIMD for (int64_t i = 0; i < CHUNK; i++) out[i] = threshold(values[i]);
      } else {
        SIMD for (int64_t i = 0; i < CHUNK; i++) out[i] = 0;
      }
    } else {
      SIMD for (int64_t i = 0; i < CHUNK; i++) out[i] = threshold(update(i));
    }
    if (w.behind.weights) {
      A* const behind = w.behind.weights + at;
      const A factor = w.behind.factors[at / CHUNK];
      SIMD for (int64_t i = 0; i < CHUNK; i++) behind[i] = scaled(factor, behind[i]);
    }
  }
  return at;
}

// An `Advance` for one rule, penalty and stored type. Plain steps have a function of their own, which
// leaves their loops more registers, where they are worth the code.
template <template <class> class Rule, template <class> class Penalty, class P, bool PLAIN = false>
[[gnu::noinline]] void advance(const Step& step, const Weights<P>& w, int64_t n) {
  using A = Arithmetic<P>;
  const Rule<A> rule(step.numbers);
  if constexpr (!PLAIN && FUSED && sizeof(A) == sizeof(float)) {
    if (rule.plain()) return advance<Rule, Penalty, P, true>(step, w, n);
  }
  int64_t done = 0;
  const Penalty<A> penalty(step.coefficients);
  penalty.with_prox([&](auto prox) __attribute__((always_inline)) {
    const auto threshold = as_threshold(prox, penalty.cut);
    done = advance_chunks<PLAIN>(rule, w, n, threshold);
  });
  if (done == n) return;
  // What is left of n goes through as a chunk, with zeros behind it.
  const int64_t left = n - done;
  alignas(64) P param[CHUNK] = {}, grad[CHUNK] = {};
  alignas(64) A state[MAX_STATES][CHUNK] = {}, out[CHUNK];
  Weights<P> rest = {param, grad, {}, {}, out, 0, {}};
  for (int64_t i = 0; i < left; i++) param[i] = w.param[done + i], grad[i] = w.grad[done + i];
  for (int k = 0; k < Rule<A>::STATES; k++) {
    rest.state[k] = rest.new_state[k] = state[k];
    for (int64_t i = 0; i < left; i++) state[k][i] = w.state[k][done + i];
  }
  advance<Rule, Penalty, P, PLAIN>(step, rest, CHUNK);
  for (int64_t i = 0; i < left; i++) w.out[done + i] = out[i];
  for (int k = 0; k < Rule<A>::STATES; k++) {
    for (int64_t i = 0; i < left; i++) w.new_state[k][done + i] = state[k][i];
  }
}

// No penalty, in the form of one.
template <class A>
struct NoPenalty {
  A cut = -1;
  explicit NoPenalty(const Coefficients&) {}
  template <class Loop>
  void with_prox(Loop loop) const {
    loop(NoThreshold{});
  }
};

#define TL1_ADVANCE(name, prepare, Penalty) advance<Rule, Penalty, P>,
template <template <class> class Rule, class P>
constexpr Advance<P> BY_PENALTY[] = {advance<Rule, NoPenalty, P>, TL1_PENALTIES(TL1_ADVANCE)};

#define TL1_BY_PENALTY(name, Rule) BY_PENALTY<Rule, P>,
// BY_RULE<P>[row of TL1_RULES][1 + row of TL1_PENALTIES, or 0 for none]
template <class P>
constexpr const Advance<P>* BY_RULE[] = {TL1_RULES(TL1_BY_PENALTY)};

}  // namespace
}  // namespace TL1_ISA
}  // namespace tl1
