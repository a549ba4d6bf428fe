// AVX-512 F + BW + VL + DQ: sixteen lanes.
#pragma once

#include "vec_avx2.h"

namespace pk {
namespace {  // why: rows.h

struct Avx512 : Lanes<16> {
  using FlushSubnormals = X86FlushSubnormals;
  static constexpr bool kHasScaling = true;
  static constexpr float kExpLow = -104.0f;  // e^x rounds to 0

  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Reg fms(Reg a, Reg b, Reg c) { return _mm512_fmsub_ps(a, b, c); }
  static inline Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static inline Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static inline Reg where_less(Reg a, Reg limit, Reg yes, Reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, limit, _CMP_LT_OQ), no, yes);
  }
  static inline Reg times_pow2(Reg p, Reg n, Reg, Reg) { return _mm512_scalef_ps(p, n); }
  // y - floor(y), and 0 for infinities; p * 2^floor(y).
  static inline Reg fraction(Reg y) { return _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF); }
  static inline Reg times_pow2_floor(Reg p, Reg y) { return _mm512_scalef_ps(p, y); }

  using Lanes::load_pair;
  using Lanes::store_pair;
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

#undef PK_LANES
#define PK_LANES Avx512
