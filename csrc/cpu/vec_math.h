// exp and tanh on vectors of fp32, from the operations of one instruction set `I` (vec_*.h).
#pragma once

#include <cmath>

#include "../include/pk_math.h"

namespace pk {
namespace {  // why: rows.h

// 2^f = 1 + c1 f + c2 f^2 + ...: minimax in relative error, for f in [0, 1) (`above`, rounding
// down) or [-1/2, 1/2] (`around`, rounding to nearest); `natural` is `around` for e^(f log 2).
template <int kDegree>
struct Exp2;

template <>
struct Exp2<4> {  // 3e-6: a hundredth of the rounding of fp16
  static constexpr float above[] = {0x1.62d6c4p-1f, 0x1.ee247ep-3f, 0x1.abf6eap-5f, 0x1.b7faecp-7f};
  static constexpr float around[] = {0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc9ap-5f,
                                     0x1.3a02acp-7f};
};

template <>
struct Exp2<5> {  // 9e-8
  static constexpr float above[] = {0x1.62e4bap-1f, 0x1.ebdb54p-3f, 0x1.c91d18p-5f, 0x1.27773ap-7f,
                                    0x1.e9792ap-10f};
  static constexpr float around[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b754p-5f, 0x1.3ceab6p-7f,
                                     0x1.5bb9e6p-10f};
};

template <>
struct Exp2<6> {  // 2e-9
  static constexpr float above[] = {0x1.62e42cp-1f, 0x1.ebfd58p-3f,  0x1.c6890cp-5f,
                                    0x1.3d0bbap-7f, 0x1.46d506p-10f, 0x1.c5455cp-13f};
  static constexpr float around[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                                     0x1.3b2d4ep-7f, 0x1.5f3e80p-10f, 0x1.41fba0p-13f};
  static constexpr float natural[] = {1.0f,           0x1.fffffcp-2f, 0x1.555492p-3f,
                                      0x1.5558f2p-5f, 0x1.123a20p-7f, 0x1.6a23d0p-10f};
};

// e^(z - shift), or `times_factor`. Exactly 1 or the factor at z = shift, 0 at -inf, NaN for NaN;
// results below the smallest normal number are 0; above e^88 it may stop growing.
//
// kExact: within 1.5 ulp. Otherwise (z - shift) log2(e) is rounded once, which adds |z - shift| / 2
// ulp: nothing in a sum, where entries weigh e^(z - shift), nor in a 16-bit result.
template <class I, int kDegree, bool kExact>
class Exp {
  using Reg = typename I::Reg;
  // With instructions that split off a fraction and scale by powers of 2, e^(z - shift) is one
  // fused multiply-add, a polynomial and a scaling.
  static constexpr bool kFused = I::kHasScaling && !kExact;
  static constexpr float kLog2E = 0x1.715476p+0f;

  Reg shift_;
  Reg factor_;
  Reg coefficients_[kDegree + 1];

  static const float* table() {
    if constexpr (kExact) return Exp2<kDegree>::natural;
    return kFused ? Exp2<kDegree>::above : Exp2<kDegree>::around;
  }

  Reg polynomial(Reg f) const {
    Reg p = coefficients_[kDegree];
    for (int i = kDegree - 1; i >= 0; --i) p = I::fma(p, f, coefficients_[i]);
    return p;
  }

 public:
  explicit Exp(float shift, float factor = 1.0f) {
    // The scaling instruction takes any number, so there the factor goes into the polynomial.
    const float inside = I::kHasScaling ? factor : 1.0f;
    shift_ = I::set(kFused ? -shift * kLog2E : shift);
    factor_ = I::set(factor);
    coefficients_[0] = I::set(inside);
    for (int i = 0; i < kDegree; ++i) coefficients_[i + 1] = I::set(inside * table()[i]);
  }

  // What the results still have to be multiplied by: fused, shift log2(e) was rounded.
  static double correction(float shift) {
    if (!kFused) return 1.0;
    const double x = (double(shift * kLog2E) - double(shift) * kLog2E) * 0.6931471805599453;
    return std::fabs(x) < 1e-4 ? 1.0 + x + 0.5 * x * x : std::exp(x);
  }

  Reg operator()(Reg z) const {
    const Reg log2_e = I::set(kLog2E);
    if constexpr (kFused) {
      const Reg y = I::fma(z, log2_e, shift_);
      return I::times_pow2_floor(polynomial(I::fraction(y)), y);
    } else {
      const Reg x = I::min(I::set(88.3f), I::max(I::set(I::kExpLow), I::sub(z, shift_)));
      // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits of the mantissa.
      const Reg magic = I::set(12582912.0f);
      const Reg shifted = I::fma(x, log2_e, magic);
      const Reg n = I::sub(shifted, magic);
      Reg f;
      if constexpr (kExact) {  // log 2 in two parts; n times the first is exact
        f = I::fma(n, I::set(-0.693359375f), x);
        f = I::fma(n, I::set(2.12194440e-4f), f);
      } else {
        f = I::fms(x, log2_e, n);
      }
      return I::times_pow2(polynomial(f), n, shifted, x);
    }
  }

  Reg times_factor(Reg z) const {
    return I::kHasScaling ? (*this)(z) : I::mul((*this)(z), factor_);
  }
};

// Whether fused arithmetic may be used: z log2(e) and shift log2(e) must not overflow.
inline bool is_moderate(float shift) {
  return std::fabs(shift) < 1e37f;
}

// The arithmetic of instruction set `I` for pk::transform.
template <class I>
struct Vector : I {
  using Number = typename I::Reg;

  static inline Number over_cap(Number, Number scaled, const Transform& t) {
    return I::div(scaled, I::set(t.cap));
  }

  // tanh within 3 ulp, and its slope 1 - tanh^2. Away from 0 both come from e = e^{-2|x|}, which
  // has no cancellation where tanh is close to 1; near 0, where 1 - e would cancel, a polynomial.
  static inline Tanh<Vector> tanh(Number x, Number factor) {
    const Number size = I::abs(x);
    const Number one = I::set(1.0f);
    const Number e = Exp<I, 6, true>(0.0f)(I::mul(I::set(-2.0f), size));
    const Number inverse = I::div(one, I::add(one, e));
    const Number far = I::mul(I::sub(one, e), inverse);
    const Number slope = I::mul(I::mul(I::set(4.0f), e), I::mul(inverse, inverse));
    const Number square = I::mul(size, size);
    const Number near = I::fma(I::mul(tanh_series<Vector>(square), square), size, size);
    const Number value = I::where_less(size, I::set(0.625f), near, far);
    return {I::copy_sign(value, x), I::mul(factor, slope)};
  }
};

}  // namespace
}  // namespace pk
