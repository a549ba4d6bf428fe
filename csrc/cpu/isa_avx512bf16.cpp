// The row kernels for one instruction set; setup.py compiles this file with its flags.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers (_mm512_undefined_ps) set it off: bug 105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "rows.h"
#include "vec_avx512bf16.h"

namespace pk {

extern const Isa kAvx512Bf16Isa;
const Isa kAvx512Bf16Isa = isa_table<Avx512Bf16, PairsOfBf16<Bf16Dots>>();

}  // namespace pk
