// The ranking loss of a batch and its gradient for every token, in one launch.
//
// 4 N bytes read and 4 N written, and 8 S ids of `order` read once more. The first blocks take
// kRange sequences each: they mark the ones that `order` names, and write sums and zero weights of
// the others. Where all are ranked in their own order, the ids at the same places name them all;
// only where they do not is the rest of `order` searched. Then one block a prompt. Inside a prompt,
// `lanes` neighbouring threads share a sequence, a term k or a candidate j; k and n - 1 - k go to
// the same threads, as the pairs (k, i > k) are a triangle. Nothing is handed between blocks,
// nothing is added atomically.
#include "../include/pk_ranking.h"
#include "../include/pk_rows.h"
#include "launch.h"

namespace pk {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxCandidates = 1024;
constexpr int kRange = 4096;  // sequences of a marking block, one byte of shared memory each
constexpr int kLoads = 8;     // loads in flight

struct Batch : RankingBatch {
  int n;  // candidates
  RankingOptions options;
  int64_t marking_blocks;
};

// What a block knows of its prompt, (n,) each.
struct Shared {
  double* scores;
  double* totals;
  double* tops;
  float* inverse;  // 1 / sum of a term, 0 where there is no term
  float* slopes;   // d loss / d score
  float* rewards;

  __device__ __forceinline__ Shared(unsigned char* at, int n) {
    scores = reinterpret_cast<double*>(at);
    totals = scores + n;
    tops = totals + n;
    inverse = reinterpret_cast<float*>(tops + n);
    slopes = inverse + n;
    rewards = slopes + n;
  }
};

constexpr size_t kBytesPerCandidate = 3 * sizeof(double) + 3 * sizeof(float);

// Over `lanes` neighbouring threads of a warp, a power of two; all of them get the result.
template <class Value, class Combine>
__device__ __forceinline__ Value reduce(Value x, int lanes, const Combine& combine) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

template <class Value>
__device__ __forceinline__ Value sum_over(Value x, int lanes) {
  return reduce(x, lanes, [](Value a, Value b) { return a + b; });
}

template <class Value>
__device__ __forceinline__ Value max_over(Value x, int lanes) {
  return reduce(x, lanes, [](Value a, Value b) { return a > b || a != a ? a : b; });
}

// Sum of x[begin:end] by `lanes` threads, in an order that depends on both lengths only.
__device__ __forceinline__ double segment_sum(const float* x, int64_t begin, int64_t end, int lane,
                                              int lanes) {
  double sum = 0.0;
  int64_t i = begin + lane;
  for (; i + (kLoads - 1) * lanes < end; i += kLoads * lanes) {
    float part[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) part[u] = x[i + u * lanes];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) sum += double(part[u]);
  }
  for (; i < end; i += lanes) sum += double(x[i]);
  return sum_over(sum, lanes);
}

__device__ __forceinline__ void fill(float* x, int64_t begin, int64_t end, float value, int lane,
                                     int lanes) {
  for (int64_t i = begin + lane; i < end; i += lanes) x[i] = value;
}

// Marks the sequences first ... first + count that the ids [begin, end) of `order` name.
__device__ void mark_ranked(const Batch& a, int64_t begin, int64_t end, int64_t first, int count,
                            unsigned char* marks) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kLoads * kThreads) {
    int64_t id[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t at = i + u * kThreads;
      id[u] = (at < end ? a.order[at] : -1) - first;
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (id[u] >= 0 && id[u] < count) marks[id[u]] = 1;  // whoever writes, writes the same
    }
  }
  __syncthreads();
}

__device__ void unranked_sequences(const Batch& a) {
  unsigned char* marks = dynamic_shared();
  const int thread = int(threadIdx.x);
  const int64_t first = int64_t(blockIdx.x) * kRange;
  const int64_t left = a.sequences - first;
  const int count = int(left < kRange ? left : kRange);
  unsigned char* missed = marks + count;  // whether the ids nearby leave one out
  for (int i = thread; i <= count; i += kThreads) marks[i] = 0;
  __syncthreads();
  const int64_t ids = a.prompts * a.n;
  mark_ranked(a, first, first + count < ids ? first + count : ids, first, count, marks);
  for (int i = thread; i < count; i += kThreads) {
    if (marks[i] == 0) *missed = 1;
  }
  __syncthreads();
  if (*missed != 0) mark_ranked(a, 0, ids, first, count, marks);
  const int lane = thread % kWarp;
  for (int base = thread - lane; base < count; base += kThreads) {
    const bool missing = base + lane < count && marks[base + lane] == 0;
    unsigned todo = __ballot_sync(kAllLanes, missing);
    for (; todo != 0; todo &= todo - 1) {
      const int64_t s = first + base + __ffs(int(todo)) - 1;
      const int64_t begin = a.offsets[s], end = a.offsets[s + 1];
      const double sum = segment_sum(a.logps, begin, end, lane, kWarp);
      if (lane == 0) a.sums[s] = float(sum);
      fill(a.row_weights, begin, end, 0.0f, lane, kWarp);
    }
  }
  if (blockIdx.x == 0) {  // tokens before the first sequence and after the last
    fill(a.row_weights, 0, a.offsets[0], 0.0f, thread, kThreads);
    fill(a.row_weights, a.offsets[a.sequences], a.tokens, 0.0f, thread, kThreads);
  }
}

