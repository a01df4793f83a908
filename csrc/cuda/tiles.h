// The kernel: update rule, threshold and group shrinkage while the weights are in registers or in
// shared memory. Read it from the bottom: a block takes items, an item is a chunk or a team's piece.
//
// Sums are added up in an order that only the view decides: results are the same in every run.

#pragma once

#include "../storage.h"
#include "groups.h"
#include "variants.h"
#include "walk.h"

namespace tl1::gpu {

// One instance of the kernel. T: of the parameter; G: of the gradient, and of the copy where it is
// not T; Rule, Prox: of update_rules.h, penalties.h; Prox is `None` for a penalty of whole groups.
template <class T_, class G_, template <class> class Rule_, template <class> class Prox_>
struct Config {
  using T = T_;
  using G = G_;
  using A = Arithmetic<T>;
  using Rule = Rule_<A>;
  using Prox = typename ForBytes<Prox_<A>, sizeof(T)>::type;
  static constexpr int STATES = Rule::STATES;
  static constexpr int VECTOR = 16 / sizeof(T);
  static constexpr bool COPIES = sizeof(T) != sizeof(G);
  static constexpr bool COUPLED = Prox::COUPLED;
  // Blocks of a multiprocessor, and vectors that a thread loads at a time: what registers allow.
  static constexpr bool LARGE =
      sizeof(A) == 8 || (VECTOR == 8 && (COUPLED || (Prox::MANY && STATES > 0)));
  static constexpr int BLOCKS = LARGE ? 1 : COUPLED || Prox::MANY || VECTOR * STATES >= 8 ? 2 : 3;
  static constexpr int AT_ONCE = STATES == 0 && VECTOR <= 4 && !COPIES ? 2 : 1;
  static_assert(sizeof(Rule) <= RULE_BYTES && sizeof(Prox) <= PROX_BYTES);
  static_assert(RULE_BYTES + PROX_BYTES + sizeof(Common<A>) <= RECORD_BYTES);
};

// N neighbours in memory, in accesses of up to 16 bytes.
template <class T, int N>
struct Pack {
  static constexpr int BYTES = N * sizeof(T);
  struct alignas(BYTES < 16 ? BYTES : 16) Part {
    T x[BYTES < 16 ? N : 16 / sizeof(T)];
  };
  static constexpr int IN_PART = sizeof(Part) / sizeof(T), PARTS = N / IN_PART;
  Part part[PARTS];

  TL1_DEVICE T& operator[](int i) { return part[i / IN_PART].x[i % IN_PART]; }
  TL1_DEVICE void from(const T* at) {
    _Pragma("unroll") for (int i = 0; i < PARTS; i++) {
      load_global(part[i], reinterpret_cast<const Part*>(at) + i);
    }
  }
  TL1_DEVICE void to(T* at) const {
    _Pragma("unroll") for (int i = 0; i < PARTS; i++) {
      store_global(part[i], reinterpret_cast<Part*>(at) + i);
    }
  }
};

template <class C>
class Block {
  using T = typename C::T;
  using G = typename C::G;
  using A = typename C::A;
  using M = Measure<A, C::COUPLED>;
  using O = Outcome<A, C::COUPLED>;
  static constexpr int N = C::VECTOR;
  using Walk = gpu::Walk<N>;
  using Cursor = gpu::Cursor<N>;
  using Wait = typename Pack<A, N>::Part;  // 16 bytes of values in shared memory
  static constexpr int IN_WAIT = Pack<A, N>::IN_PART;

  const Work& work;

  // A block's shared memory.
  template <class X>
  static TL1_DEVICE X* there(int64_t bytes) { return reinterpret_cast<X*>(shared() + bytes); }
  TL1_DEVICE int32_t* slot() const { return there<int32_t>(0); }  // a number for all threads
  // What a team's member has measured, for the others.
  TL1_DEVICE M* own() const { return there<M>(16); }
  // Of a chunk's vectors, or of a member's threads; then of its groups; then a member's values.
  TL1_DEVICE M* parts() const { return there<M>(work.parts_at); }
  TL1_DEVICE O* outcomes() const { return there<O>(work.outcomes_at); }
  TL1_DEVICE Wait* waiting() const { return there<Wait>(work.waiting_at); }

