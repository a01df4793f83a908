// Many tensors' steps -> tiles that any number of threads can take in any order.
//
// The tiles depend on the tensors alone, and sums are added in the order of the tiles: the bits of a
// result do not depend on how many threads there are or which was faster.

#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "cpu_groups.h"

namespace tl1 {

// Some of a block's groups in the two sweeps: adds its tiles' sums up, in order, and turns them into
// factors.
struct Reduction {
  int64_t step;
  size_t block;  // in Schedule::blocks
  int64_t group0, group1;
};

// A block that is swept twice. What is left to do of it is counted down while threads run.
struct Block {
  size_t first_tile, last_tile;  // in Schedule::first
  size_t first_finish;           // of its tiles in Schedule::second, as many
  size_t first_reduction, last_reduction;
  size_t factors;  // place of its first factor in Schedule::factors
  std::atomic<size_t> to_measure, to_reduce;
};

// A tile of a second sweep. The thread that measured it may have its weights in cache.
struct Finish {
  Tile tile;
  const void* measured_by;
  std::atomic<bool> taken;
};

struct Schedule {
  std::vector<Tile> first;    // flat, resident, measure
  std::deque<Finish> second;  // a deque moves nothing when it grows
  std::vector<Reduction> between;
  std::deque<Block> blocks;
  std::unique_ptr<double[]> sums;  // each tile clears its own
  std::vector<double> factors;
};

// What a thread takes next: a tile of the first sweep or a reduction, by index, or one of the tiles of
// its block's second sweep. Tiles that are swept once have no block.
struct Task {
  enum Kind { first, reduction, second } kind;
  size_t index;
  Block* block;
};

namespace schedule {

constexpr int64_t FLAT_TILE = 1 << 16;     // weights; enough that taking a tile costs nothing
constexpr int64_t LONG_TILE = 1 << 18;     // of large tensors: memory likes long streams better
constexpr int64_t LONG_TILES = 64;         // large is what gives that many, for as many threads
constexpr int64_t STREAM = 1024;           // columns that memory still delivers at speed
constexpr int64_t MEASURE_TILE = 1 << 18;  // weights, where runs are long
constexpr int64_t REDUCED = 1024;          // groups whose sums one thread adds up
constexpr int64_t ROW_TILES = 64;          // at most, and
constexpr int64_t ROWS = 32;               // at least: what bounds the memory of the sums
constexpr int64_t WHOLE_LINES = 16;        // rows, of any width, that end where a cache line does

static_assert(LONG_TILE / CHUNK <= COLUMNS && RESIDENT / CHUNK <= COLUMNS);  // factors by chunk

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
    return std::min(most, std::max(s.inner, BLOCK / s.inner * s.inner));
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

// Columns of a tile of two sweeps. Whole rows where they fit: what a thread asks memory for ahead of
// the end of a piece is lost. As many in each tile of a row: a narrow one would take as long as a wide
// one.
inline int64_t measured_columns(const Step& s, int64_t rows) {
  const bool short_runs = s.inner < SHORT_RUN;
  const int64_t unit = short_runs ? ceil_div(CHUNK, s.inner) * s.inner : CHUNK;
  const int64_t most = short_runs ? COLUMNS : std::max(COLUMNS, MEASURE_TILE / rows);
  const int64_t tiles = ceil_div(width(s), most / unit * unit);
  return ceil_div(ceil_div(width(s), tiles), unit) * unit;
}

inline void two_sweeps(const Step& s, int64_t index, int64_t base, Schedule& plan) {
  const int64_t row_width = width(s);
  const int64_t least = ceil_div(s.outer, ROW_TILES * WHOLE_LINES) * WHOLE_LINES;
  const int64_t rows = std::max(ROWS, least);
  const int64_t columns = measured_columns(s, std::min(rows, s.outer));
  const size_t first_tile = plan.first.size();
  for (int64_t row = 0; row < s.outer; row += rows) {
    for (int64_t col = 0; col < row_width; col += columns) {
      plan.first.push_back({Phase::measure, index, base, row, std::min(row + rows, s.outer), col,
                            std::min(col + columns, row_width), 0, nullptr, nullptr});
    }
  }
  const size_t n_block = plan.blocks.size();
  Block& block = plan.blocks.emplace_back();
  block.first_tile = first_tile, block.last_tile = plan.first.size();
  block.first_reduction = plan.between.size();
  for (int64_t group = 0; group < s.groups; group += REDUCED) {
    plan.between.push_back({index, n_block, group, std::min(group + REDUCED, s.groups)});
  }
  block.last_reduction = plan.between.size();
  block.to_measure = block.last_tile - block.first_tile;
  block.to_reduce = block.last_reduction - block.first_reduction;
  block.factors = plan.factors.size();
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
  for (Block& block : plan.blocks) {
    block.first_finish = plan.second.size();
    for (size_t i = block.first_tile; i < block.last_tile; i++) {
      Tile& t = plan.first[i];
      t.sums = sums;
      sums += measures(steps[t.step]) * n_groups(t, steps[t.step].inner);
      Tile& again = plan.second.emplace_back().tile = t;
      again.phase = Phase::finish;
      again.factors = plan.factors.data() + block.factors;
    }
  }
  return plan;
}

// The order in which threads take all this. A block's second sweep begins `lag` tiles after its first
// one ends: soon enough to find weights in cache, late enough that threads rarely wait for another.
inline std::vector<Task> in_order(Schedule& plan, size_t lag) {
  std::vector<Task> tasks;
  tasks.reserve(plan.first.size() + plan.between.size() + plan.second.size());
  size_t n_tiles = 0, next = 0;  // tiles of first sweeps; the block whose second sweep comes next
  const auto second_sweeps = [&](bool all) {
    for (; next < plan.blocks.size(); next++) {
      Block& b = plan.blocks[next];
      if (!all && n_tiles < b.last_tile + lag) return;
      for (size_t i = b.first_reduction; i < b.last_reduction; i++) {
        tasks.push_back({Task::reduction, i, &b});
      }
      for (size_t i = b.first_tile; i < b.last_tile; i++) tasks.push_back({Task::second, 0, &b});
    }
  };
  size_t at = 0;  // the block that has not ended yet
  for (; n_tiles < plan.first.size(); n_tiles++) {
    second_sweeps(false);
    if (at < plan.blocks.size() && n_tiles >= plan.blocks[at].last_tile) at++;
    const bool swept_twice = plan.first[n_tiles].phase == Phase::measure;
    tasks.push_back({Task::first, n_tiles, swept_twice ? &plan.blocks[at] : nullptr});
  }
  second_sweeps(true);
  return tasks;
}

// The tile of a block's second sweep, by its index in the first.
inline Finish& finish_of(Schedule& plan, const Block& b, size_t tile) {
  return plan.second[b.first_finish + (tile - b.first_tile)];
}

// Takes a tile of a block's second sweep: one that the thread has measured, or else any; backwards,
// from what the first sweep left in cache last. There is one for each of the block's tasks.
inline const Tile& take(Schedule& plan, const Block& b, const void* thread) {
  for (bool any : {false, true}) {
    for (size_t i = b.last_tile; i-- > b.first_tile;) {
      Finish& f = finish_of(plan, b, i);
      if (!any && f.measured_by != thread) continue;
      if (!f.taken.load(std::memory_order_relaxed) && !f.taken.exchange(true)) return f.tile;
    }
  }
  __builtin_unreachable();
}

// The same for a penalty of whole groups.
inline void reduce_coupled(const Step& s, const Reduction& r, Schedule& plan) {
  const Block& block = plan.blocks[r.block];
  const Measures all = Measures::in(plan.factors.data() + block.factors, s.groups);
  for (size_t i = block.first_tile; i < block.last_tile; i++) {
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
  const Block& block = plan.blocks[r.block];
  double* factors = plan.factors.data() + block.factors;
  for (size_t i = block.first_tile; i < block.last_tile; i++) {
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
