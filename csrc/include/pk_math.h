// Scalar maths that the CPU and the CUDA backend share. Header only; no allocation, no library
// beyond <cmath>.
#pragma once

#include <cmath>

#include "pk_abi.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define PK_HOST_DEVICE static __host__ __device__ __forceinline__
#define PK_ALWAYS_INLINE PK_HOST_DEVICE
#else
// `static`: every translation unit keeps its own copy. CPU units are compiled for different
// instruction sets, and the linker must never give the generic one a copy with AVX-512 in it.
#define PK_HOST_DEVICE static inline
#define PK_ALWAYS_INLINE static inline __attribute__((always_inline))
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

// What the model does to raw logits before the softmax; a cap of 0 is none.
struct Transform {
  float scale;
  float cap;
};

PK_HOST_DEVICE Transform transform_of(const LogitOptions& o) {
  return {float(o.logit_scale), float(o.softcap)};
}

template <class A>
struct Tanh {
  typename A::Number value;
  typename A::Number slope;
};

// z, and its slope dz / draw. With x = scale raw / cap: z = cap tanh(x), dz / draw = scale
// tanh'(x).
//
// `A` is a kind of arithmetic: Number, set, mul, over_cap (x from raw, or from scale raw) and tanh,
// which multiplies its slope by a factor. There are three: Scalar, Fast (pk_rows.h) and Vector
// (cpu/vec_math.h).
template <class A>
PK_ALWAYS_INLINE typename A::Number transform(typename A::Number raw, const Transform& t,
                                              bool capped, typename A::Number& slope) {
  slope = A::set(t.scale);
  const typename A::Number z = A::mul(raw, slope);
  if (!capped) return z;
  const Tanh<A> tanh = A::tanh(A::over_cap(raw, z, t), slope);
  slope = tanh.slope;
  return A::mul(A::set(t.cap), tanh.value);
}

// By the maths library. sech^2 through e^{-2|x|}: no cancellation where tanh is close to 1.
template <class Real>
struct Scalar {
  using Number = Real;

  PK_HOST_DEVICE Real set(float x) { return Real(x); }
  PK_HOST_DEVICE Real mul(Real a, Real b) { return a * b; }
  PK_HOST_DEVICE Real over_cap(Real, Real scaled, const Transform& t) {
    return scaled / Real(t.cap);
  }
  PK_HOST_DEVICE Tanh<Scalar> tanh(Real x, Real factor) {
    const Real e = std::exp(Real(-2) * std::fabs(x));
    return {std::tanh(x), factor * Real(4) * e / ((Real(1) + e) * (Real(1) + e))};
  }
};

// (tanh(x) - x) / x^3 from x^2, for |x| < 0.625 (Cephes, tanhf).
template <class A>
PK_HOST_DEVICE typename A::Number tanh_series(typename A::Number square) {
  typename A::Number p = A::set(-5.70498872745e-3f);
  p = A::fma(p, square, A::set(2.06390887954e-2f));
  p = A::fma(p, square, A::set(-5.37397155531e-2f));
  p = A::fma(p, square, A::set(1.33314422036e-1f));
  return A::fma(p, square, A::set(-3.33332819422e-1f));
}

// 1 - p from log p, exact where p is close to 1; log p is never above 0 (NaN stays NaN).
template <class Real>
PK_HOST_DEVICE Real one_minus_p(Real log_p) {
  return -std::expm1(log_p > Real(0) ? Real(0) : log_p);
}

}  // namespace pk
