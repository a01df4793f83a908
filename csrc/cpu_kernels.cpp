// The CPU kernels. CMake compiles this file once per instruction set, with TL1_ISA its name; the one
// function that it exports is tl1::TL1_ISA::run_tile. No std and no torch here: an inline function of
// theirs, compiled for AVX-512, could be the copy that the linker keeps for everyone.
//
// A step is a chain of stages over BLOCK weights at a time, each a loop that vectorises:
//   update (rule, stored type) -> t;  threshold (penalty) on t;  squares of t;  store, scaled
// Stages are chosen from tables, so that rules, penalties and types add up and do not multiply.

#include "kernels.h"
#include "storage.h"

#define SIMD _Pragma("omp simd")

namespace tl1 {
inline namespace TL1_ISA {
namespace {

struct States {
  void* in[MAX_STATES];
  void* out[MAX_STATES];
};

template <class P>
using Update = void (*)(const RuleNumbers&, const P*, const P*, const States&, Arithmetic<P>*,
                        int64_t);
template <class A>
using Threshold = void (*)(const Coefficients&, A*, int64_t);

template <template <class> class Rule, class P>
void update(const RuleNumbers& numbers, const P* p, const P* g, const States& states,
            Arithmetic<P>* t, int64_t n) {
  using A = Arithmetic<P>;
  using R = Rule<A>;
  const R rule(numbers);
  const A* in0 = static_cast<const A*>(states.in[0]);
  const A* in1 = static_cast<const A*>(states.in[1]);
  const A* in2 = static_cast<const A*>(states.in[2]);
  A* out0 = static_cast<A*>(states.out[0]);
  A* out1 = static_cast<A*>(states.out[1]);
  A* out2 = static_cast<A*>(states.out[2]);
  SIMD for (int64_t i = 0; i < n; i++) {
    A s0 = R::STATES > 0 ? in0[i] : A(0);
    A s1 = R::STATES > 1 ? in1[i] : A(0);
    A s2 = R::STATES > 2 ? in2[i] : A(0);
    t[i] = rule(load(p[i]), load(g[i]), s0, s1, s2);
    if constexpr (R::STATES > 0) out0[i] = s0;
    if constexpr (R::STATES > 1) out1[i] = s1;
    if constexpr (R::STATES > 2) out2[i] = s2;
  }
}

// In place on t[0, n) and on what is behind it up to a multiple of CHUNK.
template <template <class> class Penalty, class A>
void threshold(const Coefficients& coefficients, A* t, int64_t n) {
  const Penalty<A> penalty(coefficients);
  const A cut = penalty.cut;
  // Inline, or `cut` is read through a closure that may alias v, and the loop stays scalar.
  penalty.with_prox([=](auto prox) __attribute__((always_inline)) {
    for (int64_t at = 0; at < n; at += CHUNK) {
      A* v = t + at;
      int alive = 0;
      _Pragma("omp simd reduction(|:alive)") for (int64_t i = 0; i < CHUNK; i++) {
        alive |= !(magnitude_of(v[i]) <= cut);  // a NaN lives
      }
      if (!alive) {
        SIMD for (int64_t i = 0; i < CHUNK; i++) v[i] = 0;
        continue;
      }
      SIMD for (int64_t i = 0; i < CHUNK; i++) {
        const A size = magnitude_of(v[i]);
        const A w = prox(size);
        v[i] = with_sign_of(size <= cut ? A(0) : w, v[i]);  // `store` makes -0 +0
      }
    }
  });
}

#define TL1_UPDATE(name, Rule) update<Rule, P>,
template <class P>
constexpr Update<P> UPDATES[] = {TL1_RULES(TL1_UPDATE)};

#define TL1_THRESHOLD(name, Penalty) threshold<Penalty, A>,
template <class A>
constexpr Threshold<A> THRESHOLDS[] = {TL1_PENALTIES(TL1_THRESHOLD)};

// Squares are summed in float64. Conversions cost more than the sums, so with `unit` 1, where no
// square that matters can over- or underflow float32, QUADS of them are first added in float32.
constexpr int64_t LANES = 16;  // enough independent sums to hide an addition's latency
constexpr int64_t QUADS = 4;
static_assert(BLOCK % (LANES * QUADS) == 0);

template <class A>
double square_of(A x, double unit) {
  const double scaled = unit * static_cast<double>(x);
  return scaled * scaled;
}

template <class A>
void add_squares_to(double* lanes, const A* t, int64_t n, double unit) {
  int64_t at = 0;
  if (sizeof(A) == sizeof(float) && unit == 1) {
    for (; at + LANES * QUADS <= n; at += LANES * QUADS) {
      SIMD for (int64_t i = 0; i < LANES; i++) {
        A sum = t[at + i] * t[at + i];
        for (int64_t k = 1; k < QUADS; k++) {
          const A x = t[at + i + k * LANES];
          sum = mul_add(x, x, sum);
        }
        lanes[i] += static_cast<double>(sum);
      }
    }
  }
  for (; at + LANES <= n; at += LANES) {
    SIMD for (int64_t i = 0; i < LANES; i++) lanes[i] += square_of(t[at + i], unit);
  }
  for (int64_t i = 0; at + i < n; i++) lanes[i] += square_of(t[at + i], unit);
}

// Returns the sum of the lanes, and leaves them 0.
double take_sum(double* lanes) {
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    SIMD for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  const double sum = lanes[0];
  for (int64_t i = 0; i < LANES; i++) lanes[i] = 0;
  return sum;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P>
class Runner {
  using A = Arithmetic<P>;
  // Where weights are stored as they are computed, the first sweep can leave its values in them.
  static constexpr bool IN_PLACE = sizeof(P) == sizeof(A);

  const Step& step;
  const Tile& tile;
  Workspace& work;
  P* const param;
  const P* const grad;
  const int64_t inner, width;
  const bool short_runs;
  int64_t origin, columns;  // of the columns whose sums and factors are in the workspace

 public:
  Runner(const Step& step, const Tile& tile, Workspace& work)
      : step(step), tile(tile), work(work), param(static_cast<P*>(step.param)),
        grad(static_cast<const P*>(step.grad)), inner(step.inner), width(step.groups * step.inner),
        short_runs(step.inner < SHORT_RUN), origin(tile.col0), columns(tile.col1 - tile.col0) {}

  void run() {
    switch (tile.phase) {
      case Phase::flat: return flat();
      case Phase::resident: return resident();
      case Phase::measure: return measure();
      case Phase::finish: return finish();
    }
  }

 private:
  int64_t address(int64_t row, int64_t col) const { return tile.base + row * width + col; }

  // Memory works while the stages compute: the hardware's own prefetchers wait for the next access.
  // Always inline: GCC drops a call of a function that only prefetches.
  [[gnu::always_inline]] void prefetch(int64_t at, int64_t n) const {
    lines<1>(param + at, n);
    lines<0>(grad + at, n);
    for (void* state : step.state) {
      if (state) lines<1>(static_cast<A*>(state) + at, n);
    }
  }

  template <int Write, class T>
  [[gnu::always_inline]] static void lines(const T* first, int64_t n) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(first + i, Write);
  }

  // Update and threshold the weights [at, at + n), n <= BLOCK: their values go to t.
  template <bool KeepState>
  void advance(int64_t at, int64_t n, A* t) const {
    A unused[KeepState ? 1 : MAX_STATES][KeepState ? 1 : BLOCK];
    States states;
    for (int i = 0; i < MAX_STATES; i++) {
      A* stored = static_cast<A*>(step.state[i]);
      states.in[i] = stored ? stored + at : nullptr;
      states.out[i] = KeepState ? states.in[i] : unused[KeepState ? 0 : i];
    }
    prefetch(at + AHEAD, n);
    UPDATES<P>[step.rule](step.numbers, param + at, grad + at, states, t, n);
    if (step.penalty < 0) return;
    for (int64_t i = n; i % CHUNK != 0; i++) t[i] = 0;
    THRESHOLDS<A>[step.penalty](step.coefficients, t, n);
  }

  void put(const A* t, int64_t at, int64_t n, bool clean) const {
    P* out = param + at;
    SIMD for (int64_t i = 0; i < n; i++) store(t[i], clean, out[i]);
  }

  // factor * t, never -0. In full precision adding +0 in the same operation does it.
  static void store_scaled(A factor, A t, P& out) {
    store(mul_add(factor, t, A(0)), !IN_PLACE || !FUSED, out);
  }

  void put_scaled(const A* t, A factor, int64_t at, int64_t n) const {
    P* out = param + at;
    SIMD for (int64_t i = 0; i < n; i++) store_scaled(factor, t[i], out[i]);
  }

  void put_scaled(const A* t, const A* factors, int64_t at, int64_t n) const {
    P* out = param + at;
    SIMD for (int64_t i = 0; i < n; i++) store_scaled(factors[i], t[i], out[i]);
  }

  // Calls f(group, first column, end) for the stretches of one group within columns [col, end).
  template <class F>
  void each_run(int64_t col, int64_t end, F f) const {
    for (int64_t group = col / inner; col < end; group++) {
      const int64_t stop = smaller((group + 1) * inner, end);
      f(group, col, stop);
      col = stop;
    }
  }

  void clear_sums(double* sums) const {
    for (int64_t i = 0; i < (short_runs ? columns : LANES); i++) work.columns[i] = 0;
    const int64_t first = origin / inner, last = (origin + columns - 1) / inner;
    for (int64_t g = first; g <= last; g++) sums[g - first] = 0;
  }

  void add_squares(const A* t, int64_t col, int64_t n, double* sums) const {
    const double unit = step.unit;
    double* partial = work.columns;
    if (short_runs) {
      double* column = partial + (col - origin);
      SIMD for (int64_t i = 0; i < n; i++) column[i] += square_of(t[i], unit);
      return;
    }
    const int64_t first = origin / inner, end = origin + columns;
    each_run(col, col + n, [=, this](int64_t group, int64_t from, int64_t to) {
      add_squares_to(partial, t + (from - col), to - from, unit);
      if (to == end || to == (group + 1) * inner) sums[group - first] += take_sum(partial);
    });
  }

  // Short runs: from columns to groups. They are never cut, so the columns begin with a group.
  void fold_columns(double* sums) const {
    if (!short_runs) return;
    const double* column = work.columns;
    const int64_t groups = columns / inner, stride = inner;
    for (int64_t i = 0; i < inner; i++) {
      SIMD for (int64_t g = 0; g < groups; g++) sums[g] += column[g * stride + i];
    }
  }

  // Short runs: the factors of the groups from `origin` on, one for each column.
  A* spread(const double* factors) const {
    A* by_column = reinterpret_cast<A*>(work.spread);
    const int64_t groups = columns / inner, stride = inner;
    for (int64_t i = 0; i < inner; i++) {
      SIMD for (int64_t g = 0; g < groups; g++) by_column[g * stride + i] = A(factors[g]);
    }
    return by_column;
  }

  // Calls f(at, n, index) for the tile's weights [at, at + n), n <= BLOCK, from the first row to the
  // last; `index` counts them. Where a row of the tile is a row of the tensor, blocks span rows.
  template <class F>
  void each_block(F f) const {
    const bool whole = columns == width;
    const int64_t rows = tile.row1 - tile.row0;
    const int64_t length = whole ? rows * columns : columns;
    for (int64_t row = 0; row < (whole ? 1 : rows); row++) {
      const int64_t first = address(tile.row0 + row, origin);
      for (int64_t i = 0; i < length; i += BLOCK) {
        f(first + i, smaller(BLOCK, length - i), row * columns + i);
      }
    }
  }

  // Calls f(i, col, m) for the stretches of one row within the block that begins with weight `index`
  // of the tile: its weights [i, i + m), and their first column.
  template <class F>
  void each_row_of(int64_t index, int64_t n, F f) const {
    int64_t col = index % columns;
    for (int64_t i = 0; i < n; col = 0) {
      const int64_t m = smaller(columns - col, n - i);
      f(i, origin + col, m);
      i += m;
    }
  }

  void flat() const {
    alignas(64) A t[BLOCK];
    for (int64_t at = tile.col0; at < tile.col1; at += BLOCK) {
      const int64_t n = smaller(BLOCK, tile.col1 - at);
      advance<true>(at, n, t);
      put(t, at, n, step.clean);
    }
  }

  void resident() {
    for (int64_t col = tile.col0; col < tile.col1; col += tile.strip) {
      origin = col;
      columns = smaller(tile.strip, tile.col1 - col);
      resident_strip();
    }
  }

  void resident_strip() const {
    alignas(64) A block[BLOCK];
    double* sums = work.sums;
    clear_sums(sums);
    each_block([&](int64_t at, int64_t n, int64_t index) {
      A* t = block;
      if constexpr (!IN_PLACE) t = work.values + index;
      advance<true>(at, n, t);
      if (IN_PLACE) put(t, at, n, false);
      each_row_of(index, n, [&](int64_t i, int64_t col, int64_t m) {
        add_squares(t + i, col, m, sums);
      });
    });
    fold_columns(sums);
    const int64_t groups = columns / inner;
    const double threshold = step.group_threshold;
    SIMD for (int64_t g = 0; g < groups; g++) sums[g] = shrink_factor(sums[g], threshold);
    const A* by_column = short_runs ? spread(sums) : nullptr;
    for (int64_t row = tile.row0; row < tile.row1; row++) {
      const int64_t at = address(row, origin);
      const A* t;
      if constexpr (IN_PLACE) {
        t = param + at;
      } else {
        t = work.values + (row - tile.row0) * columns;
      }
      scale(t, at, origin, columns, sums, by_column);
    }
  }

  // Stores t, the values of the weights from `at` on, times the factors of their groups: `factors`
  // begins with the group of `origin`, by_column repeats it for short runs.
  void scale(const A* t, int64_t at, int64_t col, int64_t n, const double* factors,
             const A* by_column) const {
    if (short_runs) return put_scaled(t, by_column + (col - origin), at, n);
    const int64_t first = origin / inner;
    each_run(col, col + n, [=, this](int64_t group, int64_t from, int64_t to) {
      const A factor = static_cast<A>(factors[group - first]);
      put_scaled(t + (from - col), factor, at + (from - col), to - from);
    });
  }

  void measure() const {
    alignas(64) A t[BLOCK];
    clear_sums(tile.sums);
    each_block([&](int64_t at, int64_t n, int64_t index) {
      advance<IN_PLACE>(at, n, t);
      if (IN_PLACE) put(t, at, n, false);
      each_row_of(index, n, [&](int64_t i, int64_t col, int64_t m) {
        add_squares(t + i, col, m, tile.sums);
      });
    });
    fold_columns(tile.sums);
  }

  void finish() const {
    const double* factors = tile.factors + origin / inner;
    const A* by_column = short_runs ? spread(factors) : nullptr;
    if constexpr (IN_PLACE) {
      // From the last row to the first: what the first sweep read last may still be in cache.
      for (int64_t row = tile.row1 - 1; row >= tile.row0; row--) {
        const int64_t at = address(row, origin);
        scale(param + at, at, origin, columns, factors, by_column);
      }
    } else {
      alignas(64) A t[BLOCK];
      each_block([&](int64_t at, int64_t n, int64_t index) {
        advance<true>(at, n, t);
        each_row_of(index, n, [&](int64_t i, int64_t col, int64_t m) {
          scale(t + i, at + i, col, m, factors, by_column);
        });
      });
    }
  }
};

}  // namespace

void run_tile(const Step& step, const Tile& tile, Workspace& work) {
  switch (step.stored) {
    case Stored::float32: return Runner<float>(step, tile, work).run();
    case Stored::float64: return Runner<double>(step, tile, work).run();
    case Stored::bfloat16: return Runner<BFloat16>(step, tile, work).run();
    case Stored::float16: return Runner<Float16>(step, tile, work).run();
  }
}

}  // namespace TL1_ISA
}  // namespace tl1
