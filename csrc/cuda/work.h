// What the CUDA kernels find in memory: plain structs, the same for the host and the device.
//
// Python (tl1kernels/backends/cuda_schedule.py) writes the rows and the items, `prepare` the records.

#pragma once

#include <stddef.h>

#include "../kernels.h"

namespace tl1::gpu {

constexpr int THREADS = 128;      // of a block
constexpr int WARP = 32;
constexpr int TEAM_GROUPS = 64;   // of a panel, at most
constexpr int RING_AT = 16;       // in a block's shared memory, in bytes: of weights.h's ring

// A tensor: addresses, then its view (tl1kernels/views.py), then how its items cut it up.
struct Row {
  int64_t param, grad, state[MAX_STATES];
  int64_t copy;             // 0, or a 16-bit tensor that takes the new values
  int64_t counter, lr, lam;  // 0, or where on the device Adam's step, lr and lam are, float32
  int64_t outer, groups, inner;
  int64_t numel;
  int64_t span;    // chunk: weights of one; team: columns of one, in weights
  int64_t width;   // chunk: weights of a group, 0 for no groups
  int64_t lanes;   // chunk: threads that add up a group, a power of two; team: threads side by side, at least 2
  int64_t share_rows, share_columns;  // team: rows of a piece, and weights in each of them
  int64_t pieces, across;             // team: how many pieces, and how many of them side by side
  int64_t partials, factors;          // where those of its teams begin in the workspaces
  int64_t team_groups;                // of a team, at most
  int64_t in_block;                   // teams of one of the view's blocks
  // What stands for divisions (walk.h): 2^31 over the weights of a group (of a chunk, a panel), over
  // `lanes`, and over the rows of threads (of a team).
  int64_t inverse, inverse_lanes, inverse_step;
};
constexpr int ROW_COLUMNS = sizeof(Row) / sizeof(int64_t);

// How the weights of an item lie in memory.
enum class Shape {
  chunk,  // neighbours: whole groups of neighbours, or no groups
  panel,  // a team: whole groups side by side, in all rows of `outer`
  run,    // a team: one group
};
// When its groups' norms are known.
enum class Phase {
  held,    // in one go: the team's blocks have all of it in shared memory, and wait for each other
  first,   // after this, which leaves sums in memory
  second,  // before this, which computes all again
};

struct alignas(16) Item {
  int32_t tensor;
  int32_t kind;  // 1 for vectors of 16 bytes, + 2 * Shape + 8 * Phase
  int32_t team;  // chunk: its place
  int32_t piece;

  TL1_INLINE bool vectors() const { return kind & 1; }
  TL1_INLINE Shape shape() const { return static_cast<Shape>(kind >> 1 & 3); }
  TL1_INLINE Phase phase() const { return static_cast<Phase>(kind >> 3); }
};

// A tensor's numbers in the arithmetic type, made by `prepare` before anything else runs.
constexpr size_t RULE_BYTES = 128, PROX_BYTES = 192, RECORD_BYTES = 512;
template <class A>
struct Common {
  A cut;              // |v| <= cut goes to 0
  A unit, threshold;  // of a group's norm, in the unit, a power of two; < 0 for no groups
  A offset;           // of a coupled penalty: what is taken off |v| before it is squared
  bool clean;         // regularized: a dead weight is +0, never -0
  RandomKey key;      // of stochastic rounding
  int coupled;        // row of TL1_COUPLED; -1 for none
  Coupling coupling;
};

// A number that one block leaves for others, and the launch that it is of.
struct alignas(8) Post {
  uint32_t number, launch;
};

// What `prepare` counts: 0 at first.
struct Counters {
  int32_t tickets;  // from 0 on after each `prepare`
  uint32_t launch;  // of the tiles after it, below OWN_LAUNCHES
};
constexpr uint32_t OWN_LAUNCHES = 1u << 31;  // from there on Python counts

// The arguments of both kernels.
struct Work {
  const Row* rows;
  const double* scalars;     // a tensor's: Scalars, then the step, where `counter` is 0
  unsigned char* records;
  const float *grad_scale, *found_inf;
  Counters* counters;
  uint32_t launch;           // of tiles that `prepare` does not come before; else 0
  Post *partials, *factors;  // of teams: of their groups what each piece has measured, and the outcomes
  const Item *resident, *split;
  int64_t n_resident, n_split;
  int64_t n_tensors;
  int64_t seed;              // of stochastic rounding
  int64_t parts_at, outcomes_at, waiting_at;          // in a block's shared memory, in bytes
  int64_t of_team_at, first_at, second_at;            // of pieces of teams: outcomes, values, values
  int rule, penalty, coupled;        // rows of TL1_RULES, TL1_PENALTIES, TL1_COUPLED; or -1
  bool maximize, nesterov, decoupled;
  bool teams;                        // whether blocks wait for each other
};

}  // namespace tl1::gpu
