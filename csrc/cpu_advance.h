// The way of a weight on the CPU: update rule, threshold and the sum of squares, in registers, in one
// loop that reads and writes memory all the time. `advance` is a template over rule, penalty and
// stored type; BY_RULE has all of its instances. Included by cpu_kernels.cpp alone.

#pragma once

#include "kernels.h"
#include "storage.h"

#define SIMD _Pragma("omp simd")

namespace tl1 {
inline namespace TL1_ISA {
namespace {

// v -> factor * v; a zero of +0 leaves no -0, one of -0 lets it be.
template <class A>
struct Scaling {
  A factor = 1, zero = -A(0);
  static constexpr bool dear = false;
  [[gnu::always_inline]] A operator()(A v) const { return mul_add(factor, v, zero); }
};

// The next weights of a tensor: where they are read, and where their results go. For 16-bit weights
// `out` is no part of the tensor: they are rounded once, when all is done. Where it is null, their
// squares are all that is wanted.
template <class P>
struct Weights {
  using A = Arithmetic<P>;
  const P* param;
  const P* grad;
  const A* state[MAX_STATES];
  A* new_state[MAX_STATES];
  A* out;
  Scaling<A> scaling;  // where there is no threshold
};

// With lanes, the squares of the results are added to them, LANES sums side by side.
template <class P>
using Advance = void (*)(const Step&, const Weights<P>&, int64_t n, double* lanes);

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;  // float32 weights in a vector register
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
static_assert(CHUNK % (4 * LANES) == 0 && BLOCK % CHUNK == 0);
// Sums are float64, but conversions cost more than additions: few squares are added in float32 first.
constexpr int64_t SQUARES = 4;       // chunks
constexpr int64_t ROWS_IN_PART = 16;  // rows of a column

template <class A>
double square_of(A x, double unit) {
  const double scaled = unit * static_cast<double>(x);
  return scaled * scaled;
}

template <class A>
void add_squares_to(double* lanes, const A* t, int64_t n, double unit) {
  int64_t at = 0;
  for (; at + LANES <= n; at += LANES) {
    SIMD for (int64_t i = 0; i < LANES; i++) lanes[i] += square_of(t[at + i], unit);
  }
  for (int64_t i = 0; at + i < n; i++) lanes[i] += square_of(t[at + i], unit);
}

// Sums of the squares of groups that lie one behind the other. Short ones have too few weights for
// lanes of their own: there the lanes are groups.
template <class A>
void sum_rows(const A* t, int64_t groups, int64_t inner, double unit, double* sums) {
  constexpr int64_t SHORT = 32;
  if (inner >= SHORT) {
    for (int64_t g = 0; g < groups; g++, t += inner) {
      double sum = 0;
      _Pragma("omp simd reduction(+:sum)") for (int64_t i = 0; i < inner; i++) {
        sum += square_of(t[i], unit);
      }
      sums[g] = sum;
    }
    return;
  }
  for (int64_t g = 0; g < groups; g++) sums[g] = 0;
  for (int64_t i = 0; i < inner; i++) {
    SIMD for (int64_t g = 0; g < groups; g++) sums[g] += square_of(t[g * inner + i], unit);
  }
}

// The threshold of a weight as a function; where there is no penalty, a scaling is in its place.
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
struct NoThreshold {};
template <class A, bool Dear, class F>
Threshold<A, Prox<Dear, F>> as_threshold(Prox<Dear, F> prox, A cut, Scaling<A>) {
  return {prox, cut};
}
template <class A>
Scaling<A> as_threshold(NoThreshold, A, Scaling<A> scaling) { return scaling; }

template <class A>
bool any_alive(const A* v, A cut) {
  int alive = 0;
  _Pragma("omp simd reduction(|:alive)") for (int64_t i = 0; i < CHUNK; i++) {
    alive |= !(magnitude_of(v[i]) <= cut);  // a NaN lives
  }
  return alive;
}

// Adds squares of a CHUNK of float32 results, which neither over- nor underflow, to partial sums: two
// for each lane, since an addition waits for the one before.
inline void add_chunk_to(float* part, const float* w) {
  for (int64_t at = 0; at < CHUNK; at += 4 * LANES) {
    SIMD for (int64_t i = 0; i < 2 * LANES; i++) {
      const float w0 = w[at + i], w1 = w[at + i + 2 * LANES];
      part[i] = mul_add(w1, w1, mul_add(w0, w0, part[i]));
    }
  }
}

// Adds n partial sums to sums in float64, and leaves them 0.
inline void move_part_to(double* sums, float* part, int64_t n) {
  SIMD for (int64_t i = 0; i < n; i++) {
    sums[i] += static_cast<double>(part[i]);
    part[i] = 0;
  }
}

inline void move_both_to(double* lanes, float* part) {
  move_part_to(lanes, part, LANES);
  move_part_to(lanes, part + LANES, LANES);
}

// Memory works while a chunk is computed and while groups are scaled: the hardware's prefetchers alone
// stop at the end of a page. One distance for all: a core loses the requests that it has no room for,
// so that others from further ahead cost more than they bring. Always inline: GCC drops a call of a
// function that only prefetches.
template <int Write, class T>
[[gnu::always_inline]] inline void prefetch_ahead(const T* chunk) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < CHUNK; i += LINE) __builtin_prefetch(chunk + AHEAD + i, Write);
}

// The whole chunks among n weights; returns how many weights are in them. Everything here is inline:
// a member read through a closure may alias what is written, and the loop would stay scalar.
template <bool PLAIN, class Rule, class P, class T>
[[gnu::always_inline]] inline int64_t advance_chunks(const Rule& numbers, const Weights<P>& weights,
                                                     int64_t n, double* lanes, T threshold) {
  using A = Arithmetic<P>;
  const Rule rule = numbers;
  const Weights<P> w = weights;
  alignas(64) float part[2 * LANES] = {};
  int64_t at = 0, squares = 0;
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
    prefetch_ahead<1>(w.param + at);
    prefetch_ahead<0>(w.grad + at);
    for (int k = 0; k < Rule::STATES; k++) prefetch_ahead<1>(w.state[k] + at);
    alignas(64) A unused[CHUNK];
    A* out = w.out ? w.out + at : unused;
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
    if constexpr (sizeof(A) == sizeof(float)) {
      if (!lanes) continue;
      add_chunk_to(part, out);
      if (++squares == SQUARES) {
        move_both_to(lanes, part);
        squares = 0;
      }
    }
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    if (squares > 0) move_both_to(lanes, part);
  }
  return at;
}

