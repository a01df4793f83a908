// What the schedule and the kernels share: plain structs, and one entry point per instruction set.

#pragma once

#include <stdint.h>

#include "prox_math.h"
#include "update_rules.h"

namespace tl1 {

enum class Stored { float32, float64, bfloat16, float16 };

constexpr int MAX_STATES = 3;
constexpr int64_t BLOCK = 128;         // weights that go through the stages together, in L1
constexpr int64_t AHEAD = 2 * BLOCK;   // how far ahead of them memory is fetched
constexpr int64_t CHUNK = 64;          // weights that skip a threshold's root together
constexpr int64_t SHORT_RUN = 64;      // runs of a group shorter than this are summed by column
constexpr int64_t COLUMNS = 8192;      // columns summed side by side; a tile of short runs has no more
constexpr int64_t RESIDENT = 1 << 18;  // weights whose thresholded values wait in cache for the norm

// One tensor's step. Its memory is (blocks, outer, groups, inner); see tl1kernels/views.py.
struct Step {
  void* param;
  const void* grad;
  void* state[MAX_STATES];
  int64_t blocks, outer, groups, inner;
  Stored stored;
  int rule;      // row of TL1_RULES
  int penalty;   // row of TL1_PENALTIES; -1 for none
  bool clean;    // regularized: no -0
  RuleNumbers numbers;
  Coefficients coefficients;
  double group_threshold;  // times `unit`; -1 for no groups
  double unit;             // the scale in which weights are squared; a power of two

  int64_t width() const { return groups * inner; }
};

enum class Phase {
  flat,      // no groups: update, threshold, store
  resident,  // whole groups: the values wait in the workspace until their norm is known
  measure,   // parts of groups, first sweep: the squares are summed
  finish,    // parts of groups, second sweep: what the norm changes
};

// Part of a step: rows [row0, row1) of `outer`, columns [col0, col1) of `width`, in the block that
// starts at the weight `base`.
struct Tile {
  Phase phase;
  int64_t step;
  int64_t base, row0, row1, col0, col1;
  int64_t strip;            // resident: columns taken at a time
  double* sums;             // measure: sum of squares of each group touched
  const double* factors;    // finish: of all groups of the block

  int64_t first_group(int64_t inner) const { return col0 / inner; }
  int64_t n_groups(int64_t inner) const { return (col1 - 1) / inner - col0 / inner + 1; }
};

// One thread's memory, aligned to 64 bytes.
struct Workspace {
  static constexpr int64_t VALUES = (RESIDENT + BLOCK) * sizeof(float);
  static constexpr int64_t EACH = COLUMNS * sizeof(double);
  static constexpr int64_t BYTES = VALUES + 3 * EACH;
  char* memory;
  float* values() const { return reinterpret_cast<float*>(memory); }
  double* columns() const { return reinterpret_cast<double*>(memory + VALUES); }
  void* factors() const { return memory + VALUES + EACH; }
  double* sums() const { return reinterpret_cast<double*>(memory + VALUES + 2 * EACH); }
};

using RunTile = void (*)(const Step&, const Tile&, const Workspace&);

}  // namespace tl1
