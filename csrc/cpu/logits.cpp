// The functions on rows of logits: threads, masks and the target's entry around the row kernels.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "pro_kernels_cpu.h"

namespace pk {
namespace {

constexpr int64_t kChunkElements = 1 << 15;  // a thread takes at least this much at a time

struct Logits {
  DType dtype;
  char* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;

  int64_t item() const { return dtype == kFloat32 ? 4 : 2; }
  char* row(int64_t i) const { return data + i * stride * item(); }
  int64_t rows_at_a_time() const {
    return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, columns));
  }
};

float read(const Logits& x, int64_t i, int64_t column) {
  float value;
  with_type(x.row(i), x.dtype, [&](auto* row) { value = to_float(row[column]); });
  return value;
}

void write(const Logits& x, int64_t i, int64_t column, double value) {
  with_type(x.row(i), x.dtype, [&](auto* row) { from_float(float(value), row[column]); });
}

bool any_nan(const Logits& x, int64_t i) {
  for (int64_t v = 0; v < x.columns; ++v) {
    if (std::isnan(read(x, i, v))) return true;
  }
  return false;
}

// The factor of a row gradient. A NaN becomes the plain one: bf16 stores round by addition, and
// other NaNs could carry into the sign.
float as_factor(double x) {
  return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : float(x);
}

// What a function on rows works on, as the rows need it.
struct Call : Rows {
  Logits x;
  Transform transform;

  Call(const Rows& rows, const LogitOptions& options)
      : Rows(rows), x(matrix(logits, stride)), transform(transform_of(options)) {}

  Logits matrix(void* data, int64_t row_stride) const {
    return {DType(dtype), static_cast<char*>(data), rows, columns, row_stride};
  }
  bool scored(int64_t i) const { return targets[i] >= 0; }
  Target target(int64_t i) const {
    const bool exact = target_logits != nullptr;
    return {targets[i] - first_column, exact, exact ? target_logits[i] : 0.0f};
  }
};

double transform(double raw, const Transform& t, double& slope) {
  return pk::transform<Scalar<double>>(raw, t, t.cap > 0, slope);
}

struct Finished {
  double logp;
  double lse;
  double entropy;
};

// Relative to the maximum for as long as possible: lse itself may be large, logp is then not.
Finished finish(const RowStats& s, const Logits& x, int64_t i) {
  if (std::isinf(s.sum.max)) {  // all columns -inf, or one +inf
    const bool nan = s.sum.max > 0 ? any_nan(x, i) : std::isnan(s.sum.sum);
    const double lse = nan ? std::numeric_limits<double>::quiet_NaN() : s.sum.max;
    return {s.target - lse, lse, lse};
  }
  const double log_sum = std::log(s.sum.sum);
  const double logp = (s.target - s.sum.max) - log_sum;
  // Neither passes 0, which fp32 sums may do by a rounding.
  const double entropy = log_sum - s.sum.dot / s.sum.sum;
  return {logp > 0 ? 0 : logp, s.sum.max + log_sum, entropy < 0 ? 0 : entropy};
}

// What is known of a row, with its log-probability and lse written.
Finished finish_row(const Call& c, int64_t i, const RowStats& s) {
  const Finished f = finish(s, c.x, i);
  c.logp[i] = float(f.logp);
  c.lse[i] = float(f.lse);
  return f;
}

void stats_row(const Call& c, int64_t i) {
  const RowKernels& kernels = active_isa().kernels[c.dtype];
  const bool with_entropy = c.entropy != nullptr;
  const Finished f = finish_row(
      c, i, kernels.stats(c.x.row(i), c.columns, c.target(i), c.transform, with_entropy));
  if (with_entropy) c.entropy[i] = float(f.entropy);
}

void residual_row(const Call& c, int64_t i) {
  const Logits& x = c.x;
  const Target target = c.target(i);
  const RowKernels& kernels = active_isa().kernels[c.dtype];
  const RowStats s = kernels.stats(x.row(i), c.columns, target, c.transform, false);
  const Finished f = finish_row(c, i, s);
  const bool inside = target.column < c.columns;
  const double raw = target.exact ? target.raw : inside ? read(x, i, target.column) : 0.0f;
  const bool usual = std::isfinite(f.lse);
  const float shift = usual ? float(s.sum.max) : as_factor(f.lse);
  const float factor = usual ? as_factor(-1.0 / s.sum.sum) : -1.0f;
  kernels.gradient(x.row(i), x.row(i), c.columns, shift, factor, c.transform);
  if (!inside) return;
  double slope;
  transform(raw, c.transform, slope);
  write(x, i, target.column, one_minus_p(f.logp) * slope);
}

// e^log_p * x, 0 where the probability is, whatever x.
double p_times(double log_p, double x) {
  const double p = std::exp(log_p);
  return p == 0 ? 0 : p * x;
}

void gradient_row(const Call& c, const Logits& out, int64_t i) {
  const Target target = c.target(i);
  const bool hit = target.column >= 0 && target.column < c.columns;
  const double raw = !hit ? 0.0f : target.exact ? target.raw : read(c.x, i, target.column);
  const RowKernels& kernels = active_isa().kernels[c.dtype];
  const double weight = c.weights != nullptr ? c.weights[i] : 1.0;
  const bool tilted = c.entropy != nullptr;
  const double entropy = tilted ? c.entropy[i] : 0,
               entropy_weight = tilted ? c.entropy_weights[i] : 0;
  const float lse = c.lse[i];
  if (tilted) {
    const double factor = -(weight + entropy_weight * entropy);
    kernels.tilted_gradient(c.x.row(i), out.row(i), c.columns, as_factor(lse), as_factor(factor),
                            as_factor(-entropy_weight), c.transform);
  } else {
    kernels.gradient(c.x.row(i), out.row(i), c.columns, as_factor(lse), as_factor(-weight),
                     c.transform);
  }
  if (!hit) return;
  double slope;
  const double log_p = transform(raw, c.transform, slope) - lse;
  double value = one_minus_p(log_p) * weight;
  if (tilted) value -= entropy_weight * p_times(log_p, log_p + entropy);
  write(out, i, target.column, value * slope);
}

void zero_row(const Logits& x, int64_t i) {
  std::fill(x.row(i), x.row(i) + x.columns * x.item(), char(0));
}

}  // namespace
}  // namespace pk

using namespace pk;

void pk_cpu_logp(const Rows* rows, const LogitOptions* options, int32_t threads) {
  const Call c(*rows, *options);
  parallel_for(c.rows, threads, c.x.rows_at_a_time(), [&](int64_t i) {
    if (c.scored(i)) {
      stats_row(c, i);
    } else {
      c.logp[i] = c.lse[i] = 0;
      if (c.entropy != nullptr) c.entropy[i] = 0;
    }
  });
}

void pk_cpu_residual(const Rows* rows, const LogitOptions* options, int32_t threads) {
  const Call c(*rows, *options);
  parallel_for(c.rows, threads, c.x.rows_at_a_time(), [&](int64_t i) {
    if (c.scored(i)) return residual_row(c, i);
    c.logp[i] = c.lse[i] = 0;
    zero_row(c.x, i);
  });
}

void pk_cpu_logits_grad(const Rows* rows, const LogitOptions* options, int32_t threads) {
  const Call c(*rows, *options);
  const Logits out = c.matrix(c.out, c.out_stride);
  parallel_for(c.rows, threads, c.x.rows_at_a_time(), [&](int64_t i) {
    if (c.scored(i)) return gradient_row(c, out, i);
    zero_row(out, i);
  });
}
