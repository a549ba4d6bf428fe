// What is in this library, and whether it serves the current device.
#include "launch.h"

#ifndef PK_CUDA_TARGETS
#define PK_CUDA_TARGETS "sm_80 sm_90a sm_100 compute_100"
#endif

namespace {

__global__ void probe_kernel() {}

}  // namespace

const char* pk_cuda_layout(void) {
  static const std::string text = pk::layout();
  return text.c_str();
}

const char* pk_cuda_targets(void) {
  return PK_CUDA_TARGETS;
}

const char* pk_cuda_error(int32_t code) {
  return pk::error_text(code);
}

int32_t pk_cuda_ready(void) {
  return pk::has_code(probe_kernel);
}
