// The columns that each group of rows of dZ0 keeps, and the two products of them
// (pro_kernels/fused/columns.py), written once for every instruction set `I` (vec_*.h).
//
// Simple loops are left to the compiler, which has the instruction set's flags. Operands of the
// products are brought together block by block, in fp32 or as pairs of bf16, and sums are fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "product.h"

namespace pk {
namespace {  // why: rows.h

template <class T>
inline T* row_of(const ColumnFilter& f, T* entries, int64_t row) {
  return entries + row * f.stride;
}

struct GroupRows {
  const int64_t* at;
  int64_t count;
};

inline GroupRows rows_of(const ColumnFilter& f, int64_t group) {
  const int64_t first = group * f.group_rows;
  return {f.order + first, std::min(f.group_rows, f.rows - first)};
}

// Adds rows [from, to) of W to `sum (H,)`.
inline void add_operands(const ColumnFilter& f, int64_t from, int64_t to, float* sum) {
  with_type(f.operand, f.operand_dtype, [&](auto* operands) {
    for (int64_t row = from; row < to; ++row) {
      const auto* p = operands + row * f.operand_stride;
      for (int64_t h = 0; h < f.hidden; ++h) sum[h] += to_float(p[h]);
    }
  });
}

// The squared distance of row `row` of W from the centre.
inline float squared_distance(const ColumnFilter& f, int64_t row) {
  constexpr int64_t lanes = 32;
  float sums[lanes] = {}, total = 0;
  with_type(f.operand, f.operand_dtype, [&](auto* operands) {
    const auto* p = operands + row * f.operand_stride;
    const auto square = [&](int64_t h) {
      const float x = to_float(p[h]) - f.centre[h];
      return x * x;
    };
    const int64_t whole = f.hidden / lanes * lanes;
    for (int64_t h = 0; h < whole; h += lanes) {
      for (int64_t j = 0; j < lanes; ++j) sums[j] += square(h + j);
    }
    for (int64_t h = whole; h < f.hidden; ++h) total += square(h);
  });
  for (float x : sums) total += x;
  return total;
}

// How many entries of a row are above the threshold.
inline void count_large(const ColumnFilter& f, int64_t row) {
  with_type(f.entries, f.dtype, [&](auto* entries) {
    const auto* p = row_of(f, entries, row);
    const float limit = float(f.threshold);
    int32_t count = 0;
    for (int64_t i = 0; i < f.columns; ++i) count += std::fabs(to_float(p[i])) > limit;
    f.need[row] = count;
  });
}

// The sum of each column over the rows of a group.
inline void add_rows(const ColumnFilter& f, int64_t group) {
  with_type(f.entries, f.dtype, [&](auto* entries) {
    const GroupRows rows = rows_of(f, group);
    float* sums = f.sums + group * f.columns;
    std::fill(sums, sums + f.columns, 0.0f);
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4) {
      const auto* a = row_of(f, entries, rows.at[r]);
      const auto* b = row_of(f, entries, rows.at[r + 1]);
      const auto* c = row_of(f, entries, rows.at[r + 2]);
      const auto* d = row_of(f, entries, rows.at[r + 3]);
      for (int64_t i = 0; i < f.columns; ++i) {
        sums[i] += (std::fabs(to_float(a[i])) + std::fabs(to_float(b[i]))) +
                   (std::fabs(to_float(c[i])) + std::fabs(to_float(d[i])));
      }
    }
    for (; r < rows.count; ++r) {
      const auto* a = row_of(f, entries, rows.at[r]);
      for (int64_t i = 0; i < f.columns; ++i) sums[i] += std::fabs(to_float(a[i]));
    }
  });
}

// What R rows lose: the sums of their dropped entries, and of each times its two weights. `dropped`
// has all bits of the columns that leave.
template <int R, class T>
inline void lost_of_rows(const ColumnFilter& f, const T* entries, const int64_t* rows,
                         const uint32_t* dropped) {
  constexpr int64_t lanes = 16;
  const float *first = f.weights, *second = f.weights + f.columns;
  float mass[R][lanes] = {}, by_first[R][lanes] = {}, by_second[R][lanes] = {};
  const T* p[R];
  for (int r = 0; r < R; ++r) p[r] = row_of(f, entries, rows[r]);
  const auto add = [&](int r, int64_t i, int64_t j) {
    const float x = as_float(as_bits(to_float(p[r][i])) & 0x7fffffffu & dropped[i]);
    mass[r][j] += x;
    by_first[r][j] += x * first[i];
    by_second[r][j] += x * second[i];
  };
  const int64_t whole = f.columns / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      for (int64_t j = 0; j < lanes; ++j) add(r, i + j, j);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t i = whole; i < f.columns; ++i) add(r, i, 0);
    float sum[3] = {};
    for (int64_t j = 0; j < lanes; ++j) {
      sum[0] += mass[r][j];
      sum[1] += by_first[r][j];
      sum[2] += by_second[r][j];
    }
    for (int64_t j = 0; j < 3; ++j) f.lost[j * f.rows + rows[r]] = sum[j];
  }
}

