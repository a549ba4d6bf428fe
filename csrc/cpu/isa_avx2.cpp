// The row kernels for one instruction set; setup.py compiles this file with its flags.
#include "rows.h"
#include "vec_avx2.h"

namespace pk {

extern const Isa kAvx2Isa;
const Isa kAvx2Isa = isa_table<Avx2>();

}  // namespace pk
