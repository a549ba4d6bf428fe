// Test only: the emulated device, and the shared maths one number at a time.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/include/pk_ranking.h"
#include "../../csrc/include/pk_rows.h"

// The major compute capability, whether threads and blocks run in descending order, and the largest
// cluster there is room for.
PK_EXPORT void pk_emulation_set(int32_t major, int32_t backward, int32_t max_cluster) {
  pk_emulation::machine.major = major;
  pk_emulation::machine.max_cluster = max_cluster;
  pk_emulation::machine.backward = backward != 0;
}

// max, sum, dot and log of the sum of exponentials of z, merged from parts of `part` entries.
PK_EXPORT void pk_test_exp_sum(const double* z, int64_t n, int64_t part, double* out) {
  pk::ExpSum<double> all = pk::empty_exp_sum<double>();
  for (int64_t i = 0; i < n; i += part) {
    pk::ExpSum<double> some = pk::empty_exp_sum<double>();
    for (int64_t j = i; j < n && j < i + part; ++j) {
      pk::merge(some, pk::ExpSum<double>{z[j], z[j] > -HUGE_VAL ? 1.0 : 0.0, 0.0});
    }
    pk::merge(all, some);
  }
  out[0] = all.max;
  out[1] = all.sum;
  out[2] = all.dot;
  out[3] = pk::log_of(all);
}

// The same as the CUDA kernels take it; out: logp of `target_z`, lse, entropy.
PK_EXPORT void pk_test_row_sum(const float* z, int64_t n, int64_t part, float target_z,
                               float* out) {
  pk::RowSum all = pk::empty_row_sum();
  for (int64_t i = 0; i < n; i += part) {
    pk::RowSum some = pk::empty_row_sum();
    for (int64_t j = i; j < n && j < i + part; j += 4) {
      float four[4];
      for (int u = 0; u < 4; ++u) four[u] = j + u < n && j + u < i + part ? z[j + u] : -HUGE_VALF;
      pk::add_entries<true>(some, four);
    }
    pk::merge<true>(all, some);
  }
  const pk::RowResult result = pk::row_result(all, target_z);
  out[0] = result.logp;
  out[1] = result.lse;
  out[2] = result.entropy;
}

// z and dz / draw of n raw logits: in double, and as the CUDA kernels take them.
PK_EXPORT void pk_test_transform(const double* raw, int64_t n, float scale, float cap, double* z,
                                 double* slope, float* fast_z, float* fast_slope) {
  const pk::Transform t = {scale, cap};
  for (int64_t i = 0; i < n; ++i) {
    z[i] = pk::transform<pk::Scalar<double>>(raw[i], t, cap > 0, slope[i]);
    fast_z[i] = pk::transform<pk::Fast>(float(raw[i]), t, cap > 0, fast_slope[i]);
  }
}

PK_EXPORT void pk_test_one_minus_p(const double* log_p, int64_t n, double* out, float* single) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = pk::one_minus_p(log_p[i]);
    single[i] = pk::one_minus_p(float(log_p[i]));
  }
}

// One prompt of n candidates, all valid; rewards null: by order.
PK_EXPORT void pk_test_rank(int64_t n, const double* scores, const float* rewards,
                            const pk::RankingOptions* options, float* terms, double* gradients) {
  std::vector<int64_t> order(size_t(n), 0);
  std::vector<double> scratch(size_t(n), 0.0);
  const pk::Prompt<double> prompt = {n, n, order.data(), rewards, scores, terms, gradients};
  if (rewards != nullptr) {
    pk::rank_by_rewards(prompt, *options);
  } else {
    pk::rank_by_order(prompt, *options, scratch.data());
  }
}

PK_EXPORT double pk_test_sft_factor(int64_t count, const pk::RankingOptions* options) {
  return pk::sft_factor(count, *options);
}

// What the CUDA kernel makes of the softmax of a term.
PK_EXPORT void pk_test_term(double top, float others, float own, double own_z, float* out) {
  const pk::TermSum t = {pk::finite_top(top), others, own};
  out[0] = pk::term_of(t, own_z);
  out[1] = pk::one_minus_own_p(t);
}
