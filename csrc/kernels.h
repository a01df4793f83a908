// What the schedule and the kernels share: plain structs. They have no member functions, which would
// be compiled once per instruction set under one name (see TL1_ISA).

#pragma once

#include <stdint.h>

#include "penalties.h"
#include "random.h"
#include "update_rules.h"

namespace tl1 {

enum class Stored { float32, float64, bfloat16, float16 };

constexpr int MAX_STATES = 3;
constexpr int64_t BLOCK = 1024;        // weights that wait in L1 between two loops
constexpr int64_t AHEAD = 768;         // weights from what is computed to what memory is asked for
constexpr int64_t CHUNK = 64;          // weights that skip a threshold's root together
constexpr int64_t SHORT_RUN = 64;      // runs of a group shorter than this are summed by column
constexpr int64_t COLUMNS = 1 << 14;   // columns summed side by side; a tile of short runs has no more
constexpr int64_t RESIDENT = 1 << 18;  // weights whose thresholded values wait in cache for the norm

// One tensor's step. Its memory is (blocks, outer, groups, inner); see tl1kernels/views.py.
struct Step {
  void* param;
  void* copy;        // of a float32 parameter: 16-bit, takes its new values; or null
  const void* grad;  // of the type of the copy, if there is one
  void* state[MAX_STATES];
  int64_t blocks, outer, groups, inner;
  Stored stored;
  Stored copied;  // the type of the copy
  int rule;      // row of TL1_RULES
  int penalty;   // row of TL1_PENALTIES; -1 for none
  bool clean;    // regularized: a dead weight is +0, never -0
  bool at_random;  // bfloat16 is rounded stochastically, by the key
  RandomKey key;
  RuleNumbers numbers;
  Coefficients coefficients;
  int coupled;             // row of TL1_COUPLED; -1 for none
  Coupling coupling;
  double group_threshold;  // times `unit`; -1 for no groups
  double unit;             // the scale in which weights are squared; a power of two
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
};

// With a penalty of whole groups there are four numbers where there is one sum, and four where there
// is one factor: first all groups' first number, then all groups' second one.
constexpr int MEASURES = 4;
static_assert(sizeof(Measured) == MEASURES * sizeof(double));
static_assert(sizeof(Shrink) == MEASURES * sizeof(double));

// One thread's memory.
struct Workspace {
  // By column, or by lane of one sum, and by group. Sums of squares, then the groups' factors, take
  // COLUMNS; the rest is there for a penalty of whole groups.
  alignas(64) double columns[MEASURES * COLUMNS];
  alignas(64) double sums[MEASURES * COLUMNS];
  alignas(64) float part[COLUMNS];  // sums of squares by column, of the latest few rows
  alignas(64) unsigned char spread[(COLUMNS + CHUNK) * sizeof(double)];  // factors, by column or chunk
  alignas(64) unsigned char cuts[COLUMNS * sizeof(double)];    // the same of a coupled group's cuts
  alignas(64) float values[RESIDENT + BLOCK];  // of 16-bit weights, thresholded
};

using RunTile = void (*)(const Step&, const Tile&, Workspace&);

}  // namespace tl1
