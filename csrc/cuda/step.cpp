// The op tl1kernels::cuda_step_ and what Python asks before it: which kernels there are, and how much
// of the device they can have. The same for a GPU and for the emulation.

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../names.h"
#include "cuda_kernels.h"
#include "groups.h"
#include "launch.h"
#include "prepare.h"

namespace tl1::gpu {

// One for each object of kernels.cu: CMake passes the list.
#define TL1_DECLARE(T, G, rule) Instance kernels_##T##_##G##_##rule(int variant);
TL1_CUDA_KERNELS(TL1_DECLARE)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Compiled {
  const char *dtype, *grad_dtype, *rule;
  InstanceOf instance;
};
#define TL1_COMPILED(T, G, rule) {#T, #G, #rule, kernels_##T##_##G##_##rule},
constexpr Compiled ALL[] = {TL1_CUDA_KERNELS(TL1_COMPILED)};

// The struct that a row of TL1_PENALTIES uses decides which variant has it.
#define TL1_VARIANT(name, prepare, Struct) \
  Prepared<float>::variant(static_cast<Struct<float>*>(nullptr)),
constexpr Variant VARIANT_OF[] = {TL1_PENALTIES(TL1_VARIANT)};

// What is to run, by name.
struct Chosen {
  Instance instance;
  int rule, penalty, coupled;
  bool wide;
};

Chosen choose(const std::string& dtype, const std::string& grad_dtype, const std::string& rule,
              const std::optional<std::string>& penalty) {
  Chosen chosen{};
  chosen.rule = row_of("rule", rule, RULE_NAMES);
  chosen.coupled = penalty ? index_of(*penalty, COUPLED_NAMES) : -1;
  chosen.penalty =
      penalty && chosen.coupled < 0 ? row_of("penalty", *penalty, PENALTY_NAMES) : -1;
  chosen.wide = dtype == "float64";
  const Variant variant = chosen.coupled >= 0   ? COUPLED
                          : chosen.penalty >= 0 ? VARIANT_OF[chosen.penalty]
                                                : SOFT;
  for (const Compiled& one : ALL) {
    if (dtype == one.dtype && grad_dtype == one.grad_dtype && rule == one.rule) {
      chosen.instance = one.instance(variant);
    }
  }
  STD_TORCH_CHECK(chosen.instance.kernel, "no kernel for rule '", rule, "' on ", dtype,
                  " params with gradients of ", grad_dtype);
  return chosen;
}

// Where things lie in a block's shared memory (tiles.h has the names), and its size. What is of pieces of
// teams lies where others have theirs: a block has one or the other.
struct Shared {
  int64_t parts_at, outcomes_at, waiting_at, of_team_at, first_at, second_at, bytes;
};

template <class A, bool COUPLED>
Shared shared_of(const Instance& kernel, int64_t parts, int64_t outcomes, int64_t waiting, int64_t piece) {
  using M = Measure<A, COUPLED>;
  using O = Outcome<A, COUPLED>;
  const auto up = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  Shared shared;
  shared.parts_at = up(RING_AT + kernel.ring);
  shared.outcomes_at = up(shared.parts_at + parts * sizeof(M));
  shared.waiting_at = up(shared.outcomes_at + outcomes * sizeof(O));
  shared.bytes = shared.waiting_at + waiting * sizeof(A);
  shared.of_team_at = up(shared.parts_at + THREADS * kernel.vector * sizeof(M));
  shared.first_at = up(shared.of_team_at + TEAM_GROUPS * sizeof(O));
  shared.second_at = shared.first_at + piece * sizeof(A);
  if (piece) shared.bytes = std::max<int64_t>(shared.bytes, shared.second_at + piece * sizeof(A));
  return shared;
}

Shared shared_of(const Chosen& c, int64_t parts, int64_t outcomes, int64_t waiting, int64_t piece) {
  const auto of = c.wide ? c.coupled >= 0 ? shared_of<double, true> : shared_of<double, false>
                         : c.coupled >= 0 ? shared_of<float, true> : shared_of<float, false>;
  return of(c.instance, parts, outcomes, waiting, piece);
}

// Of how many blocks the tiles are: as many as the device has room for, or fewer if that is enough.
// Those of a team wait for each other: if not all of them run at the same time, it throws.
int blocks_of(const Work& work, Kernel kernel, int64_t shared_bytes, int64_t in_a_team, int device) {
  const int most = resident_blocks(kernel, shared_bytes, device);
  STD_TORCH_CHECK(most > 0, "no multiprocessor has room for a block of ", shared_bytes,
                  " bytes of shared memory");
  STD_TORCH_CHECK(most >= in_a_team, "a team of ", in_a_team, " blocks, of which ", most, " run at the same time");
  return std::min<int64_t>(std::max({work.n_resident, work.n_split, int64_t(1)}), most);
}

template <class T>
T* data(const char* name, const Tensor& tensor, ScalarType type, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), name,
                  " must be contiguous, and of its own dtype");
  STD_TORCH_CHECK(tensor.numel() % columns == 0, name, " must have ", columns, " columns");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void cuda_step_(const Tensor table, const Tensor scalars, const Tensor records, const Tensor posts,
                const Tensor resident, const Tensor split, const Tensor grad_scale,
                const Tensor found_inf, const std::string dtype, const std::string grad_dtype,
                const std::string rule, const std::optional<std::string> penalty, bool maximize,
                bool nesterov, bool decoupled, int64_t seed, int64_t launch, int64_t factors_at, int64_t parts,
                int64_t outcomes, int64_t waiting, int64_t piece, int64_t in_a_team, int64_t device,
                int64_t stream) {
  const Chosen chosen = choose(dtype, grad_dtype, rule, penalty);
  const Shared shared = shared_of(chosen, parts, outcomes, waiting, piece);
  Work work{};
  work.rows = data<const Row>("table", table, ScalarType::Long, ROW_COLUMNS);
  work.n_tensors = table.numel() / ROW_COLUMNS;
  work.scalars = data<const double>("scalars", scalars, ScalarType::Double, SCALAR_COLUMNS);
  work.records = data<unsigned char>("records", records, ScalarType::Byte, RECORD_BYTES);
  STD_TORCH_CHECK(scalars.numel() == work.n_tensors * SCALAR_COLUMNS &&
                      records.numel() == work.n_tensors * static_cast<int64_t>(RECORD_BYTES),
                  "scalars and records must have a row for each of the table");
  work.grad_scale = data<const float>("grad_scale", grad_scale, ScalarType::Float, 1);
  work.found_inf = data<const float>("found_inf", found_inf, ScalarType::Float, 1);
  static_assert(sizeof(Counters) == sizeof(int64_t) && sizeof(Post) == sizeof(int64_t));
  int64_t* const kept = data<int64_t>("posts", posts, ScalarType::Long, 1);
  STD_TORCH_CHECK(0 < factors_at && factors_at <= posts.numel(), "factors_at must be among the posts");
  work.counters = reinterpret_cast<Counters*>(kept);
  work.partials = reinterpret_cast<Post*>(kept + 1);
  work.factors = reinterpret_cast<Post*>(kept + factors_at);
  work.teams = posts.numel() > 1;
  work.launch = static_cast<uint32_t>(launch);
  constexpr int ITEM_COLUMNS = sizeof(Item) / sizeof(int32_t);
  work.resident = data<const Item>("resident", resident, ScalarType::Int, ITEM_COLUMNS);
  work.n_resident = resident.numel() / ITEM_COLUMNS;
  work.split = data<const Item>("split", split, ScalarType::Int, ITEM_COLUMNS);
  work.n_split = split.numel() / ITEM_COLUMNS;
  work.parts_at = shared.parts_at;
  work.outcomes_at = shared.outcomes_at;
  work.waiting_at = shared.waiting_at;
  work.of_team_at = shared.of_team_at;
  work.first_at = shared.first_at;
  work.second_at = shared.second_at;
  work.rule = chosen.rule, work.penalty = chosen.penalty, work.coupled = chosen.coupled;
  work.seed = seed;
  work.maximize = maximize, work.nesterov = nesterov, work.decoupled = decoupled;
  const Place place{static_cast<int>(device), reinterpret_cast<void*>(stream)};
  // First: `prepare` counts a step, of which nothing may be left if it is refused.
  const int blocks = blocks_of(work, chosen.instance.kernel, shared.bytes, in_a_team, place.device);
  if (launch == 0) launch_prepare(work, chosen.wide, place);
  launch_tiles(chosen.instance.kernel, work, shared.bytes, blocks, place);
}

