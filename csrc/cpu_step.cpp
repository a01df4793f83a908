// The op tl1kernels::step_ on the CPU: checks its arguments, picks the kernels, runs the schedule.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu_builds.h"
#include "names.h"
#include "schedule.h"

namespace tl1 {

// One for each build of cpu_kernels.cpp: CMake passes the list.
#define TL1_DECLARE(build)                             \
  namespace build {                                    \
  void run_tile(const Step&, const Tile&, Workspace&); \
  }
TL1_CPU_BUILDS(TL1_DECLARE)

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// Names one of the builds; without it the best that the processor can run.
constexpr const char* CPU_ENVIRONMENT = "TL1KERNELS_CPU";

struct Build {
  const char* name;
  RunTile run_tile;
  bool supported;
};

bool supports(const char* name) {
  const std::string build = name;
#if defined(__x86_64__) || defined(__i386__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (build == "avx2") return avx2;
  if (build == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return build == "baseline";
}

// The best first.
#define TL1_BUILD(build) {#build, build::run_tile, supports(#build)},
const std::vector<Build>& builds() {
  static const std::vector<Build> all = {TL1_CPU_BUILDS(TL1_BUILD)};
  return all;
}

const Build& chosen_build() {
  const char* asked = std::getenv(CPU_ENVIRONMENT);
  std::string names;
  for (const Build& build : builds()) {
    if (!build.supported) continue;
    if (!asked || !*asked || asked == std::string(build.name)) return build;
    names += std::string(names.empty() ? "'" : ", '") + build.name + "'";
  }
  STD_TORCH_CHECK(false, CPU_ENVIRONMENT, " must be one of ", names, " on this processor, got '",
                  asked, "'");
}

#define TL1_STATES(name, Rule) Rule<float>::STATES,
constexpr int RULE_STATES[] = {TL1_RULES(TL1_STATES)};
#define TL1_COUNTS(name, Rule) Rule<float>::COUNTS,
constexpr bool RULE_COUNTS[] = {TL1_RULES(TL1_COUNTS)};

#define TL1_PREPARE(name, prepare, Penalty) prepare<A>,
template <class A>
constexpr void (*PREPARE[])(double, double, double, Coefficients&) = {TL1_PENALTIES(TL1_PREPARE)};

Stored stored_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Stored::float32;
    case ScalarType::Double: return Stored::float64;
    case ScalarType::BFloat16: return Stored::bfloat16;
    case ScalarType::Half: return Stored::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "params must be float32, float64, bfloat16 or float16");
}

void check(const char* name, const Tensor& tensor, int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  const int64_t got = tensor.numel();
  STD_TORCH_CHECK(got == numel, name, " must have ", numel, " elements, got ", got);
  STD_TORCH_CHECK(numel == 0 || tensor.const_data_ptr(), name, " must have storage");
}

// Where a tensor has its elements; asked for once, since every question is a call into torch.
struct Layout {
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  explicit Layout(const Tensor& tensor) : sizes(tensor.sizes()), strides(tensor.strides()) {}
};

// `tensor` must have its elements where its parameter has them.
void check_layout(const char* name, const Tensor& tensor, const Layout& like) {
  const Layout layout(tensor);
  const size_t dims = like.sizes.size();
  STD_TORCH_CHECK(layout.sizes.size() == dims, name, " must have the dims of its parameter");
  for (size_t d = 0; d < dims; d++) {
    const bool same = layout.sizes[d] == like.sizes[d] &&
                      (like.sizes[d] == 1 || layout.strides[d] == like.strides[d]);
    STD_TORCH_CHECK(same, name, " must have the shape and strides of its parameter");
  }
}

// A tensor must be dense: its elements fill a stretch of memory, in any order of dims.
void check_dense(const char* name, const Layout& layout, int64_t numel) {
  const size_t dims = layout.sizes.size();
  int64_t filled = 1;
  for (size_t round = 0; round < dims && numel > 1; round++) {
    for (size_t d = dims; d-- > 0;) {
      if (layout.sizes[d] != 1 && layout.strides[d] == filled) {
        filled *= layout.sizes[d];
        break;
      }
    }
  }
  STD_TORCH_CHECK(numel <= 1 || filled == numel, name, " must be dense");
}

bool is_double(const Tensor& counter) { return counter.scalar_type() == ScalarType::Double; }

// Adds one to a counter of steps, a 0-d float tensor, and returns it.
double count(const Tensor& counter) {
  void* value = counter.mutable_data_ptr();
  return is_double(counter) ? ++*static_cast<double*>(value) : ++*static_cast<float*>(value);
}

// A thread keeps its workspace; the kernels write it before they read it.
Workspace& workspace() {
  static thread_local std::unique_ptr<Workspace> work;
  if (!work) work.reset(new Workspace);  // not make_unique, which would clear it
  return *work;
}

