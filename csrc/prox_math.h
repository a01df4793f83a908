// What the proximal operators of single weights (penalties.h) are made of, and the two that matter
// most: l1's and transformed l1's. For the CPU and CUDA: no trigonometry, safe in float32.
//
// A penalty is a function
//   prepare_x<A>(step, weight, a, c)   once per tensor: fills the coefficients c, in float64
// and a struct, which several penalties may share, with
//   Struct(c)         takes them, for every few weights, in the arithmetic type A
//   cut               |v| <= cut goes to 0; all other |v| go to
//   with_prox(loop)   calls loop(f) where f(|v|) is the prox, or its negative where rounding took it
//                     below 0, and f.dear says that it is worth a look whether any of a few weights
//                     needs it
// NaN is never <= cut, and f must pass it on.

#pragma once

#include <math.h>
#include <stdint.h>

// TL1_INLINE: what runs for every weight. TL1_ONCE: for every tensor, or group.
#ifdef __CUDACC__
#define TL1_INLINE __host__ __device__ __forceinline__
#define TL1_LAMBDA
#define TL1_ONCE __host__ __device__ inline
#else
// A call that is left in a loop keeps it scalar.
#define TL1_INLINE __attribute__((always_inline)) inline
#define TL1_LAMBDA __attribute__((always_inline))
#define TL1_ONCE inline
#endif

// Kernels for GPUs, also where they are compiled for the host (cuda/emulation.h).
#if defined(__CUDACC__) || defined(TL1_EMULATES_CUDA)
#define TL1_GPU 1
#else
#define TL1_GPU 0
#endif

// The CPU kernels compile this file once per instruction set. A namespace for each keeps the linker
// from giving all of them one copy, which might be the AVX-512 one.
#ifndef TL1_ISA
#define TL1_ISA portable
#endif

