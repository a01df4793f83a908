// The kernel: update rule, threshold and group shrinkage while the weights are in registers or in
// shared memory. Read it from the bottom: a block takes items, an item is a chunk or a team's piece.
//
// Sums are added up in an order that only the view decides, and whether its weights come in vectors:
// results are the same in every run.

#pragma once

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
  using Prox = typename ForStored<Prox_<A>, T>::type;
  static constexpr int STATES = Rule::STATES;
  static constexpr int VECTOR = 16 / sizeof(T);
  static constexpr bool COPIES = sizeof(T) != sizeof(G);
  static constexpr bool COUPLED = Prox::COUPLED;
  static constexpr bool STOCHASTIC = IS_STOCHASTIC<T>;
  // Blocks of a multiprocessor, and turns whose loads are under way at a time: as registers allow.
  static constexpr bool LARGE =
      sizeof(A) == 8 || (VECTOR == 8 && (COUPLED || (Prox::MANY && STATES > 0)));
  static constexpr bool WIDE = VECTOR == 8;
  static constexpr int BLOCKS = LARGE ? 2 : WIDE && (STATES > 0 || Prox::MANY) ? 3 : 4;
  static constexpr int AT_ONCE = LARGE || COPIES || STATES > 2 ? 1 : VECTOR == 4 && STATES == 0 ? 4 : 2;
  static constexpr bool PLAIN = STATES < 2;  // Adam's bytes leave time for what is left out there
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

  // What the block takes next: of `split`, by tickets, as long as there are any; then of `resident`.
  int place = work.n_split ? -1 : block();

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
  // Split items by tickets: who waits for others waits for those that have begun. The others in turn:
  // a team has no more pieces than there are blocks, and each of them comes to its piece.
  TL1_DEVICE bool next(Item& it) {
    if (place < 0) {
      if (thread() == 0) *slot() = take_ticket(work.sync);
      sync();
      const int ticket = *slot();
      sync();
      if (ticket < work.n_split) {
        it = work.split[ticket];
        return true;
      }
      place = block();
    }
    if (place >= work.n_resident) return false;
    it = work.resident[place];
    place += blocks();
    return true;
  }

  // Has one warp bring what the block takes next to the L2 cache: while threads wait for each other,
  // memory shall have something to do.
  TL1_DEVICE void prefetch() const {
    if (thread() < THREADS - WARP || !work.ahead) return;
    if (place < 0 || place >= work.n_resident) return;
    const Item it = work.resident[place];
    if (!it.vectors()) return;
    const Row& soon = work.rows[it.tensor];
    const Part part(soon, it);
    constexpr int BYTES = sizeof(T) + sizeof(G) + C::STATES * sizeof(A);  // of a weight
    const int most = static_cast<int>(work.ahead) / BYTES / 64 * 64;
    const int n = smaller(part.columns - part.column, most);
    const int rows = part.rows - part.row;
    const int end = part.row + (rows == 1 ? rows : smaller(rows, most / n));
    for (int r = part.row + thread() % WARP; r < end; r += WARP) {
      const int64_t offset = part.first + r * part.width + part.column;
      prefetch_global(reinterpret_cast<const T*>(soon.param) + offset, n);
      prefetch_global(reinterpret_cast<const G*>(soon.grad) + offset, n);
      for (int k = 0; k < C::STATES; k++) {
        prefetch_global(reinterpret_cast<const A*>(soon.state[k]) + offset, n);
      }
    }
  }

  TL1_DEVICE void item(const Item& it) {
    row = work.rows + it.tensor;
    record = work.records + it.tensor * RECORD_BYTES;
    param = reinterpret_cast<T*>(row->param);
    grad = reinterpret_cast<const G*>(row->grad);
    copy = reinterpret_cast<G*>(row->copy);
    for (int k = 0; k < C::STATES; k++) state[k] = reinterpret_cast<A*>(row->state[k]);
    it.vectors() ? passes<true>(it) : passes<false>(it);
  }

  template <bool VECTORS>
  TL1_DEVICE void passes(const Item& it) {
    const Shape shape = it.shape();
    const Phase phase = it.phase();
    const Walk w(*row, Part(*row, it), shape, VECTORS);
    const bool measures = w.groups && phase != Phase::second;
    if (measures) measure<VECTORS>(w, shape, phase == Phase::held);
    // Not before: the blocks of teams come to their barriers at about the same time.
    prefetch();
    if (!measures) {
      if (phase == Phase::second) fetch_outcomes(it, w.groups);
      finish<VECTORS>(w, shape);
    } else {
      if (shape == Shape::chunk) {
        of_chunk(static_cast<int>(row->width) / (VECTORS ? N : 1), w.groups);
      } else if (phase == Phase::held && row->pieces == 1) {
        of_one(w.groups);
      } else {
        leave(it, w.groups);
        if (phase == Phase::held) {
          wait_for_all(it);
          sum_up(it, w.groups);
        } else if (last_of(it)) {
          sum_up(it, w.groups);
          publish(it, w.groups);
        }
      }
      if (phase == Phase::held) release<VECTORS>(w, shape);
    }
    if (w.groups) sync();  // the others have read what is here
  }

  // --- N weights of a thread, the first at `offset` of the tensor.

  struct Weights {
    Pack<T, N> p;
    Pack<G, N> g;
    Pack<A, N> s[C::STATES ? C::STATES : 1];
  };

  // Calls each(k) for those of the N that are there: of vectors all are.
  template <bool VECTORS, class Each>
  static TL1_DEVICE void for_each(const Walk& walk, const Cursor& at, Each each) {
    _Pragma("unroll") for (int k = 0; k < N; k++) {
      if (VECTORS || at.column + k * walk.apart < walk.columns) each(k);
    }
  }

  template <bool VECTORS>
  TL1_DEVICE void fetch(Weights& w, const Walk& walk, const Cursor& at) const {
    if constexpr (VECTORS) {
      w.p.from(param + at.offset);
      w.g.from(grad + at.offset);
      _Pragma("unroll") for (int s = 0; s < C::STATES; s++) w.s[s].from(state[s] + at.offset);
    } else {
      for_each<VECTORS>(walk, at, [&](int k) {
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
  TL1_DEVICE void advance(Weights& w, const Numbers& c, bool plain, A (&t)[N]) const {
    C::PLAIN && plain ? take<true>(w, c, t) : take<false>(w, c, t);
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

  template <bool PLAIN>
  TL1_DEVICE void take(Weights& w, const Numbers& c, A (&t)[N]) const {
    A none = 0, p[N], g[N];
    _Pragma("unroll") for (int i = 0; i < N; i += 2) {
      load_pair(&w.p[i], p[i], p[i + 1]);
      load_pair(&w.g[i], g[i], g[i + 1]);
    }
    _Pragma("unroll") for (int i = 0; i < N; i++) {
      t[i] = c.rule.template take<PLAIN>(p[i], g[i],
                                         C::STATES > 0 ? w.s[0][i] : none,
                                         C::STATES > 1 ? w.s[C::STATES > 1 ? 1 : 0][i] : none,
                                         C::STATES > 2 ? w.s[C::STATES > 2 ? 2 : 0][i] : none);
    }
  }

  template <bool VECTORS>
  TL1_DEVICE void write_state(Weights& w, const Walk& walk, const Cursor& at) const {
    if constexpr (VECTORS) {
      _Pragma("unroll") for (int s = 0; s < C::STATES; s++) w.s[s].to(state[s] + at.offset);
    } else if (C::STATES) {
      for_each<VECTORS>(walk, at, [&](int k) {
        _Pragma("unroll") for (int s = 0; s < C::STATES; s++) {
          store_global(w.s[s][k], state[s] + at.offset + k * walk.apart);
        }
      });
    }
  }

  template <bool VECTORS, class X>
  TL1_DEVICE void write(X* to, const A (&w)[N], const Walk& walk, const Cursor& at,
                        const Common<A>& c) const {
    Pack<X, N> rounded;
    _Pragma("unroll") for (int i = 0; i < N; i += 2) {
      if constexpr (C::STOCHASTIC) {
        const uint32_t apart = VECTORS ? 1 : walk.apart;
        const uint32_t place = static_cast<uint32_t>(at.offset) + i * apart;
        store_pair_at_random(w[i], w[i + 1], c.clean, c.key, place, apart, &rounded[i]);
      } else {
        store_pair(w[i], w[i + 1], c.clean, &rounded[i]);
      }
    }
    if constexpr (VECTORS) {
      rounded.to(to + at.offset);
    } else {
      for_each<VECTORS>(walk, at, [&](int k) { store_global(rounded[k], to + at.offset + k * walk.apart); });
    }
  }

  // --- The passes.

  // Calls each(at), which goes on to a next turn, until a thread has taken all of its turns.
  template <class Each>
  static TL1_DEVICE void for_turns(const Walk& walk, Each each) {
    _Pragma("unroll 1") for (int run = 0; run < walk.runs; run++) {
      Cursor at{walk.offset + run * walk.jump, walk.column};
      _Pragma("unroll 1") while (at.turn < walk.turns) each(at);
    }
  }
  static TL1_DEVICE void next_turn(const Walk& walk, Cursor& at) {
    at.offset += walk.stride;
    at.column += walk.aside;
    at.turn++;
  }

  // Calls each(t, at) with the thresholds of the updated weights of all turns. `writes`: the state's
  // next values too.
  template <bool VECTORS, class Each>
  TL1_DEVICE void for_thresholds(const Walk& walk, const Numbers& c, bool writes, Each each) const {
    constexpr int AT_ONCE = VECTORS ? C::AT_ONCE : 1;
    const bool plain = c.rule.plain();
    for_turns(walk, [&](Cursor& at) {
      Weights w[AT_ONCE];
      Cursor ahead = at;
      _Pragma("unroll") for (int j = 0; j < AT_ONCE; j++) {
        if (j == 0 || ahead.turn < walk.turns) fetch<VECTORS>(w[j], walk, ahead);
        next_turn(walk, ahead);
      }
      _Pragma("unroll") for (int j = 0; j < AT_ONCE; j++) {
        if (j == 0 || at.turn < walk.turns) {
          A t[N];
          advance(w[j], c, plain, t);
          if (writes) write_state<VECTORS>(w[j], walk, at);
          each(t, at);
        }
        next_turn(walk, at);
      }
    });
  }

  template <bool VECTORS>
  TL1_DEVICE void measure(const Walk& walk, Shape shape, bool holds) const {
    const Numbers c = numbers();
    M m[N];
    for (int k = 0; k < N; k++) m[k] = M{};
    Wait* wait = waiting() + thread();
    for_thresholds<VECTORS>(walk, c, holds, [&](A (&t)[N], const Cursor& at) {
      if (holds) {
        _Pragma("unroll") for (int k = 0; k < N; k += IN_WAIT) {
          Wait part;
          for (int i = 0; i < IN_WAIT; i++) part.x[i] = t[k + i];
          wait[k / IN_WAIT * THREADS] = part;
        }
        wait += N / IN_WAIT * THREADS;
      }
      !C::COUPLED && c.unit == 1 ? add<VECTORS, true>(m, t, walk, at, shape, c)
                                 : add<VECTORS, false>(m, t, walk, at, shape, c);
    });
    gather(m, walk, shape);
  }

  template <bool VECTORS>
  TL1_DEVICE void finish(const Walk& walk, Shape shape) const {
    const Numbers c = numbers();
    const Own own(*this, walk);
    for_thresholds<VECTORS>(walk, c, true, [&](A (&t)[N], const Cursor& at) {
      if (walk.groups) apply<VECTORS>(t, own, walk, at);
      write_all<VECTORS>(t, walk, at, c);
    });
  }

  // Those that wait in shared memory become what the outcomes of their groups say.
  template <bool VECTORS>
  TL1_DEVICE void release(const Walk& walk, Shape shape) const {
    if (shape == Shape::chunk) {
      release<VECTORS>(walk, [&](A (&t)[N], const Cursor& at) { of_group<VECTORS>(t, walk, at); });
    } else {
      const Own own(*this, walk);
      release<VECTORS>(walk, [&](A (&t)[N], const Cursor& at) { apply<VECTORS>(t, own, walk, at); });
    }
  }
  template <bool VECTORS, class Apply>
  TL1_DEVICE void release(const Walk& walk, Apply apply) const {
    const Common<A> c = numbers();
    const Wait* wait = waiting() + thread();
    for_turns(walk, [&](Cursor& at) {
      A t[N];
      _Pragma("unroll") for (int k = 0; k < N; k += IN_WAIT) {
        const Wait part = wait[k / IN_WAIT * THREADS];
        for (int i = 0; i < IN_WAIT; i++) t[k + i] = part.x[i];
      }
      wait += N / IN_WAIT * THREADS;
      apply(t, at);
      write_all<VECTORS>(t, walk, at, c);
      next_turn(walk, at);
    });
  }

  // A chunk's weights are added up by vector, in `parts`; a run's and a panel's by column.
  template <bool VECTORS, bool IN_UNIT_1>
  TL1_DEVICE void add(M (&m)[N], const A (&t)[N], const Walk& walk, const Cursor& at, Shape shape,
                      const Numbers& c) const {
    if (shape != Shape::chunk) {
      for_each<VECTORS>(walk, at, [&](int k) { m[k].template add<IN_UNIT_1>(t[k], at.offset + k * walk.apart, c); });
    } else if constexpr (VECTORS) {
      M of_vector{};
      for_each<VECTORS>(walk, at, [&](int k) { of_vector.template add<IN_UNIT_1>(t[k], at.offset + k, c); });
      parts()[at.column / N] = of_vector;
    } else {
      for_each<VECTORS>(walk, at, [&](int k) {
        M of_weight{};
        of_weight.template add<IN_UNIT_1>(t[k], at.offset + k * walk.apart, c);
        parts()[at.column + k * walk.apart] = of_weight;
      });
    }
  }

  // The outcomes of a thread's columns in a team, which are the same in each turn, and few.
  struct Own {
    O of[C::COUPLED ? 1 : N];

    TL1_DEVICE Own(const Block& b, const Walk& walk) {
      if (C::COUPLED || walk.groups == 0) return;
      _Pragma("unroll") for (int k = 0; k < N; k++) {
        const int column = walk.column + k * walk.apart;
        of[C::COUPLED ? 0 : k] = column < walk.columns ? b.outcomes()[walk.group_of(column)] : O::none();
      }
    }
  };

  template <bool VECTORS>
  TL1_DEVICE void apply(A (&t)[N], const Own& own, const Walk& walk, const Cursor& at) const {
    if constexpr (C::COUPLED) {
      of_groups<VECTORS>(t, walk, at);
    } else {
      _Pragma("unroll") for (int k = 0; k < N; k++) t[k] = own.of[k].of_weight(t[k], at.offset);
    }
  }
  // Of a chunk, in which a vector's weights are all of one group.
  template <bool VECTORS>
  TL1_DEVICE void of_group(A (&t)[N], const Walk& walk, const Cursor& at) const {
    if constexpr (VECTORS) {
      const O outcome = outcomes()[walk.group_of(at.column)];
      _Pragma("unroll") for (int k = 0; k < N; k++) t[k] = outcome.of_weight(t[k], at.offset + k);
    } else {
      of_groups<VECTORS>(t, walk, at);
    }
  }
  template <bool VECTORS>
  TL1_DEVICE void of_groups(A (&t)[N], const Walk& walk, const Cursor& at) const {
    for_each<VECTORS>(walk, at, [&](int k) {
      const O outcome = outcomes()[walk.group_of(at.column + k * walk.apart)];
      t[k] = outcome.of_weight(t[k], at.offset + k * walk.apart);
    });
  }

  template <bool VECTORS>
  TL1_DEVICE void write_all(const A (&w)[N], const Walk& walk, const Cursor& at,
                            const Common<A>& c) const {
    write<VECTORS>(param, w, walk, at, c);
    if constexpr (C::COPIES) write<VECTORS>(copy, w, walk, at, c);
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
      M* const mine = parts() + (thread() >> exponent_of(walk.lanes)) * columns + walk.column;
      _Pragma("unroll") for (int k = 0; k < N; k++) mine[k * walk.apart] = m[k];
      sync();
      for (int group = thread(); group < walk.groups; group += THREADS) {
        M all{};
        for (int column = group * inner; column < (group + 1) * inner; column++) {
          _Pragma("unroll 4") for (int r = 0; r < walk.step; r++) all.merge(parts()[r * columns + column]);
        }
        own()[group] = all;
      }
    }
    sync();
  }

  TL1_DEVICE void of_chunk(int in_group, int groups) const {
    const Numbers c = numbers();
    const int lanes = static_cast<int>(row->lanes), lane = thread() & (lanes - 1);
    const int shift = exponent_of(lanes);
    _Pragma("unroll 1") for (int first = 0; first < groups; first += THREADS >> shift) {
      const int group = first + (thread() >> shift);
      M m{};
      if (group < groups) {
        const M* const of_group = parts() + group * in_group;
        _Pragma("unroll 4") for (int q = lane; q < in_group; q += lanes) m.merge(of_group[q]);
      }
      _Pragma("unroll 1") for (int other = lanes / 2; other; other /= 2) m.merge(m.across(other));
      if (group < groups && lane == 0) outcomes()[group] = O::of(m, c);
    }
    sync();
  }

  TL1_DEVICE void of_one(int groups) const {
    const Numbers c = numbers();
    for (int group = thread(); group < groups; group += THREADS) {
      outcomes()[group] = O::of(own()[group], c);
    }
    sync();
  }

  // --- Teams of several blocks.

  TL1_DEVICE int64_t team(const Item& it) const { return row->teams + it.team; }
  TL1_DEVICE int32_t* arrivals(const Item& it) const { return work.sync + 1 + team(it); }
  TL1_DEVICE int32_t* are_there(const Item& it) const { return arrivals(it) + work.n_teams; }
  TL1_DEVICE O* factors(const Item& it) const {
    return reinterpret_cast<O*>(work.factors) + team(it) * TEAM_GROUPS;
  }
  TL1_DEVICE M* partials(const Item& it, int64_t piece) const {
    return reinterpret_cast<M*>(work.partials) +
           (row->partials + it.team * row->pieces + piece) * TEAM_GROUPS;
  }

  TL1_DEVICE void leave(const Item& it, int groups) const {
    M* const mine = partials(it, it.piece);
    for (int group = thread(); group < groups; group += THREADS) mine[group] = own()[group];
  }

  // Whether this is the last of a team's pieces; it then sees what the others have left.
  TL1_DEVICE bool last_of(const Item& it) const {
    sync();
    if (thread() == 0) *slot() = arrive(arrivals(it));
    sync();
    const bool last = *slot() == row->pieces - 1;
    sync();
    return last;
  }

  // Returns when all of a team's pieces have left what they have measured.
  TL1_DEVICE void wait_for_all(const Item& it) const {
    sync();
    if (thread() == 0) {
      arrive(arrivals(it));
      await(arrivals(it), static_cast<int>(row->pieces));
    }
    sync();
  }

  // The outcomes of what all pieces of a team have left.
  TL1_DEVICE void sum_up(const Item& it, int groups) const {
    const Numbers c = numbers();
    int side = 1;
    while (side < groups) side *= 2;
    const int group = thread() & (side - 1), shift = exponent_of(side), rows = THREADS >> shift;
    const int pieces = group < groups ? static_cast<int>(row->pieces) : 0;
    const M* const left = partials(it, 0);
    M m{};
    _Pragma("unroll 4") for (int piece = thread() >> shift; piece < pieces; piece += rows) {
      m.merge(from_others(left + piece * TEAM_GROUPS + group));
    }
    parts()[thread()] = m;
    sync();
    if (thread() < groups) {
      M all{};
      _Pragma("unroll 4") for (int r = 0; r < rows; r++) all.merge(parts()[r * side + group]);
      outcomes()[group] = O::of(all, c);
    }
    sync();
  }

  // For the second pass of a team's pieces.
  TL1_DEVICE void publish(const Item& it, int groups) const {
    O* const to = factors(it);
    for (int group = thread(); group < groups; group += THREADS) to[group] = outcomes()[group];
    sync();
    if (thread() == 0) announce(are_there(it));
  }

  TL1_DEVICE void fetch_outcomes(const Item& it, int groups) const {
    if (thread() == 0) await(are_there(it), 1);
    sync();
    const O* const from = factors(it);
    for (int group = thread(); group < groups; group += THREADS) {
      outcomes()[group] = from_others(from + group);
    }
    sync();
  }
};

}  // namespace tl1::gpu