// Entry i > k of term k: its inverse temperature; false where it does not take part.
template <bool kRewards>
__device__ __forceinline__ bool entry(const Shared& m, const RankingOptions& o, float reward_k,
                                      int i, float& tau) {
  if (!kRewards) {
    tau = float(o.tau);
    return true;
  }
  tau = reward_k - m.rewards[i];
  return !(o.skip_ties && tau == 0.0f);
}

// z_ki; temperatures from rewards are float, a fixed one is double.
template <bool kRewards>
__device__ __forceinline__ double exponent(double score, float tau, const RankingOptions& o) {
  return score * (kRewards ? double(tau) : o.tau);
}

__device__ __forceinline__ bool is_head(const RankingOptions& o, int k, int count) {
  return k < count - 1 && (o.top_k < 0 || k < o.top_k);
}

// Term k by `lanes` threads (all of them call, whether there is such a term or not).
template <bool kRewards>
__device__ __forceinline__ void rank_term(const Shared& m, const RankingOptions& o, int k,
                                          bool live, int count, int lane, int lanes, float* terms) {
  const float reward_k = kRewards && live ? m.rewards[k] : 0.0f;
  const int last = live ? count : 0;
  const double log_eps = o.eps > 0 ? std::log(o.eps) : minus_infinity<double>();
  float own_tau = kRewards ? minus_infinity<float>() : float(o.tau);
  double top = log_eps;
  for (int i = k + 1 + lane; i < last; i += lanes) {
    float tau;
    const bool competes = entry<kRewards>(m, o, reward_k, i, tau);
    if (kRewards) own_tau = tau > own_tau || tau != tau ? tau : own_tau;
    const double z = exponent<kRewards>(m.scores[i], tau, o);
    if (competes && !(z <= top)) top = z;
  }
  own_tau = max_over(own_tau, lanes);
  const double own_z = live ? exponent<kRewards>(m.scores[k], own_tau, o) : 0.0;
  top = max_over(top, lanes);
  top = finite_top(own_z > top ? own_z : top);
  float others = 0.0f;
  for (int i = k + 1 + lane; i < last; i += lanes) {
    float tau;
    if (!entry<kRewards>(m, o, reward_k, i, tau)) continue;
    others += exp_fast(float(exponent<kRewards>(m.scores[i], tau, o) - top));
  }
  others = sum_over(others, lanes);
  if (!live || lane != 0) return;
  const TermSum t = {top, others + exp_fast(float(log_eps - top)), exp_fast(float(own_z - top))};
  m.tops[k] = t.top;
  m.inverse[k] = 1.0f / (t.others + t.own);
  m.slopes[k] = -own_tau * one_minus_own_p(t);
  terms[k] = term_of(t, own_z);
}

// sum_{k < j} tau_kj p_kj by `lanes` threads.
template <bool kRewards>
__device__ __forceinline__ float pull_of(const Shared& m, const RankingOptions& o, int j, int heads,
                                         int lane, int lanes) {
  float sum = 0.0f;
  for (int k = lane; k < (j < heads ? j : heads); k += lanes) {
    float tau;
    if (!entry<kRewards>(m, o, kRewards ? m.rewards[k] : 0.0f, j, tau)) continue;
    const float e = exp_fast(float(exponent<kRewards>(m.scores[j], tau, o) - m.tops[k]));
    sum += tau * (e * m.inverse[k]);
  }
  return sum_over(sum, lanes);
}

// Threads per item when `items` are to be shared by the block: 8 ... 32.
__device__ __forceinline__ int lanes_for(int items) {
  int lanes = 8;
  while (lanes < kWarp && 2 * lanes * items <= kThreads) lanes *= 2;
  return lanes;
}

// The item of a group of threads in a round: odd rounds run backwards, so that long and short
// terms go together.
__device__ __forceinline__ int item_of(int round, int group, int groups) {
  return round * groups + (round % 2 ? groups - 1 - group : group);
}