  // What a thread goes on to when an item is done.
  enum { SPLIT, HELD, CHUNKS } list = SPLIT;
  int place = 0;

  // The tensor at hand.
  const Row* row;
  T* param;
  const G* grad;
  A* state[MAX_STATES];
  G* copy;
  const unsigned char* record;

  // Its record, of which the compiler keeps in registers what is used.
  struct Numbers : Common<A> {
    typename C::Rule rule;
    typename C::Prox prox;
  };
  TL1_DEVICE Numbers numbers() const {
    return {*reinterpret_cast<const Common<A>*>(record + RULE_BYTES + PROX_BYTES),
            *reinterpret_cast<const typename C::Rule*>(record),
            *reinterpret_cast<const typename C::Prox*>(record + RULE_BYTES)};
  }

 public:
  TL1_DEVICE explicit Block(const Work& work) : work(work) {}

  TL1_DEVICE void run() {
    if (*work.found_inf != 0) return;
    Item it;
    while (next(it)) item(it);
  }

 private:
  // Split items first, by tickets: who waits for others waits for those that have begun.
  TL1_DEVICE bool next(Item& it) {
    if (list == SPLIT) {
      if (work.n_split) {
        if (thread() == 0) *slot() = take_ticket(work.sync);
        sync();
        const int ticket = *slot();
        sync();
        if (ticket < work.n_split) {
          it = work.split[ticket];
          return true;
        }
      }
      list = HELD;
      place = block() / ranks();
    }
    if (list == HELD) {
      // All blocks of a cluster take the same teams, each its own piece.
      if (place < work.n_held) {
        it = work.held[place];
        it.piece = rank();
        place += blocks() / ranks();
        return true;
      }
      list = CHUNKS;
      place = block();
    }
    if (place >= work.n_chunks) return false;
    it = work.chunks[place];
    place += blocks();
    return true;
  }

  // What is done with an item's weights.
  enum class Pass {
    hold,     // they are measured, and wait in shared memory
    measure,  // they are measured
    release,  // those that wait become what the outcomes of their groups say
    finish,   // they do so at once
  };

  TL1_DEVICE void item(const Item& it) {
    row = work.rows + it.tensor;
    record = work.records + it.tensor * RECORD_BYTES;
    param = reinterpret_cast<T*>(row->param);
    grad = reinterpret_cast<const G*>(row->grad);
    copy = reinterpret_cast<G*>(row->copy);
    for (int k = 0; k < C::STATES; k++) state[k] = reinterpret_cast<A*>(row->state[k]);
    const bool vectors = it.kind & 1;
    const Shape shape = static_cast<Shape>(it.kind >> 1 & 3);
    const Phase phase = static_cast<Phase>(it.kind >> 3);
    const Walk w(*row, it, shape, vectors);
    const int64_t team = row->teams + it.team;
    O* const factors = reinterpret_cast<O*>(work.factors) + team * TEAM_GROUPS;
    Pass pass = w.groups == 0 || phase == Phase::second ? Pass::finish
                : phase == Phase::held                  ? Pass::hold
                                                        : Pass::measure;
    if (phase == Phase::second) fetch_outcomes(factors, w.groups, team);
    for (;;) {
      sweep(w, shape, pass);
      if (pass == Pass::finish || pass == Pass::release) break;
      if (pass == Pass::measure) {
        M* const partials = reinterpret_cast<M*>(work.partials) +
                            (row->partials + it.team * row->pieces) * TEAM_GROUPS;
        leave(partials + it.piece * TEAM_GROUPS, w.groups);
        if (last_of(team)) decide(partials, factors, w.groups, team);
        break;
      }
      if (shape == Shape::chunk) {
        of_chunk(static_cast<int>(row->width) / (vectors ? N : 1), w.groups);
      } else {
        of_team(w.groups);
      }
      pass = Pass::release;
    }
    // The others have read what is here.
    if (w.groups) shape != Shape::chunk && phase == Phase::held ? team_sync() : sync();
  }

