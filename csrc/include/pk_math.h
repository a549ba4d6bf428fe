// Scalar maths that the CPU and the CUDA backend share. Header only; no allocation, no library
// beyond <cmath>.
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define PK_HOST_DEVICE __host__ __device__ __forceinline__
#else
// `static`: every translation unit keeps its own copy. CPU units are compiled for different
// instruction sets, and the linker must never give the generic one a copy with AVX-512 in it.
#define PK_HOST_DEVICE static inline
#endif

namespace pk {

// Below this a double (and a float) is -inf; spelled so that device code needs no <limits>.
template <class Real>
PK_HOST_DEVICE Real minus_infinity() {
  return -Real(HUGE_VAL);
}

// What exponents are taken relative to. With no finite maximum yet, 0: -inf - -inf would be NaN.
template <class Real>
PK_HOST_DEVICE Real exp_shift(Real max) {
  return std::isfinite(max) ? max : Real(0);
}

// A sum of exponentials relative to its maximum: sum_v e^{z_v} = e^{max} * sum. `dot` carries
// sum_v e^{z_v - max} (z_v - max), from which the entropy is log(sum) - dot / sum.
template <class Real>
struct ExpSum {
  Real max;
  Real sum;
  Real dot;
};

template <class Real>
PK_HOST_DEVICE ExpSum<Real> empty_exp_sum() {
  return {minus_infinity<Real>(), Real(0), Real(0)};
}

// The same sum relative to a maximum that is not smaller.
template <class Real>
PK_HOST_DEVICE void raise_max(ExpSum<Real>& s, Real max) {
  const Real down = exp_shift(s.max) - exp_shift(max);
  if (s.sum != Real(0)) {  // an empty sum has no scale, and 0 * inf is NaN
    const Real scale = std::exp(down);
    s.dot = scale * (s.dot + down * s.sum);
    s.sum *= scale;
  }
  s.max = max;
}

// Adds one entry, or another sum, to `s`.
template <class Real>
PK_HOST_DEVICE void merge(ExpSum<Real>& s, ExpSum<Real> other) {
  if (other.max > s.max) raise_max(s, other.max);
  if (other.max < s.max) raise_max(other, s.max);
  s.sum += other.sum;
  s.dot += other.dot;
}

template <class Real>
PK_HOST_DEVICE void merge_entry(ExpSum<Real>& s, Real z) {
  if (z > s.max) raise_max(s, z);
  s.sum += std::exp(z - exp_shift(s.max));
}

template <class Real>
PK_HOST_DEVICE Real log_of(const ExpSum<Real>& s) {
  return exp_shift(s.max) + std::log(s.sum);
}

// What the model does to raw logits before the softmax:
//     z = cap * tanh(scale * raw / cap),  or scale * raw where cap is 0 (no softcap).
struct Transform {
  float scale;
  float cap;
};

template <class Real>
PK_HOST_DEVICE Real transform(Real raw, const Transform& t) {
  const Real z = raw * Real(t.scale);
  return t.cap > 0 ? Real(t.cap) * std::tanh(z / Real(t.cap)) : z;
}

// d z / d raw. sech^2 through e^{-2|x|}: no cancellation where tanh is close to 1.
template <class Real>
PK_HOST_DEVICE Real slope(Real raw, const Transform& t) {
  if (!(t.cap > 0)) return Real(t.scale);
  const Real e = std::exp(Real(-2) * std::fabs(raw * Real(t.scale) / Real(t.cap)));
  return Real(t.scale) * Real(4) * e / ((Real(1) + e) * (Real(1) + e));
}

// 1 - p from log p, exact where p is close to 1; log p is never above 0 (NaN stays NaN).
template <class Real>
PK_HOST_DEVICE Real one_minus_p(Real log_p) {
  return -std::expm1(log_p > Real(0) ? Real(0) : log_p);
}

}  // namespace pk
