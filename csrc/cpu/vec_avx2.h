// AVX2 + FMA + F16C: eight lanes.
#pragma once

#include <immintrin.h>

#include "vec_generic.h"

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

struct Avx2 : Lanes<8> {
  using FlushSubnormals = X86FlushSubnormals;

  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Reg fms(Reg a, Reg b, Reg c) { return _mm256_fmsub_ps(a, b, c); }
  static inline Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static inline Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static inline Reg where_less(Reg a, Reg limit, Reg yes, Reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, limit, _CMP_LT_OQ));
  }

  using Lanes::load_pair;
  using Lanes::store_pair;
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    const Words even = rounded_to_bf16(a) >> 16, odd = rounded_to_bf16(b);
    const __m256i x = _mm256_blend_epi16(__m256i(even), __m256i(odd), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
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

#undef PK_LANES
#define PK_LANES Avx2