// Why no kernel can run on the device; "" if they can. All are compiled for the same GPUs.
std::string cuda_problem(int64_t device) {
  return problem_with(ALL[0].instance(SOFT).kernel, static_cast<int>(device));
}

// A block's shared memory, in bytes.
int64_t cuda_shared_bytes(const std::string dtype, const std::string grad_dtype, const std::string rule,
                          const std::optional<std::string> penalty, int64_t parts, int64_t outcomes,
                          int64_t waiting, int64_t piece) {
  return shared_of(choose(dtype, grad_dtype, rule, penalty), parts, outcomes, waiting, piece).bytes;
}

// How many blocks, each with so much in shared memory, run at the same time: a team's pieces at most.
int64_t cuda_resident_blocks(const std::string dtype, const std::string grad_dtype,
                             const std::string rule, const std::optional<std::string> penalty,
                             int64_t parts, int64_t outcomes, int64_t waiting, int64_t piece,
                             int64_t device) {
  const Chosen chosen = choose(dtype, grad_dtype, rule, penalty);
  const size_t bytes = shared_of(chosen, parts, outcomes, waiting, piece).bytes;
  return resident_blocks(chosen.instance.kernel, bytes, static_cast<int>(device));
}

// The bytes of what kernels leave for each other: a record, a measure, an outcome.
std::vector<int64_t> cuda_sizes(bool wide, bool coupled) {
  const int64_t measure = wide ? coupled ? sizeof(Measure<double, true>) : sizeof(double)
                               : coupled ? sizeof(Measure<float, true>) : sizeof(float);
  const int64_t outcome = wide ? coupled ? sizeof(Outcome<double, true>) : sizeof(double)
                               : coupled ? sizeof(Outcome<float, true>) : sizeof(float);
  static_assert(sizeof(Measure<double, false>) == sizeof(double));
  static_assert(sizeof(Outcome<double, false>) == sizeof(double));
  return {static_cast<int64_t>(RECORD_BYTES), measure, outcome};
}

