// The PRO ranking loss of one prompt and its closed-form gradient (shared by host and device).
//
// n candidates, best first. Candidate i has score s_i; `valid` marks the ones that exist. With
// inverse temperatures tau_ki and p_ki the softmax entries of term k over i >= k (and log eps):
//
//     term_k     = logsumexp({s_i tau_ki}_{i >= k}, log eps) - s_k tau_kk
//     d L / d s_j = sum_{k < j} tau_kj p_kj - tau_jj (1 - p_jj)
//
// From rewards: tau_ki = r_k - r_i, tau_kk = max_{i > k} tau_ki. O(n^2), no scratch.
// Without:      every tau is that of the options; prefix log-sum-exps make it O(n), n of scratch.
#pragma once

#include "pk_math.h"

namespace pk {

template <class Real>
struct Prompt {
  int64_t n;              // ranks, valid or not
  int64_t count;          // valid candidates
  const int64_t* order;   // (n,) sequence at each rank; negative: no candidate
  const float* rewards;   // (n,) or null
  const Real* scores;     // (n,)
  float* terms;           // (n,) out
  Real* score_gradients;  // (n,) out
};

template <class Real>
PK_HOST_DEVICE bool is_valid(const Prompt<Real>& p, int64_t rank) {
  return p.order[rank] >= 0;
}

// Whether rank k heads a term of the loss: the last candidate has nothing left to beat.
template <class Real>
PK_HOST_DEVICE bool heads_term(const Prompt<Real>& p, int64_t k, const RankingOptions& o) {
  return is_valid(p, k) && k < p.count - 1 && (o.top_k < 0 || k < o.top_k);
}

// tau_ki, in the rewards' own precision, as the official code subtracts them.
template <class Real>
PK_HOST_DEVICE Real reward_gap(const Prompt<Real>& p, int64_t k, int64_t i) {
  return Real(p.rewards[k] - p.rewards[i]);
}

// tau_kk: the largest gap below k; 0 when nobody is below.
template <class Real>
PK_HOST_DEVICE Real own_temperature(const Prompt<Real>& p, int64_t k) {
  Real own = minus_infinity<Real>();
  for (int64_t i = k + 1; i < p.n; ++i) {
    if (is_valid(p, i) && !(reward_gap(p, k, i) <= own)) own = reward_gap(p, k, i);
  }
  return own == minus_infinity<Real>() ? Real(0) : own;
}

// Whether candidate i > k is an entry of term k.
template <class Real>
PK_HOST_DEVICE bool competes(const Prompt<Real>& p, int64_t k, int64_t i, const RankingOptions& o) {
  return is_valid(p, i) && !(o.skip_ties && reward_gap(p, k, i) == Real(0));
}

template <class Real>
PK_HOST_DEVICE void rank_by_rewards(const Prompt<Real>& p, const RankingOptions& o) {
  for (int64_t k = 0; k < p.n; ++k) {
    p.terms[k] = 0;
    p.score_gradients[k] = 0;
  }
  for (int64_t k = 0; k < p.n; ++k) {
    if (!heads_term(p, k, o)) continue;
    const Real own = own_temperature(p, k);
    ExpSum<Real> sum = empty_exp_sum<Real>();
    merge_entry(sum, p.scores[k] * own);
    for (int64_t i = k + 1; i < p.n; ++i) {
      if (competes(p, k, i, o)) merge_entry(sum, p.scores[i] * reward_gap(p, k, i));
    }
    if (o.eps > 0) merge_entry(sum, std::log(Real(o.eps)));
    const Real log_z = log_of(sum);
    p.terms[k] = float(log_z - p.scores[k] * own);
    p.score_gradients[k] -= own * one_minus_p(p.scores[k] * own - log_z);
    for (int64_t i = k + 1; i < p.n; ++i) {
      if (!competes(p, k, i, o)) continue;
      const Real tau = reward_gap(p, k, i);
      p.score_gradients[i] += tau * std::exp(p.scores[i] * tau - log_z);
    }
  }
}

// `log_z`: (n,) scratch.
template <class Real>
PK_HOST_DEVICE void rank_by_order(const Prompt<Real>& p, const RankingOptions& o, Real* log_z) {
  const Real tau = Real(o.tau);
  ExpSum<Real> below = empty_exp_sum<Real>();
  for (int64_t k = p.n - 1; k >= 0; --k) {
    if (is_valid(p, k)) merge_entry(below, tau * p.scores[k]);
    ExpSum<Real> all = below;
    if (o.eps > 0) merge_entry(all, std::log(Real(o.eps)));
    log_z[k] = log_of(all);
  }
  // sum_{k < j} p_kj = exp(tau s_j + logsumexp_{k < j} -log_z_k)
  ExpSum<Real> above = empty_exp_sum<Real>();
  for (int64_t j = 0; j < p.n; ++j) {
    p.terms[j] = 0;
    p.score_gradients[j] = 0;
    if (!is_valid(p, j)) continue;
    const Real z = tau * p.scores[j];
    p.score_gradients[j] = tau * std::exp(z + log_of(above));
    if (!heads_term(p, j, o)) continue;
    p.terms[j] = float(log_z[j] - z);
    p.score_gradients[j] -= tau * one_minus_p(z - log_z[j]);
    merge_entry(above, -log_z[j]);
  }
}

// The factor of the SFT term: w (n - 1)^2, or w for a lone candidate when asked.
PK_HOST_DEVICE double sft_factor(int64_t count, const RankingOptions& o) {
  if (o.single_sft && count == 1) return o.sft_weight;
  return o.sft_weight * double(count - 1) * double(count - 1);
}

// The softmax of term k as the parallel form has it (csrc/cuda/ranking.cu): exponents are double,
// exponentials of their distance from the largest are float.
struct TermSum {
  double top;    // largest exponent, finite
  float others;  // sum of e^{z - top} over all entries but k's own, log eps among them
  float own;     // e^{z_kk - top}
};

constexpr double kDoubleMax = 1.7976931348623157e308;

// 0 where there is no entry, or only a score of -inf. A score of -inf at a negative temperature is
// an exponent of +inf: the distance of every other one from the largest double is -inf as well.
PK_HOST_DEVICE double finite_top(double top) {
  if (top == minus_infinity<double>()) return 0.0;
  return top > kDoubleMax ? kDoubleMax : top;
}

PK_HOST_DEVICE float term_of(const TermSum& t, double own_z) {
  return float((t.top - own_z) + double(std::log(t.others + t.own)));
}

// 1 - p_kk without cancellation where p_kk is close to 1; 1 where another entry takes everything.
PK_HOST_DEVICE float one_minus_own_p(const TermSum& t) {
  if (t.own == 0.0f && t.others > 0.0f) return 1.0f;
  return t.others / (t.others + t.own);
}

}  // namespace pk
