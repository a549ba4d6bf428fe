// The row kernels for one instruction set; setup.py compiles this file with its flags.
#include "rows.h"
#include "vec_neon.h"

namespace pk {

extern const Isa kNeonIsa;
const Isa kNeonIsa = isa_table<Neon>();

}  // namespace pk
