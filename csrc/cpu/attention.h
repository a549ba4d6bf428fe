// Attention over a tree of segments, written once for every instruction set `I` (vec_*.h), in fp32.
//
// A tile is some queries of one segment and one head. Its keys are those of the segment, up to each
// query, and of its ancestors, in blocks. The forward is FlashAttention's (arXiv 2205.14135):
// scores of a block, the running maximum and sum of each row, and P V added to the output. The
// backward (arXiv 2307.08691, algorithm 2) computes P again from the log-sum-exp. All products are
// those of product.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "product.h"
#include "vec_math.h"

namespace pk {
namespace {  // why: rows.h

// Calls f(p) for p = 0, 2 kLanes, ... below count.
template <class I, class F>
inline void by_pairs(int64_t count, F&& f) {
  for (int64_t i = 0; i < count; i += 2 * I::kLanes) f(i);
}

// Keys [first, first + count) as a tile sees them; `ahead`: how many of them its first query sees
// from the first one on, were there no window. Each further query sees one more.
struct KeyBlock {
  int64_t first;
  int64_t count;
  int64_t ahead;

  int64_t padded(int64_t step) const { return (count + step - 1) / step * step; }
  int64_t end(int64_t row) const { return std::min(count, std::max<int64_t>(0, ahead + row)); }
  int64_t begin(int64_t row, int64_t window) const {
    return std::min(end(row), std::max<int64_t>(0, ahead + row - window));
  }
};

// Calls f(block) for the keys of queries [start, start + rows) of a segment.
template <class F>
void for_key_blocks(const Tree& t, int64_t segment, int64_t start, int64_t rows, F&& f) {
  const int64_t at = t.segment(segment).position + start - t.segment(segment).first;
  for (int64_t s = segment; s >= 0; s = t.parents[s]) {
    const Segment& keys = t.segment(s);
    const int64_t end = s == segment ? start + rows : keys.end;
    const int64_t unseen = at - t.window + 1 - keys.position;
    for (int64_t c = keys.first + std::max<int64_t>(0, unseen); c < end; c += kTileKeys) {
      f(KeyBlock{c, std::min(kTileKeys, end - c), at + 1 - (keys.position + c - keys.first)});
    }
  }
}

// One row of scores becomes e^(score - top), 0 outside [begin, end); `top`, `sum` and `out` of the
// row (null: nothing is in it yet) follow.
template <class I>
inline void softmax_row(float* scores, int64_t padded, int64_t begin, int64_t end, float& top,
                        float& sum, float* out, int64_t out_size) {
  using Reg = typename I::Reg;
  const float kNothing = minus_infinity<float>();
  std::fill(scores, scores + begin, kNothing);
  std::fill(scores + end, scores + padded, kNothing);
  Reg a, b, most = I::set(top);
  by_pairs<I>(padded, [&](int64_t i) {
    I::load_pair(scores + i, a, b);
    most = I::max(most, I::max(a, b));
  });
  const float highest = I::max_lane(most);
  if (highest == kNothing) return std::fill(scores, scores + padded, 0.0f);
  if (highest != top && out != nullptr) {
    const float less = std::exp(top - highest);
    sum *= less;
    by_pairs<I>(out_size, [&](int64_t i) {
      I::load_pair(out + i, a, b);
      I::store_pair(out + i, I::mul(a, I::set(less)), I::mul(b, I::set(less)));
    });
  }
  top = highest;
  const Exp<I, 6, true> exp(highest);
  Reg even = I::set(0.0f), odd = even;
  by_pairs<I>(padded, [&](int64_t i) {
    I::load_pair(scores + i, a, b);
    a = exp(a), b = exp(b);
    even = I::add(even, a), odd = I::add(odd, b);
    I::store_pair(scores + i, a, b);
  });
  sum += float(I::sum_lanes(I::add(even, odd)));
}

template <class I>
inline void cap_row(float* scores, int64_t padded, const Transform& cap) {
  typename I::Reg a, b, slope;
  by_pairs<I>(padded, [&](int64_t i) {
    I::load_pair(scores + i, a, b);
    a = transform<Vector<I>>(a, cap, true, slope), b = transform<Vector<I>>(b, cap, true, slope);
    I::store_pair(scores + i, a, b);
  });
}

template <class I>
void attend(const Tree& t, int64_t head, int64_t segment, int64_t start, int64_t rows) {
  const typename I::FlushSubnormals guard;
  const Transform cap{1.0f, float(t.softcap)};
  const int64_t group = head / (t.heads / t.key_heads);
  const int64_t query_row = t.heads * t.size, out_row = t.heads * t.value_size;
  const int64_t value_row = t.key_heads * t.value_size;
  const float* query = t.query + start * query_row + head * t.size;
  const float* keys = t.keys_across + group * t.size * t.columns;
  const float* values = t.values + group * t.value_size;
  float* out = t.out + start * out_row + head * t.value_size;
  alignas(64) float scores[kTileRows * kTileKeys];
  float top[kTileRows], sum[kTileRows] = {};
  std::fill(top, top + rows, minus_infinity<float>());
  bool first = true;
  for_key_blocks(t, segment, start, rows, [&](const KeyBlock& k) {
    const int64_t padded = k.padded(2 * I::kLanes);
    product<I>(query, query_row, 1, keys + k.first, t.columns, scores, kTileKeys, rows, padded,
               t.size, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kTileKeys;
      if (cap.cap > 0) cap_row<I>(row, padded, cap);
      softmax_row<I>(row, padded, k.begin(r, t.window), k.end(r), top[r], sum[r],
                     first ? nullptr : out + r * out_row, t.value_size);
    }
    product<I>(scores, kTileKeys, 1, values + k.first * value_row, value_row, out, out_row, rows,
               t.value_size, k.count, !first);
    first = false;
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* row = out + r * out_row;
    for (int64_t i = 0; i < t.value_size; ++i) row[i] /= sum[r];
    t.lse[(start + r) * t.heads + head] = top[r] + std::log(sum[r]);
  }
}

// A row of scores becomes P, one of d P becomes d scores; both are 0 outside [begin, end).
template <class I>
inline void gradient_row(float* scores, float* grads, int64_t padded, int64_t begin, int64_t end,
                         float lse, float inner, const Transform& cap) {
  using Reg = typename I::Reg;
  const Exp<I, 6, true> exp(lse);
  Reg a, b, c, d, slope_a, slope_b;
  by_pairs<I>(padded, [&](int64_t i) {
    I::load_pair(scores + i, a, b);
    I::load_pair(grads + i, c, d);
    if (cap.cap > 0) {
      a = transform<Vector<I>>(a, cap, true, slope_a);
      b = transform<Vector<I>>(b, cap, true, slope_b);
    }
    a = exp(a), b = exp(b);
    c = I::mul(a, I::sub(c, I::set(inner))), d = I::mul(b, I::sub(d, I::set(inner)));
    if (cap.cap > 0) c = I::mul(c, slope_a), d = I::mul(d, slope_b);
    I::store_pair(scores + i, a, b);
    I::store_pair(grads + i, c, d);
  });
  for (float* row : {scores, grads}) {
    std::fill(row, row + begin, 0.0f);
    std::fill(row + end, row + padded, 0.0f);
  }
}

template <class I>
void attend_backward(const Tree& t, int64_t head, int64_t segment, int64_t start, int64_t rows) {
  const typename I::FlushSubnormals guard;
  const Transform cap{1.0f, float(t.softcap)};
  const int64_t group = head / (t.heads / t.key_heads), sum = head / (t.heads / t.sums);
  const int64_t query_row = t.heads * t.size, out_row = t.heads * t.value_size;
  const int64_t key_row = t.key_heads * t.size;
  const int64_t key_sum_row = t.sums * t.size, value_sum_row = t.sums * t.value_size;
  const float* query = t.query + start * query_row + head * t.size;
  const float* keys = t.keys + group * t.size;
  const float* keys_across = t.keys_across + group * t.size * t.columns;
  const float* values_across = t.values_across + group * t.value_size * t.columns;
  const float* out = t.out + start * out_row + head * t.value_size;
  const float* grad = t.grad + start * out_row + head * t.value_size;
  float* query_grad = t.query_grad + start * query_row + head * t.size;
  float* key_grad = t.key_grad + sum * t.size;
  float* value_grad = t.value_grad + sum * t.value_size;
  alignas(64) float scores[kTileRows * kTileKeys];
  alignas(64) float grads[kTileRows * kTileKeys];
  float inner[kTileRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < t.value_size; ++i) {
      inner[r] += grad[r * out_row + i] * out[r * out_row + i];
    }
  }
  bool first = true;
  for_key_blocks(t, segment, start, rows, [&](const KeyBlock& k) {
    const int64_t padded = k.padded(2 * I::kLanes);
    product<I>(query, query_row, 1, keys_across + k.first, t.columns, scores, kTileKeys, rows,
               padded, t.size, false);
    product<I>(grad, out_row, 1, values_across + k.first, t.columns, grads, kTileKeys, rows, padded,
               t.value_size, false);
    for (int64_t r = 0; r < rows; ++r) {
      gradient_row<I>(scores + r * kTileKeys, grads + r * kTileKeys, padded, k.begin(r, t.window),
                      k.end(r), t.lse[(start + r) * t.heads + head], inner[r], cap);
    }
    product<I>(scores, 1, kTileKeys, grad, out_row, value_grad + k.first * value_sum_row,
               value_sum_row, k.count, t.value_size, rows, true);
    product<I>(grads, 1, kTileKeys, query, query_row, key_grad + k.first * key_sum_row, key_sum_row,
               k.count, t.size, rows, true);
    product<I>(grads, kTileKeys, 1, keys + k.first * key_row, key_row, query_grad, query_row, rows,
               t.size, k.count, !first);
    first = false;
  });
}

template <class I>
constexpr AttentionKernels attention_kernels() {
  return {attend<I>, attend_backward<I>};
}

}  // namespace
}  // namespace pk
