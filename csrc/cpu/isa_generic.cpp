// The row kernels for one instruction set; setup.py compiles this file with its flags.
#include "rows.h"
#include "vec_generic.h"

namespace pk {

extern const Isa kGenericIsa;
const Isa kGenericIsa = isa_table<Generic>();

}  // namespace pk
