// One instance of the kernel, an item's weights in memory, and how they come to a thread's registers:
// vectors of 16 bytes through shared memory, several turns ahead of what is computed.

#pragma once

#include <type_traits>

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
  // Blocks of a multiprocessor: as registers allow.
  static constexpr bool LARGE =
      sizeof(A) == 8 || (VECTOR == 8 && (COUPLED || Prox::MANY || STATES > 2));
  static constexpr bool MIDDLING = VECTOR == 8 ? STATES > 0 : (COUPLED || Prox::MANY) && STATES > 1;
  static constexpr int BLOCKS = LARGE ? 2 : MIDDLING ? 3 : 4;
  // What a turn brings a thread, in units of up to 16 bytes; turns in the ring; turns taken at a time.
  static constexpr int UNITS = 2 + STATES * VECTOR * static_cast<int>(sizeof(A)) / 16;
  static constexpr int TURNS = UNITS > 2 ? 2 : 4;
  static constexpr int AT_ONCE = VECTOR == 4 && STATES == 0 ? 2 : 1;
  static constexpr int RING = TURNS * UNITS * 16 * THREADS;  // bytes
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

// N weights of a thread.
template <class C>
struct Weights {
  static constexpr int N = C::VECTOR;
  Pack<typename C::T, N> p;
  Pack<typename C::G, N> g;
  Pack<typename C::A, N> s[C::STATES ? C::STATES : 1];
};

// An item, its tensor, and which of its weights the thread has.
template <class C>
struct Job {
  using T = typename C::T;
  using G = typename C::G;
  using A = typename C::A;

  Item it;
  const Row* row;
  T* param;
  const G* grad;
  A* state[MAX_STATES];
  G* copy;
  const unsigned char* record;
  Walk<C::VECTOR> walk;

  // `vectors`: it.vectors(), which the compiler is to know.
  TL1_DEVICE Job(const Work& work, const Item& it, bool vectors)
      : it(it), row(work.rows + it.tensor), param(reinterpret_cast<T*>(row->param)),
        grad(reinterpret_cast<const G*>(row->grad)), copy(reinterpret_cast<G*>(row->copy)),
        record(work.records + it.tensor * RECORD_BYTES),
        walk(*row, Part(*row, it), it.shape(), vectors) {
    for (int k = 0; k < C::STATES; k++) state[k] = reinterpret_cast<A*>(row->state[k]);
  }

  // The weights at a place where they do not come in vectors.
  TL1_DEVICE void fetch(Weights<C>& w, const Cursor& at) const {
    walk.template for_each<false>(at, [&](int k) {
      const int64_t offset = at.offset + k * walk.apart;
      load_global(w.p[k], param + offset);
      load_global(w.g[k], grad + offset);
      _Pragma("unroll") for (int s = 0; s < C::STATES; s++) load_global(w.s[s][k], state[s] + offset);
    });
  }
};

// Where vectors wait in shared memory: each thread has places of its own for TURNS turns, and nobody
// waits for another thread. What has been asked for is there in the same order.
template <class C>
class Ring {
  static constexpr int N = C::VECTOR, IN_PART = Pack<typename C::A, N>::IN_PART;
  static constexpr int PARTS = Pack<typename C::A, N>::PARTS;  // of a state's N
  unsigned char* const mine;

  TL1_DEVICE unsigned char* at(int place, int unit) const {
    return mine + (place * C::UNITS + unit) * THREADS * 16;
  }

 public:
  TL1_DEVICE explicit Ring(unsigned char* memory) : mine(memory + thread() * 16) {}

  // Asks for a turn; `ahead` goes on to the next one. Behind the last one it asks for nothing.
  TL1_DEVICE void ask(const Job<C>& job, Cursor& ahead, int place) const {
    if (ahead.there()) {
      copy_ahead<16>(at(place, 0), job.param + ahead.offset);
      copy_ahead<N * sizeof(typename C::G)>(at(place, 1), job.grad + ahead.offset);
      _Pragma("unroll") for (int u = 2; u < C::UNITS; u++) {
        const int state = (u - 2) / PARTS, part = (u - 2) % PARTS;
        copy_ahead<16>(at(place, u), job.state[state] + ahead.offset + part * IN_PART);
      }
      ahead.next(job.walk);
    }
    commit_copies();
  }
  // Asks for an item's first turns.
  TL1_DEVICE void ask_first(const Job<C>& job, Cursor& ahead) const {
    ahead = Cursor(job.walk);
    _Pragma("unroll 1") for (int place = 0; place < C::TURNS; place++) ask(job, ahead, place);
  }
  // Returns when AT_ONCE turns are there: those that were asked for first.
  TL1_DEVICE void await() const { await_copies<C::TURNS - C::AT_ONCE>(); }
  TL1_DEVICE void take(Weights<C>& w, int place) const {
    w.p = *reinterpret_cast<const decltype(w.p)*>(at(place, 0));
    w.g = *reinterpret_cast<const decltype(w.g)*>(at(place, 1));
    _Pragma("unroll") for (int u = 2; u < C::UNITS; u++) {
      auto& part = w.s[(u - 2) / PARTS].part[(u - 2) % PARTS];
      part = *reinterpret_cast<const std::remove_reference_t<decltype(part)>*>(at(place, u));
    }
  }
};

}  // namespace tl1::gpu
