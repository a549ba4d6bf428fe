// Products of matrices in cache, written once for every instruction set: numbers of A times
// registers of B, with R x 2 registers of C in fp32.
//
// How a number is multiplied is `M`: one fp32 (Fp32), or a pair of bf16 whose products are added
// (where a processor has that: vec_avx512bf16.h); then A and B hold pairs, along the depth.
#pragma once

#include <cstdint>

namespace pk {
namespace {  // why: rows.h

template <class I>
struct Fp32 {
  using Lanes = I;
  using Number = float;
  static inline typename I::Reg multiply_add(float a, typename I::Reg b, typename I::Reg c) {
    return I::fma(I::set(a), b, c);
  }
  static inline void load_pair(const float* p, typename I::Reg& a, typename I::Reg& b) {
    I::load_pair(p, a, b);
  }
};

// c_of(r)[0:2 kLanes] = a b, or += ; element (r, k) of a is a[r * row + k * step].
template <class M, int R, class C>
inline void product_of_rows(const typename M::Number* a, int64_t row, int64_t step,
                            const typename M::Number* b, int64_t b_row, const C& c_of,
                            int64_t depth, bool add) {
  using I = typename M::Lanes;
  using Reg = typename I::Reg;
  Reg sum[R][2];
  for (int r = 0; r < R; ++r) {
    sum[r][0] = sum[r][1] = I::set(0.0f);
    if (add) I::load_pair(c_of(r), sum[r][0], sum[r][1]);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Reg left, right;
    M::load_pair(b + k * b_row, left, right);
    for (int r = 0; r < R; ++r) {
      sum[r][0] = M::multiply_add(a[r * row + k * step], left, sum[r][0]);
      sum[r][1] = M::multiply_add(a[r * row + k * step], right, sum[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) I::store_pair(c_of(r), sum[r][0], sum[r][1]);
}

// The same for `rows` <= R of them.
template <class M, int R, class C>
inline void product_of_some(int64_t rows, const typename M::Number* a, int64_t row, int64_t step,
                            const typename M::Number* b, int64_t b_row, const C& c_of,
                            int64_t depth, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return product_of_rows<M, R>(a, row, step, b, b_row, c_of, depth, add);
    product_of_some<M, R - 1>(rows, a, row, step, b, b_row, c_of, depth, add);
  }
}

// For any number of rows, and of columns a multiple of 2 kLanes; c_of(i): row i of C.
template <class M, class C>
void product_into(const typename M::Number* a, int64_t row, int64_t step,
                  const typename M::Number* b, int64_t b_row, const C& c_of, int64_t rows,
                  int64_t columns, int64_t depth, bool add) {
  constexpr int lanes = M::Lanes::kLanes;
  constexpr int kRows = lanes == 16 ? 12 : 6;  // with 32 or 16 registers
  for (int64_t j = 0; j < columns; j += 2 * lanes) {
    for (int64_t i = 0; i < rows; i += kRows) {
      product_of_some<M, kRows>(
          rows - i < kRows ? rows - i : kRows, a + i * row, row, step, b + j, b_row,
          [&](int r) { return c_of(i + r) + j; }, depth, add);
    }
  }
}

// C with rows c_row apart.
template <class I>
void product(const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c,
             int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
  product_into<Fp32<I>>(
      a, row, step, b, b_row, [&](int64_t i) { return c + i * c_row; }, rows, columns, depth, add);
}

}  // namespace
}  // namespace pk
