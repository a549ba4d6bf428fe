// The kernels for one instruction set: setup.py compiles this file once for each, as PK_ISA and
// with its flags. Its vec_*.h names the operations, PK_LANES.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers (_mm512_undefined_ps) set it off: bug 105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#ifndef PK_ISA
#define PK_ISA generic
#endif
#define PK_TEXT(...) #__VA_ARGS__
#define PK_HEADER(isa) PK_TEXT(vec_##isa.h)
#define PK_TABLE(isa)         \
  extern const Isa isa_##isa; \
  const Isa isa_##isa = isa_table<PK_LANES>(#isa);
#define PK_OF(macro, isa) macro(isa)

#include PK_OF(PK_HEADER, PK_ISA)
#include "rows.h"

namespace pk {
PK_OF(PK_TABLE, PK_ISA)
}
