// What crosses the C ABI of both libraries. Each struct is a list of fields, one line a field: from
// it come the struct and its description, which pro_kernels/backends/native.py
// compares with its own when it loads a library.
//
// N token rows, V vocabulary columns, S sequences, B prompts, n candidates. Pointers are to memory
// of the device that computes, sizes and strides count elements, everything is contiguous but
// matrices, whose rows have unit stride. `dtype`: 0 fp32, 1 bf16, 2 fp16 (DType in cpu/dtype.h).
// What is computed from them is written in pro_kernels/backends/torch.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

#if defined(_WIN32)
#define PK_EXPORT extern "C" __declspec(dllexport)
#else
#define PK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Options are the fields of the dataclasses in pro_kernels/options.py, those of 8 bytes first (so
// there is no padding), otherwise in their order: float is double, `int | None` is int64_t with -1
// for None, `float | None` is double with 0 for None, bool is int32_t.
#define PK_LOGIT_OPTIONS(FIELD) \
  FIELD(double, softcap)        \
  FIELD(double, logit_scale)

#define PK_RANKING_OPTIONS(FIELD)  \
  FIELD(double, tau)               \
  FIELD(double, eps)               \
  FIELD(double, sft_weight)        \
  FIELD(int64_t, top_k)            \
  FIELD(int32_t, length_normalize) \
  FIELD(int32_t, skip_ties)        \
  FIELD(int32_t, sft_mean)         \
  FIELD(int32_t, single_sft)

// Rows of logits. A negative target: the row is not read, its results are 0. A target >= V:
// log-probability NaN.
#define PK_ROWS(FIELD)                                                                     \
  FIELD(void*, logits) /* (N, V) */                                                        \
  FIELD(int32_t, dtype)                                                                    \
  FIELD(int64_t, rows)                                                                     \
  FIELD(int64_t, columns)                                                                  \
  FIELD(int64_t, stride)                                                                   \
  FIELD(const int64_t*, targets)     /* (N,) */                                            \
  FIELD(const float*, target_logits) /* (N,) exact raw logits of the targets, or null */   \
  FIELD(float*, logp)                /* (N,) out; logits_grad has no use for it */         \
  FIELD(float*, lse)                 /* (N,) out; logits_grad reads it */                  \
  FIELD(float*, entropy)             /* (N,) out, or null; logits_grad reads it */         \
  /* Of logits_grad alone. */                                                              \
  FIELD(const float*, weights)         /* (N,) or null: 1 */                               \
  FIELD(const float*, entropy_weights) /* (N,) where there is an entropy */                \
  FIELD(int64_t, first_column)         /* of the vocabulary, to which the targets refer */ \
  FIELD(void*, out)                    /* (N, V), may be logits */                         \
  FIELD(int64_t, out_stride)

#define PK_RANKING_BATCH(FIELD)                            \
  FIELD(const float*, logps) /* (N,) */                    \
  FIELD(int64_t, tokens)                                   \
  FIELD(const int64_t*, offsets) /* (S + 1,) */            \
  FIELD(const int64_t*, lengths) /* (S,) */                \
  FIELD(int64_t, sequences)                                \
  FIELD(const int64_t*, order) /* (B, n) */                \
  FIELD(int64_t, prompts)                                  \
  FIELD(int64_t, candidates)                               \
  FIELD(const float*, rewards)        /* (B, n) or null */ \
  FIELD(const int64_t*, sft_rank)     /* (B,) */           \
  FIELD(const float*, prompt_weights) /* (B,) */           \
  FIELD(float*, terms)                /* (B, n) out */     \
  FIELD(float*, sums)                 /* (S,) out */       \
  FIELD(float*, row_weights)          /* (N,) out */

#define PK_MATRIX(FIELD)  \
  FIELD(void*, data)      \
  FIELD(int32_t, dtype)   \
  FIELD(int64_t, rows)    \
  FIELD(int64_t, columns) \
  FIELD(int64_t, stride)

// Attention over a tree of K segments (pro_kernels/distinct/attention.py), all fp32. S tokens, h
// heads, g of keys and values; d and e, the sizes of a head, are multiples of 32. W >= S + 32: what
// is behind the tokens is read but has no effect. keys_across are multiplied by the scale.
#define PK_TREE_ATTENTION(FIELD)                                                               \
  FIELD(const int64_t*, segments) /* (K, 4) first, end, end of the descendants, position */    \
  FIELD(int64_t, count)                                                                        \
  FIELD(int64_t, tokens)                                                                       \
  FIELD(int64_t, columns) /* W */                                                              \
  FIELD(int64_t, heads)                                                                        \
  FIELD(int64_t, key_heads)                                                                    \
  FIELD(int64_t, sums)       /* g or h: of the gradients of keys and values, for each token */ \
  FIELD(int64_t, size)       /* d */                                                           \
  FIELD(int64_t, value_size) /* e */                                                           \
  FIELD(int64_t, window)                                                                       \
  FIELD(double, softcap)                                                                       \
  FIELD(const float*, query)       /* (S, h, d) */                                             \
  FIELD(const float*, keys_across) /* (g, d, W) */                                             \
  FIELD(const float*, values)      /* (S, g, e) */                                             \
  FIELD(float*, out)               /* (S, h, e); the backward reads it */                      \
  FIELD(float*, lse)               /* (S, h); the backward reads it */                         \
  /* Of the backward alone. */                                                                 \
  FIELD(const float*, keys)          /* (S, g, d) */                                           \
  FIELD(const float*, values_across) /* (g, e, W) */                                           \
  FIELD(const float*, grad)          /* (S, h, e) */                                           \
  FIELD(float*, query_grad)          /* (S, h, d) out, over the scale */                       \
  FIELD(float*, key_grad)            /* (S, sums, d), added to; over the scale */              \
  FIELD(float*, value_grad)          /* (S, sums, e), added to */

