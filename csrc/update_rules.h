// The update rules for one weight, for the CPU and CUDA: v = rule.take(p, g, state), torch.optim's.
//
// A rule is a struct, and a row of TL1_RULES, with
//   STATES                     how many state tensors it has (those shaped like the parameter)
//   COUNTS                     whether it also has a counter of steps
//   Rule(numbers)              takes those it knows of RuleNumbers, in the arithmetic type A
//   take<PLAIN>(p, g, s0, ...) the updated weight; the state values are updated in place
//   plain()                    whether its numbers allow PLAIN: what few steps have is left out (decay in
//                              the gradient, Nesterov's way, a unit), and the bits are the same
// A number that switches something off (no weight decay, plain momentum) selects and does not
// multiply: 0 * inf would be NaN where torch.optim has none.

#pragma once

#include "prox_math.h"

namespace tl1 {

// One tensor's scalars by the names that the Python layer gives them: the rule's (batch.py), then
// the regularizer's terms (penalties.py).
#define TL1_SCALARS(row)                                                                       \
  row(lr) row(weight_decay) row(momentum) row(dampening) row(beta1) row(beta2) row(eps)        \
  row(elementwise) row(group) row(a)

#define TL1_SCALAR_MEMBER(name) double name;
struct Scalars {
  TL1_SCALARS(TL1_SCALAR_MEMBER)
};

// What selects between variants of a rule.
struct Variant {
  bool maximize, nesterov, decoupled;
};

// The rules' numbers, in float64; each rule takes those it knows.
struct RuleNumbers {
  double unit;         // of the gradient: -1 to maximize, over the loss's scale
  double decay;        // weight decay that goes into the gradient
  double keep;         // factor of the weight before the update (decoupled decay)
  double lr;           // step size; for Adam, over the first moment's bias correction
  double momentum;
  double gain;         // of the gradient in the momentum buffer: 1 - dampening
  double nesterov;     // 0 or 1
  double beta1, rate1, beta2, rate2;  // rate = 1 - beta
  double inverse_root;         // 1 / sqrt(the second moment's bias correction)
  double eps;
};

inline namespace TL1_ISA {

// `step` counts from 1 for a rule that counts, Adam; it is 0 for one that does not.
TL1_ONCE RuleNumbers rule_numbers(const Scalars& s, const Variant& variant, double grad_scale,
                                double step) {
  const bool adam = step > 0;
  const bool decoupled = adam && variant.decoupled;
  RuleNumbers n{};
  n.unit = (variant.maximize ? -1 : 1) / grad_scale;
  n.decay = decoupled ? 0 : s.weight_decay;
  n.keep = decoupled ? 1 - s.lr * s.weight_decay : 1;
  n.lr = adam ? s.lr / (1 - pow(s.beta1, step)) : s.lr;
  n.momentum = s.momentum;
  n.gain = 1 - s.dampening;
  n.nesterov = variant.nesterov;
  n.beta1 = s.beta1;
  n.rate1 = 1 - s.beta1;
  n.beta2 = s.beta2;
  n.rate2 = 1 - s.beta2;
  n.inverse_root = adam ? 1 / sqrt(1 - pow(s.beta2, step)) : 1;
  n.eps = s.eps;
  return n;
}

// Both values are computed, and one is taken.
template <class A>
TL1_INLINE A either(bool first, A a, A b) { return first ? a : b; }

// v = source: the prox alone.
template <class A>
struct Assign {
  static constexpr int STATES = 0;
  static constexpr bool COUNTS = false;
  explicit TL1_INLINE Assign(const RuleNumbers&) {}
  TL1_INLINE static constexpr bool plain() { return false; }  // there is nothing to leave out
  template <bool>
  TL1_INLINE A take(A, A g, A&, A&, A&) const { return g; }
};

template <class A>
struct Sgd {
  static constexpr int STATES = 0;
  static constexpr bool COUNTS = false;
  A lr, decay;  // in the gradient's unit; a power of two leaves every rounding as it is
  explicit TL1_INLINE Sgd(const RuleNumbers& n) : lr(A(n.unit * n.lr)), decay(A(n.decay / n.unit)) {}
  TL1_INLINE bool plain() const { return decay == 0; }
  template <bool PLAIN>
  TL1_INLINE A take(A p, A g, A&, A&, A&) const {
    // Not (1 - lr * decay) * p: an infinite weight turns into torch's NaN.
    if constexpr (!PLAIN) g = either(decay != 0, mul_add(decay, p, g), g);
    return mul_add(-lr, g, p);
  }
};

// state: momentum_buffer
template <class A>
struct SgdMomentum {
  static constexpr int STATES = 1;
  static constexpr bool COUNTS = false;
  A unit, decay, lr, momentum, gain, nesterov;
  explicit TL1_INLINE SgdMomentum(const RuleNumbers& n)
      : unit(A(n.unit)), decay(A(n.decay)), lr(A(n.lr)), momentum(A(n.momentum)),
        gain(A(n.gain)), nesterov(A(n.nesterov)) {}
  TL1_INLINE bool plain() const { return unit == 1 && decay == 0 && nesterov == 0; }
  template <bool PLAIN>
  TL1_INLINE A take(A p, A g, A& buffer, A&, A&) const {
    if constexpr (!PLAIN) {
      g = unit * g;
      g = either(decay != 0, mul_add(decay, p, g), g);
    }
    buffer = mul_add(gain, g, momentum * buffer);
    A way = buffer;
    if constexpr (!PLAIN) way = either(nesterov != 0, mul_add(momentum, buffer, g), buffer);
    return mul_add(-lr, way, p);
  }
};

// Adam, AdamW, and with Amsgrad their variant. state: exp_avg, exp_avg_sq, max_exp_avg_sq
template <class A, bool Amsgrad>
struct AdamRule {
  static constexpr int STATES = Amsgrad ? 3 : 2;
  static constexpr bool COUNTS = true;
  A unit, decay, keep, lr, beta1, rate1, beta2, rate2, inverse_root, eps;
  explicit TL1_INLINE AdamRule(const RuleNumbers& n)
      : unit(A(n.unit)), decay(A(n.decay)), keep(A(n.keep)), lr(A(n.lr)), beta1(A(n.beta1)), rate1(A(n.rate1)),
        beta2(A(n.beta2)), rate2(A(n.rate2)), inverse_root(A(n.inverse_root)), eps(A(n.eps)) {}
  TL1_INLINE bool plain() const { return unit == 1 && decay == 0 && rate1 < A(0.5); }
  template <bool PLAIN>
  TL1_INLINE A take(A p, A g, A& mean, A& square, A& largest) const {
    if constexpr (PLAIN) {
      mean = mul_add(rate1, g - mean, mean);
    } else {
      g = unit * g;
      g = either(decay != 0, mul_add(decay, p, g), g);
      // torch.lerp's two forms: the other one would cancel a large old mean against itself.
      mean = either(rate1 < A(0.5), mul_add(rate1, g - mean, mean), mul_add(-beta1, g - mean, g));
    }
    square = mul_add(beta2, square, rate2 * g * g);
    // As torch.maximum: a NaN on either side wins.
    if constexpr (Amsgrad) largest = largest > square || largest != largest ? largest : square;
    const A second = Amsgrad ? largest : square;
    return mul_add(-lr, quotient(mean, mul_add(root(second), inverse_root, eps)), keep * p);
  }
};
template <class A>
using Adam = AdamRule<A, false>;
template <class A>
using AdamAmsgrad = AdamRule<A, true>;

// name in the op's schema, struct
#define TL1_RULES(row)              \
  row("assign", Assign)             \
  row("sgd", Sgd)                   \
  row("sgd_momentum", SgdMomentum)  \
  row("adam", Adam)                 \
  row("adam_amsgrad", AdamAmsgrad)

}  // namespace TL1_ISA
}  // namespace tl1