  // --- N weights of a thread, the first at `offset` of the tensor.

  struct Weights {
    Pack<T, N> p;
    Pack<G, N> g;
    Pack<A, N> s[C::STATES ? C::STATES : 1];
  };

  // Calls each(k) for those of the N that are there.
  template <class Each>
  static TL1_DEVICE void for_each(const Walk& walk, const Cursor& at, Each each) {
    _Pragma("unroll") for (int k = 0; k < N; k++) {
      if (at.column + k * walk.apart < walk.columns) each(k);
    }
  }

  TL1_DEVICE void fetch(Weights& w, const Walk& walk, const Cursor& at) const {
    if (walk.vectors()) {
      w.p.from(param + at.offset);
      w.g.from(grad + at.offset);
      _Pragma("unroll") for (int s = 0; s < C::STATES; s++) w.s[s].from(state[s] + at.offset);
    } else {
      for_each(walk, at, [&](int k) {
        const int64_t offset = at.offset + k * walk.apart;
        load_global(w.p[k], param + offset);
        load_global(w.g[k], grad + offset);
        _Pragma("unroll") for (int s = 0; s < C::STATES; s++) {
          load_global(w.s[s][k], state[s] + offset);
        }
      });
    }
  }

  // t = the threshold of the updated weights; the state takes its next values.
  TL1_DEVICE void advance(Weights& w, const Numbers& c, A (&t)[N]) const {
    A none = 0;
    _Pragma("unroll") for (int i = 0; i < N; i++) {
      t[i] = c.rule.template take<false>(load(w.p[i]), load(w.g[i]),
                                         C::STATES > 0 ? w.s[0][i] : none,
                                         C::STATES > 1 ? w.s[C::STATES > 1 ? 1 : 0][i] : none,
                                         C::STATES > 2 ? w.s[C::STATES > 2 ? 2 : 0][i] : none);
    }
    if constexpr (!C::COUPLED) {
      c.prox.with_prox([&](auto f) {
        _Pragma("unroll") for (int i = 0; i < N; i++) {
          // Also of what dies: branches for each weight would have them wait for each other.
          const A size = magnitude_of(t[i]), alive = f(size);
          t[i] = with_sign_of(size <= c.cut ? A(0) : alive, t[i]);
        }
      });
    }
  }

  TL1_DEVICE void write_state(Weights& w, const Walk& walk, const Cursor& at) const {
    if (walk.vectors()) {
      _Pragma("unroll") for (int s = 0; s < C::STATES; s++) w.s[s].to(state[s] + at.offset);
    } else if (C::STATES) {
      for_each(walk, at, [&](int k) {
        _Pragma("unroll") for (int s = 0; s < C::STATES; s++) {
          store_global(w.s[s][k], state[s] + at.offset + k * walk.apart);
        }
      });
    }
  }

  template <class X>
  TL1_DEVICE void write(X* to, const A (&w)[N], const Walk& walk, const Cursor& at, bool clean) const {
    Pack<X, N> rounded;
    _Pragma("unroll") for (int i = 0; i < N; i += 2) {
      store_pair(w[i], w[i + 1], clean, &rounded[i]);
    }
    if (walk.vectors()) {
      rounded.to(to + at.offset);
    } else {
      for_each(walk, at, [&](int k) { store_global(rounded[k], to + at.offset + k * walk.apart); });
    }
  }

  // --- The passes.

