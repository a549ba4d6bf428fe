// The ranking loss of a batch: segment sums, the loss of each prompt, the weight of each row.
// Arithmetic is double inside; it is a few numbers per sequence.
#include "../include/pk_ranking.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "pro_kernels_cpu.h"

namespace pk {
namespace {

// The least a thread takes at a time.
constexpr int64_t kChunkTokens = 1 << 14;
constexpr int64_t kChunkPairs = 1 << 10;

// Sum in a fixed pattern, eight interleaved partial sums.
double sum_of(const float* x, int64_t count) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += x[i + j];
  }
  for (int j = 0; i + j < count; ++j) part[j] += x[i + j];
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

struct Batch {
  const int64_t* lengths;    // (S,)
  const double* sums;        // (S,)
  double* sequence_weights;  // (S,) out: d loss / d S_s
  RankingOptions options;
};

// Room for one prompt's scores, score gradients and scratch, (n,) each.
struct Workspace {
  std::vector<double> values;
  explicit Workspace(int64_t n) : values(size_t(3 * n)) {}
};

void rank_prompt(const Batch& batch, const int64_t* order, const float* rewards, int64_t n,
                 int64_t sft_rank, double prompt_weight, float* terms) {
  const RankingOptions& o = batch.options;
  Workspace workspace(n);
  double* scores = workspace.values.data();
  double* gradients = scores + n;
  int64_t count = 0;
  const auto norm = [&](int64_t rank) {
    return double(std::max<int64_t>(1, batch.lengths[order[rank]]));
  };
  for (int64_t i = 0; i < n; ++i) {
    if (order[i] < 0) continue;
    ++count;
    scores[i] = batch.sums[order[i]] / (o.length_normalize ? norm(i) : 1.0);
  }
  const Prompt<double> prompt{n, count, order, rewards, scores, terms, gradients};
  if (rewards != nullptr) {
    rank_by_rewards(prompt, o);
  } else {
    rank_by_order(prompt, o, gradients + n);
  }
  terms[n - 1] = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (order[i] < 0) continue;
    double weight = gradients[i] / (o.length_normalize ? norm(i) : 1.0);
    if (i == sft_rank) {
      const double factor = sft_factor(count, o) / (o.sft_mean ? norm(i) : 1.0);
      terms[n - 1] = float(-factor * batch.sums[order[i]]);
      weight -= factor;
    }
    batch.sequence_weights[order[i]] = weight * prompt_weight;
  }
}

}  // namespace
}  // namespace pk

using namespace pk;

void pk_cpu_ranking(const float* logps, int64_t tokens, const int64_t* offsets,
                    const int64_t* lengths, int64_t sequences, const int64_t* order,
                    int64_t prompts, int64_t candidates, const float* rewards,
                    const int64_t* sft_rank, const float* prompt_weights, int32_t length_normalize,
                    double fixed_tau, int32_t skip_ties, double eps, double sft_weight,
                    int32_t sft_mean, int64_t top_k, int32_t single_sft, float* terms, float* sums,
                    float* row_weights, int32_t threads) {
  std::vector<double> exact_sums(size_t(sequences), 0.0);
  std::vector<double> sequence_weights(size_t(sequences), 0.0);
  const int64_t tokens_each = std::max<int64_t>(1, tokens / std::max<int64_t>(1, sequences));
  const int64_t chunk = std::max<int64_t>(1, kChunkTokens / tokens_each);
  parallel_for(sequences, threads, chunk, [&](int64_t s) {
    exact_sums[size_t(s)] = sum_of(logps + offsets[s], offsets[s + 1] - offsets[s]);
    sums[s] = float(exact_sums[size_t(s)]);
  });

  const RankingOptions options{fixed_tau,        eps,       sft_weight, top_k,
                               length_normalize, skip_ties, sft_mean,   single_sft};
  const Batch batch{lengths, exact_sums.data(), sequence_weights.data(), options};
  const int64_t pairs = rewards != nullptr ? candidates * candidates : candidates;
  const int64_t prompt_chunk = std::max<int64_t>(1, kChunkPairs / std::max<int64_t>(1, pairs));
  parallel_for(candidates > 0 ? prompts : 0, threads, prompt_chunk, [&](int64_t b) {
    const int64_t first = b * candidates;
    const float* prompt_rewards = rewards != nullptr ? rewards + first : nullptr;
    rank_prompt(batch, order + first, prompt_rewards, candidates, sft_rank[b], prompt_weights[b],
                terms + first);
  });

  // Rows outside every sequence weigh nothing.
  std::fill(row_weights, row_weights + std::min(tokens, offsets[0]), 0.0f);
  std::fill(row_weights + std::max<int64_t>(0, offsets[sequences]), row_weights + tokens, 0.0f);
  parallel_for(sequences, threads, chunk, [&](int64_t s) {
    const float weight = float(sequence_weights[size_t(s)]);
    std::fill(row_weights + offsets[s], row_weights + offsets[s + 1], weight);
  });
}
