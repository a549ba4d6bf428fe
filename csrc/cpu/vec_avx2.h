// AVX2 + FMA + F16C: eight lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dtype.h"

namespace pk {
namespace {  // why: rows.h

// Results below the smallest normal number become 0 while this lives. Otherwise every product of
// a tiny probability traps to microcode, ~150 cycles a vector.
struct X86FlushSubnormals {
  unsigned saved = _mm_getcsr();
  X86FlushSubnormals() { _mm_setcsr(saved | _MM_FLUSH_ZERO_ON); }
  ~X86FlushSubnormals() { _mm_setcsr(saved); }
  X86FlushSubnormals(const X86FlushSubnormals&) = delete;
};

struct Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  using Reg = __m256;
  using FlushSubnormals = X86FlushSubnormals;
  static constexpr bool kHasScaling = false;
  static constexpr float kExpLow = -87.33f;  // e^x is a normal number above it

  static inline Reg set(float x) { return _mm256_set1_ps(x); }
  static inline Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static inline Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Reg fms(Reg a, Reg b, Reg c) { return _mm256_fmsub_ps(a, b, c); }
  static inline Reg abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // A NaN in `b` is kept by both.
  static inline Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static inline Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static inline Reg where_less(Reg a, Reg limit, Reg yes, Reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, limit, _CMP_LT_OQ));
  }
  static inline Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm256_or_ps(abs(magnitude), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
  }
  // p * 2^n, with n also in the low bits of `shifted`; 0 at x = kExpLow, NaN for NaN.
  static inline Reg times_pow2(Reg p, Reg, Reg shifted, Reg x) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const Reg y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    return _mm256_and_ps(y, _mm256_cmp_ps(x, set(kExpLow), _CMP_NLE_UQ));
  }

  static inline float max_lane(Reg a) {
    alignas(32) float lane[kLanes];
    _mm256_store_ps(lane, a);
    float m = lane[0];
    for (int i = 1; i < kLanes; ++i) m = lane[i] > m ? lane[i] : m;
    return m;
  }
  static inline double sum_lanes(Reg a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    alignas(32) double lane[4];
    _mm256_store_pd(lane, _mm256_add_pd(low, high));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }

  static inline void load_pair(const float* p, Reg& a, Reg& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + kLanes);
  }
  static inline void store_pair(float* p, Reg a, Reg b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + kLanes, b);
  }

  // Even elements in `a`, odd ones in `b`: one shift and one mask instead of shuffles.
  static inline void load_pair(const BFloat16* p, Reg& a, Reg& b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))));
  }
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    const __m256i even = _mm256_srli_epi32(rounded_to_bf16(a), 16);
    const __m256i x = _mm256_blend_epi16(even, rounded_to_bf16(b), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  // Nearest even, result in the high halves. A NaN stays one: those that get here (made by the
  // processor, or from 16-bit logits) have low halves that cannot carry into the sign.
  static inline __m256i rounded_to_bf16(Reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }

  static inline void load_pair(const Half* p, Reg& a, Reg& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kLanes)));
  }
  static inline void store_pair(Half* p, Reg a, Reg b) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, nearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + kLanes), _mm256_cvtps_ph(b, nearest));
  }
};

}  // namespace
}  // namespace pk
