// The schemas of the native library's ops, torch.ops.tl1kernels. Implementations register beside
// their kernels (cpu_step.cpp); this file has the one that says what was built.

#include <string>

#include <torch/csrc/stable/library.h>

namespace {

std::string build_info() {
  return "C++ " + std::to_string(__cplusplus) + ", "
#ifdef __VERSION__
         "compiler " __VERSION__ ", "
#endif
         "torch stable ABI 2.10";
}

}  // namespace

STABLE_TORCH_LIBRARY(tl1kernels, m) {
  m.def("build_info() -> str");

  // A step on tensors of one dtype, in place (tl1kernels/backends/native.py calls it).
  //   state    rule's states of the first parameter, its counter if it has one, those of the second
  //   views    int64 (n, 4): blocks, outer, groups, inner of each parameter's memory
  //   scalars  float64 (n, k), columns as scalar_names() has them
  //   rule     a row of TL1_RULES; penalty: a row of TL1_PENALTIES, or None
  //   copies   none, or for each parameter, then float32, a 16-bit tensor that takes its new values;
  //            its gradient has that type
  //   seed     None to round to nearest; else bfloat16 is rounded stochastically (random.h)
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor views, "
      "Tensor scalars, str rule, str? penalty, bool maximize, bool nesterov, bool decoupled, "
      "float grad_scale, Tensor(c!)[] copies, int? seed) -> ()");
  m.def("scalar_names() -> str");   // separated by spaces, in the order of the columns
  m.def("penalty_names() -> str");  // those that step_ knows
  m.def("cpu_builds() -> str");     // instruction sets that this processor can run, the best first
  m.def("cpu_tiles(int blocks, int outer, int groups, int inner) -> int[]");  // for tests
  m.def("cpu_build() -> str");      // the one that runs: TL1KERNELS_CPU, or the best
}

STABLE_TORCH_LIBRARY_IMPL(tl1kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
