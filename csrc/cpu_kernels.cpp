// The CPU kernels. CMake compiles this file once per instruction set, with TL1_ISA its name; the one
// function that it exports is tl1::TL1_ISA::run_tile. No std and no torch here: an inline function of
// theirs, compiled for AVX-512, could be the copy that the linker keeps for everyone.
//
// Weights are advanced (cpu_advance.h) and their squares added to the sums of their groups; when a
// group's norm is known, a second loop scales it. What is written here says which weights, and when.

#include "cpu_advance.h"
#include "cpu_groups.h"

namespace tl1 {
inline namespace TL1_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P>
class Runner {
  using A = Arithmetic<P>;
  // Where weights are stored as they are computed, the first sweep can leave its values in them.
  static constexpr bool IN_PLACE = sizeof(P) == sizeof(A);
  static constexpr bool COPIES = sizeof(P) == sizeof(float);  // there may be a 16-bit copy

  const Step& step;
  const Tile& tile;
  Workspace& work;
  P* const param;
  const P* const grad;
  const int64_t inner, width;
  const bool short_runs;
  const bool short_rows;  // groups in one piece that a block holds
  int64_t origin, columns;   // of the columns whose sums and factors are in the workspace
  int64_t rows_in_part = 0;  // that work.part has the squares of
  int64_t ahead = AHEAD;     // from what is advanced to what memory is asked for

 public:
  Runner(const Step& step, const Tile& tile, Workspace& work)
      : step(step), tile(tile), work(work), param(static_cast<P*>(step.param)),
        grad(static_cast<const P*>(step.grad)), inner(step.inner), width(step.groups * step.inner),
        short_runs(step.inner < SHORT_RUN), short_rows(are_short_rows(step)), origin(tile.col0),
        columns(tile.col1 - tile.col0) {}

  void run() {
    switch (tile.phase) {
      case Phase::flat: return flat();
      case Phase::resident: return resident();
      case Phase::measure: return measure();
      case Phase::finish: return finish();
    }
  }

 private:
  static bool are_short_rows(const Step& s) {
    return s.outer == 1 && s.coupled < 0 && s.inner <= BLOCK;
  }

  int64_t address(int64_t row, int64_t col) const { return tile.base + row * width + col; }

  // Update and threshold the weights [at, at + n), n <= BLOCK: their values go to out.
  template <bool KeepState>
  void advance_to(int64_t at, int64_t n, A* out, Behind<A> behind = {}) const {
    A unused[KeepState ? 1 : MAX_STATES][KeepState ? 1 : BLOCK];
    alignas(64) P wide[COPIES ? BLOCK : 1];
    Weights<P> w = {param + at, gradients(at, n, wide), {}, {}, out, ahead, behind};
    for (int k = 0; k < MAX_STATES; k++) {
      A* stored = static_cast<A*>(step.state[k]);
      if (stored) stored += at;
      w.state[k] = stored;
      w.new_state[k] = KeepState ? stored : unused[KeepState ? 0 : k];
    }
    BY_RULE<P>[step.rule][step.penalty + 1](step, w, n);
  }

  // Calls f(copy, gradients) with their type, if there is a copy.
  template <class F>
  void with_copy(F f) const {
    if constexpr (COPIES) {
      if (!step.copy) return;
      if (step.copied == Stored::bfloat16) {
        f(static_cast<BFloat16*>(step.copy), static_cast<const BFloat16*>(step.grad));
      } else {
        f(static_cast<Float16*>(step.copy), static_cast<const Float16*>(step.grad));
      }
    }
  }

  // The gradients of the weights [at, at + n), in the weights' type: in `wide`, if they have another.
  const P* gradients(int64_t at, int64_t n, P* wide) const {
    const P* found = COPIES && step.copy ? wide : grad + at;
    with_copy([&](auto*, const auto* narrow) {
      SIMD for (int64_t i = 0; i < n; i++) wide[i] = load(narrow[at + i]);
    });
    return found;
  }

  // What has been stored for the weights [at, at + n) goes to the copy as well.
  void put_copy(int64_t at, int64_t n) const {
    with_copy([&](auto* copy, const auto*) {
      const bool clean = step.clean;
      SIMD for (int64_t i = at; i < at + n; i++) store(load(param[i]), clean, copy[i]);
    });
  }

