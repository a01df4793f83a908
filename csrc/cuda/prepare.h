// What runs before the tiles: each tensor's numbers, those on the device too, become its record, in
// float64; and a launch begins, with no ticket taken.

#pragma once

#include <new>

#include "variants.h"
#include "work.h"

namespace tl1::gpu {

constexpr int N_SCALARS = sizeof(Scalars) / sizeof(double);
constexpr int SCALAR_COLUMNS = N_SCALARS + 1;  // the last is the step

// The penalties as they are compiled, by the struct that they use. The numbers are places in the
// list of kernels.cu.
enum Variant { SOFT, TRANSFORMED, OTHERS, COUPLED, VARIANTS };

template <class A>
struct Prepared {
  TL1_ONCE static constexpr Variant variant(SoftThreshold<A>*) { return SOFT; }
  TL1_ONCE static constexpr Variant variant(TransformedL1<A>*) { return TRANSFORMED; }
  TL1_ONCE static constexpr Variant variant(void*) { return OTHERS; }

  TL1_ONCE static void put(SoftThreshold<A>*, const Coefficients& c, void* at) {
    new (at) Soft<A>(c);
  }
  TL1_ONCE static void put(TransformedL1<A>*, const Coefficients& c, void* at) {
    new (at) Transformed<A>(c);
  }
#define TL1_PUT(Struct)                                                   \
  TL1_ONCE static void put(Struct<A>*, const Coefficients& c, void* at) { \
    new (at) Others<A>(Others<A>::of_##Struct, c);                        \
  }
  TL1_OTHERS(TL1_PUT)

  // The penalty's coefficients; without a weight, those with which it leaves all weights as they are.
  TL1_ONCE static void prox(int penalty, const Scalars& s, Common<A>& common, void* at) {
    Coefficients c{};
    if (penalty < 0) put(static_cast<SoftThreshold<A>*>(nullptr), c, at);
#define TL1_PREPARE_PROX(name, prepare, Struct)                                          \
  if (penalty-- == 0) {                                                                  \
    const bool others = variant(static_cast<Struct<A>*>(nullptr)) == OTHERS;             \
    if (s.elementwise > 0 || !others) prepare<A>(s.lr, s.elementwise, s.a, c);           \
    if (s.elementwise > 0 || !others) put(static_cast<Struct<A>*>(nullptr), c, at);      \
    else put(static_cast<Pieces<A>*>(nullptr), c, at);                                   \
  }
    TL1_PENALTIES(TL1_PREPARE_PROX)
    common.cut = s.elementwise > 0 ? A(c.cut) : A(-1);
  }

  TL1_ONCE static void rule(int row, const RuleNumbers& numbers, void* at) {
#define TL1_PREPARE_RULE(name, Rule) \
  if (row-- == 0) new (at) Rule<A>(numbers);
    TL1_RULES(TL1_PREPARE_RULE)
  }

  TL1_ONCE static void common(const Work& work, const Scalars& s, Common<A>& common) {
    const double tau = s.lr * s.elementwise, threshold = s.lr * s.group;
    const bool coupled = work.coupled >= 0 && tau > 0;
    const double scale = coupled ? fmax(tau, threshold) : threshold;
    const double most = sizeof(A) == 4 ? 0x1p120 : 0x1p1000;
    // As a rule it is 1, which costs nothing: all squares that matter beside such a threshold are
    // within float32's range.
    const bool near_1 = !coupled && scale > 0x1p-40 && scale < 0x1p36;
    const double unit =
        scale > 0 && !near_1 ? fmin(fmax(ldexp(1.0, -ilogb(scale)), 1 / most), most) : 1;
    const double in_units = threshold > 0 ? threshold * unit : coupled ? 0 : -1;
    common.unit = A(unit);
    common.threshold = A(in_units);
    common.clean = s.elementwise > 0 || s.group > 0;
    common.coupled = coupled ? work.coupled : -1;
    common.offset = coupled ? A(offset(work.coupled, tau)) : A(0);
    common.coupling = {tau, in_units, unit};
  }

  TL1_ONCE static void tensor(const Work& work, int64_t i) {
    const Row& row = work.rows[i];
    const double* given = work.scalars + i * SCALAR_COLUMNS;
    Scalars s = *reinterpret_cast<const Scalars*>(given);
    double step = 0;
    if (row.lr) s.lr = *reinterpret_cast<const float*>(row.lr);
    if (row.lam) {
      const double lam = *reinterpret_cast<const float*>(row.lam);
      s.elementwise *= lam;
      s.group *= lam;
    }
    if (row.counter) {
      step = *reinterpret_cast<float*>(row.counter) += 1;
    } else {
      step = given[N_SCALARS];
    }
    unsigned char* const record = work.records + i * RECORD_BYTES;
    const double scale = *work.grad_scale;
    rule(work.rule, rule_numbers(s, {work.maximize, work.nesterov, work.decoupled}, scale, step),
         record);
    Common<A> numbers{};
    common(work, s, numbers);
    numbers.key = random_key(work.seed, i);
    if (work.coupled < 0) prox(work.penalty, s, numbers, record + RULE_BYTES);
    *reinterpret_cast<Common<A>*>(record + RULE_BYTES + PROX_BYTES) = numbers;
  }
};

// One thread's part: tensor i.
template <class A>
TL1_ONCE void prepare(const Work& work, int64_t i) {
  if (i == 0) *work.counters = {0, (work.counters->launch + 1) % OWN_LAUNCHES};
  if (i < work.n_tensors && *work.found_inf == 0) Prepared<A>::tensor(work, i);
}

}  // namespace tl1::gpu
