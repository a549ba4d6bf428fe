// The gradient of rows of logits from their log-sum-exp: one read, one write, 2 N V b bytes, one
// launch, one block a row. Rows that are not scored are written only.
#include "rows.cuh"

namespace pk {
namespace {

// Where logits and gradient are misaligned differently there are no common vectors.
template <class T, bool kCap, bool kTilt>
__device__ void write_single(const T* in, T* out, int v, int64_t column, const Gradient& g,
                             const Transform& transform) {
  for (int c = int(threadIdx.x); c < v; c += int(blockDim.x)) {
    const float value = gradient_of<kCap, kTilt>(load_one(in + c), transform, g.others);
    store_one(out + c, c == column ? g.at_target : value);
  }
}

template <class T, bool kCap, bool kTilt>
__device__ __forceinline__ void write_vectors(const Row<T>& in, uint4* out, const Target& target,
                                              const Gradient& g, const Transform& transform) {
  const int threads = int(blockDim.x);
  int i = int(threadIdx.x);
  for (; i + (kUnroll - 1) * threads < in.vectors; i += kUnroll * threads) {
    uint4 vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = load_streaming(in.body() + i + u * threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * threads;
      store_vector(out + at, vector_gradient<T, kCap, kTilt>(vectors[u], at, target, g, transform));
    }
  }
  for (; i < in.vectors; i += threads) {
    const uint4 vector = load_streaming(in.body() + i);
    store_vector(out + i, vector_gradient<T, kCap, kTilt>(vector, i, target, g, transform));
  }
}

template <class T, bool kCap, bool kTilt>
__global__ void __launch_bounds__(kMaxRowThreads) logits_grad_kernel(const RowArguments a) {
  const int64_t n = blockIdx.x;
  const int64_t column = a.targets[n];
  const Row<T> out(static_cast<T*>(a.out) + n * a.out_stride, a.v());
  if (column < 0) {
    write_zeros(out, 0, 1);
    return;
  }
  const Row<T> in(static_cast<T*>(a.logits) + n * a.stride, a.v());
  const int64_t local = column - a.first_column;
  const Target target =
      find_target(in, local, a.v(), a.target_logits ? a.target_logits + n : nullptr);
  // In place no barrier is needed: the target's logit matters only to the thread that overwrites
  // it.
  const float lse = a.lse[n];
  const float weight = a.weights ? a.weights[n] : 1.0f;
  float slope;
  const float log_p = transform_fast<kCap>(target.raw, a.transform, slope) - lse;
  Gradient g = {{lse, -weight, 0.0f}, one_minus_p(log_p) * slope * weight};
  if (kTilt) {
    const float entropy = a.entropy[n], by = a.entropy_weights[n];
    g.others.factor -= by * entropy;
    g.others.tilt = -by;
    // A target of probability 0 adds nothing, however far below.
    const float p = exp_fast(log_p);
    if (!(p == 0.0f)) g.at_target -= by * p * (log_p + entropy) * slope;
  }
  if (in.head == out.head) {
    write_vectors<T, kCap, kTilt>(in, out.body(), target, g, a.transform);
    const int edge = int(threadIdx.x);
    if (edge < in.edges) {
      const int c = in.column_of_edge(edge);
      const float value = gradient_of<kCap, kTilt>(load_one(in.at + c), a.transform, g.others);
      store_one(out.at + c, edge == target.edge ? g.at_target : value);
    }
  } else {
    write_single<T, kCap, kTilt>(in.at, out.at, a.v(), local, g, a.transform);
  }
}

}  // namespace
}  // namespace pk

using namespace pk;

int32_t pk_cuda_logits_grad(const Rows* rows, const LogitOptions* options, void* stream) {
  if (rows->columns > kMaxColumns) return kInvalidValue;
  const RowArguments a = row_arguments(*rows, *options);
  const RowConfig* config = row_config(kStreaming, bytes_of_row(a));
  const Shape shape = {a.rows, config->threads};
  return for_dtype(a, [&](auto type, auto cap) {
    using T = decltype(type);
    constexpr bool kCap = decltype(cap)::value;
    return a.entropy != nullptr ? launch(logits_grad_kernel<T, kCap, true>, shape, stream, a)
                                : launch(logits_grad_kernel<T, kCap, false>, shape, stream, a);
  });
}
