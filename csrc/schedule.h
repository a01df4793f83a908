// Many tensors' steps -> tiles that any number of threads can take in any order.
//
// The tiles depend on the tensors alone, and sums are added in the order of the tiles: the bits of a
// result do not depend on how many threads there are or which was faster.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu_groups.h"

namespace tl1 {

// Some of a block's groups in the two sweeps: adds its tiles' sums up, in order, and turns them into
// factors.
struct Reduction {
  int64_t step;
  size_t first_tile, last_tile;  // in Schedule::first
  size_t factors;                // place of the block's first factor in Schedule::factors
  int64_t group0, group1;
};

struct Schedule {
  std::vector<Tile> first;    // flat, resident, measure
  std::vector<Tile> second;   // finish
  std::vector<Reduction> between;
  std::unique_ptr<double[]> sums;  // each tile clears its own
  std::vector<double> factors;
};

namespace schedule {

constexpr int64_t FLAT_TILE = 1 << 16;     // weights; enough that taking a tile costs nothing
constexpr int64_t LONG_TILE = 1 << 18;     // of large tensors: memory likes long streams better
constexpr int64_t LONG_TILES = 64;         // large is what gives that many, for as many threads
constexpr int64_t SMALL_STRIP = 2048;      // weights that wait in L1, where groups are that small
constexpr int64_t STREAM = 1024;           // columns that memory still delivers at speed
constexpr int64_t MEASURE_TILE = 1 << 18;  // weights
constexpr int64_t REDUCED = 1024;          // groups whose sums one thread adds up
constexpr int64_t ROW_TILES = 64;          // at most, and
constexpr int64_t ROWS = 32;               // at least: what bounds the memory of the sums

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t width(const Step& s) { return s.groups * s.inner; }

// Numbers that are measured of a group.
inline int64_t measures(const Step& s) { return s.coupled < 0 ? 1 : MEASURES; }

// Groups that a tile touches.
inline int64_t n_groups(const Tile& t, int64_t inner) {
  return (t.col1 - 1) / inner - t.col0 / inner + 1;
}

// Columns that a thread holds until their norms are known, whole groups; 0 if that cannot be.
inline int64_t resident_strip(const Step& s) {
  const int64_t row_width = width(s), limit = s.inner < SHORT_RUN ? COLUMNS : RESIDENT;
  const int64_t most = std::min(RESIDENT / s.outer, limit) / s.inner * s.inner;
  if (s.outer == 1) {
    return std::min(most, std::max(s.inner, SMALL_STRIP / s.inner * s.inner));
  }
  return most >= row_width ? row_width : (most >= STREAM ? most : 0);
}

// Weights of a tile that is read and written once.
inline int64_t tile_size(const Step& s) {
  return std::clamp(s.blocks * s.outer * width(s) / LONG_TILES, FLAT_TILE, LONG_TILE);
}

inline void flat(const Step& s, int64_t index, Schedule& plan) {
  const int64_t size = s.blocks * s.outer * width(s), tile = tile_size(s);
  for (int64_t at = 0; at < size; at += tile) {
    plan.first.push_back({Phase::flat, index, 0, 0, 1, at, std::min(at + tile, size), 0,
                          nullptr, nullptr});
  }
}

inline void resident(const Step& s, int64_t index, int64_t base, int64_t strip, Schedule& plan) {
  const int64_t row_width = width(s);
  const int64_t columns = strip * std::max<int64_t>(1, tile_size(s) / (strip * s.outer));
  for (int64_t col = 0; col < row_width; col += columns) {
    plan.first.push_back({Phase::resident, index, base, 0, s.outer, col,
                          std::min(col + columns, row_width), strip, nullptr, nullptr});
  }
}

inline void two_sweeps(const Step& s, int64_t index, int64_t base, Schedule& plan) {
  const int64_t row_width = width(s);
  const int64_t rows = std::max(ROWS, ceil_div(s.outer, ROW_TILES));
  int64_t columns = std::max(STREAM, MEASURE_TILE / std::min(rows, s.outer));
  if (s.inner < SHORT_RUN) columns = std::min(columns, COLUMNS) / s.inner * s.inner;
  const size_t first_tile = plan.first.size();
  for (int64_t row = 0; row < s.outer; row += rows) {
    for (int64_t col = 0; col < row_width; col += columns) {
      plan.first.push_back({Phase::measure, index, base, row, std::min(row + rows, s.outer), col,
                            std::min(col + columns, row_width), 0, nullptr, nullptr});
    }
  }
  for (int64_t group = 0; group < s.groups; group += REDUCED) {
    plan.between.push_back({index, first_tile, plan.first.size(), plan.factors.size(), group,
                            std::min(group + REDUCED, s.groups)});
  }
  plan.factors.resize(plan.factors.size() + static_cast<size_t>(measures(s) * s.groups));
}

inline Schedule of(const std::vector<Step>& steps) {
  Schedule plan;
  for (size_t i = 0; i < steps.size(); i++) {
    const Step& s = steps[i];
    const int64_t index = static_cast<int64_t>(i), size = s.outer * width(s);
    if (s.blocks * size == 0) continue;
    if (s.group_threshold < 0) {
      flat(s, index, plan);
      continue;
    }
    const int64_t strip = resident_strip(s);
    for (int64_t block = 0; block < s.blocks; block++) {
      if (strip) {
        resident(s, index, block * size, strip, plan);
      } else {
        two_sweeps(s, index, block * size, plan);
      }
    }
  }
  // Only now that nothing grows any more: where each tile's sums and factors are.
  size_t n_sums = 0;
  for (const Tile& t : plan.first) {
    if (t.phase != Phase::measure) continue;
    const Step& s = steps[t.step];
    n_sums += static_cast<size_t>(measures(s) * n_groups(t, s.inner));
  }
  plan.sums.reset(new double[n_sums]);
  double* sums = plan.sums.get();
  for (const Reduction& r : plan.between) {
    if (r.group0 > 0) continue;  // the block's first has set its tiles
    for (size_t i = r.first_tile; i < r.last_tile; i++) {
      Tile& t = plan.first[i];
      t.sums = sums;
      sums += measures(steps[t.step]) * n_groups(t, steps[t.step].inner);
      plan.second.push_back(t);
      plan.second.back().phase = Phase::finish;
      plan.second.back().factors = plan.factors.data() + r.factors;
    }
  }
  return plan;
}

// The same for a penalty of whole groups.
inline void reduce_coupled(const Step& s, const Reduction& r, Schedule& plan) {
  const Measures all = Measures::in(plan.factors.data() + r.factors, s.groups);
  for (size_t i = r.first_tile; i < r.last_tile; i++) {
    const Tile& t = plan.first[i];
    const int64_t first = t.col0 / s.inner, n = n_groups(t, s.inner);
    const int64_t group1 = std::min(r.group1, first + n);
    const Measures of_tile = Measures::in(t.sums, n);
    for (int64_t g = std::max(r.group0, first); g < group1; g++) {
      all.add(g, of_tile.measured(g - first));
    }
  }
  for (int64_t g = r.group0; g < r.group1; g++) {
    all.put(g, finish(s.coupled, all.measured(g), s.coupling));
  }
}

inline void reduce(const Step& s, const Reduction& r, Schedule& plan) {
  if (s.coupled >= 0) return reduce_coupled(s, r, plan);
  double* factors = plan.factors.data() + r.factors;
  for (size_t i = r.first_tile; i < r.last_tile; i++) {
    const Tile& t = plan.first[i];
    const int64_t first = t.col0 / s.inner, end = first + n_groups(t, s.inner);
    const int64_t group0 = std::max(r.group0, first), group1 = std::min(r.group1, end);
    const double* sums = t.sums;
    _Pragma("omp simd") for (int64_t g = group0; g < group1; g++) factors[g] += sums[g - first];
  }
  const double threshold = s.group_threshold;
  _Pragma("omp simd") for (int64_t g = r.group0; g < r.group1; g++) {
    factors[g] = shrink_factor(factors[g], threshold);
  }
}

}  // namespace schedule
}  // namespace tl1