// What the rows of a group lose; then their kept entries move to the front.
inline void compact(const ColumnFilter& f, int64_t group) {
  std::vector<uint32_t> dropped(f.columns, ~uint32_t(0));
  const int32_t* kept = f.kept + f.starts[group];
  const int64_t count = f.starts[group + 1] - f.starts[group];
  for (int64_t k = 0; k < count; ++k) dropped[kept[k]] = 0;
  with_type(f.entries, f.dtype, [&](auto* entries) {
    const GroupRows rows = rows_of(f, group);
    const auto move = [&](int64_t row) {
      if (!f.move) return;
      auto* p = row_of(f, entries, row);
      for (int64_t k = 0; k < count; ++k) p[k] = p[kept[k]];  // ascending: nothing is overwritten
    };
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4) {
      lost_of_rows<4>(f, entries, rows.at + r, dropped.data());
      for (int64_t i = r; i < r + 4; ++i) move(rows.at[i]);
    }
    for (; r < rows.count; ++r) {
      lost_of_rows<1>(f, entries, rows.at + r, dropped.data());
      move(rows.at[r]);
    }
  });
}

// Operands as fp32, one number for each step of the depth.
template <class I>
struct Floats : Fp32<I> {
  static constexpr int64_t kDepth = 1;
  // The depth runs along p.
  static inline void along(const void* p, int32_t dtype, int64_t count, float* out) {
    with_type(p, dtype, [&](auto* x) {
      for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
    });
  }
  // Or from one of `rows` to the next.
  static inline void across(const void* const* rows, int32_t dtype, int64_t count, float* out) {
    along(rows[0], dtype, count, out);
  }
};

// Operands as pairs of bf16.
template <class Pairs>
struct PairsOfBf16 : Pairs {
  static constexpr int64_t kDepth = 2;
  static inline void along(const void* p, int32_t, int64_t count, uint32_t* out) {
    out[(count - 1) / 2] = 0;
    std::memcpy(out, p, count * sizeof(BFloat16));
  }
  static inline void across(const void* const* rows, int32_t, int64_t count, uint32_t* out) {
    const BFloat16* even = static_cast<const BFloat16*>(rows[0]);
    const BFloat16* odd = static_cast<const BFloat16*>(rows[1]);
    for (int64_t i = 0; i < count; ++i) out[i] = even[i].bits | uint32_t(odd[i].bits) << 16;
  }
};

constexpr int64_t kDepthBlock = 128;  // numbers of the depth that are together in L2

inline int64_t item_size(int32_t dtype) {
  return dtype == kFloat32 ? 4 : 2;
}

inline const void* entry(const ColumnFilter& f, int64_t row, int64_t column) {
  const char* p = static_cast<const char*>(f.entries);
  return p + (row * f.stride + column) * item_size(f.dtype);
}

inline const void* operand(const ColumnFilter& f, int64_t row, int64_t column) {
  const char* p = static_cast<const char*>(f.operand);
  return p + (row * f.operand_stride + column) * item_size(f.operand_dtype);
}

// Those of a group between two columns of the vocabulary; `start`: where they are among its own.
struct KeptColumns {
  const int32_t* columns;
  int64_t count;
  int64_t start;
};

inline KeptColumns kept_of(const ColumnFilter& f, int64_t group, int64_t from, int64_t to) {
  const int32_t* first = f.kept + f.starts[group];
  const int32_t* last = f.kept + f.starts[group + 1];
  const int32_t* begin = std::lower_bound(first, last, int32_t(from));
  return {begin, std::lower_bound(begin, last, int32_t(to)) - begin, begin - first};
}

inline void store(const float* from, int64_t count, void* out, int32_t dtype, int64_t at) {
  with_type(out, dtype, [&](auto* p) {
    for (int64_t i = 0; i < count; ++i) from_float(from[i], p[at + i]);
  });
}

// What left stands before the sums of a row, as stand_ins * centre, and their result behind.
inline void begin_hidden(const ColumnFilter& f, int64_t i, float* sums) {
  for (int64_t h = 0; h < f.hidden; ++h) sums[h] = f.stand_ins[f.order[i]] * f.centre[h];
}

inline void end_hidden(const ColumnFilter& f, int64_t i, const float* sums) {
  store(sums, f.hidden, f.out, f.out_dtype, f.order[i] * f.out_stride);
}

// Rows of some width side by side as products read them, row_of(at) for at < count, zeros behind.
template <class M, class F>
void bring(int64_t count, int64_t width, int32_t dtype, typename M::Number* out, int64_t out_row,
           const F& row_of) {
  const std::vector<char> zeros(width * 4);
  for (int64_t k = 0; k * M::kDepth < count; ++k) {
    const void* of[2];
    for (int64_t i = 0; i < M::kDepth; ++i) {
      const int64_t at = k * M::kDepth + i;
      of[i] = at < count ? row_of(at) : zeros.data();
    }
    M::across(of, dtype, width, out + k * out_row);
  }
}

