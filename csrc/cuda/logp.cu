// Statistics of rows of logits, read once: N V b bytes, one launch, one block a row.
#include "rows.cuh"

namespace pk {
namespace {

template <class T, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kMaxRowThreads) logp_kernel(const RowArguments a) {
  const int64_t n = blockIdx.x;
  const int64_t column = a.targets[n];
  RowResult result = {0.0f, 0.0f, 0.0f};
  if (column >= 0) {
    const Row<T> row(static_cast<T*>(a.logits) + n * a.stride, a.v());
    const Target target =
        find_target(row, column, a.v(), a.target_logits ? a.target_logits + n : nullptr);
    RowSum s = empty_row_sum();
    const int threads = int(blockDim.x);
    int i = int(threadIdx.x);
    for (; i + (kUnroll - 1) * threads < row.vectors; i += kUnroll * threads) {
      uint4 vectors[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) vectors[u] = load_streaming(row.body() + i + u * threads);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        add_vector<T, kCap, kEntropy>(s, vectors[u], i + u * threads, target, a.transform);
    }
    for (; i < row.vectors; i += threads)
      add_vector<T, kCap, kEntropy>(s, load_streaming(row.body() + i), i, target, a.transform);
    add_edges<T, kCap, kEntropy>(s, row, target, a.transform);
    s = block_sum<kEntropy>(s, reinterpret_cast<float*>(dynamic_shared()));
    float slope;
    result = row_result(s, transform_fast<kCap>(target.raw, a.transform, slope));
  }
  if (threadIdx.x == 0) {
    a.logp[n] = result.logp;
    a.lse[n] = result.lse;
    if (kEntropy) a.entropy[n] = result.entropy;
  }
}

}  // namespace
}  // namespace pk

using namespace pk;

int32_t pk_cuda_logp(const Rows* rows, const LogitOptions* options, void* stream) {
  if (rows->columns > kMaxColumns) return kInvalidValue;
  const RowArguments a = row_arguments(*rows, *options);
  const RowConfig* config = row_config(kStreaming, bytes_of_row(a));
  const Shape shape = {a.rows, config->threads, kScratchBytes};
  return for_dtype(a, [&](auto type, auto cap) {
    using T = decltype(type);
    constexpr bool kCap = decltype(cap)::value;
    return a.entropy != nullptr ? launch(logp_kernel<T, kCap, true>, shape, stream, a)
                                : launch(logp_kernel<T, kCap, false>, shape, stream, a);
  });
}
