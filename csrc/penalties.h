// The penalties by name, and the proximal operators that prox_math.h does not have. A new one is a
// function here, with a struct where none of these fits, and a row of TL1_PENALTIES.

#pragma once

#include "prox_math.h"

namespace tl1 {
inline namespace TL1_ISA {

// 0 up to the cut, then two straight pieces, then |v| itself.
template <class A>
struct Pieces {
  A cut, offset1, rest1, slope1, end1, offset2, rest2, slope2, end2;

  // A piece slope * (|v| - offset), up to |v| = end; it is not there where it ends before the cut.
  TL1_ONCE static void piece(double* x, double slope, double offset, double end) {
    x[0] = round_down<A>(offset);
    x[1] = what_is_left(offset, x[0]);
    x[2] = slope;
    x[3] = round_down<A>(end);
  }

  TL1_INLINE explicit Pieces(const Coefficients& c)
      : cut(A(c.cut)), offset1(A(c.x[0])), rest1(A(c.x[1])), slope1(A(c.x[2])), end1(A(c.x[3])),
        offset2(A(c.x[4])), rest2(A(c.x[5])), slope2(A(c.x[6])), end2(A(c.x[7])) {}

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    const Pieces self = *this;
    loop(cheap([self](A size) TL1_LAMBDA {
      const A first = self.slope1 * ((size - self.offset1) - self.rest1);
      const A second = self.slope2 * ((size - self.offset2) - self.rest2);
      return size <= self.end1 ? first : size <= self.end2 ? second : size;
    }));
  }
};

// l0: hard threshold (Blumensath & Davies 2008).
template <class A>
TL1_ONCE void prepare_l0(double step, double weight, double, Coefficients& c) {
  c.cut = round_down<A>(sqrt(2 * step * weight));
}

// SCAD (Fan & Li 2001), a > 1 + step.
template <class A>
TL1_ONCE void prepare_scad(double step, double weight, double a, Coefficients& c) {
  c.cut = round_down<A>(step * weight);
  Pieces<A>::piece(c.x, 1, step * weight, weight * (1 + step));
  Pieces<A>::piece(c.x + 4, (a - 1) / (a - 1 - step), step * weight * (a / (a - 1)), a * weight);
}

// MCP (Zhang 2010), a > step: the firm threshold.
template <class A>
TL1_ONCE void prepare_mcp(double step, double weight, double a, Coefficients& c) {
  c.cut = round_down<A>(step * weight);
  Pieces<A>::piece(c.x, a / (a - step), step * weight, a * weight);
}

// min(|w|, a) (Zhang 2009): a soft threshold, or none where that is better.
template <class A>
TL1_ONCE void prepare_capped_l1(double step, double weight, double a, Coefficients& c) {
  const double tau = step * weight;
  c.cut = round_down<A>(a < tau / 2 ? sqrt(2 * tau) * sqrt(a) : tau);
  if (a >= tau / 2) Pieces<A>::piece(c.x, 1, tau, a + tau / 2);
}

// log(a |w| + 1) / log(a + 1): the prox is the larger root of (w - |v|) (w + 1/a) + t / a = 0, where
// t = step weight a / log(a + 1). With p = 1 + a |v| that is
//   w = |v| - 2 t / (p + sqrt((p - k) (p + k))),   k = 2 sqrt(a t)
// All is taken by 1 / max(a, 1), and then by a power of two that makes p about 1 at the cut: no
// square leaves float32's range, for any a.
template <class A>
struct Log {
  A cut, one, slope, k, numerator;

  TL1_INLINE explicit Log(const Coefficients& c)
      : cut(A(c.cut)), one(A(c.x[0])), slope(A(c.x[1])), k(A(c.x[2])), numerator(A(c.x[3])) {}

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    const Log self = *this;
    loop(dear([self](A size) TL1_LAMBDA {
      const A p = mul_add(self.slope, size, self.one);
      const A below = p - self.k;
      const A square = (below > 0 ? below : A(0)) * (p + self.k);
      return size - quotient(self.numerator, p + root(square));
    }));
  }
};

// Where |v| begins to live, in units of 1 / a. For k = a t <= 1 that is where the slope at 0 ends, and
// the prox is continuous there. Beyond, it jumps to the w = x / a where both are as good:
//   2 (log(1 + x) - x / (1 + x)) / x^2 = 1 / k,   and the left side falls.
TL1_ONCE double log_cut(double k) {
  if (k <= 1) return k;
  double low = 1e-9, high = 2 * k + 10, x = high;
  for (int i = 0; i < 64; i++) {
    x = sqrt(low) * sqrt(high);
    const bool alive = 2 * (log1p(x) - x / (1 + x)) * k > x * x;
    (alive ? low : high) = x;
  }
  return x + k / (1 + x);
}

