// The kernel for one update rule TL1_RULE and the stored types TL1_T, TL1_G: CMake compiles this
// file once for each, with TL1_KERNELS the name of what it exports.

#include "launch.h"
#include "prepare.h"
#include "tiles.h"

namespace tl1::gpu {
namespace {

template <class C>
TL1_DEVICE void run(const Work& work) {
  Block<C>(work).run();
}

#ifdef __CUDACC__
template <class C>
__global__ void __launch_bounds__(THREADS, C::BLOCKS) kernel(const __grid_constant__ Work work) {
  run<C>(work);
}
#else
template <class C>
void kernel(const Work& work) {
  run<C>(work);
}
#endif

}  // namespace

template <class C>
Instance instance() {
  return {reinterpret_cast<Kernel>(&kernel<C>), C::VECTOR, C::RING};
}
#define TL1_INSTANCE(Prox) instance<Config<TL1_T, TL1_G, TL1_RULE, Prox>>()

Instance TL1_KERNELS(int variant) {
  const Instance all[VARIANTS] = {TL1_INSTANCE(Soft), TL1_INSTANCE(Transformed), TL1_INSTANCE(Others),
                                TL1_INSTANCE(None)};
  return all[variant];
}

}  // namespace tl1::gpu
