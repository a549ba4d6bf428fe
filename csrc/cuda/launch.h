// Host side of the kernels: the device, the launch, and the launch configurations as data.
#pragma once

#include "device.cuh"
#include "pro_kernels_cuda.h"

namespace pk {

struct Device {
  int major;         // of the compute capability
  int shared_optin;  // most bytes of shared memory a block can have
};

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared = 0;
  int cluster = 1;
};

constexpr int32_t kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr int64_t kMaxColumns = 0x7fffffff - (1 << 20);  // column indices in a row are 32-bit

#ifndef __CUDACC__
}  // namespace pk
#include "cuda_emulation_launch.h"
namespace pk {
#else

inline int32_t current_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.shared_optin, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   index);
  return int32_t(error);
}

// One launch; `shape.blocks` is a multiple of the cluster size. No blocks, no launch.
template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), const Shape& shape, void* stream,
               Arguments... arguments) {
  if (shape.blocks == 0) return 0;
  if (shape.blocks > kMaxBlocks) return kInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  cudaError_t error = cudaSuccess;
  if (shape.shared > 48 * 1024) {
    // Always the device's limit, so that threads which launch at once set the same.
    Device device;
    error = cudaError_t(current_device(device));
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   device.shared_optin);
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // ours to report, not the next caller's
  return int32_t(error);
}

inline const char* error_text(int32_t code) {
  return cudaGetErrorString(cudaError_t(code));
}

// 0 where there is code of this kernel for the current device.
inline int32_t has_code(void (*kernel)()) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) cudaGetLastError();
  return int32_t(error);
}

#endif

// How rows of up to `max_bytes` are taken.
struct RowConfig {
  int64_t max_bytes;
  int threads;
  int cluster;
};

constexpr int64_t kAnyBytes = INT64_MAX;
constexpr int64_t kKiB = 1024;

// logp and logits_grad: a column is touched once, it only takes enough loads in flight.
constexpr RowConfig kStreaming[] = {{4 * kKiB, 128, 1}, {kAnyBytes, 256, 1}};

// residual, the row on chip. A share of 72 KiB lets three blocks live on an SM of sm_90 and sm_100
// (228 KiB), so that loads of one overlap stores of another; wider rows take the SM alone.
constexpr RowConfig kClusters[] = {
    {4 * kKiB, 128, 1},   {72 * kKiB, 256, 1},  {144 * kKiB, 256, 2},
    {288 * kKiB, 256, 4}, {576 * kKiB, 256, 8}, {1728 * kKiB, 256, 8},
};
// Without clusters: two blocks an SM on sm_80 (164 KiB), one on sm_86, sm_89 and sm_120 (100 KiB).
constexpr RowConfig kOneBlock[] = {{4 * kKiB, 128, 1}, {72 * kKiB, 256, 1}};
// Rows beyond that are read twice. Wide blocks: the rows under way should fit in L2.
constexpr RowConfig kReread[] = {{kAnyBytes, 1024, 1}};

constexpr int kMaxRowThreads = 256;  // of every configuration but kReread
constexpr int kMaxRereadThreads = 1024;
constexpr size_t kScratchBytes = 512;  // in front of the row: sums of the warps and the block

// The first configuration that takes rows of this size, or null.
template <int kCount>
const RowConfig* row_config(const RowConfig (&table)[kCount], int64_t bytes) {
  for (const RowConfig& config : table) {
    if (bytes <= config.max_bytes) return &config;
  }
  return nullptr;
}

}  // namespace pk
