// The kernels on a GPU, on the stream that Python hands over; nothing here waits for it.

#include <algorithm>
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

cudaLaunchConfig_t config_of(int ranks, size_t shared_bytes, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config{};
  config.blockDim = THREADS;
  config.dynamicSmemBytes = shared_bytes;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = ranks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = ranks > 1 ? 1 : 0;
  return config;
}

// What a kernel finds room for on a device; asked once.
int resident_blocks(Kernel kernel, int ranks, size_t shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, size_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, ranks, shared_bytes, device}];
  if (blocks) return blocks;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "asking for shared memory");
  if (ranks > 1) {
    cudaLaunchAttribute cluster;
    cudaLaunchConfig_t config = config_of(ranks, shared_bytes, cluster);
    config.gridDim = ranks;
    check(cudaOccupancyMaxActiveClusters(&blocks, kernel, &config), "counting clusters");
    blocks *= ranks;
  } else {
    int each = 0, processors = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, THREADS, shared_bytes),
          "counting blocks");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "counting multiprocessors");
    blocks = each * processors;
  }
  return blocks;
}

}  // namespace

void launch_prepare(const Work& work, bool wide, const Place& place) {
  check(cudaSetDevice(place.device), "choosing the device");
  const int64_t n = std::max(work.n_tensors, 1 + 2 * work.n_teams);
  const unsigned blocks = static_cast<unsigned>((n + PREPARE_THREADS - 1) / PREPARE_THREADS);
  const auto kernel = wide ? prepare_kernel<double> : prepare_kernel<float>;
  kernel<<<blocks, PREPARE_THREADS, 0, static_cast<cudaStream_t>(place.stream)>>>(work);
  check(cudaGetLastError(), "starting prepare");
}

void launch_tiles(Kernel kernel, const Work& work, int ranks, size_t shared_bytes,
                  const Place& place) {
  const int64_t items =
      std::max({work.n_chunks, work.n_split, work.n_held * ranks, int64_t(1)});
  const int64_t most = resident_blocks(kernel, ranks, shared_bytes, place.device);
  STD_TORCH_CHECK(most > 0, "no multiprocessor has room for a block of ", shared_bytes,
                  " bytes of shared memory");
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = config_of(ranks, shared_bytes, cluster);
  config.gridDim = static_cast<unsigned>(std::min((items + ranks - 1) / ranks * ranks, most));
  config.stream = static_cast<cudaStream_t>(place.stream);
  void* arguments[] = {const_cast<Work*>(&work)};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "starting the tiles");
}

std::string problem_with(Kernel kernel, int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // so that nobody else finds it
  return cudaGetErrorString(error);
}

bool has_clusters(Kernel kernel, int ranks, size_t shared_bytes, int device) {
  check(cudaSetDevice(device), "choosing the device");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "reading a kernel's attributes");
  if (attributes.ptxVersion < 90) return false;  // block.h: __CUDA_ARCH__
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for shared memory");
  if (shared_bytes + attributes.sharedSizeBytes > static_cast<size_t>(most)) return false;
  return resident_blocks(kernel, ranks, shared_bytes, device) > 0;
}

}  // namespace tl1::gpu
