// The kernels on the host, for tests: as launch.cu.

#include "launch.h"
#include "prepare.h"

namespace tl1::gpu {
namespace {

constexpr int BLOCKS = 8;  // at most: enough for items to be shared out, and for a team
constexpr size_t SHARED = 99 << 10;  // bytes that a block can have: of all GPUs the least

}  // namespace

void launch_prepare(const Work& work, bool wide, const Place&) {
  for (int64_t i = 0; i < work.n_tensors; i++) {
    wide ? prepare<double>(work, i) : prepare<float>(work, i);
  }
}

void launch_tiles(Kernel kernel, const Work& work, size_t shared_bytes, int blocks, const Place&) {
  const auto run = reinterpret_cast<void (*)(const Work&)>(const_cast<void*>(kernel));
  Emulation::run(blocks, shared_bytes, [&] { run(work); });
}

std::string problem_with(Kernel, int) { return ""; }

int resident_blocks(Kernel, size_t shared_bytes, int) { return shared_bytes > SHARED ? 0 : BLOCKS; }

}  // namespace tl1::gpu
