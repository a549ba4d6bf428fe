// The operations on vectors of fp32 that the kernels are written in, with the compiler's own vector
// types, which GCC and Clang turn into whatever the machine has (SSE2, NEON, plain scalars). Those
// of a particular instruction set (vec_*.h) replace what it does better.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace pk {
namespace {  // why: rows.h

template <class T, int N>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * N)));
  typedef T Anywhere __attribute__((vector_size(sizeof(T) * N), aligned(1), may_alias));
};

template <int N>
struct Lanes {
  static constexpr int kLanes = N;
  using Reg = typename VectorOf<float, N>::Type;
  using Anywhere = typename VectorOf<float, N>::Anywhere;
  using Bits = typename VectorOf<int32_t, N>::Type;
  using Words = typename VectorOf<uint32_t, N>::Type;
  static constexpr bool kHasScaling = false;
  static constexpr float kExpLow = -87.33f;  // e^x is a normal number above it
  using Pairs = void;                        // how pairs of bf16 are multiplied, if they are

  struct FlushSubnormals {  // not in portable code
    FlushSubnormals() {}
  };

  static inline Reg set(float x) { return x - Reg{}; }
  static inline Reg add(Reg a, Reg b) { return a + b; }
  static inline Reg sub(Reg a, Reg b) { return a - b; }
  static inline Reg mul(Reg a, Reg b) { return a * b; }
  static inline Reg div(Reg a, Reg b) { return a / b; }
  // Not std::fma: without the instruction it is a slow library call.
  static inline Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static inline Reg fms(Reg a, Reg b, Reg c) { return a * b - c; }
  // yes where the mask is all ones, no where it is 0.
  static inline Reg select(Bits mask, Reg yes, Reg no) {
    return Reg((Bits(yes) & mask) | (Bits(no) & ~mask));
  }
  // A NaN in `b` is kept by both.
  static inline Reg max(Reg a, Reg b) { return select(a > b, a, b); }
  static inline Reg min(Reg a, Reg b) { return select(a < b, a, b); }
  static inline Reg where_less(Reg a, Reg limit, Reg yes, Reg no) {
    return select(a < limit, yes, no);
  }
  static inline Reg abs(Reg a) { return Reg(Bits(a) & 0x7fffffff); }
  static inline Reg copy_sign(Reg magnitude, Reg sign) {
    return select(Bits{} + 0x7fffffff, magnitude, sign);
  }
  // p * 2^n, with n also in the low bits of `shifted`; 0 at x = kExpLow, NaN for NaN.
  static inline Reg times_pow2(Reg p, Reg, Reg shifted, Reg x) {
    return Reg((Bits(p) + (Bits(shifted) << 23)) & ~(x <= set(kExpLow)));
  }

  static inline float max_lane(Reg a) {
    float m = a[0];
    for (int i = 1; i < N; ++i) m = a[i] > m ? a[i] : m;
    return m;
  }
  // Halves are added, then neighbours.
  static inline double sum_lanes(Reg a) {
    constexpr int count = N > 4 ? N / 2 : N;
    double lane[count];
    for (int i = 0; i < count; ++i) lane[i] = double(a[i]) + (N > 4 ? double(a[i + N - count]) : 0);
    for (int width = count / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] = lane[2 * i] + lane[2 * i + 1];
    }
    return lane[0];
  }

  // Two registers' worth of elements. Their order is the type's own business: a store puts back
  // what a load took apart.
  static inline void load_pair(const float* p, Reg& a, Reg& b) {
    a = *reinterpret_cast<const Anywhere*>(p);
    b = *reinterpret_cast<const Anywhere*>(p + N);
  }
  static inline void store_pair(float* p, Reg a, Reg b) {
    *reinterpret_cast<Anywhere*>(p) = a;
    *reinterpret_cast<Anywhere*>(p + N) = b;
  }

  // Even elements in `a`, odd ones in `b`: one shift and one mask instead of shuffles.
  static inline void load_pair(const BFloat16* p, Reg& a, Reg& b) {
    Words x;
    std::memcpy(&x, p, sizeof x);
    a = Reg(x << 16);
    b = Reg(x & 0xffff0000u);
  }
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    const Words x = (rounded_to_bf16(a) >> 16) | (rounded_to_bf16(b) & 0xffff0000u);
    std::memcpy(p, &x, sizeof x);
  }
  // Nearest even, result in the high halves. A NaN stays one: those that get here (made by the
  // processor, or from 16-bit logits) have low halves that cannot carry into the sign.
  static inline Words rounded_to_bf16(Reg a) {
    const Words bits = Words(a);
    return bits + 0x7fff + ((bits >> 16) & 1);
  }

  // Of four lanes.
  static inline void load_pair(const Half* p, Reg& a, Reg& b) {
    a = Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
    b = Reg{to_float(p[N]), to_float(p[N + 1]), to_float(p[N + 2]), to_float(p[N + 3])};
  }
  static inline void store_pair(Half* p, Reg a, Reg b) {
    for (int i = 0; i < N; ++i) from_float(a[i], p[i]);
    for (int i = 0; i < N; ++i) from_float(b[i], p[N + i]);
  }
};

using Generic = Lanes<4>;

}  // namespace
}  // namespace pk

#define PK_LANES Generic