std::string cuda_scalar_names() { return joined(SCALAR_NAMES) + " step"; }
std::string cuda_coupled_names() { return joined(COUPLED_NAMES); }
std::string cuda_penalty_names() { return joined(PENALTY_NAMES) + " " + joined(COUPLED_NAMES); }

}  // namespace
}  // namespace tl1::gpu

// A fragment: the CPU's library, if it is loaded, has ops of the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(tl1kernels, m) {
  // A step on tensors of one dtype, in place, at the addresses in `table` (backends/cuda.py).
  //   table                int64 (n, columns of work.h's Row)
  //   scalars              float64 (n, columns as cuda_scalar_names() has them)
  //   records              what `prepare` makes of the scalars
  //   posts                int64 (1 + partials + factors), 0 before the first step and kept from step to
  //                        step: work.h's counters, then what blocks leave for each other; the outcomes
  //                        from `factors_at` on
  //   resident, split      int32 (items, 4), of cuda_schedule.py
  //   grad_scale, found_inf  float32, one each
  //   launch               0; or, where the records of the last step are this one's too, a number from
  //                        2^31 on that no step with these posts has had: `prepare` does not run then,
  //                        and there must be no split items
  //   seed                 of the dtype "stochastic_bfloat16": bfloat16, rounded so (random.h)
  //   parts, outcomes, waiting, piece   entries in shared memory
  //   in_a_team            blocks that wait for each other, at most
  m.def(
      "cuda_step_(Tensor table, Tensor scalars, Tensor(a!) records, Tensor(b!) posts, "
      "Tensor resident, Tensor split, Tensor grad_scale, Tensor found_inf, str dtype, "
      "str grad_dtype, str rule, str? penalty, bool maximize, bool nesterov, bool decoupled, "
      "int seed, int launch, int factors_at, int parts, int outcomes, int waiting, int piece, int in_a_team, "
      "int device, int stream) -> ()");
  m.def(
      "cuda_resident_blocks(str dtype, str grad_dtype, str rule, str? penalty, int parts, "
      "int outcomes, int waiting, int piece, int device) -> int");
  m.def(
      "cuda_shared_bytes(str dtype, str grad_dtype, str rule, str? penalty, int parts, int outcomes, "
      "int waiting, int piece) -> int");
  m.def("cuda_sizes(bool wide, bool coupled) -> int[]");
  m.def("cuda_problem(int device) -> str");
  m.def("cuda_scalar_names() -> str");
  m.def("cuda_penalty_names() -> str");
  m.def("cuda_coupled_names() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tl1kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_step_", TORCH_BOX(&tl1::gpu::cuda_step_));
  m.impl("cuda_resident_blocks", TORCH_BOX(&tl1::gpu::cuda_resident_blocks));
  m.impl("cuda_shared_bytes", TORCH_BOX(&tl1::gpu::cuda_shared_bytes));
  m.impl("cuda_sizes", TORCH_BOX(&tl1::gpu::cuda_sizes));
  m.impl("cuda_problem", TORCH_BOX(&tl1::gpu::cuda_problem));
  m.impl("cuda_scalar_names", TORCH_BOX(&tl1::gpu::cuda_scalar_names));
  m.impl("cuda_coupled_names", TORCH_BOX(&tl1::gpu::cuda_coupled_names));
  m.impl("cuda_penalty_names", TORCH_BOX(&tl1::gpu::cuda_penalty_names));
}
