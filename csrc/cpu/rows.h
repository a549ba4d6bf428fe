// The row kernels, written once for every instruction set `I` (vec_*.h) and dtype `T`.
//
// V columns of one row. Statistics read memory once: exponentials are summed block by block, each
// relative to the maximum so far, and the maximum is tracked on the way. Sums are fp32 in
// 2 * kLanes accumulators inside a block and double across blocks. The gradient is a second pass,
// from L2. Nothing depends on alignment or on other rows, so neither does any bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "filter.h"
#include "kernels.h"
#include "vec_math.h"

namespace pk {
// Unnamed: the functions of one unit must never stand in for those of another, whose processor
// may lack the instructions.
namespace {

// Columns: a part of any L1, and 128 numbers in each fp32 partial sum.
template <class I>
constexpr int64_t kBlock = 256 * I::kLanes;

// Calls f(a, b) for each pair of registers of p[0:count]; the last one is filled up with -inf.
template <class I, class T, class F>
inline void for_pairs(const T* p, int64_t count, F&& f) {
  constexpr int64_t step = 2 * I::kLanes;
  typename I::Reg a, b;
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    I::load_pair(p + i, a, b);
    f(a, b);
  }
  if (i == count) return;
  float rest[step];
  for (int64_t j = 0; j < step; ++j) {
    rest[j] = i + j < count ? to_float(p[i + j]) : minus_infinity<float>();
  }
  I::load_pair(rest, a, b);
  f(a, b);
}

template <class I, class T>
inline float max_of(const T* p, int64_t count) {
  typename I::Reg even = I::set(minus_infinity<float>());
  typename I::Reg odd = even;
  for_pairs<I>(p, count, [&](typename I::Reg a, typename I::Reg b) {
    even = I::max(even, a);
    odd = I::max(odd, b);
  });
  return I::max_lane(I::max(even, odd));
}

// Adds the exponentials of p[0:count] to the sum, relative to `shift`; returns the maximum.
template <class I, bool kDot, bool kExact, class T>
inline float add_exps(const T* p, int64_t count, float shift, ExpSum<double>& sum) {
  using Reg = typename I::Reg;
  using RowExp = Exp<I, kExact || sizeof(T) == 4 ? 6 : 5, kExact>;
  const RowExp exp(shift);
  Reg top_even = I::set(minus_infinity<float>()), top_odd = top_even;
  Reg sum_even = I::set(0.0f), sum_odd = sum_even, dot_even = sum_even, dot_odd = sum_even;
  // Finite: -inf columns then add 0 * finite.
  const auto distance = [&](Reg z) { return I::max(I::set(-104.0f), I::sub(z, I::set(shift))); };
  for_pairs<I>(p, count, [&](Reg a, Reg b) {
    top_even = I::max(top_even, a);
    top_odd = I::max(top_odd, b);
    const Reg exp_a = exp(a);
    const Reg exp_b = exp(b);
    sum_even = I::add(sum_even, exp_a);
    sum_odd = I::add(sum_odd, exp_b);
    if (kDot) {
      dot_even = I::fma(exp_a, distance(a), dot_even);
      dot_odd = I::fma(exp_b, distance(b), dot_odd);
    }
  });
  const double correction = RowExp::correction(shift);
  sum.sum += correction * (I::sum_lanes(sum_even) + I::sum_lanes(sum_odd));
  if (kDot) sum.dot += correction * (I::sum_lanes(dot_even) + I::sum_lanes(dot_odd));
  return I::max_lane(I::max(top_even, top_odd));
}

template <class I, bool kDot, class T>
inline float add_exps(const T* p, int64_t count, ExpSum<double>& sum) {
  const float shift = float(exp_shift(sum.max));
  return is_moderate(shift) ? add_exps<I, kDot, false>(p, count, shift, sum)
                            : add_exps<I, kDot, true>(p, count, shift, sum);
}

// Adds a block, from L1. Its maximum is found on the way: a sum may be relative to anything close
// to the maximum, so few blocks turn out to need a higher one and a second pass.
template <class I, bool kDot, class T>
inline void add_block(const T* p, int64_t count, ExpSum<double>& sum) {
  constexpr float slack = 2.0f;  // costs nothing in accuracy: x is still rounded below an ulp of 2
  if (sum.max == minus_infinity<double>()) sum.max = max_of<I>(p, count);
  const ExpSum<double> before = sum;
  const float top = add_exps<I, kDot>(p, count, sum);
  if (!(top > sum.max + slack)) return;
  sum = before;
  raise_max(sum, double(top));
  add_exps<I, kDot>(p, count, sum);
}

// z and dz/draw of a register of raw logits.
template <class I>
inline typename I::Reg transform(typename I::Reg raw, const Transform& t, typename I::Reg& slope) {
  return transform<Vector<I>>(raw, t, t.cap > 0, slope);
}

// fp32 values of p[0:count], in order.
template <class I>
inline void to_floats(const float* p, int64_t count, float* out) {
  std::copy(p, p + count, out);
}
template <class I>
inline void to_floats(const BFloat16* p, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(p[i]);
}
template <class I>
inline void to_floats(const Half* p, int64_t count, float* out) {
  constexpr int64_t step = 2 * I::kLanes;
  typename I::Reg a, b;
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    I::load_pair(p + i, a, b);  // in order for this type
    I::store_pair(out + i, a, b);
  }
  for (; i < count; ++i) out[i] = to_float(p[i]);
}

// `values` has room for a whole block, so the tail may be transformed with what lies behind it.
template <class I>
inline void transform_block(float* values, int64_t count, const Transform& t) {
  constexpr int64_t step = 2 * I::kLanes;
  std::fill(values + count, values + (count + step - 1) / step * step, 0.0f);
  typename I::Reg a, b, slope;
  for (int64_t i = 0; i < count; i += step) {
    I::load_pair(values + i, a, b);
    I::store_pair(values + i, transform<I>(a, t, slope), transform<I>(b, t, slope));
  }
}

