// No particular instruction set: four lanes of the compiler's own vector type, which GCC and Clang
// turn into whatever the machine has (SSE2, NEON, plain scalars).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace pk {
namespace {  // why: rows.h

struct Generic {
  static constexpr const char* kName = "generic";
  static constexpr int kLanes = 4;
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr bool kHasScaling = false;
  static constexpr float kExpLow = -87.33f;

  struct FlushSubnormals {  // not in portable code
    FlushSubnormals() {}
  };

  static inline Reg set(float x) { return Reg{x, x, x, x}; }
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
  static inline Reg times_pow2(Reg p, Reg, Reg shifted, Reg x) {
    return Reg((Bits(p) + (Bits(shifted) << 23)) & ~(x <= set(kExpLow)));
  }

  static inline float max_lane(Reg a) {
    const float low = a[0] > a[1] ? a[0] : a[1];
    const float high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
  }
  static inline double sum_lanes(Reg a) {
    return (double(a[0]) + double(a[1])) + (double(a[2]) + double(a[3]));
  }

  // Two registers' worth of elements. Their order is the type's own business: a store puts back
  // what a load took apart.
  static inline void load_pair(const float* p, Reg& a, Reg& b) {
    std::memcpy(&a, p, sizeof a);
    std::memcpy(&b, p + kLanes, sizeof b);
  }
  static inline void store_pair(float* p, Reg a, Reg b) {
    std::memcpy(p, &a, sizeof a);
    std::memcpy(p + kLanes, &b, sizeof b);
  }

  static inline void load_pair(const BFloat16* p, Reg& a, Reg& b) {
    Bits x;
    std::memcpy(&x, p, sizeof x);
    a = Reg(x << 16);
    b = Reg(x & kHighHalf);
  }
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    const Bits x = ((rounded_to_bf16(a) >> 16) & 0xffff) | (rounded_to_bf16(b) & kHighHalf);
    std::memcpy(p, &x, sizeof x);
  }
  static constexpr int32_t kHighHalf = int32_t(0xffff0000u);
  // As in vec_avx2.h.
  static inline Bits rounded_to_bf16(Reg a) {
    const Bits bits = Bits(a);
    return bits + 0x7fff + ((bits >> 16) & 1);
  }

  static inline void load_pair(const Half* p, Reg& a, Reg& b) {
    a = Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
    b = Reg{to_float(p[4]), to_float(p[5]), to_float(p[6]), to_float(p[7])};
  }
  static inline void store_pair(Half* p, Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) from_float(a[i], p[i]);
    for (int i = 0; i < kLanes; ++i) from_float(b[i], p[kLanes + i]);
  }
};

}  // namespace
}  // namespace pk