// Calls f(i) for i in [0, n); threads take the next i when they are ready for it.
template <class F>
void for_each(size_t n, bool parallel, const F& f) {
  const int64_t threads = parallel ? std::min<int64_t>(n, torch::stable::get_num_threads()) : 1;
  if (threads <= 1) {
    for (size_t i = 0; i < n; i++) f(i);
    return;
  }
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

// Waits until what `left` counts is done; threads that run are doing it.
void wait_for(const std::atomic<size_t>& left) {
  while (left.load(std::memory_order_acquire) > 0) std::this_thread::yield();
}

void run(const std::vector<Step>& steps, Schedule& plan, RunTile run_tile) {
  constexpr int64_t WORTH_THREADS = 1 << 15;  // weights; less is done before the others wake up
  int64_t weights = 0;
  for (const Step& s : steps) weights += s.blocks * s.outer * schedule::width(s);
  const bool parallel = weights >= WORTH_THREADS;
  const size_t lag = 2 * torch::stable::get_num_threads();
  const std::vector<Task> tasks = schedule::in_order(plan, lag);
  // Nobody waits for what has not begun: it comes earlier, so a thread has it.
  for_each(tasks.size(), parallel, [&](size_t i) {
    const Task& task = tasks[i];
    Block* const block = task.block;
    if (task.kind == Task::reduction) {
      wait_for(block->to_measure);
      const Reduction& reduction = plan.between[task.index];
      schedule::reduce(steps[reduction.step], reduction, plan);
      block->to_reduce.fetch_sub(1, std::memory_order_release);
      return;
    }
    if (task.kind == Task::second) {
      wait_for(block->to_reduce);
      const Tile& tile = schedule::take(plan, *block, &workspace());
      return run_tile(steps[tile.step], tile, workspace());
    }
    const Tile& tile = plan.first[task.index];
    run_tile(steps[tile.step], tile, workspace());
    if (block) {
      schedule::finish_of(plan, *block, task.index).measured_by = &workspace();
      block->to_measure.fetch_sub(1, std::memory_order_release);
    }
  });
}

// Whether four sizes are those of a view of `numel` elements; no product of them may overflow.
bool is_view_of(const int64_t* sizes, int64_t numel) {
  if (numel == 0) return *std::min_element(sizes, sizes + 4) == 0;
  int64_t product = 1;
  for (int i = 0; i < 4; i++) {
    if (sizes[i] <= 0 || sizes[i] > numel / product) return false;
    product *= sizes[i];
  }
  return product == numel;
}

// Views must be an int64 tensor (n, 4), scalars float64 (n, scalar_names()), both contiguous.
void step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> state,
           Tensor views, Tensor scalars, std::string rule, std::optional<std::string> penalty,
           bool maximize, bool nesterov, bool decoupled, double grad_scale,
           std::vector<Tensor> copies, std::optional<int64_t> seed) {
  const size_t n = params.size();
  const int rule_row = row_of("rule", rule, RULE_NAMES);
  const int coupled_row = penalty ? index_of(*penalty, COUPLED_NAMES) : -1;
  const int penalty_row =
      penalty && coupled_row < 0 ? row_of("penalty", *penalty, PENALTY_NAMES) : -1;
  const size_t shaped = RULE_STATES[rule_row];
  const bool counts = RULE_COUNTS[rule_row];
  const size_t each = shaped + counts;  // the last is the counter
  constexpr int64_t N_SCALARS = sizeof(Scalars) / sizeof(double);
  STD_TORCH_CHECK(grads.size() == n, "grads must be as many as params, got ", grads.size());
  STD_TORCH_CHECK(state.size() == n * each, "state must have ", each, " tensors a parameter");
  STD_TORCH_CHECK(copies.empty() || copies.size() == n,
                  "copies must be none or as many as params, got ", copies.size());
  check("views", views, n * 4, ScalarType::Long);
  check("scalars", scalars, n * N_SCALARS, ScalarType::Double);
  STD_TORCH_CHECK(views.is_contiguous() && scalars.is_contiguous(),
                  "views and scalars must be contiguous");
  const int64_t* view = static_cast<const int64_t*>(views.const_data_ptr());
  const Scalars* scalar = static_cast<const Scalars*>(scalars.const_data_ptr());

  // Kept by the thread: memory that is given back to the system costs a fault a page to get again.
  static thread_local std::vector<Step> steps;
  steps.assign(n, Step{});
  for (size_t i = 0; i < n; i++) {
    Step& s = steps[i];
    const int64_t* v = view + 4 * i;
    const int64_t numel = params[i].numel();
    const ScalarType type = params[i].scalar_type();
    const Layout layout(params[i]);
    s.stored = stored_type(type);
    check("params", params[i], numel, type);
    check_dense("params", layout, numel);
    s.copy = nullptr;
    ScalarType grad_type = type;
    if (!copies.empty()) {
      grad_type = copies[i].scalar_type();
      s.copied = stored_type(grad_type);
      const bool narrow = s.copied == Stored::bfloat16 || s.copied == Stored::float16;
      STD_TORCH_CHECK(s.stored == Stored::float32 && narrow,
                      "copies must be bfloat16 or float16, of float32 params");
      check("copies", copies[i], numel, grad_type);
      check_layout("copies", copies[i], layout);
      s.copy = copies[i].mutable_data_ptr();
    }
    STD_TORCH_CHECK(!seed || s.stored == Stored::bfloat16, "with a seed params must be bfloat16");
    check("grads", grads[i], numel, grad_type);
    check_layout("grads", grads[i], layout);
    STD_TORCH_CHECK(is_view_of(v, numel), "views must have the number of elements of params");
    const ScalarType wide = s.stored == Stored::float64 ? ScalarType::Double : ScalarType::Float;
    for (size_t k = 0; k < shaped; k++) {
      check("state", state[i * each + k], numel, wide);
      check_layout("state", state[i * each + k], layout);
    }
    if (counts) {
      const Tensor& counter = state[i * each + shaped];
      check("step", counter, 1, is_double(counter) ? ScalarType::Double : ScalarType::Float);
    }
    s.param = params[i].mutable_data_ptr();
    s.grad = grads[i].const_data_ptr();
    for (size_t k = 0; k < MAX_STATES; k++) {
      s.state[k] = k < shaped ? state[i * each + k].mutable_data_ptr() : nullptr;
    }
    if (numel > 0) s.blocks = v[0], s.outer = v[1], s.groups = v[2], s.inner = v[3];
  }
  for (size_t i = 0; i < n; i++) {
    Step& s = steps[i];
    const Scalars& c = scalar[i];
    s.rule = rule_row;
    s.penalty = c.elementwise > 0 ? penalty_row : -1;
    s.coupled = c.lr * c.elementwise > 0 ? coupled_row : -1;
    s.clean = c.elementwise > 0 || c.group > 0;
    s.at_random = seed.has_value();
    s.key = random_key(seed.value_or(0), static_cast<int64_t>(i));
    const bool wide = s.stored == Stored::float64;
    if (s.penalty >= 0) {
      const auto prepare = wide ? PREPARE<double>[s.penalty] : PREPARE<float>[s.penalty];
      prepare(c.lr, c.elementwise, c.a, s.coefficients);
    }
    const double tau = c.lr * c.elementwise, threshold = c.lr * c.group;
    const double scale = s.coupled < 0 ? threshold : std::max(tau, threshold);
    const bool near_1 = scale > 0x1p-40 && scale < 0x1p40;
    s.unit = near_1 || scale <= 0
                 ? 1
                 : std::ldexp(1.0, -std::clamp(std::ilogb(scale), -1000, 1000));
    s.group_threshold = threshold > 0 ? threshold * s.unit : s.coupled < 0 ? -1 : 0;
    s.coupling = {tau, s.group_threshold, s.unit};
  }
  const RunTile run_tile = chosen_build().run_tile;
  Schedule plan = schedule::of(steps);
  // Nothing above has changed anything. From here on nothing is refused.
  for (size_t i = 0; i < n; i++) {
    const double step = counts ? count(state[i * each + shaped]) : 0;
    steps[i].numbers = rule_numbers(scalar[i], {maximize, nesterov, decoupled}, grad_scale, step);
  }
  run(steps, plan, run_tile);
}

