// The kernel: update rule, threshold and group shrinkage while the weights are in registers or in
// shared memory. Read it from the bottom: a block takes items, an item is a chunk or a team's piece.
//
// Sums are added up in an order that only the view decides, and whether its weights come in vectors:
// results are the same in every run.

#pragma once

#include "posts.h"
#include "weights.h"

namespace tl1::gpu {

template <class C>
class Block {
  using T = typename C::T;
  using G = typename C::G;
  using A = typename C::A;
  using M = Measure<A, C::COUPLED>;
  using O = Outcome<A, C::COUPLED>;
  static constexpr int N = C::VECTOR;
  using Walk = gpu::Walk<N>;
  using Job = gpu::Job<C>;
  using Weights = gpu::Weights<C>;
  using Wait = typename Pack<A, N>::Part;  // 16 bytes of values in shared memory
  static constexpr int IN_WAIT = Pack<A, N>::IN_PART;

  static_assert(TEAM_GROUPS <= THREADS);  // a thread for each of a team's groups

  const Work& work;

  // A block's shared memory.
  template <class X>
  static TL1_DEVICE X* there(int64_t bytes) { return reinterpret_cast<X*>(shared() + bytes); }
  TL1_DEVICE int32_t* slot() const { return there<int32_t>(0); }  // a number for all threads
  TL1_DEVICE Ring<C> ring() const { return Ring<C>(there<unsigned char>(RING_AT)); }
  // Of a chunk's vectors, or of a member's threads; then of its groups; then a member's values.
  TL1_DEVICE M* parts() const { return there<M>(work.parts_at); }
  TL1_DEVICE O* outcomes() const { return there<O>(room ? work.of_team_at : work.outcomes_at); }
  TL1_DEVICE Wait* waiting() const {
    return there<Wait>(room == 0 ? work.waiting_at : room == 1 ? work.first_at : work.second_at);
  }
  // Where the item at hand has its values: of a team of several blocks in one of two places, in turn.
  int room = 0;

  // Where the block goes on: in `split`, by tickets, as long as there are any; then in `resident`.
  int place = work.n_split ? -1 : block();

  // What the block takes next. Registers have no room for all of a second job.
  struct Soon {
    const Item* it;  // null for nothing
    Cursor ahead;    // what is asked for next
  };
  // Whether several blocks have it, which wait for each other.
  TL1_DEVICE bool of_team(const Item& it) const {
    return it.phase() == Phase::held && work.rows[it.tensor].pieces > 1;
  }

  // A tensor's record, of which the compiler keeps in registers what is used.
  struct Numbers : Common<A> {
    typename C::Rule rule;
    typename C::Prox prox;
  };
  static TL1_DEVICE Numbers numbers(const Job& job) {
    return {*reinterpret_cast<const Common<A>*>(job.record + RULE_BYTES + PROX_BYTES),
            *reinterpret_cast<const typename C::Rule*>(job.record),
            *reinterpret_cast<const typename C::Prox*>(job.record + RULE_BYTES)};
  }

 public:
  TL1_DEVICE explicit Block(const Work& work) : work(work) {}

  // A block of a team goes on to its next item before it waits for the others; the values of both wait
  // in shared memory. Nobody waits for ever: a block waits for a team's measures only once it has left
  // its own, and when that waits for anything it is for teams that come earlier.
  TL1_DEVICE void run() {
    if (*work.found_inf != 0) return;
    Soon soon;
    look_ahead(soon);
    // Of a piece that waits: four times its place in `resident`, + 1 in the second room, + 2 as long as
    // the warp owes its team a share of the sums.
    int held = -1;
    while (soon.it || held >= 0) {
      room = !soon.it || !of_team(*soon.it) ? 0 : held >= 0 ? 2 - (held & 1) : 1;
      if (soon.it && (room || held < 0)) soon.it->vectors() ? passes<true>(soon) : passes<false>(soon);
      const int before = held, now = room, at = place - (soon.it ? 2 : 1) * blocks();
      if (before >= 0) {
        room = 1 + (before & 1);
        if (before & 2) sum_up_share(before / 4, true);
        finish_held(before / 4);
      }
      // Only now: the others have had time to measure theirs. If one has not, they get as long again.
      const bool owes = now && !sum_up_share(at, false);
      held = now ? 4 * at + 2 * owes + now - 1 : -1;
    }
  }

 private:
  // Split items by tickets: who waits for others waits for those that have begun. The others in turn:
  // a team has no more pieces than there are blocks, and each of them comes to its piece.
  TL1_DEVICE const Item* next() {
    if (place < 0) {
      if (thread() == 0) *slot() = take_ticket(&work.counters->tickets);
      sync();
      const int ticket = *slot();
      sync();
      if (ticket < work.n_split) return work.split + ticket;
      place = block();
    }
    if (place >= work.n_resident) return nullptr;
    const Item* const it = work.resident + place;
    place += blocks();
    if (place < work.n_resident) bring_near(work.resident + place);  // nobody else reads there
    return it;
  }

