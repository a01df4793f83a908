// The kernels on the host, for tests: as launch.cu.

#include <algorithm>

#include "launch.h"
#include "prepare.h"

namespace tl1::gpu {
namespace {

constexpr int BLOCKS = 8;  // enough for items to be shared out, and for a cluster

}  // namespace

void launch_prepare(const Work& work, bool wide, const Place&) {
  for (int64_t i = 0; i < std::max(work.n_tensors, 1 + 2 * work.n_teams); i++) {
    wide ? prepare<double>(work, i) : prepare<float>(work, i);
  }
}

void launch_tiles(Kernel kernel, const Work& work, int ranks, size_t shared_bytes, const Place&) {
  const auto run = reinterpret_cast<void (*)(const Work&)>(const_cast<void*>(kernel));
  Emulation::run(BLOCKS, ranks, shared_bytes, [&] { run(work); });
}

std::string problem_with(Kernel, int) { return ""; }

bool has_clusters(Kernel, int ranks, size_t, int) { return BLOCKS % ranks == 0; }

}  // namespace tl1::gpu
