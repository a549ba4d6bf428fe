// Test only: the emulated device.
#include "../../csrc/cuda/launch.h"

// The major compute capability, whether threads and blocks run in descending order, and the largest
// cluster there is room for.
PK_EXPORT void pk_emulation_set(int32_t major, int32_t backward, int32_t max_cluster) {
  pk_emulation::machine.major = major;
  pk_emulation::machine.max_cluster = max_cluster;
  pk_emulation::machine.backward = backward != 0;
}
