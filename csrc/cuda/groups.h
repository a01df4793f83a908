// What a group's weights come to: what is measured of them, and what becomes of them.

#pragma once

#include "../penalties.h"
#include "block.h"
#include "work.h"

namespace tl1::gpu {

// What is measured of some weights of a group.
template <class A, bool COUPLED>
struct Measure {
  A squares = 0;

  template <bool IN_UNIT_1>
  TL1_DEVICE void add(A t, int64_t, const Common<A>& c) {
    const A x = IN_UNIT_1 ? t : t * c.unit;
    squares = mul_add(x, x, squares);
  }
  TL1_DEVICE void merge(const Measure& m) { squares += m.squares; }
  TL1_DEVICE Measure across(int lanes) const { return {shuffle_xor(squares, lanes)}; }
};

template <class A>
struct Measure<A, true> {
  A squares = 0, sum = 0, largest = 0;
  int32_t unused = 0;
  int64_t at = INT64_MAX;  // where the largest is, counted from the tensor's first weight

  template <bool>
  TL1_DEVICE void add(A v, int64_t offset, const Common<A>& c) {
    const A size = magnitude_of(v);
    const A beyond = size <= c.offset ? A(0) : c.unit * (size - c.offset);
    squares = mul_add(beyond, beyond, squares);
    sum += size;
    larger(v, offset);
  }
  TL1_DEVICE void larger(A v, int64_t offset) {
    const A mine = magnitude_of(largest), other = magnitude_of(v);
    if (other > mine || (other == mine && offset < at)) largest = v, at = offset;
  }
  TL1_DEVICE void merge(const Measure& m) {
    squares += m.squares;
    sum += m.sum;
    larger(m.largest, m.at);
  }
  TL1_DEVICE Measure across(int lanes) const {
    return {shuffle_xor(squares, lanes), shuffle_xor(sum, lanes), shuffle_xor(largest, lanes), 0,
            shuffle_xor(at, lanes)};
  }
};

// What becomes of a group's weights.
template <class A, bool COUPLED>
struct Outcome {
  A factor;

  static TL1_DEVICE Outcome none() { return {A(1)}; }
  static TL1_DEVICE Outcome of(const Measure<A, false>& m, const Common<A>& c) {
    return {c.threshold < 0 ? A(1) : shrink_factor(m.squares, c.threshold)};
  }
  TL1_DEVICE A of_weight(A t, int64_t) const { return t * factor; }
};

template <class A>
struct Outcome<A, true> {
  A factor, cut, kept;
  int32_t unused;
  int64_t kept_at;

  static TL1_DEVICE Outcome none() { return {A(1), A(0), A(0), 0, -1}; }
  static TL1_DEVICE Outcome of(const Measure<A, true>& m, const Common<A>& c) {
    if (c.coupled < 0) {
      Outcome lasso = none();
      if (c.threshold >= 0) lasso.factor = shrink_factor(m.squares, c.threshold);
      return lasso;
    }
    const Shrink s = finish(c.coupled, {double(m.squares), double(m.sum), double(m.largest), double(m.at)}, c.coupling);
    return {A(s.factor), A(s.cut), A(s.kept), 0, int64_t(s.kept_at)};
  }
  TL1_DEVICE A of_weight(A v, int64_t offset) const {
    const A size = magnitude_of(v);
    const A w = (size < cut ? A(0) : size - cut) * factor;  // not <=: of two infinities NaN is left
    return offset == kept_at ? kept : with_sign_of(w, v);
  }
};

}  // namespace tl1::gpu