template <bool kRewards>
__device__ void rank_prompt(const Batch& a, int64_t prompt) {
  const RankingOptions& o = a.options;
  const int n = a.n, thread = int(threadIdx.x);
  const int lanes = lanes_for(n), lane = thread % lanes;
  const int group = thread / lanes, groups = kThreads / lanes;
  const int64_t* order = a.order + prompt * n;
  float* terms = a.terms + prompt * n;
  const Shared m(dynamic_shared(), n);
  const int rounds = (n + groups - 1) / groups;

  const auto norm = [&](int64_t sequence) {
    const int64_t length = a.lengths[sequence];
    return double(length > 1 ? length : 1);
  };
  int mine = 0;
  for (int i = thread; i < n; i += kThreads) {
    mine += order[i] >= 0;
    if (kRewards) m.rewards[i] = a.rewards[prompt * n + i];
  }
  int* counts = reinterpret_cast<int*>(m.rewards + n);
  mine = sum_over(mine, kWarp);
  if (thread % kWarp == 0) counts[thread / kWarp] = mine;
  for (int round = 0; round < rounds; ++round) {
    const int i = round * groups + group;
    const int64_t s = i < n ? order[i] : -1;
    const int64_t begin = s >= 0 ? a.offsets[s] : 0, end = s >= 0 ? a.offsets[s + 1] : 0;
    const double sum = segment_sum(a.logps, begin, end, lane, lanes);
    if (lane == 0 && i < n) {
      m.totals[i] = sum;
      m.scores[i] = s >= 0 && o.length_normalize ? sum / norm(s) : sum;
      if (s >= 0) a.sums[s] = float(sum);
    }
  }
  __syncthreads();
  int count = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) count += counts[warp];

  for (int round = 0; round < rounds; ++round) {
    const int k = item_of(round, group, groups);
    rank_term<kRewards>(m, o, k, is_head(o, k, count), count, lane, lanes, terms);
  }
  __syncthreads();
  const int heads = o.top_k >= 0 && o.top_k < count - 1 ? int(o.top_k) : count - 1;
  for (int round = 0; round < rounds; ++round) {
    const int j = item_of(round, group, groups);
    const float pull = pull_of<kRewards>(m, o, j < count ? j : 0, heads, lane, lanes);
    const int64_t s = j < count ? order[j] : -1;
    double weight = 0.0;
    if (s >= 0) {
      weight = double(pull + (j < heads ? m.slopes[j] : 0.0f));
      if (o.length_normalize) weight /= norm(s);
      if (j == a.sft_rank[prompt]) {
        const double factor = sft_factor(count, o) / (o.sft_mean ? norm(s) : 1.0);
        if (lane == 0) terms[n - 1] = float(-factor * m.totals[j]);
        weight -= factor;
      }
      weight *= double(a.prompt_weights[prompt]);
      fill(a.row_weights, a.offsets[s], a.offsets[s + 1], float(weight), lane, lanes);
    }
    if (lane == 0 && j >= heads && j < n - 1) terms[j] = 0.0f;
  }
  const int64_t sft = a.sft_rank[prompt];
  if (thread == 0 && !(sft >= 0 && sft < count)) terms[n - 1] = 0.0f;
}

template <bool kRewards>
__global__ void __launch_bounds__(kThreads, 8) ranking_kernel(const Batch a) {
  if (blockIdx.x < a.marking_blocks) {
    unranked_sequences(a);
  } else {
    rank_prompt<kRewards>(a, blockIdx.x - a.marking_blocks);
  }
}

}  // namespace
}  // namespace pk

using namespace pk;

int32_t pk_cuda_ranking(const RankingBatch* batch, const RankingOptions* options, void* stream) {
  if (batch->candidates > kMaxCandidates) return kInvalidValue;
  Batch a = {*batch, int(batch->candidates), *options, (batch->sequences + kRange - 1) / kRange};
  if (a.n == 0) a.prompts = 0;
  if (a.marking_blocks == 0 && a.tokens > 0) a.marking_blocks = 1;  // tokens of no sequence
  const size_t marks = size_t(a.sequences < kRange ? a.sequences : kRange) + 1;
  const size_t prompt = size_t(a.n) * kBytesPerCandidate + kThreads / kWarp * sizeof(int);
  const Shape shape = {a.marking_blocks + a.prompts, kThreads, marks > prompt ? marks : prompt};
  return a.rewards != nullptr ? launch(ranking_kernel<true>, shape, stream, a)
                              : launch(ranking_kernel<false>, shape, stream, a);
}
