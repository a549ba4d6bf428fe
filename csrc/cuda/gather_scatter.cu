// The thin (N, H) sides of the matmuls: gather, scatter and the exact target logits.
//
// Bytes, H numbers of `b` bytes a row: gather and scatter N H b read and as many written, target
// logits 2 N H b read; one launch each. Numbers are taken eight at a time; where a pointer or a
// stride is not a multiple of 16 bytes, each on its own.
#include <cmath>

#include "launch.h"

namespace pk {
namespace {

constexpr int kThreads = 256;
constexpr int kEight = 8;

// A matrix as the kernels take it.
struct Side {
  void* data;
  int64_t stride;
  int32_t dtype;
  int32_t vectors;  // whether every row starts on a 16-byte boundary
};

inline bool known(const Matrix& m) {
  return m.dtype >= 0 && m.dtype < kDTypes;
}

inline Side side_of(const Matrix& m) {
  const int64_t bytes = m.stride * (m.dtype == kFloat32 ? 4 : 2);
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && bytes % 16 == 0;
  return {m.data, m.stride, m.dtype, aligned};
}

template <class T>
__device__ __forceinline__ void load_as(const T* at, int count, bool vectors, float (&x)[kEight]) {
  if (vectors && count == kEight) {
#pragma unroll
    for (int v = 0; v < kEight / kPerVector<T>; ++v) {
      float part[kPerVector<T>];
      unpack<T>(load_vector(reinterpret_cast<const uint4*>(at) + v), part);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) x[v * kPerVector<T> + j] = part[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) x[j] = j < count ? load_one(at + j) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_as(T* at, int count, bool vectors, const float (&x)[kEight]) {
  if (vectors && count == kEight) {
#pragma unroll
    for (int v = 0; v < kEight / kPerVector<T>; ++v) {
      float part[kPerVector<T>];
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) part[j] = x[v * kPerVector<T> + j];
      store_vector(reinterpret_cast<uint4*>(at) + v, pack<T>(part));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (j < count) store_one(at + j, x[j]);
    }
  }
}

// Columns [column, column + 8) of a row, those from `width` on as 0.
__device__ __forceinline__ void load_eight(const Side& m, int64_t row, int64_t column,
                                           int64_t width, float (&x)[kEight]) {
  const int count = int(width - column < kEight ? width - column : kEight);
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case kFloat32:
      return load_as(static_cast<const float*>(m.data) + at, count, m.vectors, x);
    case kBFloat16:
      return load_as(static_cast<const BFloat16*>(m.data) + at, count, m.vectors, x);
    default:
      return load_as(static_cast<const Half*>(m.data) + at, count, m.vectors, x);
  }
}

__device__ __forceinline__ void store_eight(const Side& m, int64_t row, int64_t column,
                                            int64_t width, const float (&x)[kEight]) {
  const int count = int(width - column < kEight ? width - column : kEight);
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case kFloat32:
      return store_as(static_cast<float*>(m.data) + at, count, m.vectors, x);
    case kBFloat16:
      return store_as(static_cast<BFloat16*>(m.data) + at, count, m.vectors, x);
    default:
      return store_as(static_cast<Half*>(m.data) + at, count, m.vectors, x);
  }
}

// One block a token.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Side in, const Side out, const int64_t* rows, const float* weights,
                  int64_t width) {
  const int64_t i = blockIdx.x;
  const int64_t row = rows[i];
  const float weight = weights ? weights[i] : 1.0f;
  for (int64_t c = threadIdx.x * kEight; c < width; c += kThreads * kEight) {
    float x[kEight];
    load_eight(in, row, c, width, x);
#pragma unroll
    for (int j = 0; j < kEight; ++j) x[j] *= weight;
    store_eight(out, i, c, width, x);
  }
}

// One block a row of `out`: the one of the row's first token, the others leave at once.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const Side side, const Side out, const int64_t* rows, const float* weights,
                   const int64_t* by_row, int64_t n, int64_t width) {
  const int64_t first = blockIdx.x;
  const int64_t row = rows[by_row ? by_row[first] : first];
  if (by_row && first > 0 && rows[by_row[first - 1]] == row) return;
  int64_t end = first + 1;
  while (by_row && end < n && rows[by_row[end]] == row) ++end;
  for (int64_t c = threadIdx.x * kEight; c < width; c += kThreads * kEight) {
    float sum[kEight] = {};
    if (by_row) load_eight(out, row, c, width, sum);
    for (int64_t at = first; at < end; ++at) {
      const int64_t i = by_row ? by_row[at] : at;
      const float weight = weights[i];
      float x[kEight];
      load_eight(side, i, c, width, x);
#pragma unroll
      for (int j = 0; j < kEight; ++j) sum[j] += weight * x[j];
    }
    store_eight(out, row, c, width, sum);
  }
}

// One warp a token.
__global__ void __launch_bounds__(kThreads)
    target_logits_kernel(const Side x, const Side weight, const void* bias, const int64_t* targets,
                         int64_t n, int64_t vocab, int64_t width, float* out) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t i = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= n) return;
  const int64_t target = targets[i];
  if (target >= vocab) {  // no such row of the weight
    if (lane == 0) out[i] = NAN;
    return;
  }
  float sum = 0.0f;
  for (int64_t c = lane * kEight; target >= 0 && c < width; c += kWarp * kEight) {
    float a[kEight], b[kEight];
    load_eight(x, i, c, width, a);
    load_eight(weight, target, c, width, b);
    float part = 0.0f;
#pragma unroll
    for (int j = 0; j < kEight; ++j) part += a[j] * b[j];
    sum += part;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane != 0) return;
  if (bias != nullptr && target >= 0) {
    float b[kEight];
    load_eight({const_cast<void*>(bias), 1, x.dtype, 0}, target, 0, 1, b);
    sum += b[0];
  }
  out[i] = sum;
}

}  // namespace
}  // namespace pk

using namespace pk;

int32_t pk_cuda_gather_rows(const Matrix* in, const Matrix* out, const int64_t* rows,
                            const float* weights, void* stream) {
  if (!known(*in) || !known(*out)) return kInvalidValue;
  return launch(gather_kernel, {out->rows, kThreads}, stream, side_of(*in), side_of(*out), rows,
                weights, out->columns);
}

int32_t pk_cuda_scatter_rows(const Matrix* side, const Matrix* out, const int64_t* rows,
                             const float* weights, const int64_t* by_row, void* stream) {
  if (!known(*side) || !known(*out)) return kInvalidValue;
  return launch(scatter_kernel, {side->rows, kThreads}, stream, side_of(*side), side_of(*out), rows,
                weights, by_row, side->rows, side->columns);
}

int32_t pk_cuda_target_logits(const Matrix* x, const Matrix* weight, const void* bias,
                              const int64_t* targets, float* out, void* stream) {
  if (!known(*x)) return kInvalidValue;
  const int64_t tokens_a_block = kThreads / kWarp;
  return launch(target_logits_kernel, {(x->rows + tokens_a_block - 1) / tokens_a_block, kThreads},
                stream, side_of(*x), side_of(*weight), bias, targets, x->rows, weight->rows,
                weight->columns, out);
}
