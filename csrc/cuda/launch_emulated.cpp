// The kernels on the host, for tests: as launch.cu.

#include <algorithm>

#include "launch.h"
#include "prepare.h"

namespace tl1::gpu {
namespace {

constexpr int BLOCKS = 8;  // at most: enough for items to be shared out, and for a team

}  // namespace

void launch_prepare(const Work& work, bool wide, const Place&) {
  for (int64_t i = 0; i < work.n_tensors; i++) {
    wide ? prepare<double>(work, i) : prepare<float>(work, i);
  }
}

void launch_tiles(Kernel kernel, const Work& work, size_t shared_bytes, int64_t, const Place&) {
  const auto run = reinterpret_cast<void (*)(const Work&)>(const_cast<void*>(kernel));
  const int64_t items = std::max({work.n_resident, work.n_split, int64_t(1)});
  Emulation::run(static_cast<int>(std::min<int64_t>(items, BLOCKS)), shared_bytes, [&] { run(work); });
}

std::string problem_with(Kernel, int) { return ""; }

int resident_blocks(Kernel, size_t, int) { return BLOCKS; }

}  // namespace tl1::gpu