template <class A>
TL1_ONCE void prepare_log(double step, double weight, double a, Coefficients& c) {
  a = fmin(fmax(a, 1e-100), 1e100);  // beyond that it is l0 or l1 to all digits
  const double t = step * weight * (a / log1p(a)), cut = log_cut(a * t) / a;
  const double by = fmin(1.0, 1 / a);
  const double unit = ldexp(by, -ilogb(by * (1 + a * cut)));
  c.cut = round_down<A>(cut);
  c.x[0] = unit;
  c.x[1] = unit * a;
  c.x[2] = unit * 2 * sqrt(a * t);
  c.x[3] = unit * 2 * t;
}

// Powers of |w|. With y a power of t / |v| for the threshold t, in (0, 1], the prox is a power of r
// times |v|, where r in [2/3, 1] is the largest root of a polynomial with y in it, far from its double
// root: one or two Newton steps from a short fit, which prox_constants.py finds again.
// r - 1 = y * polynomial(y), r^3 - r + k y = 0, for y <= 1: relative error 1.3e-05
struct HalfRoot {
  static constexpr int TERMS = 5;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        -1.3657306959434519e-1,
        -2.1834855898506676e-2,
        -3.2917773214527309e-2,
        3.1411041635341522e-2,
        -2.3578462890342289e-2,
    };
    return c[i];
  }
};
// r - 1 = y * polynomial(y), r^4 - r + k y = 0, for y <= 1: relative error 1.2e-05
struct TwoThirdsRoot {
  static constexpr int TERMS = 7;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        -1.3308831399629665e-1,
        -1.743123524741771e-2,
        -1.4380153456318766e-1,
        4.2609713795514723e-1,
        -7.554140573586747e-1,
        6.4466700927391359e-1,
        -2.2731926404386633e-1,
    };
    return c[i];
  }
};

// One weight's prox is |v| * Ratio::of(t / |v|, k).
template <class A, class Ratio>
struct Power {
  A cut, threshold, k;

  TL1_INLINE explicit Power(const Coefficients& c)
      : cut(A(c.cut)), threshold(A(c.x[0])), k(A(c.x[1])) {}

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    const A t = threshold, factor = k;
    loop(dear([=](A size) TL1_LAMBDA { return size * Ratio::of(quotient(t, size), factor); }));
  }

  // With t rounded, k makes up for it.
  TL1_ONCE static void prepare(double threshold, Coefficients& c) {
    c.cut = round_down<A>(threshold);
    c.x[0] = fmin(c.cut, 3e38);
    c.x[1] = Ratio::K * (c.x[0] > 0 ? pow(threshold / c.x[0], Ratio::POWER) : 1);
  }
};

// |w|^(1/2) (Xu, Chang, Xu & Zhang 2012): y = (t / |v|)^1.5, r^3 - r + k y = 0, w = |v| r^2.
struct HalfRatio {
  static constexpr double K = 0.27216552697590868, POWER = 1.5;  // K = 1 / (2 1.5^1.5)
  template <class A>
  TL1_INLINE static A of(A x, A k) {
    const A y = x * root(x), ky = k * y;
    A r = mul_add(y, polynomial<HalfRoot>(y), A(1));
    for (int i = 0; i < (sizeof(A) == sizeof(float) ? 1 : 2); i++) {
      const A square = r * r;
      r -= quotient(mul_add(r, square - 1, ky), mul_add(A(3), square, A(-1)));
    }
    return r * r;
  }
};
template <class A>
using Half = Power<A, HalfRatio>;

template <class A>
TL1_ONCE void prepare_l_half(double step, double weight, double, Coefficients& c) {
  const double root = cbrt(step * weight);
  Half<A>::prepare(1.5 * root * root, c);
}

// |w|^(2/3) (Cao, Sun & Xu 2013): y = (t / |v|)^(4/3), r^4 - r + k y = 0, w = |v| r^3.
struct TwoThirdsRatio {
  static constexpr double K = 0.39685026299204984, POWER = 4.0 / 3;  // K = 2^(-4/3)
  template <class A>
  TL1_INLINE static A of(A ratio, A k) {
    const A x = ratio > A(1e-30) ? ratio : A(1e-30);
    // Halley's steps to the cube root, from a third of the exponent: 5, 13, 39 bits.
    const float bits = static_cast<float>(bits_of(static_cast<float>(x)));
    A cube_root = from_bits(static_cast<int32_t>(bits * (1.0f / 3)) + 709958130);
    for (int i = 0; i < (sizeof(A) == sizeof(float) ? 2 : 3); i++) {
      const A square = cube_root * cube_root;
      const A excess = mul_add(square, cube_root, -x);
      cube_root -= quotient(cube_root * excess, 2 * excess + 3 * x);
    }
    const A y = x * cube_root, ky = k * y;
    // In e = r - 1, which has digits that r has not.
    A e = y * polynomial<TwoThirdsRoot>(y);
    for (int i = 0; i < (sizeof(A) == sizeof(float) ? 1 : 2); i++) {
      const A less = e * mul_add(e, 3 + e, A(3));  // r^3 - 1
      e -= quotient(mul_add(e, less, less) + ky, mul_add(A(4), less, A(3)));
    }
    return mul_add(e, mul_add(e, 3 + e, A(3)), A(1));
  }
};
template <class A>
using TwoThirds = Power<A, TwoThirdsRatio>;