  TL1_DEVICE void sweep(const Walk& walk, Shape shape, Pass pass) {
    constexpr int AT_ONCE = C::AT_ONCE;
    const Numbers c = numbers();
    const bool measures = pass == Pass::hold || pass == Pass::measure;
    M m[N];
    for (int k = 0; k < N; k++) m[k] = M{};
    Wait* wait = waiting() + thread();
    Cursor here(walk);
    _Pragma("unroll 1") while (here.row < walk.rows) {
      Weights w[AT_ONCE];
      if (pass != Pass::release) {
        Cursor ahead = here;
        _Pragma("unroll") for (int j = 0; j < AT_ONCE; j++) {
          if (j > 0) ahead.next(walk);
          if (j == 0 || ahead.row < walk.rows) fetch(w[j], walk, ahead);
        }
      }
      _Pragma("unroll") for (int j = 0; j < AT_ONCE; j++) {
        if (j == 0 || here.row < walk.rows) {
          A t[N];
          if (pass == Pass::release) {
            _Pragma("unroll") for (int k = 0; k < N; k += IN_WAIT) {
              const Wait part = wait[k / IN_WAIT * THREADS];
              for (int i = 0; i < IN_WAIT; i++) t[k + i] = part.x[i];
            }
          } else {
            advance(w[j], c, t);
            if (pass != Pass::measure) write_state(w[j], walk, here);
          }
          if (measures) {
            if (pass == Pass::hold) {
              _Pragma("unroll") for (int k = 0; k < N; k += IN_WAIT) {
                Wait part;
                for (int i = 0; i < IN_WAIT; i++) part.x[i] = t[k + i];
                wait[k / IN_WAIT * THREADS] = part;
              }
            }
            add(m, t, walk, here, shape, c);
          } else {
            if (walk.groups) apply(t, walk, here, shape);
            write(param, t, walk, here, c.clean);
            if constexpr (C::COPIES) write(copy, t, walk, here, c.clean);
          }
          wait += N / IN_WAIT * THREADS;
          here.next(walk);
        }
      }
    }
    if (measures) gather(m, walk, shape);
  }

  // A chunk's weights are added up by vector, in `parts`; a run's in one sum, a panel's by column.
  TL1_DEVICE void add(M (&m)[N], const A (&t)[N], const Walk& walk, const Cursor& at, Shape shape,
                      const Numbers& c) const {
    if (shape == Shape::chunk) {
      M of_vector{};
      for_each(walk, at, [&](int k) {
        if (!walk.vectors()) of_vector = M{};
        of_vector.add(t[k], at.offset + k * walk.apart, c);
        if (!walk.vectors()) parts()[at.column + k * walk.apart] = of_vector;
      });
      if (walk.vectors()) parts()[at.column / N] = of_vector;
    } else {
      for_each(walk, at, [&](int k) { m[k].add(t[k], at.offset + k * walk.apart, c); });
    }
  }

  TL1_DEVICE void apply(A (&t)[N], const Walk& walk, const Cursor& at, Shape shape) const {
    if (shape == Shape::chunk && walk.vectors()) {
      const O outcome = outcomes()[walk.group_of(at.column)];
      _Pragma("unroll") for (int k = 0; k < N; k++) t[k] = outcome.of_weight(t[k], at.offset + k);
    } else {
      for_each(walk, at, [&](int k) {
        const O outcome = outcomes()[walk.group_of(at.column + k * walk.apart)];
        t[k] = outcome.of_weight(t[k], at.offset + k * walk.apart);
      });
    }
  }

  // --- What the groups come to.

