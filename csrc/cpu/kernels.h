// What one instruction set provides: three functions on one row of logits, per dtype, and two on a
// tile of attention, and those of a column filter.
//
// Everything around the rows (threads, masks, the target's own entry, finishing in double) is
// compiled once, in logits.cpp; what is around the others, in attention.cpp and filter.cpp. A new
// instruction set is one vec_*.h, one line in dispatch.cpp and one in setup.py.
#pragma once

#include <cstdint>

#include "../include/pk_abi.h"
#include "../include/pk_math.h"
#include "dtype.h"

namespace pk {

// The target of a row, and its exact raw logit where the caller has one.
struct Target {
  int64_t column;  // negative: not in this row
  bool exact;
  float raw;
};

struct RowStats {
  ExpSum<double> sum;
  float target;  // transformed logit of the target; NaN if it is not in the row
};

struct RowKernels {
  // Online softmax statistics; `with_dot` also fills sum.dot (for the entropy).
  RowStats (*stats)(const void* row, int64_t columns, const Target&, const Transform&,
                    bool with_dot);
  // out_v = factor * exp(z_v - shift) * dz_v/draw_v. `out` may be `row`.
  void (*gradient)(const void* row, void* out, int64_t columns, float shift, float factor,
                   const Transform&);
  // out_v = (factor + tilt * (z_v - shift)) * exp(z_v - shift) * dz_v/draw_v.
  void (*tilted_gradient)(const void* row, void* out, int64_t columns, float shift, float factor,
                          float tilt, const Transform&);
};

// A row of (K, 4) `segments`.
struct Segment {
  int64_t first;
  int64_t end;
  int64_t last;  // where its descendants end
  int64_t position;
};

struct Tree : TreeAttention {
  const int64_t* parents;  // (K,), -1: none

  const Segment& segment(int64_t i) const { return reinterpret_cast<const Segment*>(segments)[i]; }
};

constexpr int64_t kTileRows = 48;  // queries of a tile, at most
constexpr int64_t kTileKeys = 128;

// Of queries [start, start + rows) of a segment and head.
struct AttentionKernels {
  void (*forward)(const Tree&, int64_t head, int64_t segment, int64_t start, int64_t rows);
  // Writes the gradients of the queries, and adds to those of the keys and values of this head.
  void (*backward)(const Tree&, int64_t head, int64_t segment, int64_t start, int64_t rows);
};

// A piece of dZ0 W: the rows of a group, columns [first, end) of W, from its rows [from, to).
struct HiddenPiece {
  int64_t group;
  int64_t first;
  int64_t end;
  int64_t from;
  int64_t to;
};

// The two products of the columns that groups of rows keep (filter.h).
struct FilterProducts {
  int64_t number_size;  // bytes of a number as the products read it, of `depth` operands
  int64_t depth;
  // Adds a piece to its place in `sums (N, width)`, whose rows are in the order of the groups.
  void (*hidden)(const ColumnFilter&, const HiddenPiece&, float* sums, int64_t width);
  // Rows of X for all products of a group, (depth, width), behind those of the groups before it.
  void (*bring_together)(const ColumnFilter&, int64_t group, void* out, int64_t width);
  void (*weight)(const ColumnFilter&, const void* sides, int64_t width, int64_t first, int64_t end);
};

struct FilterKernels {
  void (*add_operands)(const ColumnFilter&, int64_t from, int64_t to, float* sum);
  float (*squared_distance)(const ColumnFilter&, int64_t row);
  void (*count_large)(const ColumnFilter&, int64_t row);
  void (*add_rows)(const ColumnFilter&, int64_t group);
  void (*compact)(const ColumnFilter&, int64_t group);
  // Of place i in the order: the sums before all pieces, and their result.
  void (*begin_hidden)(const ColumnFilter&, int64_t i, float* sums);
  void (*end_hidden)(const ColumnFilter&, int64_t i, const float* sums);
  FilterProducts products;
  FilterProducts of_bf16;  // where all operands are
};

struct Isa {
  const char* name;
  RowKernels kernels[kDTypes];
  AttentionKernels attention;
  FilterKernels filter;
};

// The instruction set in use, chosen on first use or by pk_cpu_set_isa.
const Isa& active_isa();

}  // namespace pk