  // What the block takes next; its first weights are asked for.
  TL1_DEVICE void look_ahead(Soon& soon) {
    soon.it = next();
    if (soon.it && soon.it->vectors()) ring().ask_first(Job(work, *soon.it, true), soon.ahead);
  }

  // All of an item, but for what a team's piece does when all others have measured theirs.
  template <bool VECTORS>
  TL1_DEVICE void passes(Soon& soon) {
    const Job job(work, *soon.it, VECTORS);
    const Shape shape = job.it.shape();
    const Phase phase = job.it.phase();
    const int groups = job.walk.groups;
    const bool measures = groups && phase != Phase::second;
    if (phase == Phase::second) fetch_outcomes(job);
    measures ? measure<VECTORS>(job, soon.ahead) : finish<VECTORS>(job, soon.ahead);
    look_ahead(soon);
    if (measures) {
      sync();  // what has been measured is there
      if (shape == Shape::chunk) {
        of_chunk(job, VECTORS ? N : 1);
        release_chunk<VECTORS>(job);
      } else if (phase == Phase::held && job.row->pieces == 1) {
        of_one(job);
        release<VECTORS>(job);
      } else {
        leave(job);
        // The pieces of a split team begin in turn: those before the last one are under way.
        if (phase == Phase::first && job.it.piece == job.row->pieces - 1) sum_up(job, 0, 1, true);
      }
    }
    if (groups) sync();  // the others have read what is here
  }

  // The groups of a team are shared out among its pieces.
  TL1_DEVICE bool sum_up_share(int place, bool waits) const {
    const Item it = work.resident[place];
    const Job job(work, it, it.vectors());
    return sum_up(job, job.it.piece, static_cast<int>(job.row->pieces), waits);
  }

  TL1_DEVICE void finish_held(int place) {
    const Item it = work.resident[place];
    it.vectors() ? finish_held<true>(it) : finish_held<false>(it);
  }
  template <bool VECTORS>
  TL1_DEVICE void finish_held(const Item& it) {
    const Job job(work, it, VECTORS);
    fetch_outcomes(job);
    release<VECTORS>(job);
    sync();
  }

