// The storage types of logits and their scalar conversions (fp32 arithmetic everywhere else).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pk {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Codes of the C ABI; pro_kernels/backends/native.py has the same order.
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDTypes = 3 };

static inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float to_float(float x) {
  return x;
}

static inline float to_float(BFloat16 x) {
  return as_float(uint32_t(x.bits) << 16);
}

static inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent re-biased by one multiplication, which also normalises subnormals.
  const float scaled = as_float(magnitude << 13) * as_float(0x77800000u);  // 2^112
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : as_bits(scaled);
  return as_float(bits | sign);
}

static inline void from_float(float x, float& out) {
  out = x;
}

// Round to nearest even; NaN stays NaN.
static inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = as_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(nan ? (bits >> 16) | 0x40u : rounded);
}

static inline void from_float(float x, Half& out) {
  const uint32_t sign = (as_bits(x) >> 16) & 0x8000u;
  const uint32_t bits = as_bits(x) & 0x7fffffffu;
  // Subnormal halves: adding 0.5 leaves the rounded mantissa in the low bits.
  const uint32_t small = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  uint32_t half = bits < 0x38800000u ? small : normal;
  half = bits >= 0x477ff000u ? 0x7c00u : half;                         // rounds to infinity
  half = bits > 0x7f800000u ? 0x7e00u | (bits >> 13 & 0x3ffu) : half;  // NaN
  out.bits = uint16_t(half | sign);
}

// Calls f(p) with a pointer of the type that `dtype` names.
template <class F>
static inline void with_type(void* p, int32_t dtype, F&& f) {
  if (dtype == kFloat32) return f(static_cast<float*>(p));
  if (dtype == kBFloat16) return f(static_cast<BFloat16*>(p));
  f(static_cast<Half*>(p));
}

template <class F>
static inline void with_type(const void* p, int32_t dtype, F&& f) {
  with_type(const_cast<void*>(p), dtype,
            [&](auto* x) { f(static_cast<const std::remove_pointer_t<decltype(x)>*>(x)); });
}

}  // namespace pk
