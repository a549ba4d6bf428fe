// The C ABI of libpro_kernels_cpu. Its twin is the table of signatures in
// pro_kernels/backends/cpu.py; what the functions mean is written in pro_kernels/backends/torch.py.
//
// N token rows, V vocabulary columns, S sequences, B prompts, n candidates.
//
// Pointers are to host memory, strides in elements, everything contiguous but the logits, which
// have unit stride along V. `dtype`: 0 fp32, 1 bf16, 2 fp16. `softcap` 0: none. A negative target:
// the row is not read, its results are 0. A target >= V: log-probability NaN.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define PK_API extern "C" __declspec(dllexport)
#else
#define PK_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a signature below changes; the loader refuses any other number.
#define PK_CPU_ABI 2
PK_API int pk_cpu_abi(void);

// Name of the instruction set in use.
PK_API const char* pk_cpu_isa(void);
// Uses another one from now on, in the whole process (null: the best). -1: not available here.
PK_API int pk_cpu_set_isa(const char* name);

PK_API void pk_cpu_logp(int32_t dtype,
                        const void* logits,  // (N, V)
                        int64_t rows, int64_t columns, int64_t row_stride,
                        const int64_t* targets,      // (N,)
                        const float* target_logits,  // (N,) or null
                        float logit_scale, float softcap,
                        float* logp,     // (N,) out
                        float* lse,      // (N,) out
                        float* entropy,  // (N,) out, or null
                        int32_t threads);

PK_API void pk_cpu_residual(int32_t dtype,
                            void* logits,  // (N, V) in, d logp / d raw out
                            int64_t rows, int64_t columns, int64_t row_stride,
                            const int64_t* targets,      // (N,)
                            const float* target_logits,  // (N,) or null
                            float logit_scale, float softcap,
                            float* logp,  // (N,) out
                            float* lse,   // (N,) out
                            int32_t threads);

PK_API void pk_cpu_logits_grad(int32_t dtype,
                               const void* logits,  // (N, V): columns first_column + [0, V)
                               int64_t rows, int64_t columns, int64_t row_stride,
                               const float* lse,              // (N,)
                               const int64_t* targets,        // (N,)
                               const float* weights,          // (N,) or null: 1
                               const float* target_logits,    // (N,) or null
                               const float* entropy,          // (N,) or null, with its weights
                               const float* entropy_weights,  // (N,) or null
                               int64_t first_column, float logit_scale, float softcap,
                               void* out,  // (N, V) out; may be `logits`
                               int64_t out_row_stride, int32_t threads);

PK_API void pk_cpu_ranking(const float* logps,      // (N,)
                           int64_t tokens,          // N
                           const int64_t* offsets,  // (S + 1,)
                           const int64_t* lengths,  // (S,)
                           int64_t sequences,       // S
                           const int64_t* order,    // (B, n)
                           int64_t prompts, int64_t candidates,
                           const float* rewards,         // (B, n) or null
                           const int64_t* sft_rank,      // (B,)
                           const float* prompt_weights,  // (B,)
                           int32_t length_normalize, double fixed_tau, int32_t skip_ties,
                           double eps, double sft_weight, int32_t sft_mean,
                           int64_t top_k,  // negative: all
                           int32_t single_sft,
                           float* terms,        // (B, n) out
                           float* sums,         // (S,) out
                           float* row_weights,  // (N,) out
                           int32_t threads);
