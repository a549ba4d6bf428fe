// AVX-512 with BF16: vec_avx512.h with the processor's own rounding to bf16 (nearest even; NaN
// stays NaN; results below the smallest normal number become 0, as they do everywhere here).
#pragma once

#include "vec_avx512.h"

namespace pk {
namespace {  // why: rows.h

struct Bf16Dots;

struct Avx512Bf16 : Avx512 {
  using Pairs = Bf16Dots;

  using Avx512::store_pair;
  static inline void store_pair(BFloat16* p, Reg a, Reg b) {
    // Element 2i from a, element 2i + 1 from b: vec_avx512.h loads them so.
    const __m512i even_then_odd = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(interleave(), even_then_odd));
  }
  static inline __m512i interleave() {
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                            6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  }
};

// Products of pairs, as product.h takes them. The processor counts subnormal numbers as 0.
struct Bf16Dots {
  using Lanes = Avx512Bf16;
  using Number = uint32_t;
  static inline __m512 multiply_add(uint32_t a, __m512 b, __m512 c) {
    const __m512i pairs = _mm512_set1_epi32(int(a));
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(b));
  }
  static inline void load_pair(const uint32_t* p, __m512& a, __m512& b) {
    a = _mm512_castsi512_ps(_mm512_loadu_si512(p));
    b = _mm512_castsi512_ps(_mm512_loadu_si512(p + Avx512Bf16::kLanes));
  }
};

}  // namespace
}  // namespace pk

#undef PK_LANES
#define PK_LANES Avx512Bf16
