// AVX-512 F + BW + VL + DQ: sixteen lanes. The same operations as vec_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dtype.h"
#include "vec_avx2.h"

namespace pk {
namespace {  // why: rows.h

struct Avx512 {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  using Reg = __m512;
  using FlushSubnormals = X86FlushSubnormals;
  static constexpr bool kHasScaling = true;
  static constexpr float kExpLow = -104.0f;  // e^x rounds to 0

  static inline Reg set(float x) { return _mm512_set1_ps(x); }
  static inline Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static inline Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Reg fms(Reg a, Reg b, Reg c) { return _mm512_fmsub_ps(a, b, c); }
  static inline Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static inline Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static inline Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static inline Reg where_less(Reg a, Reg limit, Reg yes, Reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, limit, _CMP_LT_OQ), no, yes);
  }
  static inline Reg copy_sign(Reg magnitude, Reg sign) {
    const Reg sign_bit = set(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign_bit, magnitude), _mm512_and_ps(sign_bit, sign));
  }
  static inline Reg times_pow2(Reg p, Reg n, Reg, Reg) { return _mm512_scalef_ps(p, n); }
  // y - floor(y), and 0 for infinities; p * 2^floor(y).
  static inline Reg fraction(Reg y) { return _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF); }
  static inline Reg times_pow2_floor(Reg p, Reg y) { return _mm512_scalef_ps(p, y); }

  static inline float max_lane(Reg a) {
    alignas(64) float lane[kLanes];
    _mm512_store_ps(lane, a);
    float m = lane[0];
    for (int i = 1; i < kLanes; ++i) m = lane[i] > m ? lane[i] : m;
    return m;
  }
  static inline double sum_lanes(Reg a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    alignas(64) double lane[8];
    _mm512_store_pd(lane, _mm512_add_pd(low, high));
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) +
           ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }

  static inline void load_pair(const float* p, Reg& a, Reg& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + kLanes);
  }
  static inline void store_pair(float* p, Reg a, Reg b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + kLanes, b);
  }

  static inline void load_pair(const BFloat16* p, Reg& a, Reg& b) {
    const __m512i x = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
  }
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    const __m512i even = _mm512_srli_epi32(rounded_to_bf16(a), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded_to_bf16(b)));
  }
  static inline __m512i rounded_to_bf16(Reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }

  static inline void load_pair(const Half* p, Reg& a, Reg& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes)));
  }
  static inline void store_pair(Half* p, Reg a, Reg b) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, nearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm512_cvtps_ph(b, nearest));
  }
};

}  // namespace
}  // namespace pk
