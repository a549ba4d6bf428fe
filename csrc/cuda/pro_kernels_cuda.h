// The C ABI of libpro_kernels_cuda, loaded by pro_kernels/backends/cuda.py: the structs are those
// of pk_abi.h with device pointers, `stream` is a cudaStream_t of the current device. Nothing here
// allocates, waits or looks at device data. Every function but the first three returns 0, or a code
// for pk_cuda_error(); nothing was launched then. Rows need neither an aligned start nor an even
// stride: those only make them faster.
#pragma once

#include "../include/pk_abi.h"

// Number and structs of this ABI.
PK_EXPORT const char* pk_cuda_layout(void);
// The targets compiled in, separated by spaces: "sm_80 sm_90a sm_100 compute_100".
PK_EXPORT const char* pk_cuda_targets(void);
PK_EXPORT const char* pk_cuda_error(int32_t code);
// 0 where this library holds code for the current device.
PK_EXPORT int32_t pk_cuda_ready(void);

PK_EXPORT int32_t pk_cuda_logp(const pk::Rows* rows, const pk::LogitOptions* options, void* stream);
// Overwrites the logits with d logp / d raw.
PK_EXPORT int32_t pk_cuda_residual(const pk::Rows* rows, const pk::LogitOptions* options,
                                   void* stream);
PK_EXPORT int32_t pk_cuda_logits_grad(const pk::Rows* rows, const pk::LogitOptions* options,
                                      void* stream);
// At most 1024 candidates.
PK_EXPORT int32_t pk_cuda_ranking(const pk::RankingBatch* batch, const pk::RankingOptions* options,
                                  void* stream);

// out[i] = weights[i] * in[rows[i]]; weights null = 1.
PK_EXPORT int32_t pk_cuda_gather_rows(const pk::Matrix* in, const pk::Matrix* out,
                                      const int64_t* rows, const float* weights, void* stream);

// out[rows[i]] = sum of weights[i] * side[i] over the tokens of that row, in fp32, rounded once.
// `by_row` null: every row occurs once. Otherwise a stable argsort of `rows`: the tokens of a row
// are added in their own order, to what `out` holds. Rows of `out` without a token are not written.
PK_EXPORT int32_t pk_cuda_scatter_rows(const pk::Matrix* side, const pk::Matrix* out,
                                       const int64_t* rows, const float* weights,
                                       const int64_t* by_row, void* stream);

// out[i] = x[i] . weight[targets[i]] + bias[targets[i]] in fp32; x, weight, bias of one dtype. 0
// for a negative target, NaN for one that the weight has no row of.
PK_EXPORT int32_t pk_cuda_target_logits(const pk::Matrix* x, const pk::Matrix* weight,
                                        const void* bias, const int64_t* targets, float* out,
                                        void* stream);
