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
  int64_t row_stride;

  int64_t item() const { return dtype == kFloat32 ? 4 : 2; }
  char* row(int64_t i) const { return data + i * row_stride * item(); }
  int64_t rows_at_a_time() const {
    return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, columns));
  }
};

float read(const Logits& x, int64_t i, int64_t column) {
  const void* row = x.row(i);
  if (x.dtype == kFloat32) return static_cast<const float*>(row)[column];
  if (x.dtype == kBFloat16) return to_float(static_cast<const BFloat16*>(row)[column]);
  return to_float(static_cast<const Half*>(row)[column]);
}

void write(const Logits& x, int64_t i, int64_t column, double value) {
  void* row = x.row(i);
  if (x.dtype == kFloat32) return from_float(float(value), static_cast<float*>(row)[column]);
  if (x.dtype == kBFloat16) return from_float(float(value), static_cast<BFloat16*>(row)[column]);
  from_float(float(value), static_cast<Half*>(row)[column]);
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

Target target_of(int64_t column, const float* exact, int64_t i) {
  return {column, exact != nullptr, exact != nullptr ? exact[i] : 0.0f};
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
  return {logp > 0 ? 0 : logp, s.sum.max + log_sum, log_sum - s.sum.dot / s.sum.sum};
}

void stats_row(const Logits& x, int64_t i, const Target& target, const Transform& t, float* logp,
               float* lse, float* entropy) {
  const RowKernels& kernels = active_isa().kernels[x.dtype];
  const RowStats s = kernels.stats(x.row(i), x.columns, target, t, entropy != nullptr);
  const Finished f = finish(s, x, i);
  logp[i] = float(f.logp);
  lse[i] = float(f.lse);
  if (entropy != nullptr) entropy[i] = float(f.entropy);
}

void residual_row(const Logits& x, int64_t i, const Target& target, const Transform& t, float* logp,
                  float* lse) {
  const RowKernels& kernels = active_isa().kernels[x.dtype];
  const RowStats s = kernels.stats(x.row(i), x.columns, target, t, false);
  const Finished f = finish(s, x, i);
  logp[i] = float(f.logp);
  lse[i] = float(f.lse);
  const bool inside = target.column < x.columns;
  const double raw = target.exact ? target.raw : inside ? read(x, i, target.column) : 0.0f;
  const bool usual = std::isfinite(f.lse);
  const float shift = usual ? float(s.sum.max) : as_factor(f.lse);
  const float factor = usual ? as_factor(-1.0 / s.sum.sum) : -1.0f;
  kernels.gradient(x.row(i), x.row(i), x.columns, shift, factor, t);
  if (inside) write(x, i, target.column, one_minus_p(f.logp) * slope(raw, t));
}

struct Entropy {
  bool given;
  double value;
  double weight;
};

// e^log_p * x, 0 where the probability is, whatever x.
double p_times(double log_p, double x) {
  const double p = std::exp(log_p);
  return p == 0 ? 0 : p * x;
}

void gradient_row(const Logits& x, const Logits& out, int64_t i, float lse, double weight,
                  const Entropy& entropy, const Target& target, const Transform& t) {
  const bool hit = target.column >= 0 && target.column < x.columns;
  const double raw = !hit ? 0.0f : target.exact ? target.raw : read(x, i, target.column);
  const RowKernels& kernels = active_isa().kernels[x.dtype];
  if (entropy.given) {
    const double factor = -(weight + entropy.weight * entropy.value);
    kernels.tilted_gradient(x.row(i), out.row(i), x.columns, as_factor(lse), as_factor(factor),
                            as_factor(-entropy.weight), t);
  } else {
    kernels.gradient(x.row(i), out.row(i), x.columns, as_factor(lse), as_factor(-weight), t);
  }
  if (!hit) return;
  const double log_p = transform(raw, t) - lse;
  double value = one_minus_p(log_p) * weight;
  if (entropy.given) value -= entropy.weight * p_times(log_p, log_p + entropy.value);
  write(out, i, target.column, value * slope(raw, t));
}

void zero_row(const Logits& x, int64_t i) {
  std::fill(x.row(i), x.row(i) + x.columns * x.item(), char(0));
}

}  // namespace
}  // namespace pk

using namespace pk;

int pk_cpu_abi(void) {
  return PK_CPU_ABI;
}

void pk_cpu_logp(int32_t dtype, const void* logits, int64_t rows, int64_t columns,
                 int64_t row_stride, const int64_t* targets, const float* target_logits,
                 float logit_scale, float softcap, float* logp, float* lse, float* entropy,
                 int32_t threads) {
  // Only read: nothing writes through the pointer.
  char* data = const_cast<char*>(static_cast<const char*>(logits));
  const Logits x{DType(dtype), data, rows, columns, row_stride};
  const Transform t{logit_scale, softcap};
  parallel_for(rows, threads, x.rows_at_a_time(), [&](int64_t i) {
    if (targets[i] < 0) {
      logp[i] = lse[i] = 0;
      if (entropy != nullptr) entropy[i] = 0;
      return;
    }
    stats_row(x, i, target_of(targets[i], target_logits, i), t, logp, lse, entropy);
  });
}

void pk_cpu_residual(int32_t dtype, void* logits, int64_t rows, int64_t columns, int64_t row_stride,
                     const int64_t* targets, const float* target_logits, float logit_scale,
                     float softcap, float* logp, float* lse, int32_t threads) {
  const Logits x{DType(dtype), static_cast<char*>(logits), rows, columns, row_stride};
  const Transform t{logit_scale, softcap};
  parallel_for(rows, threads, x.rows_at_a_time(), [&](int64_t i) {
    if (targets[i] < 0) {
      logp[i] = lse[i] = 0;
      return zero_row(x, i);
    }
    residual_row(x, i, target_of(targets[i], target_logits, i), t, logp, lse);
  });
}

void pk_cpu_logits_grad(int32_t dtype, const void* logits, int64_t rows, int64_t columns,
                        int64_t row_stride, const float* lse, const int64_t* targets,
                        const float* weights, const float* target_logits, const float* entropy,
                        const float* entropy_weights, int64_t first_column, float logit_scale,
                        float softcap, void* out, int64_t out_row_stride, int32_t threads) {
  char* data = const_cast<char*>(static_cast<const char*>(logits));
  const Logits x{DType(dtype), data, rows, columns, row_stride};
  const Logits y{DType(dtype), static_cast<char*>(out), rows, columns, out_row_stride};
  const Transform t{logit_scale, softcap};
  parallel_for(rows, threads, x.rows_at_a_time(), [&](int64_t i) {
    if (targets[i] < 0) return zero_row(y, i);
    const Target target = target_of(targets[i] - first_column, target_logits, i);
    const double weight = weights != nullptr ? weights[i] : 1.0;
    Entropy h = {entropy != nullptr, 0, 0};
    if (h.given) h = {true, entropy[i], entropy_weights[i]};
    gradient_row(x, y, i, lse[i], weight, h, target, t);
  });
}