// The columns that each group of rows of dZ0 keeps (pro_kernels/fused/columns.py). G groups of
// `group_rows` rows, the last may have fewer; H hidden.
#define PK_COLUMN_FILTER(FIELD)                                                           \
  FIELD(void*, entries) /* (N, V) dZ0; kept entries move to the front of their rows */    \
  FIELD(int32_t, dtype)                                                                   \
  FIELD(int64_t, rows)                                                                    \
  FIELD(int64_t, columns)                                                                 \
  FIELD(int64_t, stride)                                                                  \
  FIELD(double, threshold)     /* above which an entry counts */                          \
  FIELD(int64_t*, need)        /* (N,) out: how many entries of a row count */            \
  FIELD(const int64_t*, order) /* (N,) rows of the first group, of the second, ... */     \
  FIELD(int64_t, group_rows)                                                              \
  FIELD(float*, sums)           /* (G, V) out: of the entries, without their signs */     \
  FIELD(const int64_t*, starts) /* (G + 1,) of the groups in `kept` */                    \
  FIELD(const int32_t*, kept)   /* columns, ascending in each group */                    \
  FIELD(const float*, weights)  /* (2, V) */                                              \
  FIELD(float*, lost)           /* (3, N) out: sums of what leaves, plain and weighted */ \
  /* Of the products. */                                                                  \
  FIELD(const void*, operand) /* (V, H) W, or (N, H) X */                                 \
  FIELD(int32_t, operand_dtype)                                                           \
  FIELD(int64_t, hidden)                                                                  \
  FIELD(int64_t, operand_stride)                                                          \
  FIELD(float*, centre)          /* (H,) */                                               \
  FIELD(const float*, stand_ins) /* (N,) by which it is multiplied */                     \
  FIELD(void*, out)              /* (N, H) dZ0 W, or (V, H) dZ0^T X */                    \
  FIELD(int32_t, out_dtype)                                                               \
  FIELD(int64_t, out_stride)                                                              \
  FIELD(int32_t, accumulate) /* dZ0^T X: fp32, added to */                                \
  FIELD(int32_t, move)       /* compact: whether entries move */

#define PK_STRUCTS(STRUCT)                   \
  STRUCT(LogitOptions, PK_LOGIT_OPTIONS)     \
  STRUCT(RankingOptions, PK_RANKING_OPTIONS) \
  STRUCT(Rows, PK_ROWS)                      \
  STRUCT(RankingBatch, PK_RANKING_BATCH)     \
  STRUCT(Matrix, PK_MATRIX)                  \
  STRUCT(TreeAttention, PK_TREE_ATTENTION)   \
  STRUCT(ColumnFilter, PK_COLUMN_FILTER)

namespace pk {

// Raised whenever a function changes its arguments or their meaning; of a struct that changes, the
// description tells.
constexpr int kAbi = 1;

#define PK_MEMBER(type, name) type name;
#define PK_STRUCT(Name, FIELDS) \
  struct Name {                 \
    FIELDS(PK_MEMBER)           \
  };
PK_STRUCTS(PK_STRUCT)
#undef PK_STRUCT
#undef PK_MEMBER

struct TypeName {
  static const char* of(double) { return "float64"; }
  static const char* of(int32_t) { return "int32"; }
  static const char* of(int64_t) { return "int64"; }
  static const char* of(const void*) { return "pointer"; }
};

// All of it as text, for the loader to compare: the number of the ABI, then a line for each struct
// with its size and for each field with its type and offset.
static inline std::string layout() {
  std::string text = "ABI " + std::to_string(kAbi) + "\n";
#define PK_FIELD(type, name)                                                   \
  text += struct_name + "." #name " " + TypeName::of(Struct{}.name) + " at " + \
          std::to_string(offsetof(Struct, name)) + "\n";
#define PK_STRUCT(Name, FIELDS)                                              \
  {                                                                          \
    using Struct = Name;                                                     \
    const std::string struct_name = #Name;                                   \
    text += struct_name + " " + std::to_string(sizeof(Struct)) + " bytes\n"; \
    FIELDS(PK_FIELD)                                                         \
  }
  PK_STRUCTS(PK_STRUCT)
#undef PK_STRUCT
#undef PK_FIELD
  return text;
}

}  // namespace pk