template <class A>
TL1_ONCE void prepare_l_two_thirds(double step, double weight, double, Coefficients& c) {
  const double x = step * weight / 1.5;
  TwoThirds<A>::prepare(2 * sqrt(x) * sqrt(sqrt(x)), c);
}

// Penalties of whole groups. No weight has a threshold of its own; what is measured of a group says
// what becomes of its weights:
//   w = sign(v) factor * max(0, |v| - cut),   but for one weight, which is `kept`, if `kept_at` >= 0
struct Measured {
  double squares;  // sum of max(0, |v| - offset)^2, in the step's unit
  double sum;      // of |v|
  double largest;  // the v of largest magnitude, of equal ones the first; where squares are not 0,
                   // maybe its magnitude alone
  double at;       // its place in the group, counted in memory
};
struct Coupling {
  double tau;        // step * weight of the penalty
  double threshold;  // of the group's norm, the group lasso's, in the unit
  double unit;       // of what is squared
};
struct Shrink {
  double factor, cut, kept_at, kept;
};

// Combined group and exclusive sparsity (Yoon & Hwang 2017): with the factor s of the group lasso, a
// soft threshold of s v at tau ||s v||_1.
struct Cges {
  TL1_ONCE static double offset(double) { return 0; }
  TL1_ONCE static Shrink finish(const Measured& m, const Coupling& c) {
    return {c.threshold > 0 ? shrink_factor(m.squares, c.threshold) : 1, c.tau * m.sum, -1, 0};
  }
};

// ||w||_1 - ||w||_2 (Lou & Yan 2018), then the group lasso: the soft-thresholded group,
// scaled up to its norm + tau, or its largest weight alone.
struct L1MinusL2 {
  TL1_ONCE static double offset(double tau) { return tau; }
  TL1_ONCE static Shrink finish(const Measured& m, const Coupling& c) {
    const double norm = root(m.squares), size = magnitude_of(m.largest) * c.unit;
    // Also where rounding alone has left nothing beyond tau. NaN is not 0.
    if (m.squares == 0) {
      const double left = size <= c.threshold ? 0 : 1 - c.threshold / size;
      return {0, c.tau, m.at, left * m.largest};
    }
    const double tau = c.tau * c.unit, grown = norm + tau;  // infinite where the squares overflow
    const double left = grown <= c.threshold ? 0 : 1 - c.threshold / grown;
    return {left == 0 ? 0 : left * (1 + tau / norm), c.tau, -1, 0};
  }
};

// name in the registry, struct
#define TL1_COUPLED(row) \
  row("l1_minus_l2", L1MinusL2) \
  row("cges", Cges)

TL1_ONCE Shrink finish(int coupled, const Measured& m, const Coupling& c) {
#define TL1_FINISH(name, Penalty) \
  if (coupled-- == 0) return Penalty::finish(m, c);
  TL1_COUPLED(TL1_FINISH)
  return {1, 0, -1, 0};
}

TL1_ONCE double offset(int coupled, double tau) {
#define TL1_OFFSET(name, Penalty) \
  if (coupled-- == 0) return Penalty::offset(tau);
  TL1_COUPLED(TL1_OFFSET)
  return 0;
}

// name in the registry (tl1kernels/penalties.py), function, struct
#define TL1_PENALTIES(row) \
  row("l1", prepare_l1, SoftThreshold) \
  row("tl1", prepare_tl1, TransformedL1) \
  row("l0", prepare_l0, Pieces) \
  row("scad", prepare_scad, Pieces) \
  row("mcp", prepare_mcp, Pieces) \
  row("capped_l1", prepare_capped_l1, Pieces) \
  row("log", prepare_log, Log) \
  row("l_half", prepare_l_half, Half) \
  row("l_two_thirds", prepare_l_two_thirds, TwoThirds)

}  // namespace TL1_ISA
}  // namespace tl1
