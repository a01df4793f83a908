// The native library's entry into torch. It says what was built; kernels register their ops
// beside it. Ops live in the namespace torch.ops.tl1kernels.

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
}

STABLE_TORCH_LIBRARY_IMPL(tl1kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
