// What the row kernels share: a row as edges and 16-byte vectors, its target, its reduction.
#pragma once

#include "../include/pk_rows.h"
#include "launch.h"

namespace pk {

// Arguments of the row kernels.
struct RowArguments : Rows {
  Transform transform;

  __device__ __forceinline__ int v() const { return int(columns); }
};
// nvcc takes a larger argument apart worse: it then divides by the cap again for every vector.
static_assert(sizeof(RowArguments) <= 128, "larger than nvcc keeps in registers");

inline RowArguments row_arguments(const Rows& rows, const LogitOptions& options) {
  return {rows, transform_of(options)};
}

// Columns [0, v) as `edges` single numbers (before the first 16-byte boundary and after the last)
// and `vectors` vectors.
template <class T>
struct Row {
  T* at;
  int head;
  int vectors;
  int edges;

  __device__ __forceinline__ Row(T* at, int v) : at(at) {
    const int misaligned = int(reinterpret_cast<uintptr_t>(at) % sizeof(uint4));
    head = misaligned ? int((sizeof(uint4) - misaligned) / sizeof(T)) : 0;
    if (head > v) head = v;
    vectors = (v - head) / kPerVector<T>;
    edges = v - vectors * kPerVector<T>;
  }

  __device__ __forceinline__ uint4* body() const { return reinterpret_cast<uint4*>(at + head); }

  __device__ __forceinline__ int column_of_edge(int edge) const {
    return edge < head ? edge : edge + vectors * kPerVector<T>;
  }
};

// Where the target of a row lies, and its raw logit. -1: not there.
struct Target {
  float raw;
  int edge = -1;
  int vector = -1;
  int slot = 0;
};

// `column` outside [0, v) is nowhere and its logit NaN; `exact` null: the stored logit. Edges and
// vectors are those of `row`.
template <class T>
__device__ __forceinline__ Target find_target(const Row<T>& row, int64_t column, int v,
                                              const float* exact) {
  Target t = {__uint_as_float(0x7fc00000u)};
  if (column < 0 || column >= v) return t;
  t.raw = exact != nullptr ? *exact : load_one(row.at + column);
  const int in_body = int(column) - row.head;
  if (in_body < 0) {
    t.edge = int(column);
  } else if (in_body / kPerVector<T> < row.vectors) {
    t.vector = in_body / kPerVector<T>;
    t.slot = in_body % kPerVector<T>;
  } else {
    t.edge = int(column) - row.vectors * kPerVector<T>;
  }
  return t;
}

// Vectors that a thread has in flight at a time.
constexpr int kUnroll = 4;

template <int kCount>
__device__ __forceinline__ void put(float (&x)[kCount], int slot, float value) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) x[j] = j == slot ? value : x[j];
}

// Adds vector `index` of a row to `s`, the target's own logit in its place.
template <class T, bool kCap, bool kDot>
__device__ __forceinline__ void add_vector(RowSum& s, const uint4& vector, int index,
                                           const Target& target, const Transform& transform) {
  float x[kPerVector<T>];
  float slope;
  unpack<T>(vector, x);
  if (index == target.vector) put(x, target.slot, target.raw);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) x[j] = transform_fast<kCap>(x[j], transform, slope);
  add_entries<kDot>(s, x);
}

// The edges, one a thread.
template <class T, bool kCap, bool kDot>
__device__ __forceinline__ void add_edges(RowSum& s, const Row<T>& row, const Target& target,
                                          const Transform& transform) {
  const int edge = int(threadIdx.x);
  if (edge >= row.edges) return;
  const float raw = edge == target.edge ? target.raw : load_one(row.at + row.column_of_edge(edge));
  float slope;
  const float z[1] = {transform_fast<kCap>(raw, transform, slope)};
  add_entries<kDot>(s, z);
}

// Every lane gets the sum over its warp, always in the same order.
template <bool kDot>
__device__ __forceinline__ RowSum warp_sum(RowSum s) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    RowSum other = {__shfl_xor_sync(kAllLanes, s.max, step),
                    __shfl_xor_sync(kAllLanes, s.sum, step),
                    kDot ? __shfl_xor_sync(kAllLanes, s.dot, step) : 0.0f};
    merge<kDot>(s, other);
  }
  return s;
}

// Every thread gets the sum over its block. `scratch`: kScratchBytes of shared memory.
template <bool kDot>
__device__ __forceinline__ RowSum block_sum(RowSum s, float* scratch) {
  RowSum* parts = reinterpret_cast<RowSum*>(scratch);
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  s = warp_sum<kDot>(s);
  if (lane == 0) parts[threadIdx.x / kWarp] = s;
  __syncthreads();
  return warp_sum<kDot>(lane < warps ? parts[lane] : empty_row_sum());
}

// The gradient of a row from its statistics: what every column but the target gets, and the target.
struct Gradient {
  RowGradient others;
  float at_target;
};

template <class T, bool kCap, bool kTilt = false>
__device__ __forceinline__ uint4 vector_gradient(const uint4& vector, int index,
                                                 const Target& target, const Gradient& g,
                                                 const Transform& transform) {
  float x[kPerVector<T>];
  unpack<T>(vector, x);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j)
    x[j] = gradient_of<kCap, kTilt>(x[j], transform, g.others);
  if (index == target.vector) put(x, target.slot, g.at_target);
  return pack<T>(x);
}

// Zeros without a read; `part` of `parts` blocks that share the row.
template <class T>
__device__ __forceinline__ void write_zeros(const Row<T>& row, int part, int parts) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const int step = int(blockDim.x) * parts;
  for (int i = part * int(blockDim.x) + int(threadIdx.x); i < row.vectors; i += step)
    store_vector(row.body() + i, zero);
  if (part == 0 && int(threadIdx.x) < row.edges)
    store_one(row.at + row.column_of_edge(int(threadIdx.x)), 0.0f);
}

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

inline int64_t bytes_of_row(const Rows& rows) {
  return rows.columns * (rows.dtype == kFloat32 ? 4 : 2);
}

// Calls function(T(), True() or False()) for the dtype and whether there is a softcap (> 0).
template <class Function>
int32_t for_dtype(const RowArguments& a, const Function& function) {
  const bool cap = a.transform.cap > 0;
  switch (a.dtype) {
    case kFloat32:
      return cap ? function(float(), True()) : function(float(), False());
    case kBFloat16:
      return cap ? function(BFloat16(), True()) : function(BFloat16(), False());
    case kFloat16:
      return cap ? function(Half(), True()) : function(Half(), False());
    default:
      return kInvalidValue;
  }
}

}  // namespace pk