namespace tl1 {

// What a penalty's `prepare` computes; the meaning of x is its own.
struct Coefficients {
  double cut;
  double x[9];
};

inline namespace TL1_ISA {

// Where there is no fused multiply-add the error terms below would be lost to rounding.
#if TL1_GPU || defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool FUSED = true;
#else
constexpr bool FUSED = false;
#endif

TL1_INLINE float mul_add(float a, float b, float c) { return FUSED ? fmaf(a, b, c) : a * b + c; }
TL1_INLINE double mul_add(double a, double b, double c) { return FUSED ? fma(a, b, c) : a * b + c; }
TL1_INLINE double root(double x) { return sqrt(x); }
TL1_INLINE double quotient(double a, double b) { return a / b; }

// Roots and quotients, to 2 units in the last place or better. CUDA's own, exact to the last, have a
// slow path and ten instructions to find out. The near ones are for x far from the ends of float32's
// range.
#ifdef __CUDA_ARCH__
TL1_INLINE float root(float x) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
TL1_INLINE float quotient(float a, float b) {
  float r;
  asm("div.full.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
TL1_INLINE float near_root(float x) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
TL1_INLINE float near_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#elif defined(TL1_EMULATES_CUDA)
// Up to a unit in the last place off, as those are; the near ones turn the subnormal into 0.
inline float off(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != 0 && fabsf(x) <= 1e38f) bits += static_cast<int32_t>((bits * 2654435769u) >> 16) % 3 - 1;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
TL1_INLINE float root(float x) { return off(sqrtf(x)); }
TL1_INLINE float quotient(float a, float b) { return off(a / b); }
TL1_INLINE float near_root(float x) { return flushed(off(sqrtf(flushed(x)))); }
TL1_INLINE float near_reciprocal(float x) { return flushed(off(1 / flushed(x))); }
#else
TL1_INLINE float root(float x) { return sqrtf(x); }
TL1_INLINE float quotient(float a, float b) { return a / b; }
TL1_INLINE float near_root(float x) { return sqrtf(x); }
TL1_INLINE float near_reciprocal(float x) { return 1 / x; }
#endif

TL1_INLINE float magnitude_of(float x) { return fabsf(x); }
TL1_INLINE double magnitude_of(double x) { return fabs(x); }

TL1_INLINE float with_sign_of(float size, float x) { return copysignf(size, x); }
TL1_INLINE double with_sign_of(double size, double x) { return copysign(size, x); }
TL1_ONCE float towards_zero(float x) { return nextafterf(x, 0.0f); }
TL1_ONCE double towards_zero(double x) { return nextafter(x, 0.0); }

// The largest A <= x >= 0, so that a v of type A compares with it as with x itself.
template <class A>
TL1_ONCE A round_down(double x) {
  A nearest = static_cast<A>(x);
  return static_cast<double>(nearest) > x ? towards_zero(nearest) : nearest;
}

// What a number in two parts has in its second one; infinity - infinity would be NaN.
TL1_ONCE double what_is_left(double x, double first) { return fmin(x - first, 3e38); }

TL1_INLINE int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
TL1_INLINE float from_bits(int32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// min(x, limit) for x >= 0, limit for NaN. Floats without a sign are in the order of their bits, and
// integers have one instruction for it.
TL1_INLINE float at_most(float x, float limit) {
#ifdef __CUDA_ARCH__
  return fminf(x, limit);
#endif
  return from_bits(bits_of(x) < bits_of(limit) ? bits_of(x) : bits_of(limit));
}

// c_I + c_(I + 1) x + ... by Horner's rule; recursions, since a loop within a loop is not vectorised.
template <class Series, int I = 0, class A>
TL1_INLINE A polynomial(A x) {
  constexpr A c = static_cast<A>(Series::coefficient(I));
  if constexpr (I == Series::TERMS - 1) {
    return c;
  } else {
    return mul_add(polynomial<Series, I + 1>(x), x, c);
  }
}

template <int TERMS, int I = 0, class A>
TL1_INLINE A polynomial(const A (&c)[TERMS], A x) {
  if constexpr (I == TERMS - 1) {
    return c[I];
  } else {
    return mul_add(polynomial<TERMS, I + 1>(c, x), x, c[I]);
  }
}

// What with_prox hands out.
template <bool Dear, class F>
struct Prox {
  static constexpr bool dear = Dear;
  F f;
  template <class A>
  TL1_INLINE A operator()(A size) const { return f(size); }
};
template <class F>
TL1_INLINE Prox<false, F> cheap(F f) { return {f}; }
template <class F>
TL1_INLINE Prox<true, F> dear(F f) { return {f}; }
// In between: where 16 registers must do, two short loops and the look take less than one long loop.
#ifdef __AVX512F__
constexpr bool FEW_REGISTERS = false;
#else
constexpr bool FEW_REGISTERS = true;
#endif
template <class F>
TL1_INLINE Prox<FEW_REGISTERS, F> middling(F f) { return {f}; }

// l1: max(0, |v| - tau).
template <class A>
TL1_ONCE void prepare_l1(double step, double weight, double, Coefficients& c) {
  const double tau = step * weight;
  c.cut = round_down<A>(tau);
  c.x[0] = what_is_left(tau, c.cut);
}

template <class A>
struct SoftThreshold {
  A cut, rest;  // tau, in two parts

  TL1_INLINE explicit SoftThreshold(const Coefficients& c) : cut(A(c.cut)), rest(A(c.x[0])) {}

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    const SoftThreshold self = *this;
    loop(cheap([self](A size) TL1_LAMBDA { return (size - self.cut) - self.rest; }));
  }
};

// Transformed l1 (Zhang & Xin 2017; Ma et al. 2019, eq. 11). With y = a + |v| and
// D = tau a (a + 1), the prox is |v| - D P / y^2, where P = 1 / r^2 and r in [2/3, 1] is the
// largest root of r^3 - r^2 + (4/27) q = 0 for q = (27/4) D / y^3. The published form subtracts
// terms of order a; this one loses nothing, and P is a polynomial:
//   gentle:   in q itself, where the threshold's q is at most 1/8 (tau below about a^2 / 50)
//   gentlest: a shorter one, up to 1/64 (tau below about a^2 / 430)
//   root:     in 1 - sqrt(1 - q); on GPUs, for 16 bits, shorter ones in sqrt(1 - q)
// prox_constants.py finds them again and says how good they are.
// P - 1 = q * polynomial(q), for q <= 1/64: relative error 1.5e-08
struct Tl1Gentlest {
  static constexpr int TERMS = 2;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        2.9628586391148861e-1,
        1.5578392405236951e-1,
    };
    return c[i];
  }
};
// P - 1 = q * polynomial(q), for q <= 1/8: relative error 4.7e-09
struct Tl1Gentle {
  static constexpr int TERMS = 4;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        2.9629513372710399e-1,
        1.5372386364526834e-1,
        9.546204620656462e-2,
        8.7659739938447941e-2,
    };
    return c[i];
  }
};
// P - 1 = x * polynomial(x), x = 1 - u, for q <= 1: relative error 1.1e-08
struct Tl1Steep {
  static constexpr int TERMS = 10;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        5.9259086159632275e-1,
        3.1832810285811126e-1,
        1.6443365909525517e-1,
        9.6574918154151067e-2,
        -8.7712096137369075e-3,
        1.6815378026226187e-1,
        -2.4281597083396648e-1,
        2.7617415935046862e-1,
        -1.6115764230278867e-1,
        4.6489316343003194e-2,
    };
    return c[i];
  }
};
// z - 1 = x * polynomial(x), x = 1 - u, for q <= 1: relative error 1.1e-08
struct Tl1Z {
  static constexpr int TERMS = 7;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        -1.1111194051270547e-1,
        -1.6441318598217125e-2,
        -4.4232045686194067e-3,
        -7.7728552816301757e-4,
        -1.5926046476784248e-3,
        9.31337314034989e-4,
        -5.5957009711010404e-4,
    };
    return c[i];
  }
};
// P = polynomial(u), for q <= 1: relative error 2.3e-06
struct Tl1Short {
  static constexpr int TERMS = 8;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        2.25,
        -2.5976576600077467,
        2.7390127842447257,
        -2.7371359144565257,
        2.4282576530087249,
        -1.6678029779829481,
        7.3313232911787717e-1,
        -1.4780854102022599e-1,
    };
    return c[i];
  }
};
// P = polynomial(u), for q <= 1: relative error 8.1e-05
struct Tl1Shortest {
  static constexpr int TERMS = 6;
  TL1_INLINE static constexpr double coefficient(int i) {
    const double c[TERMS] = {
        2.25,
        -2.589986181526069,
        2.628573763092294,
        -2.1992223215831151,
        1.2206049895155199,
        -3.1005080339995339e-1,
    };
    return c[i];
  }
};

