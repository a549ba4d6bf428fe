// Which instruction set runs: the best one that was compiled in (PK_HAVE_*, from setup.py) and
// that this processor has; pk_cpu_set_isa chooses another.
#include <atomic>
#include <cstring>

#include "../include/pk_layout.h"
#include "kernels.h"
#include "pro_kernels_cpu.h"

namespace pk {

extern const Isa kAvx512Bf16Isa;
extern const Isa kAvx512Isa;
extern const Isa kAvx2Isa;
extern const Isa kNeonIsa;
extern const Isa kGenericIsa;

namespace {

struct Candidate {
  const Isa* isa;
  bool (*supported)();
};

#if defined(PK_HAVE_AVX512) || defined(PK_HAVE_AVX512BF16)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#ifdef PK_HAVE_AVX512BF16
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif
#ifdef PK_HAVE_AVX2
// F16C is not a name every compiler knows here; each processor with AVX2 has it.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif
bool always() {
  return true;
}

// Best first.
const Candidate kCandidates[] = {
#ifdef PK_HAVE_AVX512BF16
    {&kAvx512Bf16Isa, has_avx512bf16},
#endif
#ifdef PK_HAVE_AVX512
    {&kAvx512Isa, has_avx512},
#endif
#ifdef PK_HAVE_AVX2
    {&kAvx2Isa, has_avx2},
#endif
#ifdef PK_HAVE_NEON
    {&kNeonIsa, always},
#endif
    {&kGenericIsa, always},
};

const Isa* find_isa(const char* name) {  // null: the best
  for (const Candidate& c : kCandidates) {
    if ((name == nullptr || std::strcmp(name, c.isa->name) == 0) && c.supported()) return c.isa;
  }
  return nullptr;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& active_isa() {
  const Isa* isa = chosen.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = find_isa(nullptr);
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace pk

const char* pk_cpu_layout(void) {
  static const std::string text = pk::layout();
  return text.c_str();
}

const char* pk_cpu_isa(void) {
  return pk::active_isa().name;
}

int32_t pk_cpu_set_isa(const char* name) {
  const pk::Isa* isa = pk::find_isa(name);
  if (isa == nullptr) return -1;
  pk::chosen.store(isa, std::memory_order_release);
  return 0;
}