  // Calls f(round) with what stores a weight as it is rounded: round(w, clean, at), at its place.
  template <class F>
  [[gnu::always_inline]] void with_rounding(F f) const {
    P* const out = param;
    if constexpr (IS_BFLOAT16<P>) {
      if (step.at_random) {
        const RandomKey key = step.key;
        return f([=](A w, bool clean, int64_t at) __attribute__((always_inline)) {
          store_at_random(w, clean, random_bits(key, static_cast<uint32_t>(at)), out[at]);
        });
      }
    }
    f([=](A w, bool clean, int64_t at) __attribute__((always_inline)) { store(w, clean, out[at]); });
  }

  void put(const A* t, int64_t at, int64_t n) const {
    const bool clean = step.clean;
    with_rounding([=](auto round) __attribute__((always_inline)) {
      SIMD for (int64_t i = 0; i < n; i++) round(t[i], clean, at + i);
    });
  }

  void put_scaled(const A* t, A factor, int64_t at, int64_t n) const {
    with_rounding([=](auto round) __attribute__((always_inline)) {
      SIMD for (int64_t i = 0; i < n; i++) round(scaled(factor, t[i]), !IN_PLACE, at + i);
    });
    put_copy(at, n);
  }

  void put_scaled(const A* t, const A* factors, int64_t at, int64_t n) const {
    with_rounding([=](auto round) __attribute__((always_inline)) {
      SIMD for (int64_t i = 0; i < n; i++) round(scaled(factors[i], t[i]), !IN_PLACE, at + i);
    });
    put_copy(at, n);
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

  int64_t groups_touched() const { return (origin + columns - 1) / inner - origin / inner + 1; }

  // What is measured of coupled groups, and where runs are short of each column.
  Measures of_groups(double* sums) const { return Measures::in(sums, groups_touched()); }
  Measures of_columns() const { return Measures::in(work.columns, columns); }

  void clear_sums(double* sums) const {
    if (step.coupled >= 0) {
      if (short_runs) of_columns().clear(columns);
      return of_groups(sums).clear(groups_touched());
    }
    for (int64_t i = 0; i < (short_runs ? columns : LANES); i++) work.columns[i] = 0;
    for (int64_t i = 0; i < (short_runs ? columns : 0); i++) work.part[i] = 0;
    const int64_t first = origin / inner, last = (origin + columns - 1) / inner;
    for (int64_t g = first; g <= last; g++) sums[g - first] = 0;
  }

  // Advances the weights [at, at + n) to out, and adds their squares to the sums; `index` counts the
  // tile's weights before them.
  template <bool KeepState>
  void advance_block(int64_t at, int64_t n, int64_t index, A* out, double* sums) {
    if (step.coupled >= 0) return advance_coupled<KeepState>(at, n, index, out, sums);
    advance_to<KeepState>(at, n, out);
    each_row_of(index, n, [&](int64_t i, int64_t col, int64_t m) {
      if (short_runs) {
        add_to_columns(out + i, col, m);
      } else {
        add_to_groups(out + i, col, m, sums);
      }
    });
  }

  template <bool KeepState>
  void advance_coupled(int64_t at, int64_t n, int64_t index, A* out, double* sums) {
    advance_to<KeepState>(at, n, out);
    // Rounded, as the cut is by which the weights will shrink.
    const double offset = A(tl1::offset(step.coupled, step.coupling.tau)), unit = step.unit;
    each_row_of(index, n, [&](int64_t i, int64_t col, int64_t m) {
      const int64_t row = tile.row0 + (index + i) / columns;
      if (short_runs) {
        const double place = static_cast<double>(row);  // of the run; fold_coupled adds the rest
        return measure_columns(out + i, m, place, offset, unit, of_columns().from(col - origin));
      }
      const Measures groups = of_groups(sums);
      each_run(col, col + m, [&](int64_t group, int64_t from, int64_t to) {
        const double place = static_cast<double>(row * inner + from - group * inner);
        const A* v = out + i + (from - col);
        groups.add(group - origin / inner, measure_run(v, to - from, place, offset, unit));
      });
    });
  }

  // Short runs: from columns to groups.
  void fold_coupled(double* sums) const {
    const Measures groups = of_groups(sums), by_column = of_columns();
    for (int64_t g = 0; g < columns / inner; g++) {
      for (int64_t i = 0; i < inner; i++) {
        Measured m = by_column.measured(g * inner + i);
        m.at = m.at * static_cast<double>(inner) + static_cast<double>(i);
        groups.add(g, m);
      }
    }
  }

  // What becomes of the groups from `origin` on, by column.
  void spread_coupled(const Measures& shrinks) const {
    A *factors = reinterpret_cast<A*>(work.spread), *cuts = reinterpret_cast<A*>(work.cuts);
    for (int64_t i = 0; i < columns; i++) {
      factors[i] = static_cast<A>(shrinks.of[0][i / inner]);
      cuts[i] = static_cast<A>(shrinks.of[1][i / inner]);
    }
  }

  [[gnu::always_inline]] static A shrunk(A v, A factor, A cut) {
    const A size = magnitude_of(v);
    return with_sign_of(factor * (size < cut ? A(0) : size - cut), v);
  }

  // Stores v, the weights of a row from column `col` on, with what `shrinks`, from the group of
  // `origin` on, makes of them.
  void shrink(const A* v, int64_t row, int64_t col, int64_t n, const Measures& shrinks) const {
    const int64_t at = address(row, col);
    if (short_runs) {
      const A* factors = reinterpret_cast<const A*>(work.spread) + (col - origin);
      const A* cuts = reinterpret_cast<const A*>(work.cuts) + (col - origin);
      with_rounding([=](auto round) __attribute__((always_inline)) {
        SIMD for (int64_t i = 0; i < n; i++) round(shrunk(v[i], factors[i], cuts[i]), true, at + i);
      });
    } else {
      const int64_t first = origin / inner;
      each_run(col, col + n, [=, this](int64_t group, int64_t from, int64_t to) {
        const A factor = static_cast<A>(shrinks.of[0][group - first]);
        const A cut = static_cast<A>(shrinks.of[1][group - first]);
        const A* of_run = v + (from - col);
        const int64_t of = at + (from - col);
        with_rounding([=](auto round) __attribute__((always_inline)) {
          SIMD for (int64_t i = 0; i < to - from; i++) round(shrunk(of_run[i], factor, cut), true, of + i);
        });
      });
    }
    put_copy(at, n);
  }

  // Stores the weights that their groups keep, of those in the tile.
  void keep(const Measures& shrinks) const {
    const int64_t first = origin / inner;
    for (int64_t g = 0; g < groups_touched(); g++) {
      if (shrinks.of[2][g] < 0) continue;
      const int64_t place = static_cast<int64_t>(shrinks.of[2][g]);
      const int64_t row = place / inner, col = (first + g) * inner + place % inner;
      const bool here = row >= tile.row0 && row < tile.row1 && col >= origin && col < origin + columns;
      if (!here) continue;
      const int64_t at = address(row, col);
      with_rounding([=](auto round) { round(static_cast<A>(shrinks.of[3][g]), true, at); });
      put_copy(at, 1);
    }
  }

  void add_to_groups(const A* t, int64_t col, int64_t n, double* sums) const {
    double* lanes = work.columns;
    const int64_t first = origin / inner, end = origin + columns;
    each_run(col, col + n, [=, this](int64_t group, int64_t from, int64_t to) {
      add_squares(t + (from - col), to - from, step.unit, lanes);
      if (to == end || to == (group + 1) * inner) sums[group - first] += take_sum(lanes);
    });
  }

  void add_to_columns(const A* t, int64_t col, int64_t n) {
    const double unit = step.unit;
    double* column = work.columns + (col - origin);
    if (!in_float<A>(unit)) {
      SIMD for (int64_t i = 0; i < n; i++) column[i] += square_of(t[i], unit);
      return;
    }
    if (col == origin && rows_in_part++ == ROWS_IN_PART) {
      move_part_to(work.columns, work.part, columns);
      rows_in_part = 1;
    }
    float* part = work.part + (col - origin);
    SIMD for (int64_t i = 0; i < n; i++) add_square(static_cast<float>(t[i]), part[i]);
  }

  // Short runs: from columns to groups. They are never cut, so the columns begin with a group.
  void fold_columns(double* sums) {
    if (!short_runs) return;
    if (step.coupled >= 0) return fold_coupled(sums);
    move_part_to(work.columns, work.part, columns);
    rows_in_part = 0;
    const double* column = work.columns;
    const int64_t groups = columns / inner, stride = inner;
    for (int64_t i = 0; i < inner; i++) {
      SIMD for (int64_t g = 0; g < groups; g++) sums[g] += column[g * stride + i];
    }
  }

  // The factors of the groups from `origin` on, one for each column; for short runs and rows.
  A* spread(const double* factors) const {
    A* by_column = reinterpret_cast<A*>(work.spread);
    const int64_t groups = columns / inner;
    if (inner == 1) {
      SIMD for (int64_t g = 0; g < groups; g++) by_column[g] = A(factors[g]);
      return by_column;
    }
    A* at = by_column;
    for (int64_t g = 0; g < groups; g++, at += inner) {
      const A factor = A(factors[g]);
      // Whole vectors: the next group overwrites what is too much.
      for (int64_t i = 0; i < inner; i += LANES) {
        SIMD for (int64_t k = 0; k < LANES; k++) at[i + k] = factor;
      }
    }
    return by_column;
  }

  // Calls f(at, n, index) for the tile's weights [at, at + n), n <= BLOCK, from the first row to the
  // last; `index` counts them. Where a row of the tile is a row of the tensor, blocks span rows.
  template <class F>
  void each_block(F f) {
    const bool whole = columns == width;
    const int64_t rows = tile.row1 - tile.row0;
    const int64_t length = whole ? rows * columns : columns;
    const int64_t turn = whole || columns < AHEAD ? length : columns - AHEAD;  // see ahead_of
    for (int64_t row = 0; row < (whole ? 1 : rows); row++) {
      const int64_t first = address(tile.row0 + row, origin);
      for (int64_t i = 0, n; i < length; i += n) {
        n = smaller(BLOCK, (i < turn ? turn : length) - i);
        ahead = ahead_of(i);
        f(first + i, n, row * columns + i);
      }
    }
    ahead = AHEAD;
  }

  // From weight i of a row of the tile to what is asked for meanwhile, which is near the row's end the
  // next one's beginning.
  int64_t ahead_of(int64_t i) const {
    return i + AHEAD < columns ? AHEAD : AHEAD + width - columns;
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
    alignas(64) A block[BLOCK];
    for (int64_t at = tile.col0; at < tile.col1; at += BLOCK) {
      const int64_t n = smaller(BLOCK, tile.col1 - at);
      if constexpr (IN_PLACE) {
        advance_to<true>(at, n, param + at);
        if (step.clean && step.penalty < 0) put(param + at, at, n);  // else the threshold made -0 +0
        put_copy(at, n);
      } else {
        advance_to<true>(at, n, block);
        put(block, at, n);
      }
    }
  }

  void resident() {
    if constexpr (IN_PLACE) {
      if (step.outer == 1 && step.coupled < 0 && inner % CHUNK == 0) return overlapped();
    }
    for (int64_t col = tile.col0; col < tile.col1; col += tile.strip) {
      origin = col;
      columns = smaller(tile.strip, tile.col1 - col);
      resident_strip();
    }
  }

  // Where the value of weight `at` of the tensor, `index` of the strip, waits for its group's norm.
  A* held([[maybe_unused]] int64_t at, [[maybe_unused]] int64_t index) const {
    if constexpr (IN_PLACE) {
      return param + at;
    } else {
      return work.values + index;
    }
  }

  // Turns sums of squares into what their groups are scaled by.
  void to_factors(double* sums, int64_t groups) const {
    const double threshold = step.group_threshold;
    SIMD for (int64_t g = 0; g < groups; g++) sums[g] = shrink_factor(sums[g], threshold);
  }

  // Groups in one piece, of whole chunks: each strip is scaled while the next one is advanced, so that
  // memory is asked for weights all the time.
  void overlapped() const {
    A* const factors = reinterpret_cast<A*>(work.spread);  // of the tile, by chunk
    double* const sums = work.sums;
    const int64_t start = address(0, tile.col0), n = tile.col1 - tile.col0, strip = tile.strip;
    for (int64_t first = 0; first < n; first += strip) {
      const int64_t end = smaller(first + strip, n), groups = (end - first) / inner;
      alignas(64) double lanes[SUMS] = {};
      for (int64_t i = first; i < end; i += BLOCK) {
        const int64_t at = start + i, m = smaller(BLOCK, end - i);
        A* const values = held(at, 0);
        if (first == 0) {
          advance_to<true>(at, m, values);
        } else {
          advance_to<true>(at, m, values, {values - strip, factors + (i - strip) / CHUNK});
          put_copy(at - strip, m);
        }
        if (short_rows) {
          sum_rows(values, groups, inner, step.unit, work.columns, sums);
        } else {
          add_squares(values, m, step.unit, lanes);
        }
      }
      if (!short_rows) sums[0] = take_sum(lanes);
      to_factors(sums, groups);
      A* by_chunk = factors + first / CHUNK;
      for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = 0; i < inner; i += CHUNK) *by_chunk++ = A(sums[g]);
      }
    }
    for (int64_t i = n > strip ? n - strip : 0; i < n; i += CHUNK) {
      put_scaled(held(start + i, 0), factors[i / CHUNK], start + i, CHUNK);
    }
  }