// Adds a piece to `sums (rows of the order, width)`.
template <class I, class M>
void hidden_grad(const ColumnFilter& f, const HiddenPiece& piece, float* sums, int64_t width) {
  using Number = typename M::Number;
  const typename I::FlushSubnormals guard;
  constexpr int64_t step = 2 * I::kLanes, deep = kDepthBlock / M::kDepth;
  const int64_t across = piece.end - piece.first, padded = (across + step - 1) / step * step;
  const GroupRows rows = rows_of(f, piece.group);
  const KeptColumns kept = kept_of(f, piece.group, piece.from, piece.to);
  std::vector<Number> a(rows.count * deep), b(deep * padded);
  float* out = sums + piece.group * f.group_rows * width + piece.first;
  for (int64_t start = 0; start < kept.count; start += kDepthBlock) {
    const int64_t some = std::min(kDepthBlock, kept.count - start);
    const int64_t depth = (some + M::kDepth - 1) / M::kDepth;
    for (int64_t r = 0; r < rows.count; ++r) {
      M::along(entry(f, rows.at[r], kept.start + start), f.dtype, some, &a[r * deep]);
    }
    bring<M>(some, across, f.operand_dtype, b.data(), padded,
             [&](int64_t at) { return operand(f, kept.columns[start + at], piece.first); });
    product_into<M>(
        a.data(), deep, 1, b.data(), padded, [&](int64_t r) { return out + r * width; }, rows.count,
        padded, depth, true);
  }
}

// The rows of X as the products read them: (depth, width) of a group, one group behind the other.
template <class I, class M>
void bring_together(const ColumnFilter& f, int64_t group, void* out, int64_t width) {
  using Number = typename M::Number;
  const GroupRows rows = rows_of(f, group);
  const int64_t before = group * ((f.group_rows + M::kDepth - 1) / M::kDepth);
  bring<M>(rows.count, f.hidden, f.operand_dtype, static_cast<Number*>(out) + before * width, width,
           [&](int64_t at) { return operand(f, rows.at[at], 0); });
}

// Vocabulary columns [first, end) of dW = dZ0^T X, all groups together. Only those that a group
// keeps have a row of sums.
template <class I, class M>
void weight_grad(const ColumnFilter& f, const void* sides, int64_t width, int64_t first,
                 int64_t end) {
  using Number = typename M::Number;
  const typename I::FlushSubnormals guard;
  const int64_t groups = (f.rows + f.group_rows - 1) / f.group_rows;
  const int64_t deep = (f.group_rows + M::kDepth - 1) / M::kDepth;
  std::vector<int32_t> place(end - first, -1);
  int64_t most = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const KeptColumns kept = kept_of(f, group, first, end);
    for (int64_t i = 0; i < kept.count; ++i) place[kept.columns[i] - first] = 0;
    most = std::max(most, kept.count);
  }
  int32_t places = 0;
  for (int32_t& p : place) p = p < 0 ? p : places++;
  std::vector<float> sums(places * width);
  const int64_t a_row = most + 16;  // apart
  std::vector<Number> a(deep * a_row);
  for (int64_t group = 0; group < groups; ++group) {
    const KeptColumns kept = kept_of(f, group, first, end);
    if (kept.count == 0) continue;
    const GroupRows rows = rows_of(f, group);
    const int64_t depth = (rows.count + M::kDepth - 1) / M::kDepth;
    bring<M>(rows.count, kept.count, f.dtype, a.data(), a_row,
             [&](int64_t at) { return entry(f, rows.at[at], kept.start); });
    const Number* b = static_cast<const Number*>(sides) + group * deep * width;
    product_into<M>(
        a.data(), 1, a_row, b, width,
        [&](int64_t i) { return &sums[place[kept.columns[i] - first] * width]; }, kept.count, width,
        depth, true);
  }
  for (int64_t v = first; v < end; ++v) {
    if (place[v - first] < 0) {
      char* row = static_cast<char*>(f.out) + v * f.out_stride * item_size(f.out_dtype);
      if (!f.accumulate) std::memset(row, 0, f.hidden * item_size(f.out_dtype));
      continue;
    }
    float* row = &sums[place[v - first] * width];
    if (f.accumulate) {
      const float* before = static_cast<const float*>(f.out) + v * f.out_stride;
      for (int64_t h = 0; h < f.hidden; ++h) row[h] += before[h];
    }
    store(row, f.hidden, f.out, f.out_dtype, v * f.out_stride);
  }
}

template <class I, class M>
constexpr FilterProducts filter_products() {
  return {sizeof(typename M::Number), M::kDepth, hidden_grad<I, M>, bring_together<I, M>,
          weight_grad<I, M>};
}

// `M`: how this instruction set multiplies what is bf16.
template <class I, class M>
constexpr FilterKernels filter_kernels() {
  return {add_operands,
          squared_distance,
          count_large,
          add_rows,
          compact,
          begin_hidden,
          end_hidden,
          filter_products<I, Floats<I>>(),
          filter_products<I, M>()};
}

}  // namespace
}  // namespace pk