// Blocks are read as they lie, except where a value has to change first: under a softcap or scale,
// and where the exact target logit takes the place of the stored one.
template <class I, class T, bool kTransform, bool kDot>
RowStats stats(const T* row, int64_t columns, const Target& target, const Transform& t) {
  RowStats result{empty_exp_sum<double>(), std::numeric_limits<float>::quiet_NaN()};
  alignas(64) float values[kBlock<I>];
  for (int64_t start = 0; start < columns; start += kBlock<I>) {
    const int64_t count = std::min(kBlock<I>, columns - start);
    const int64_t hit = target.column - start;
    const bool has_target = hit >= 0 && hit < count;
    if (!kTransform && !has_target) {
      add_block<I, kDot>(row + start, count, result.sum);
      continue;
    }
    to_floats<I>(row + start, count, values);
    if (has_target && target.exact) values[hit] = target.raw;
    if (kTransform) transform_block<I>(values, count, t);
    if (has_target) result.target = values[hit];
    add_block<I, kDot>(values, count, result.sum);
  }
  return result;
}

// out = one(row), by pairs of registers.
template <class I, class T, class F>
inline void map_row(const T* row, T* out, int64_t columns, const F& one) {
  constexpr int64_t step = 2 * I::kLanes;
  const auto one_pair = [&](const T* from, T* to) {
    typename I::Reg a, b;
    I::load_pair(from, a, b);
    I::store_pair(to, one(a), one(b));
  };
  int64_t i = 0;
  for (; i + step <= columns; i += step) one_pair(row + i, out + i);
  if (i == columns) return;
  T rest[step] = {};
  std::copy(row + i, row + columns, rest);
  one_pair(rest, rest);
  std::copy(rest, rest + (columns - i), out + i);
}

template <class I, class T, bool kTransform, bool kExact>
void gradient(const T* row, T* out, int64_t columns, float shift, float factor,
              const Transform& t) {
  using Reg = typename I::Reg;
  using RowExp = Exp<I, kExact ? 6 : 4, kExact>;
  const RowExp exp(shift, float(factor * RowExp::correction(shift)));
  map_row<I>(row, out, columns, [&](Reg raw) {
    if constexpr (kTransform) {
      Reg slope;
      const Reg z = transform<I>(raw, t, slope);
      return I::mul(exp.times_factor(z), slope);
    } else {
      return exp.times_factor(raw);
    }
  });
}

// The same with a factor that is linear in z: what an entropy adds.
template <class I, class T>
void tilted_gradient(const T* row, T* out, int64_t columns, float shift, float factor, float tilt,
                     const Transform& t) {
  using Reg = typename I::Reg;
  const Exp<I, 6, true> exp(shift);
  map_row<I>(row, out, columns, [&](Reg raw) {
    Reg slope;
    const Reg z = transform<I>(raw, t, slope);
    // Finite: -inf columns are then 0 * finite. max would drop a NaN, which exp keeps.
    const Reg below = I::max(I::set(-104.0f), I::sub(z, I::set(shift)));
    return I::mul(I::mul(exp(z), I::fma(below, I::set(tilt), I::set(factor))), slope);
  });
}

template <class I, class T>
RowStats stats_entry(const void* row, int64_t columns, const Target& target, const Transform& t,
                     bool with_dot) {
  const typename I::FlushSubnormals guard;
  const T* p = static_cast<const T*>(row);
  const bool plain = t.scale == 1.0f && !(t.cap > 0);
  if (plain && !with_dot) return stats<I, T, false, false>(p, columns, target, t);
  if (plain) return stats<I, T, false, true>(p, columns, target, t);
  if (!with_dot) return stats<I, T, true, false>(p, columns, target, t);
  return stats<I, T, true, true>(p, columns, target, t);
}

template <class I, class T>
void gradient_entry(const void* row, void* out, int64_t columns, float shift, float factor,
                    const Transform& t) {
  const typename I::FlushSubnormals guard;
  const T* from = static_cast<const T*>(row);
  T* to = static_cast<T*>(out);
  const bool plain = t.scale == 1.0f && !(t.cap > 0);
  // 16-bit results: less is exact to the last bit or nearly so.
  if constexpr (sizeof(T) == 2) {
    if (plain && is_moderate(shift)) {
      return gradient<I, T, false, false>(from, to, columns, shift, factor, t);
    }
  }
  if (plain) return gradient<I, T, false, true>(from, to, columns, shift, factor, t);
  gradient<I, T, true, true>(from, to, columns, shift, factor, t);
}

template <class I, class T>
void tilted_gradient_entry(const void* row, void* out, int64_t columns, float shift, float factor,
                           float tilt, const Transform& t) {
  const typename I::FlushSubnormals guard;
  tilted_gradient<I>(static_cast<const T*>(row), static_cast<T*>(out), columns, shift, factor, tilt,
                     t);
}

template <class I, class T>
constexpr RowKernels row_kernels() {
  return {stats_entry<I, T>, gradient_entry<I, T>, tilted_gradient_entry<I, T>};
}

// The table of instruction set I, in the order of DType.
template <class I>
constexpr Isa isa_table(const char* name) {
  using Pairs = typename I::Pairs;
  using M = std::conditional_t<std::is_void_v<Pairs>, Floats<I>, PairsOfBf16<Pairs>>;
  return {name,
          {row_kernels<I, float>(), row_kernels<I, BFloat16>(), row_kernels<I, Half>()},
          attention_kernels<I>(),
          filter_kernels<I, M>()};
}

}  // namespace
}  // namespace pk
