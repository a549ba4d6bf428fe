// Which instruction set runs: the best one that was compiled in (PK_ISAS, from setup.py: best
// first) and that this processor has; pk_cpu_set_isa chooses another.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "pro_kernels_cpu.h"

#ifndef PK_ISAS
#define PK_ISAS(F) F(generic)
#endif
// Only those compiled in are asked for: not every compiler knows every name. F16C, each processor
// with AVX2 has it.
#define PK_HAS(name) __builtin_cpu_supports(name)
#define PK_RUNS_avx512bf16 PK_RUNS_avx512&& PK_HAS("avx512bf16")
#define PK_RUNS_avx512 \
  PK_HAS("avx512f") && PK_HAS("avx512bw") && PK_HAS("avx512vl") && PK_HAS("avx512dq")
#define PK_RUNS_avx2 PK_HAS("avx2") && PK_HAS("fma")
#define PK_RUNS_neon true
#define PK_RUNS_generic true

namespace pk {

#define PK_DECLARE(isa) extern const Isa isa_##isa;
PK_ISAS(PK_DECLARE)

namespace {

const Isa* find_isa(const char* name) {  // null: the best
#define PK_TRY(isa) \
  if ((name == nullptr || std::strcmp(name, #isa) == 0) && PK_RUNS_##isa) return &isa_##isa;
  PK_ISAS(PK_TRY)
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
