// What the kernels need of the device: storage types, vector access, asynchronous copies, clusters,
// dynamic shared memory. Compiled by g++ (tests/cuda_emulation), a header there stands in for it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../cpu/dtype.h"

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else

#include <cuda_runtime.h>

namespace pk {

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char pk_shared[];
  return pk_shared;
}

__device__ __forceinline__ uint4 load_vector(const uint4* at) {
  return *at;
}

// For what is read once: first to leave the caches.
__device__ __forceinline__ uint4 load_streaming(const uint4* at) {
  return __ldcs(at);
}

__device__ __forceinline__ void store_vector(uint4* at, const uint4& vector) {
  *at = vector;
}

// 16 bytes from global to shared memory, past L1; complete after wait_copies().
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `pending` (0 ... 3) of this thread's latest groups are under way.
__device__ __forceinline__ void wait_copies(int pending) {
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}

// Clusters of blocks: sm_90 and newer; elsewhere every block is a cluster of its own.
__device__ __forceinline__ int cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return int(size);
}

__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// `own`, an address in shared memory, as block `rank` of the cluster has it.
__device__ __forceinline__ float read_peer(const float* own, int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned address;
  float value;
  const unsigned at = unsigned(__cvta_generic_to_shared(own));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *own;
#endif
}

__device__ __forceinline__ float low_half(uint32_t bits) {
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(bits));
  return x;
}

// The two 16-bit numbers of a word, and back, rounded to nearest even.
template <class T>
__device__ __forceinline__ void unpack_pair(uint32_t bits, float& low, float& high);

template <>
__device__ __forceinline__ void unpack_pair<BFloat16>(uint32_t bits, float& low, float& high) {
  low = __uint_as_float(bits << 16);
  high = __uint_as_float(bits & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack_pair<Half>(uint32_t bits, float& low, float& high) {
  low = low_half(bits);
  high = low_half(bits >> 16);
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_pair<BFloat16>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

template <>
__device__ __forceinline__ uint32_t pack_pair<Half>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

}  // namespace pk

#endif

namespace pk {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Numbers of type T in a 16-byte vector.
template <class T>
constexpr int kPerVector = int(sizeof(uint4) / sizeof(T));

template <class T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[kPerVector<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (sizeof(T) == 4) {
      x[j] = __uint_as_float(words[j]);
    } else {
      unpack_pair<T>(words[j], x[2 * j], x[2 * j + 1]);
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (sizeof(T) == 4) {
      words[j] = __float_as_uint(x[j]);
    } else {
      words[j] = pack_pair<T>(x[2 * j], x[2 * j + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One number at a time: the edges of rows, and whatever is not 16-byte aligned.
template <class T>
__device__ __forceinline__ float load_one(const T* at) {
  if constexpr (sizeof(T) == 4) {
    return *at;
  } else {
    float low, high;
    unpack_pair<T>(at->bits, low, high);
    return low;
  }
}

template <class T>
__device__ __forceinline__ void store_one(T* at, float x) {
  if constexpr (sizeof(T) == 4) {
    *at = x;
  } else {
    at->bits = uint16_t(pack_pair<T>(x, 0.0f));
  }
}

}  // namespace pk