  // --- N weights of a thread.

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
  TL1_DEVICE void write_state(Weights& w, const Job& job, const Cursor& at) const {
    if constexpr (VECTORS) {
      _Pragma("unroll") for (int s = 0; s < C::STATES; s++) w.s[s].to(job.state[s] + at.offset);
    } else if (C::STATES) {
      job.walk.template for_each<VECTORS>(at, [&](int k) {
        _Pragma("unroll") for (int s = 0; s < C::STATES; s++) {
          store_global(w.s[s][k], job.state[s] + at.offset + k * job.walk.apart);
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
      walk.template for_each<VECTORS>(at, [&](int k) { store_global(rounded[k], to + at.offset + k * walk.apart); });
    }
  }

  // --- The passes.

  // Calls each(t, at) with the thresholds of the updated weights of all turns. `writes`: the state's
  // next values too.
  template <bool VECTORS, class Each>
  TL1_DEVICE void for_thresholds(const Job& job, Cursor& ahead, const Numbers& c, bool writes,
                                 Each each) const {
    constexpr int AT_ONCE = VECTORS ? C::AT_ONCE : 1;
    const bool plain = c.rule.plain();
    Cursor at(job.walk);
    int place = 0;  // in the ring
    _Pragma("unroll 1") while (at.there()) {
      Weights w[AT_ONCE];
      if constexpr (VECTORS) {
        ring().await();
        _Pragma("unroll") for (int j = 0; j < AT_ONCE; j++) ring().take(w[j], place + j);
      } else {
        job.fetch(w[0], at);
      }
      _Pragma("unroll") for (int j = 0; j < AT_ONCE; j++) {
        if (j == 0 || at.there()) {
          A t[N];
          advance(w[j], c, plain, t);
          if (writes) write_state<VECTORS>(w[j], job, at);
          each(t, at);
          at.next(job.walk);
        }
        if constexpr (VECTORS) ring().ask(job, ahead, place + j);  // not before: what was there is used
      }
      place = place + AT_ONCE < C::TURNS ? place + AT_ONCE : 0;
    }
  }

  template <bool VECTORS>
  TL1_DEVICE void measure(const Job& job, Cursor& ahead) const {
    const Numbers c = numbers(job);
    const Walk& walk = job.walk;
    const Shape shape = job.it.shape();
    const bool holds = job.it.phase() == Phase::held;
    M m[N];
    for (int k = 0; k < N; k++) m[k] = M{};
    Wait* wait = waiting() + thread();
    for_thresholds<VECTORS>(job, ahead, c, holds, [&](A (&t)[N], const Cursor& at) {
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
    put_down(m, job);
  }

  template <bool VECTORS>
  TL1_DEVICE void finish(const Job& job, Cursor& ahead) const {
    const Numbers c = numbers(job);
    const Own own(*this, job.walk);
    for_thresholds<VECTORS>(job, ahead, c, true, [&](A (&t)[N], const Cursor& at) {
      if (job.walk.groups) apply<VECTORS>(t, own, job.walk, at);
      write_all<VECTORS>(t, job, at, c);
    });
  }

  // Those that wait in shared memory become what the outcomes of their groups say.
  template <bool VECTORS>
  TL1_DEVICE void release_chunk(const Job& job) const {
    release<VECTORS>(job, [&](A (&t)[N], const Cursor& at) { of_group<VECTORS>(t, job.walk, at); });
  }
  template <bool VECTORS>
  TL1_DEVICE void release(const Job& job) const {
    const Own own(*this, job.walk);
    release<VECTORS>(job, [&](A (&t)[N], const Cursor& at) { apply<VECTORS>(t, own, job.walk, at); });
  }
  template <bool VECTORS, class Apply>
  TL1_DEVICE void release(const Job& job, Apply apply) const {
    const Common<A> c = numbers(job);
    const Wait* wait = waiting() + thread();
    _Pragma("unroll 1") for (Cursor at(job.walk); at.there(); at.next(job.walk)) {
      A t[N];
      _Pragma("unroll") for (int k = 0; k < N; k += IN_WAIT) {
        const Wait part = wait[k / IN_WAIT * THREADS];
        for (int i = 0; i < IN_WAIT; i++) t[k + i] = part.x[i];
      }
      wait += N / IN_WAIT * THREADS;
      apply(t, at);
      write_all<VECTORS>(t, job, at, c);
    }
  }

  // A chunk's weights are added up by vector, in `parts`; a run's and a panel's by column.
  template <bool VECTORS, bool IN_UNIT_1>
  TL1_DEVICE void add(M (&m)[N], const A (&t)[N], const Walk& walk, const Cursor& at, Shape shape,
                      const Numbers& c) const {
    if (shape != Shape::chunk) {
      walk.template for_each<VECTORS>(at, [&](int k) { m[k].template add<IN_UNIT_1>(t[k], at.offset + k * walk.apart, c); });
    } else if constexpr (VECTORS) {
      M of_vector{};
      walk.template for_each<VECTORS>(at, [&](int k) { of_vector.template add<IN_UNIT_1>(t[k], at.offset + k, c); });
      parts()[static_cast<unsigned>(at.column(walk)) / N] = of_vector;
    } else {
      walk.template for_each<VECTORS>(at, [&](int k) {
        M of_weight{};
        of_weight.template add<IN_UNIT_1>(t[k], at.offset + k * walk.apart, c);
        parts()[at.column(walk) + k * walk.apart] = of_weight;
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
      const O outcome = outcomes()[walk.group_of(at.column(walk))];
      _Pragma("unroll") for (int k = 0; k < N; k++) t[k] = outcome.of_weight(t[k], at.offset + k);
    } else {
      of_groups<VECTORS>(t, walk, at);
    }
  }
  template <bool VECTORS>
  TL1_DEVICE void of_groups(A (&t)[N], const Walk& walk, const Cursor& at) const {
    walk.template for_each<VECTORS>(at, [&](int k) {
      const O outcome = outcomes()[walk.group_of(at.column(walk) + k * walk.apart)];
      t[k] = outcome.of_weight(t[k], at.offset + k * walk.apart);
    });
  }

  template <bool VECTORS>
  TL1_DEVICE void write_all(const A (&w)[N], const Job& job, const Cursor& at, const Common<A>& c) const {
    write<VECTORS>(job.param, w, job.walk, at, c);
    if constexpr (C::COPIES) write<VECTORS>(job.copy, w, job.walk, at, c);
  }

  // --- What the groups come to.

  // The threads' sums of a run's or a panel's member, into `parts`: registers are few.
  TL1_DEVICE void put_down(M (&m)[N], const Job& job) const {
    const Walk& walk = job.walk;
    if (job.it.shape() == Shape::run) {
      for (int k = 1; k < N; k++) m[0].merge(m[k]);
      _Pragma("unroll 1") for (int other = WARP / 2; other; other /= 2) {
        m[0].merge(m[0].across(other));
      }
      if (thread_anew() % WARP == 0) parts()[thread_anew() / WARP] = m[0];
    } else if (job.it.shape() == Shape::panel) {
      // A row of `parts` for each row of threads: the columns' sums.
      M* const mine = parts() + walk.down * walk.lanes * N + walk.column;
      _Pragma("unroll") for (int k = 0; k < N; k++) {
        if (walk.down < walk.step) mine[k * walk.apart] = m[k];
      }
    }
  }
  // What they come to for group `thread_anew()` of a run's or a panel's member.
  TL1_DEVICE M gather(const Job& job) const {
    const Walk& walk = job.walk;
    M all{};
    if (job.it.shape() == Shape::run) {
      _Pragma("unroll") for (int warp = 0; warp < THREADS / WARP; warp++) all.merge(parts()[warp]);
    } else {
      const int columns = walk.lanes * N, inner = static_cast<int>(job.row->inner), first = thread_anew() * inner;
      for (int column = first; column < first + inner; column++) {
        _Pragma("unroll 4") for (int r = 0; r < walk.step; r++) all.merge(parts()[r * columns + column]);
      }
    }
    return all;
  }

  // `unit`: weights that one of `parts` is the sum of.
  TL1_DEVICE void of_chunk(const Job& job, int unit) const {
    const Numbers c = numbers(job);
    const int groups = job.walk.groups, in_group = static_cast<int>(job.row->width) / unit;
    const int lanes = static_cast<int>(job.row->lanes), lane = thread_anew() & (lanes - 1);
    const int shift = exponent_of(lanes);
    _Pragma("unroll 1") for (int first = 0; first < groups; first += THREADS >> shift) {
      const int group = first + (thread_anew() >> shift);
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

  TL1_DEVICE void of_one(const Job& job) const {
    const Numbers c = numbers(job);
    if (const int group = thread_anew(); group < job.walk.groups) outcomes()[group] = O::of(gather(job), c);
    sync();
  }

  // --- Teams of several blocks.

  TL1_DEVICE uint32_t launch() const { return work.launch ? work.launch : work.counters->launch; }
  TL1_DEVICE int64_t group_of_team(const Job& job, int group) const {
    return job.it.team * job.row->team_groups + group;
  }
  // Of a group what each piece has measured, in turn.
  TL1_DEVICE Post* partials(const Job& job, int group) const {
    return work.partials + (job.row->partials + group_of_team(job, group) * job.row->pieces) * WORDS<M>;
  }
  TL1_DEVICE Post* factors(const Job& job, int group) const {
    return work.factors + (job.row->factors + group_of_team(job, group)) * WORDS<O>;
  }

  TL1_DEVICE void leave(const Job& job) const {
    if (const int group = thread_anew(); group < job.walk.groups) {
      leave_for_others(gather(job), partials(job, group) + job.it.piece * WORDS<M>, launch());
    }
  }

  // What a team's groups from `first` on, `apart` from each other, come to: for all of its pieces.
  // Returns whether the warp has done its part: if it does not wait, it needs all that is measured.
  TL1_DEVICE bool sum_up(const Job& job, int first, int apart, bool waits) const {
    constexpr int UNDER_WAY = sizeof(M) == 4 ? 4 : 1;
    const int groups = job.walk.groups, pieces = static_cast<int>(job.row->pieces);
    int lanes = 2;  // threads that add up a group
    while (lanes < WARP && lanes < pieces) lanes *= 2;
    const int shift = exponent_of(lanes), lane = thread_anew() & (lanes - 1);
    const int of_warp = apart * (thread_anew() / WARP * WARP >> shift);  // from `first` to the warp's first one
    if (first + of_warp >= groups) return true;
    const Numbers c = numbers(job);
    const uint32_t now = launch();
    bool there = true;
    _Pragma("unroll 1") for (; first + of_warp < groups; first += apart * (THREADS >> shift)) {
      const int group = first + apart * (thread_anew() >> shift);
      const Post* const left = partials(job, group);
      M m{};
      _Pragma("unroll 1") for (int piece = lane; group < groups && piece < pieces; piece += lanes * UNDER_WAY) {
        M some[UNDER_WAY];
        const int n = (pieces - piece + lanes - 1) >> shift;
        there &= from_others(some, left + piece * WORDS<M>, lanes, n, now, waits);
        _Pragma("unroll") for (int j = 0; j < UNDER_WAY; j++) {
          if (j < n) m.merge(some[j]);
        }
      }
      _Pragma("unroll 1") for (int other = lanes / 2; other; other /= 2) m.merge(m.across(other));
      _Pragma("unroll 1") for (int other = WARP / 2; other; other /= 2) there &= shuffle_xor(there, other);
      if (!there) return false;
      if (group < groups && lane == 0) leave_for_others(O::of(m, c), factors(job, group), now);
    }
    return true;
  }

  TL1_DEVICE void fetch_outcomes(const Job& job) const {
    if (const int group = thread_anew(); group < job.walk.groups) {
      O outcome[1];
      from_others(outcome, factors(job, group), 1, 1, launch(), true);
      outcomes()[group] = outcome[0];
    }
    sync();
  }
};

}  // namespace tl1::gpu