template <class A>
struct TransformedL1 {
  TL1_ONCE static void prepare(double step, double weight, double a, Coefficients& c) {
    const double tau = step * weight;
    const double d = tau / a * (1 + 1 / a);  // D in units of a: the threshold is where y = 1 + d
    const bool continuous = d <= 0.5;
    const double cut = continuous ? tau * (1 + 1 / a) : sqrt(2 * tau) * sqrt(a + 1) - a / 2;
    c.cut = round_down<A>(cut);
    c.x[0] = fmin(fmax(a, 1e-100), 1e100);  // beyond that, TL1 is l0 or l1 to all digits
    c.x[1] = tau * c.x[0] * (c.x[0] + 1);
    c.x[2] = sizeof(A) == 4 ? float_way(continuous ? d : 1, a, tau, c) : NEWTON;
    c.x[3] = what_is_left(cut, c.cut);
    if (c.x[2] != ROOT) return;
    // A power of two, in which y is about 1 where |v| begins to live: none of its powers leaves
    // float32's range.
    c.x[4] = fmin(ldexp(1.0, -ilogb(c.x[0] + cut)), 0x1p120);
    // The unit in which q = 1 / y^3. An a far from the cut is l0's or l1's to 16 bits.
    const double near = fmin(fmax(a, 1e-6 * cut), 1e8 * cut);
    const double short_d = near * (continuous ? cut * near : tau * (a + 1));
    c.x[5] = short_d > 0 ? 1 / cbrt(6.75 * short_d) : 1;
    c.x[6] = short_d > 0 ? near * c.x[5] : 1;
    c.x[7] = short_d * c.x[5] * c.x[5];
  }

