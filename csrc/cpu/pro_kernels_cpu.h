// The C ABI of libpro_kernels_cpu, loaded by pro_kernels/backends/cpu.py: the structs are those of
// pk_abi.h, `threads` is how many threads may compute.
#pragma once

#include "../include/pk_abi.h"

// Number and structs of this ABI.
PK_EXPORT const char* pk_cpu_layout(void);
// Name of the instruction set in use.
PK_EXPORT const char* pk_cpu_isa(void);
// Uses another one from now on, in the whole process (null: the best). -1: not available here.
PK_EXPORT int32_t pk_cpu_set_isa(const char* name);

PK_EXPORT void pk_cpu_logp(const pk::Rows* rows, const pk::LogitOptions* options, int32_t threads);
// Overwrites the logits with d logp / d raw.
PK_EXPORT void pk_cpu_residual(const pk::Rows* rows, const pk::LogitOptions* options,
                               int32_t threads);
PK_EXPORT void pk_cpu_logits_grad(const pk::Rows* rows, const pk::LogitOptions* options,
                                  int32_t threads);
PK_EXPORT void pk_cpu_ranking(const pk::RankingBatch* batch, const pk::RankingOptions* options,
                              int32_t threads);
PK_EXPORT void pk_cpu_tree_attention(const pk::TreeAttention* arguments, int32_t threads);
PK_EXPORT void pk_cpu_tree_attention_backward(const pk::TreeAttention* arguments, int32_t threads);
// The columns that groups of rows keep: the sum of the rows of W (to `centre`), the square of the
// distance of each from the centre (to `sums`), counts for each row, sums for each group, what rows
// lose with the kept entries moved to the front, and the two products of them.
PK_EXPORT void pk_cpu_filter_centre(const pk::ColumnFilter* filter, int32_t threads);
PK_EXPORT void pk_cpu_filter_distances(const pk::ColumnFilter* filter, int32_t threads);
PK_EXPORT void pk_cpu_filter_count(const pk::ColumnFilter* filter, int32_t threads);
PK_EXPORT void pk_cpu_filter_sums(const pk::ColumnFilter* filter, int32_t threads);
PK_EXPORT void pk_cpu_filter_compact(const pk::ColumnFilter* filter, int32_t threads);
PK_EXPORT void pk_cpu_filter_hidden_grad(const pk::ColumnFilter* filter, int32_t threads);
PK_EXPORT void pk_cpu_filter_weight_grad(const pk::ColumnFilter* filter, int32_t threads);