  // Advances the strip; what is measured of its groups goes to sums.
  void advance_strip(double* sums) {
    if (short_rows) {
      each_block([&](int64_t at, int64_t n, int64_t index) {
        advance_to<true>(at, n, held(at, index));
      });
      const A* values = held(address(tile.row0, origin), 0);
      return sum_rows(values, columns / inner, inner, step.unit, work.columns, sums);
    }
    clear_sums(sums);
    each_block([&](int64_t at, int64_t n, int64_t index) {
      advance_block<true>(at, n, index, held(at, index), sums);
    });
    fold_columns(sums);
  }

  void resident_strip() {
    double* sums = work.sums;
    advance_strip(sums);
    const int64_t groups = columns / inner;
    if (step.coupled >= 0) {
      const Measures of = of_groups(sums);
      for (int64_t g = 0; g < groups; g++) {
        of.put(g, tl1::finish(step.coupled, of.measured(g), step.coupling));
      }
      return shrink_strip(of);
    }
    to_factors(sums, groups);
    const bool whole = inner % LANES == 0;
    const A* by_column = short_runs || (short_rows && !whole) ? spread(sums) : nullptr;
    for (int64_t row = tile.row0; row < tile.row1; row++) {
      const int64_t at = address(row, origin);
      scale(held(at, (row - tile.row0) * columns), at, origin, columns, sums, by_column);
    }
  }

