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

struct Batch : RankingBatch {
  const RankingOptions& options;
  std::vector<double> exact_sums;        // (S,)
  std::vector<double> sequence_weights;  // (S,): d loss / d S_s

  Batch(const RankingBatch& batch, const RankingOptions& options)
      : RankingBatch(batch),
        options(options),
        exact_sums(size_t(sequences), 0.0),
        sequence_weights(size_t(sequences), 0.0) {}
};

// Room for one prompt's scores, score gradients and scratch, (n,) each.
struct Workspace {
  std::vector<double> values;
  explicit Workspace(int64_t n) : values(size_t(3 * n)) {}
};

void rank_prompt(Batch& batch, int64_t b) {
  const RankingOptions& o = batch.options;
  const int64_t n = batch.candidates;
  const int64_t* order = batch.order + b * n;
  const float* rewards = batch.rewards != nullptr ? batch.rewards + b * n : nullptr;
  float* terms = batch.terms + b * n;
  const double prompt_weight = batch.prompt_weights[b];
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
    scores[i] = batch.exact_sums[size_t(order[i])] / (o.length_normalize ? norm(i) : 1.0);
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
    if (i == batch.sft_rank[b]) {
      const double factor = sft_factor(count, o) / (o.sft_mean ? norm(i) : 1.0);
      terms[n - 1] = float(-factor * batch.exact_sums[size_t(order[i])]);
      weight -= factor;
    }
    batch.sequence_weights[size_t(order[i])] = weight * prompt_weight;
  }
}

}  // namespace
}  // namespace pk

using namespace pk;

void pk_cpu_ranking(const RankingBatch* batch, const RankingOptions* options, int32_t threads) {
  Batch a(*batch, *options);
  const int64_t tokens_each = std::max<int64_t>(1, a.tokens / std::max<int64_t>(1, a.sequences));
  const int64_t chunk = std::max<int64_t>(1, kChunkTokens / tokens_each);
  parallel_for(a.sequences, threads, chunk, [&](int64_t s) {
    const double sum = sum_of(a.logps + a.offsets[s], a.offsets[s + 1] - a.offsets[s]);
    a.exact_sums[size_t(s)] = sum;
    a.sums[s] = float(sum);
  });

  const int64_t pairs = a.rewards != nullptr ? a.candidates * a.candidates : a.candidates;
  const int64_t prompt_chunk = std::max<int64_t>(1, kChunkPairs / std::max<int64_t>(1, pairs));
  parallel_for(a.candidates > 0 ? a.prompts : 0, threads, prompt_chunk,
               [&](int64_t b) { rank_prompt(a, b); });

  // Rows outside every sequence weigh nothing.
  float* weights = a.row_weights;
  std::fill(weights, weights + std::min(a.tokens, a.offsets[0]), 0.0f);
  std::fill(weights + std::max<int64_t>(0, a.offsets[a.sequences]), weights + a.tokens, 0.0f);
  parallel_for(a.sequences, threads, chunk, [&](int64_t s) {
    const float weight = float(a.sequence_weights[size_t(s)]);
    std::fill(weights + a.offsets[s], weights + a.offsets[s + 1], weight);
  });
}
