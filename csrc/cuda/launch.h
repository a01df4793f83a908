// How the kernels are started: on a GPU (launch.cu), or emulated on the host (launch_emulated.cpp).
// Each of these throws what the GPU complains of.

#pragma once

#include <stddef.h>

#include <string>

#include "work.h"

namespace tl1::gpu {

// The kernel of one update rule and two stored types; `variant` is one of prepare.h's.
using Kernel = const void*;
struct Instance {
  Kernel kernel;
  int vector;  // weights in 16 bytes
  int ring;    // bytes of shared memory that it needs for what is on its way: weights.h
};
using InstanceOf = Instance (*)(int variant);

// Where the kernels run: torch's number of a device, and a stream of it.
struct Place {
  int device;
  void* stream;
};

void launch_prepare(const Work& work, bool wide, const Place& place);

// `blocks` run at the same time.
void launch_tiles(Kernel kernel, const Work& work, size_t shared_bytes, int blocks, const Place& place);

// Why this kernel cannot run on the device: CUDA's words; "" if it can.
std::string problem_with(Kernel kernel, int device);

// How many blocks with so much shared memory each the device runs at the same time; 0 for none.
int resident_blocks(Kernel kernel, size_t shared_bytes, int device);

}  // namespace tl1::gpu