  void shrink_strip(const Measures& shrinks) const {
    if (short_runs) spread_coupled(shrinks);
    for (int64_t row = tile.row0; row < tile.row1; row++) {
      const A* v = held(address(row, origin), (row - tile.row0) * columns);
      shrink(v, row, origin, columns, shrinks);
    }
    keep(shrinks);
  }

  // Stores t, the values of the weights from `at` on, times the factors of their groups: `factors`
  // begins with the group of `origin`, by_column, if there is one, repeats it for each column.
  void scale(const A* t, int64_t at, int64_t col, int64_t n, const double* factors,
             const A* by_column) const {
    if (by_column) return put_scaled(t, by_column + (col - origin), at, n);
    const int64_t first = origin / inner;
    each_run(col, col + n, [=, this](int64_t group, int64_t from, int64_t to) {
      const A factor = static_cast<A>(factors[group - first]);
      put_scaled(t + (from - col), factor, at + (from - col), to - from);
    });
  }

  void measure() {
    alignas(64) A block[BLOCK];
    clear_sums(tile.sums);
    each_block([&](int64_t at, int64_t n, int64_t index) {
      A* out = block;
      if constexpr (IN_PLACE) out = param + at;
      advance_block<IN_PLACE>(at, n, index, out, tile.sums);
    });
    fold_columns(tile.sums);
  }

