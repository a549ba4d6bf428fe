// Statistics and gradient of one row of logits in fp32, as the CUDA kernels take them: running
// maxima and sums per lane, merged in a tree (shared by device code and tests).
//
// With z the logits after scale and softcap, M = max z and s = sum e^{z - M}:
//     logp = (z_t - M) - log s      lse = M + log s      entropy = log s - sum e^{z - M} (z - M) /
//     s
// Every maximum stays inside the finite range, so (-inf) - (-inf) never occurs: a row of -inf has
// lse = -inf, a +inf gives lse = +inf, NaN reaches the sum.
#pragma once

#include "pk_math.h"

namespace pk {

constexpr float kFloatMax = 3.4028234663852886e38f;
constexpr float kLog2E = 1.4426950408889634f;

// 2^x, 0 below 2^-126: keeping those costs three more instructions.
PK_HOST_DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

PK_HOST_DEVICE float exp_fast(float x) {
  return exp2_fast(x * kLog2E);
}

// x / y for y in the middle of the range.
PK_HOST_DEVICE float divide_fast(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

struct Fast {
  using Number = float;

  PK_HOST_DEVICE float set(float x) { return x; }
  PK_HOST_DEVICE float mul(float a, float b) { return a * b; }
  PK_HOST_DEVICE float fma(float a, float b, float c) { return a * b + c; }
  PK_HOST_DEVICE float over_cap(float raw, float, const Transform& t) {
    return raw * (t.scale / t.cap);
  }

  // From one exponential of a negative number.
  PK_HOST_DEVICE Tanh<Fast> tanh(float x, float factor) {
    const float size = std::fabs(x);
    const float e = exp_fast(-2.0f * size);
    const float inverse = divide_fast(1.0f, 1.0f + e);
    const float far = (1.0f - e) * inverse;
    // 1 - e cancels near 0: there an odd polynomial, relative error below 2^-22.
    const float square = x * x;
    const float near = x * (square * tanh_series<Fast>(square) + 1.0f);
    const float slope = 4.0f * e * inverse * inverse;
    return {size < 0.625f ? near : std::copysign(far, x), factor * slope};
  }
};

template <bool kCap>
PK_HOST_DEVICE float transform_fast(float raw, const Transform& t, float& slope) {
  return transform<Fast>(raw, t, kCap, slope);
}

struct RowSum {
  float max;
  float sum;
  float dot;  // sum e^{z - max} (z - max)
};

PK_HOST_DEVICE RowSum empty_row_sum() {
  return {-kFloatMax, 0.0f, 0.0f};
}

template <bool kDot>
PK_HOST_DEVICE void raise_max(RowSum& s, float max) {
  // Bounded so that 0 * shift stays 0 where nothing finite was seen yet: exp(-1e4) is 0.
  const float shift = std::fmax(s.max - max, -1e4f);
  const float scale = exp_fast(shift);
  if (kDot) s.dot = (s.dot + s.sum * shift) * scale;
  s.sum *= scale;
  s.max = max;
}

// Adds kCount entries; one more exponential for all of them.
template <bool kDot, int kCount>
PK_HOST_DEVICE void add_entries(RowSum& s, const float (&z)[kCount]) {
  float max = s.max;
#pragma unroll
  for (int j = 0; j < kCount; ++j) max = std::fmax(max, z[j]);
  raise_max<kDot>(s, std::fmin(max, kFloatMax));
  float sum[kCount];
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float below = z[j] - s.max;
    sum[j] = exp_fast(below);
    if (kDot) dot += sum[j] * std::fmax(below, -1e4f);
  }
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
  }
  s.sum += sum[0];
  if (kDot) s.dot += dot;
}

template <bool kDot>
PK_HOST_DEVICE void merge(RowSum& s, RowSum other) {
  const float max = std::fmax(s.max, other.max);
  raise_max<kDot>(s, max);
  raise_max<kDot>(other, max);
  s.sum += other.sum;
  if (kDot) s.dot += other.dot;
}

struct RowResult {
  float logp;
  float lse;
  float entropy;
};

PK_HOST_DEVICE RowResult row_result(const RowSum& s, float target_z) {
  const float log_sum = std::log(s.sum);
  const float logp = (target_z - s.max) - log_sum;
  // A row of -inf, or with a +inf in it, has the entropy -inf, or inf, of the PyTorch backend.
  const float mean = s.sum > 0.0f && s.sum <= kFloatMax ? s.dot / s.sum : 0.0f;
  return {logp > 0.0f ? 0.0f : logp, s.max + log_sum, log_sum - mean};  // NaN stays NaN
}

// d logp / d raw of a column that is not the target, times a weight: factor e^{z - reference}.
// Either reference = lse and factor = -weight, or reference = M and factor = -weight / s. An
// entropy makes the factor linear in z (kTilt): then reference = lse, factor = -(weight +
// entropy_weight * entropy), tilt = -entropy_weight.
struct RowGradient {
  float reference;
  float factor;
  float tilt;
};

template <bool kCap, bool kTilt = false>
PK_HOST_DEVICE float gradient_of(float raw, const Transform& t, const RowGradient& g) {
  float slope;
  const float below = transform_fast<kCap>(raw, t, slope) - g.reference;
  float factor = g.factor;
  if (kTilt) factor += g.tilt * std::fmax(below, -1e4f);  // finite: -inf columns are 0 * finite
  return exp_fast(below) * factor * slope;
}

}  // namespace pk
