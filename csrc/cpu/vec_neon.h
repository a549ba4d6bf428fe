// AArch64 NEON: four lanes. The same operations as vec_generic.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "dtype.h"

namespace pk {
namespace {  // why: rows.h

struct Neon {
  static constexpr int kLanes = 4;
  using Reg = float32x4_t;
  using Pairs = void;
  static constexpr bool kHasScaling = false;
  static constexpr float kExpLow = -87.33f;

  // Nothing to do: subnormal numbers run at full speed here.
  struct FlushSubnormals {
    FlushSubnormals() {}
  };

  static inline Reg set(float x) { return vdupq_n_f32(x); }
  static inline Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static inline Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static inline Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static inline Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static inline Reg fms(Reg a, Reg b, Reg c) { return vfmaq_f32(vnegq_f32(c), a, b); }
  static inline Reg abs(Reg a) { return vabsq_f32(a); }
  // A NaN in either operand is kept by both.
  static inline Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static inline Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static inline Reg where_less(Reg a, Reg limit, Reg yes, Reg no) {
    return vbslq_f32(vcltq_f32(a, limit), yes, no);
  }
  static inline Reg copy_sign(Reg magnitude, Reg sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude);
  }
  static inline Reg times_pow2(Reg p, Reg, Reg shifted, Reg x) {
    const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    const uint32x4_t y = vaddq_u32(vreinterpretq_u32_f32(p), exponent);
    return vreinterpretq_f32_u32(vbicq_u32(y, vcleq_f32(x, set(kExpLow))));
  }

  static inline float max_lane(Reg a) { return vmaxvq_f32(a); }
  static inline double sum_lanes(Reg a) {
    return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a)));
  }

  static inline void load_pair(const float* p, Reg& a, Reg& b) {
    a = vld1q_f32(p);
    b = vld1q_f32(p + kLanes);
  }
  static inline void store_pair(float* p, Reg a, Reg b) {
    vst1q_f32(p, a);
    vst1q_f32(p + kLanes, b);
  }

  static inline void load_pair(const BFloat16* p, Reg& a, Reg& b) {
    const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    a = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
    b = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
  }
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    // The high halves of `b` stay, those of `a` come in below them.
    const uint32x4_t x = vsriq_n_u32(rounded_to_bf16(b), rounded_to_bf16(a), 16);
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_u32(x));
  }
  static inline uint32x4_t rounded_to_bf16(Reg a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  }

  static inline void load_pair(const Half* p, Reg& a, Reg& b) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    a = vcvt_f32_f16(vget_low_f16(x));
    b = vcvt_high_f32_f16(x);
  }
  static inline void store_pair(Half* p, Reg a, Reg b) {
    const float16x8_t x = vcvt_high_f16_f32(vcvt_f16_f32(a), b);
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_f16(x));
  }
};

}  // namespace
}  // namespace pk

#define PK_LANES Neon
