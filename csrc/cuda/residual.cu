// Rows of logits overwritten with d logp / d raw: one launch, 2 N V b bytes.
//
// A row is held in the shared memory of one block, or of a cluster of blocks (sm_90 and newer), as
// raw vectors: every thread copies its own there asynchronously, takes their statistics as they
// arrive, and writes the gradient from them. Blocks of a cluster exchange their sums through
// distributed shared memory. Rows that do not fit are read twice, the second time backwards: what
// was read last is the likeliest to be in L2 still.
#include "rows.cuh"

namespace pk {
namespace {

constexpr int kGroups = 4;          // asynchronous copies wait in this many steps
constexpr int kBlockPart = 32 * 3;  // in the scratch, after the sums of up to 32 warps

__device__ __forceinline__ Gradient gradient_from(const RowSum& s, float target_slope, float logp) {
  return {{s.max, -1.0f / s.sum, 0.0f}, one_minus_p(logp) * target_slope};
}

// Sums of the blocks of the cluster, in the order of their ranks; every thread gets the result.
__device__ __forceinline__ RowSum cluster_sum(const RowSum& own, float* part) {
  if (threadIdx.x == 0) {
    part[0] = own.max;
    part[1] = own.sum;
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  RowSum s = empty_row_sum();
  for (int rank = 0; rank < cluster_size(); ++rank)
    merge<false>(s, {read_peer(part, rank), read_peer(part + 1, rank), 0.0f});
  return s;
}

template <class T, bool kCap>
__global__ void __launch_bounds__(kMaxRowThreads, 3) residual_on_chip_kernel(const RowArguments a) {
  const int blocks = cluster_size(), rank = cluster_rank(), threads = int(blockDim.x);
  const int64_t n = blockIdx.x / blocks;
  const int64_t column = a.targets[n];
  const Row<T> row(static_cast<T*>(a.logits) + n * a.stride, a.v());
  if (column < 0) {  // the same in all blocks of the cluster
    write_zeros(row, rank, blocks);
    if (rank == 0 && threadIdx.x == 0) a.logp[n] = a.lse[n] = 0.0f;
    return;
  }
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  uint4* held = reinterpret_cast<uint4*>(dynamic_shared() + kScratchBytes);
  const int share = (row.vectors + blocks - 1) / blocks;
  const int first = rank * share;
  const int count = max(0, min(share, row.vectors - first));
  uint4* body = row.body() + first;
  const int step = ((count + threads - 1) / threads + kGroups - 1) / kGroups * threads;

  for (int group = 0; group < kGroups; ++group) {
    const int end = min(count, (group + 1) * step);
    for (int i = group * step + int(threadIdx.x); i < end; i += threads)
      copy_async(held + i, body + i);
    commit_copies();
  }
  const Target target =
      find_target(row, column, a.v(), a.target_logits ? a.target_logits + n : nullptr);
  RowSum s = empty_row_sum();
  const bool has_edge = rank == 0 && int(threadIdx.x) < row.edges;
  T* edge = row.at + row.column_of_edge(int(threadIdx.x));
  const float edge_raw = has_edge ? load_one(edge) : 0.0f;
  if (rank == 0) add_edges<T, kCap, false>(s, row, target, a.transform);
  for (int group = 0; group < kGroups; ++group) {
    wait_copies(kGroups - 1 - group);
    const int end = min(count, (group + 1) * step);
    for (int i = group * step + int(threadIdx.x); i < end; i += threads)
      add_vector<T, kCap, false>(s, held[i], first + i, target, a.transform);
  }
  s = block_sum<false>(s, scratch);
  if (blocks > 1) s = cluster_sum(s, scratch + kBlockPart);
  cluster_arrive();  // this block has read its peers

  float slope;
  const RowResult result = row_result(s, transform_fast<kCap>(target.raw, a.transform, slope));
  const Gradient g = gradient_from(s, slope, result.logp);
  for (int i = int(threadIdx.x); i < count; i += threads)
    store_vector(body + i, vector_gradient<T, kCap>(held[i], first + i, target, g, a.transform));
  if (has_edge) {
    const float value = gradient_of<kCap>(edge_raw, a.transform, g.others);
    store_one(edge, int(threadIdx.x) == target.edge ? g.at_target : value);
  }
  if (rank == 0 && threadIdx.x == 0) {
    a.logp[n] = result.logp;
    a.lse[n] = result.lse;
  }
  cluster_wait();  // its shared memory stays until every peer has read it
}

template <class T, bool kCap>
__global__ void __launch_bounds__(kMaxRereadThreads) residual_reread_kernel(const RowArguments a) {
  const int64_t n = blockIdx.x;
  const int threads = int(blockDim.x);
  const int64_t column = a.targets[n];
  const Row<T> row(static_cast<T*>(a.logits) + n * a.stride, a.v());
  if (column < 0) {
    write_zeros(row, 0, 1);
    if (threadIdx.x == 0) a.logp[n] = a.lse[n] = 0.0f;
    return;
  }
  const Target target =
      find_target(row, column, a.v(), a.target_logits ? a.target_logits + n : nullptr);
  RowSum s = empty_row_sum();
  int i = int(threadIdx.x);
  for (; i + threads < row.vectors; i += 2 * threads) {
    const uint4 vector = load_vector(row.body() + i), next = load_vector(row.body() + i + threads);
    add_vector<T, kCap, false>(s, vector, i, target, a.transform);
    add_vector<T, kCap, false>(s, next, i + threads, target, a.transform);
  }
  if (i < row.vectors) {
    add_vector<T, kCap, false>(s, load_vector(row.body() + i), i, target, a.transform);
    i += threads;
  }
  add_edges<T, kCap, false>(s, row, target, a.transform);
  s = block_sum<false>(s, reinterpret_cast<float*>(dynamic_shared()));

  float slope;
  const RowResult result = row_result(s, transform_fast<kCap>(target.raw, a.transform, slope));
  const Gradient g = gradient_from(s, slope, result.logp);
  // `i` is one step past this thread's last vector; each thread overwrites what it alone reads.
  for (i -= threads; i >= threads; i -= 2 * threads) {
    const int before = i - threads;
    const uint4 vector = load_streaming(row.body() + i), next = load_streaming(row.body() + before);
    store_vector(row.body() + i, vector_gradient<T, kCap>(vector, i, target, g, a.transform));
    store_vector(row.body() + before,
                 vector_gradient<T, kCap>(next, before, target, g, a.transform));
  }
  if (i >= 0) {
    const uint4 vector = load_streaming(row.body() + i);
    store_vector(row.body() + i, vector_gradient<T, kCap>(vector, i, target, g, a.transform));
  }
  const int edge = int(threadIdx.x);
  if (edge < row.edges) {
    T* at = row.at + row.column_of_edge(edge);
    const float value = gradient_of<kCap>(load_one(at), a.transform, g.others);
    store_one(at, edge == target.edge ? g.at_target : value);
  }
  if (threadIdx.x == 0) {
    a.logp[n] = result.logp;
    a.lse[n] = result.lse;
  }
}

}  // namespace
}  // namespace pk

using namespace pk;

int32_t pk_cuda_residual(const Rows* rows, const LogitOptions* options, void* stream) {
  Device device;
  const int32_t error = current_device(device);
  if (error) return error;
  if (rows->columns > kMaxColumns || rows->rows > kMaxBlocks) return kInvalidValue;
  const RowArguments a = row_arguments(*rows, *options);
  const int64_t bytes = bytes_of_row(a);
  const bool clusters = device.major == 9 || device.major == 10;
  const RowConfig* config = clusters ? row_config(kClusters, bytes) : row_config(kOneBlock, bytes);
  size_t shared = 0;
  if (config != nullptr) {
    const int64_t vectors = bytes / int64_t(sizeof(uint4));
    const int64_t share = (vectors + config->cluster - 1) / config->cluster;
    shared = kScratchBytes + size_t(share) * sizeof(uint4);
  }
  const bool fits = config != nullptr && shared <= size_t(device.shared_optin);
  const int cluster = fits ? config->cluster : 1;
  const Shape on_chip = {a.rows * cluster, fits ? config->threads : 0, shared, cluster};
  const Shape reread = {a.rows, row_config(kReread, bytes)->threads, kScratchBytes};
  return for_dtype(a, [&](auto type, auto cap) {
    using T = decltype(type);
    constexpr bool kCap = decltype(cap)::value;
    if (fits) {
      const int32_t error = launch(residual_on_chip_kernel<T, kCap>, on_chip, stream, a);
      // A share of a device may have no room for a cluster. Nothing has run then.
      if (error == 0 || cluster == 1) return error;
    }
    return launch(residual_reread_kernel<T, kCap>, reread, stream, a);
  });
}