  // The threads' sums of a team's member, into `own`.
  TL1_DEVICE void gather(M (&m)[N], const Walk& walk, Shape shape) const {
    if (shape == Shape::run) {
      for (int k = 1; k < N; k++) m[0].merge(m[k]);
      _Pragma("unroll 1") for (int other = WARP / 2; other; other /= 2) {
        m[0].merge(m[0].across(other));
      }
      if (thread() % WARP == 0) parts()[thread() / WARP] = m[0];
      sync();
      if (thread() == 0) {
        _Pragma("unroll 1") for (int warp = 1; warp < THREADS / WARP; warp++) {
          m[0].merge(parts()[warp]);
        }
        own()[0] = m[0];
      }
    } else if (shape == Shape::panel) {
      // A row of `parts` for each row of threads: the columns' sums.
      const int columns = walk.lanes * N, inner = static_cast<int>(row->inner);
      M* const mine = parts() + thread() / walk.lanes * columns + walk.column;
      _Pragma("unroll") for (int k = 0; k < N; k++) mine[k * walk.apart] = m[k];
      sync();
      for (int group = thread(); group < walk.groups; group += THREADS) {
        M all{};
        for (int column = group * inner; column < (group + 1) * inner; column++) {
          _Pragma("unroll 1") for (int r = 0; r < walk.step; r++) all.merge(parts()[r * columns + column]);
        }
        own()[group] = all;
      }
    }
    sync();
  }

  TL1_DEVICE void of_chunk(int in_group, int groups) const {
    const Numbers c = numbers();
    const int lanes = static_cast<int>(row->lanes), lane = thread() & (lanes - 1);
    _Pragma("unroll 1") for (int first = 0; first < groups; first += THREADS / lanes) {
      const int group = first + thread() / lanes;
      M m{};
      if (group < groups) {
        for (int q = lane; q < in_group; q += lanes) m.merge(parts()[group * in_group + q]);
      }
      _Pragma("unroll 1") for (int other = lanes / 2; other; other /= 2) m.merge(m.across(other));
      if (group < groups && lane == 0) outcomes()[group] = O::of(m, c);
    }
    sync();
  }

  // A team whose groups are held is a cluster, or one block.
  TL1_DEVICE bool alone() const { return row->pieces == 1; }
  TL1_DEVICE void team_sync() const { alone() ? sync() : cluster_sync(); }

  TL1_DEVICE void of_team(int groups) const {
    const Numbers c = numbers();
    team_sync();
    for (int group = thread(); group < groups; group += THREADS) {
      M m = alone() ? own()[group] : M{};
      _Pragma("unroll 1") for (int r = 0; r < ranks() && !alone(); r++) {
        m.merge(of_rank(own(), r)[group]);
      }
      outcomes()[group] = O::of(m, c);
    }
    sync();
  }

  TL1_DEVICE void leave(M* partials, int groups) const {
    for (int group = thread(); group < groups; group += THREADS) partials[group] = own()[group];
  }

  // Whether this is the last of a team's pieces; it then sees what the others have left.
  TL1_DEVICE bool last_of(int64_t team) const {
    sync();
    if (thread() == 0) *slot() = arrive(work.sync + 1 + team);
    sync();
    const bool last = *slot() == row->pieces - 1;
    sync();
    return last;
  }

  TL1_DEVICE void decide(const M* partials, O* factors, int groups, int64_t team) const {
    const Numbers c = numbers();
    int side = 1;
    while (side < groups) side *= 2;
    const int group = thread() % side, rows = THREADS / side;
    M m{};
    _Pragma("unroll 1") for (int piece = thread() / side; piece < row->pieces; piece += rows) {
      if (group < groups) m.merge(from_others(partials + piece * TEAM_GROUPS + group));
    }
    parts()[thread()] = m;
    sync();
    if (thread() < groups) {
      M all{};
      _Pragma("unroll 1") for (int r = 0; r < rows; r++) all.merge(parts()[r * side + group]);
      factors[group] = O::of(all, c);
    }
    sync();
    if (thread() == 0) announce(work.sync + 1 + work.n_teams + team);
  }

  TL1_DEVICE void fetch_outcomes(const O* factors, int groups, int64_t team) const {
    if (thread() == 0) await(work.sync + 1 + work.n_teams + team);
    sync();
    for (int group = thread(); group < groups; group += THREADS) {
      outcomes()[group] = from_others(factors + group);
    }
    sync();
  }
};

}  // namespace tl1::gpu