  void finish_coupled() {
    double* all = const_cast<double*>(tile.factors);  // it only reads them
    const Measures shrinks = Measures::in(all, step.groups).from(origin / inner);
    if (short_runs) spread_coupled(shrinks);
    alignas(64) A v[BLOCK];
    each_block([&](int64_t at, int64_t n, int64_t index) {
      const A* values = v;
      if constexpr (IN_PLACE) {
        values = param + at;
      } else {
        advance_to<true>(at, n, v);
      }
      each_row_of(index, n, [&](int64_t i, int64_t col, int64_t m) {
        shrink(values + i, tile.row0 + (index + i) / columns, col, m, shrinks);
      });
    });
    keep(shrinks);
  }

  void finish() {
    if (step.coupled >= 0) return finish_coupled();
    const double* factors = tile.factors + origin / inner;
    const A* by_column = short_runs ? spread(factors) : nullptr;
    if constexpr (IN_PLACE) {
      for (int64_t row = tile.row0; row < tile.row1; row++) {
        for (int64_t i = 0; i < columns; i += CHUNK) {
          const int64_t at = address(row, origin + i), n = smaller(CHUNK, columns - i);
          prefetch<1>(param + at + AHEAD);
          scale(param + at, at, origin + i, n, factors, by_column);
        }
      }
    } else {
      alignas(64) A t[BLOCK];
      each_block([&](int64_t at, int64_t n, int64_t index) {
        advance_to<true>(at, n, t);
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