// The tiles of one tensor with groups: for each its phase, base, row0, row1, col0, col1, strip.
std::vector<int64_t> cpu_tiles(int64_t blocks, int64_t outer, int64_t groups, int64_t inner) {
  Step step{};
  step.blocks = blocks, step.outer = outer, step.groups = groups, step.inner = inner;
  step.group_threshold = 1;
  step.coupled = -1;
  std::vector<int64_t> all;
  for (const Tile& t : schedule::of({step}).first) {
    all.insert(all.end(), {static_cast<int64_t>(t.phase), t.base, t.row0, t.row1, t.col0, t.col1,
                           t.strip});
  }
  return all;
}

std::string cpu_build() { return chosen_build().name; }
std::string cpu_builds() {
  std::string all;
  for (const Build& build : builds()) {
    if (build.supported) all += std::string(all.empty() ? "" : " ") + build.name;
  }
  return all;
}
std::string scalar_names() { return joined(SCALAR_NAMES); }
std::string penalty_names() { return joined(PENALTY_NAMES) + " " + joined(COUPLED_NAMES); }

}  // namespace
}  // namespace tl1

STABLE_TORCH_LIBRARY_IMPL(tl1kernels, CPU, m) {
  m.impl("step_", TORCH_BOX(&tl1::step_));
}

STABLE_TORCH_LIBRARY_IMPL(tl1kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_build", TORCH_BOX(&tl1::cpu_build));
  m.impl("cpu_builds", TORCH_BOX(&tl1::cpu_builds));
  m.impl("cpu_tiles", TORCH_BOX(&tl1::cpu_tiles));
  m.impl("scalar_names", TORCH_BOX(&tl1::scalar_names));
  m.impl("penalty_names", TORCH_BOX(&tl1::penalty_names));
}