// An `Advance` for one rule, penalty and stored type. Plain steps have a function of their own, which
// leaves their loops more registers, where they are worth the code.
template <template <class> class Rule, template <class> class Penalty, class P, bool PLAIN = false>
[[gnu::noinline]] void advance(const Step& step, const Weights<P>& w, int64_t n, double* lanes) {
  using A = Arithmetic<P>;
  const Rule<A> rule(step.numbers);
  if constexpr (!PLAIN && FUSED && sizeof(A) == sizeof(float)) {
    if (rule.plain()) return advance<Rule, Penalty, P, true>(step, w, n, lanes);
  }
  int64_t done = 0;
  const Penalty<A> penalty(step.coefficients);
  penalty.with_prox([&](auto prox) __attribute__((always_inline)) {
    const auto threshold = as_threshold(prox, penalty.cut, w.scaling);
    done = advance_chunks<PLAIN>(rule, w, n, lanes, threshold);
  });
  if (done == n) return;
  // What is left of n goes through as a chunk, with zeros behind it.
  const int64_t left = n - done;
  alignas(64) P param[CHUNK] = {}, grad[CHUNK] = {};
  alignas(64) A state[MAX_STATES][CHUNK] = {}, out[CHUNK];
  Weights<P> rest = {param, grad, {}, {}, out, w.scaling};
  for (int64_t i = 0; i < left; i++) param[i] = w.param[done + i], grad[i] = w.grad[done + i];
  for (int k = 0; k < Rule<A>::STATES; k++) {
    rest.state[k] = rest.new_state[k] = state[k];
    for (int64_t i = 0; i < left; i++) state[k][i] = w.state[k][done + i];
  }
  advance<Rule, Penalty, P, PLAIN>(step, rest, CHUNK, nullptr);
  for (int64_t i = 0; i < (w.out ? left : 0); i++) w.out[done + i] = out[i];
  for (int k = 0; k < Rule<A>::STATES; k++) {
    for (int64_t i = 0; i < left; i++) w.new_state[k][done + i] = state[k][i];
  }
  if (lanes) add_squares_to(lanes, out, left, 1);
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
