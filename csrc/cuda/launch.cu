// The kernels on a GPU, on the stream that Python hands over; nothing here waits for it.

#include <map>
#include <mutex>
#include <tuple>

#include <torch/headeronly/util/Exception.h>

#include "launch.h"
#include "prepare.h"

namespace tl1::gpu {
namespace {

constexpr int PREPARE_THREADS = 128;

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else finds it
  STD_TORCH_CHECK(false, "CUDA, ", doing, ": ", cudaGetErrorString(error));
}

template <class A>
__global__ void __launch_bounds__(PREPARE_THREADS)
    prepare_kernel(const __grid_constant__ Work work) {
  prepare<A>(work, int64_t(blockIdx.x) * PREPARE_THREADS + threadIdx.x);
}

}  // namespace

void launch_prepare(const Work& work, bool wide, const Place& place) {
  check(cudaSetDevice(place.device), "choosing the device");
  const int64_t n = work.n_tensors;
  const unsigned blocks = static_cast<unsigned>((n + PREPARE_THREADS - 1) / PREPARE_THREADS);
  const auto kernel = wide ? prepare_kernel<double> : prepare_kernel<float>;
  kernel<<<blocks, PREPARE_THREADS, 0, static_cast<cudaStream_t>(place.stream)>>>(work);
  check(cudaGetLastError(), "starting prepare");
}

int resident_blocks(Kernel kernel, size_t shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, size_t, int>, int> known;  // asked for once
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key(kernel, shared_bytes, device);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  check(cudaSetDevice(device), "choosing the device");
  int most = 0, each = 0, processors = 0;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "reading a kernel's attributes");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for shared memory");
  if (shared_bytes + attributes.sharedSizeBytes > static_cast<size_t>(most)) return 0;
  // For the kernel, not for a launch: what a launch uses less of is free for other blocks.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes)),
        "asking for shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, THREADS, shared_bytes),
        "counting blocks");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "counting multiprocessors");
  return known[key] = each * processors;
}

void launch_tiles(Kernel kernel, const Work& work, size_t shared_bytes, int blocks, const Place& place) {
  check(cudaSetDevice(place.device), "choosing the device");
  // The blocks of a team wait for each other: all of the grid must run, or none of it.
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = THREADS;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &cooperative;
  config.numAttrs = work.teams;
  void* arguments[] = {const_cast<Work*>(&work)};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "starting the tiles");
}

std::string problem_with(Kernel kernel, int device) {
  int before = device;  // whoever asks keeps the device that is chosen
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (before != device) cudaSetDevice(before);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // so that nobody else finds it
  return cudaGetErrorString(error);
}

}  // namespace tl1::gpu
