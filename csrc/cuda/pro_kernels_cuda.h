// C ABI of the CUDA backend (libpro_kernels_cuda.so); loaded by pro_kernels/backends/cuda.py.
//
// Pointers are device pointers, sizes and strides count elements, `stream` is a cudaStream_t of the
// current device. Nothing here allocates, waits or looks at device data. `dtype` is 0 fp32, 1 bf16,
// 2 fp16, as in csrc/cpu/dtype.h. What each function computes: pro_kernels/backends/torch.py.
// Every function but the first three returns 0, or a code for pk_cuda_error(); nothing was launched
// then. Rows need neither an aligned start nor an even stride: those only make them faster.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define PK_EXPORT __attribute__((visibility("default")))
#else
#define PK_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

PK_EXPORT int32_t pk_cuda_abi(void);
// The targets compiled in, separated by spaces: "sm_80 sm_90a sm_100 compute_100".
PK_EXPORT const char* pk_cuda_targets(void);
PK_EXPORT const char* pk_cuda_error(int32_t code);
// 0 where this library holds code for the current device.
PK_EXPORT int32_t pk_cuda_ready(void);

// logits (n, v); targets (n,), negative = row not scored, never read, outputs 0; exact (n,) raw
// fp32 target logits or null; scale and softcap as in LogitOptions, softcap 0 = none; logp, lse,
// entropy (n,), entropy may be null.
PK_EXPORT int32_t pk_cuda_logp(int32_t dtype, const void* logits, int64_t n, int64_t v,
                               int64_t stride, const int64_t* targets, const float* exact,
                               float scale, float softcap, float* logp, float* lse, float* entropy,
                               void* stream);

// Overwrites logits with d logp / d raw.
PK_EXPORT int32_t pk_cuda_residual(int32_t dtype, void* logits, int64_t n, int64_t v,
                                   int64_t stride, const int64_t* targets, const float* exact,
                                   float scale, float softcap, float* logp, float* lse,
                                   void* stream);

// out (n, v) = weights * d logp / d raw for columns first_column ... first_column + v of the
// vocabulary; weights null = 1; out may be logits. With entropy (n,), which may be null, plus
// entropy_weights * d entropy / d raw.
PK_EXPORT int32_t pk_cuda_logits_grad(int32_t dtype, const void* logits, int64_t n, int64_t v,
                                      int64_t stride, const float* lse, const int64_t* targets,
                                      const float* weights, const float* exact,
                                      const float* entropy, const float* entropy_weights,
                                      int64_t first_column, float scale, float softcap, void* out,
                                      int64_t out_stride, void* stream);

// logps (n,), offsets (sequences + 1,), lengths (sequences,), order and rewards (prompts,
// candidates), sft_rank and prompt_weights (prompts,); terms (prompts, candidates), sums
// (sequences,), row_weights (n,), all of them written. top_k negative: all terms.
PK_EXPORT int32_t pk_cuda_ranking(const float* logps, int64_t n, const int64_t* offsets,
                                  const int64_t* lengths, int64_t sequences, const int64_t* order,
                                  int64_t prompts, int64_t candidates, const float* rewards,
                                  const int64_t* sft_rank, const float* prompt_weights,
                                  int32_t length_normalize, double tau, int32_t skip_ties,
                                  double eps, double sft_weight, int32_t sft_mean, int64_t top_k,
                                  int32_t single_sft, float* terms, float* sums, float* row_weights,
                                  void* stream);

// out[i] = weights[i] * in[rows[i]]; weights null = 1.
PK_EXPORT int32_t pk_cuda_gather_rows(int32_t in_dtype, const void* in, int64_t in_stride,
                                      const int64_t* rows, const float* weights, int64_t n,
                                      int64_t width, int32_t out_dtype, void* out,
                                      int64_t out_stride, void* stream);

// out[rows[i]] = sum of weights[i] * side[i] over the tokens of that row, in fp32, rounded once.
// `by_row` null: every row occurs once. Otherwise a stable argsort of `rows`: the tokens of a row
// are added in their own order, to what `out` holds. Rows of `out` without a token are not written.
PK_EXPORT int32_t pk_cuda_scatter_rows(int32_t side_dtype, const void* side, int64_t side_stride,
                                       const float* weights, const int64_t* rows,
                                       const int64_t* by_row, int64_t n, int64_t width,
                                       int32_t out_dtype, void* out, int64_t out_stride,
                                       void* stream);

// out[i] = x[i] . weight[targets[i]] + bias[targets[i]] in fp32; x, weight, bias of one dtype. 0
// for a negative target, NaN for one of `vocab` and more.
PK_EXPORT int32_t pk_cuda_target_logits(int32_t dtype, const void* x, int64_t x_stride,
                                        const void* weight, int64_t weight_stride, const void* bias,
                                        const int64_t* targets, int64_t n, int64_t vocab,
                                        int64_t width, float* out, void* stream);

#ifdef __cplusplus
}
#endif