  static constexpr double NEWTON = 0, GENTLEST = 1, GENTLE = 2, ROOT = 3;
  double exact_a, exact_d, way;
  double unit_of_root;  // what by_root's lengths are in; 1 in the other ways
  A cut, rest;          // in two parts, as in SoftThreshold
  A a;
  double a_low;         // what rounding took from a, beside y at the cut, where it matters most
  A d, k, unit;         // d and k allow for that
  A limit;              // by_root's: where w is |v| to all digits
  A slope;              // the cut in units of a^2
  A terms[4];
  A short_unit, short_a, short_d;  // by_short_root's

  TL1_INLINE explicit TransformedL1(const Coefficients& c)
      : exact_a(c.x[0]), exact_d(c.x[1]), way(c.x[2]), unit_of_root(way == ROOT ? c.x[4] : 1),
        cut(A(c.cut)), rest(A(c.x[3])), a(A(exact_a * unit_of_root)),
        a_low((exact_a - double(a) / unit_of_root) / (exact_a + c.cut)),
        d(A(exact_d * unit_of_root * unit_of_root * (1 - 2 * a_low))),
        k(A(6.75 * exact_d * (unit_of_root * unit_of_root * unit_of_root) * (1 - 3 * a_low))),
        unit(A(unit_of_root)), limit(A(fmin(1e30 / unit_of_root, 1e38))), slope(A(c.x[8])),
        terms{A(c.x[4]), A(c.x[5]), A(c.x[6]), A(c.x[7])}, short_unit(A(c.x[5])),
        short_a(A(c.x[6])), short_d(A(c.x[7])) {}

  template <class Loop>
  TL1_INLINE void with_prox(Loop loop) const {
    const TransformedL1 self = *this;
    if constexpr (sizeof(A) == 8) {
      loop(dear([=](A x) TL1_LAMBDA { return self.by_newton(x); }));
    } else if constexpr (TL1_GPU) {
      // Memory hides the root there, and one way is less code.
      loop(dear([=](A x) TL1_LAMBDA { return self.by_root(x); }));
    } else if (way == GENTLEST) {
      loop(middling([=](A x) TL1_LAMBDA { return self.template by_series<Tl1Gentlest::TERMS>(x); }));
    } else if (way == GENTLE) {
      loop(middling([=](A x) TL1_LAMBDA { return self.template by_series<Tl1Gentle::TERMS>(x); }));
    } else if constexpr (FUSED) {
      loop(dear([=](A x) TL1_LAMBDA { return self.by_root(x); }));
    } else {
      loop(dear([=](A x) TL1_LAMBDA { return static_cast<A>(self.by_newton(x)); }));
    }
  }

  // Which way float32 takes, for a threshold at |v| = a d. Fills in the series' terms.
  TL1_ONCE static double float_way(double d, double a, double tau, Coefficients& c) {
    const double q = 6.75 * d / ((1 + d) * (1 + d) * (1 + d));
    const bool gentlest = q <= 1.0 / 64;
    if (TL1_GPU || q > 0.125 || a < 1e-12 || a > 1e6 || tau < 1e-30) return ROOT;
    double power = a * a;
    c.x[8] = c.cut / power;
    for (int i = 0; i < (gentlest ? Tl1Gentlest::TERMS : Tl1Gentle::TERMS); i++) {
      power *= 6.75 * d;
      const double term =
          power * (gentlest ? Tl1Gentlest::coefficient(i) : Tl1Gentle::coefficient(i));
      // Only a term that is nothing beside the first gets as small as that.
      c.x[4 + i] = term < 1e-37 ? 0 : term;
    }
    return gentlest ? GENTLEST : GENTLE;
  }

  // A soft threshold at t = tau (a + 1) / a, and what TL1 gives back of it:
  //   w = (|v| - t) + t H,   H = 1 - P a^2 / y^2 = (|v| (|v| + 2 a) - (P - 1) a^2) / y^2
  // |v| - t is exact where w is small, and H is small where t is not: few roundings matter. The
  // terms are those of (P - 1) a^2 as a series in (a / y)^3: powers of 1 / y itself would leave
  // float32's range.
  template <int TERMS>
  TL1_INLINE float by_series(float size) const {
    const float within = at_most(size, 1e12f);  // its square must not overflow; H is 1 there anyway
    const float inverse = a / (a + within);
    const float square = inverse * inverse, cube = square * inverse;
    A series[TERMS];
    for (int i = 0; i < TERMS; i++) series[i] = terms[i];
    const float taken = cube * polynomial(series, cube);
    const float given_back = mul_add(within, within + 2 * a, -taken);
    return mul_add(slope * square, given_back, (size - cut) - rest);
  }

  // |v| - D P / y^2. A step of Newton's makes up for what rounding took from y and from 1 / y.
  TL1_INLINE float by_root(float size) const {
    const float within = at_most(size, limit);  // y must not overflow; w is |v| there anyway
    const float y = mul_add(unit, within, a);
    const float lost = mul_add(unit, within, a - y);
    const float near = near_reciprocal(y);
    const float inverse = mul_add(near, mul_add(-lost, near, mul_add(-y, near, 1.0f)), near);
    const float square = inverse * inverse;
    const float u = near_root(magnitude_of(mul_add(-k * square, inverse, 1.0f)));  // < 0 by rounding
    const float p = (1 - u) * polynomial<Tl1Steep>(1 - u);
    return mul_add(-(d * square), p, mul_add(-d, square, size));
  }

  // The same for a result that is rounded to 16 bits. Lengths are in a unit in which q = 1 / y^3.
  template <class Series>
  TL1_INLINE float by_short_root(float size) const {
    const float inverse = near_reciprocal(mul_add(short_unit, size, short_a));
    const float square = inverse * inverse;
    const float u = near_root(magnitude_of(mul_add(-square, inverse, 1.0f)));
    return mul_add(-short_d * square, polynomial<Series>(u), size);
  }

  // For float64, and for a root in float32 without FMA. z = cos(acos(u) / 3) gives
  // r = (4 z^2 - 1) / 3; its cubic 4 z^3 - 3 z = u has no double root, so a Newton step squares the
  // polynomial's error.
  TL1_INLINE double by_newton(double size) const {
    const double inverse = 1 / (exact_a + size);
    const double quotient = exact_d * inverse * inverse;
    const double left = 1 - 6.75 * (quotient * inverse);
    const double u = root(magnitude_of(left));  // below 0 by rounding alone
    double z = 1 + (1 - u) * polynomial<Tl1Z>(1 - u);
    const double square = 4 * z * z;
    z -= (z * (square - 3) - u) / (3 * square - 3);
    const double r = (4 * z * z - 1) / 3;
    return size - quotient / (r * r);
  }
};

template <class A>
TL1_ONCE void prepare_tl1(double step, double weight, double a, Coefficients& c) {
  TransformedL1<A>::prepare(step, weight, a, c);
}

// max(0, 1 - threshold / norm), the group's factor in eq. 22, from the sum of squares. Both are in
// units in which the threshold is near 1: where the sum over- or underflows the factor is 1 or 0.
// `<=` first, so that a norm of 0 is never divided by, and a NaN stays NaN.
template <class A>
TL1_INLINE A shrink_factor(A sum_of_squares, A threshold) {
  const A norm = root(sum_of_squares);
  return norm <= threshold ? A(0) : 1 - quotient(threshold, norm);
}

}  // namespace TL1_ISA
}  // namespace tl1
