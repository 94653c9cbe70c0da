// The 16-bit floats as plain bits.  No compiler or CPU support is needed, and every conversion is free of branches, so
// that loops over them are vectorised.
#pragma once

#include "../common.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type to compute in.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

// A choice without a branch, which the compiler could not vectorise where one side is floating-point arithmetic.
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const int32_t magnitude = x.bits & 0x7fff;
  const uint32_t normal = static_cast<uint32_t>((magnitude << 13) + (112 << 23));  // exponent bias 15 -> 127
  const uint32_t special = static_cast<uint32_t>(magnitude << 13) | 0x7f800000;    // infinity, NaN
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, static_cast<float>(magnitude) * 0x1p-24f);
  const uint32_t finite = select(magnitude < 0x0400, subnormal, normal);
  return __builtin_bit_cast(float, select(magnitude < 0x7c00, finite, special) | sign);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }

// Round to nearest, ties to even; NaN stays NaN.
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

// What lies beyond the range, infinity too, becomes +-65504, and NaN stays NaN: see fastflow/ops/half.py.  A gradient
// that must overflow to infinity is stored as float and rounded by torch.
inline void narrow(float x, Half& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffff);
  const uint32_t normal = static_cast<uint32_t>(magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The spacing of floats in [0.5, 1) is that of subnormal halves, so this addition does the rounding.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000;
  const uint32_t finite = select(magnitude < 0x38800000, subnormal, normal);
  const uint32_t special = select(magnitude > 0x7f800000, 0x7e00, 0x7bff);
  out.bits = static_cast<uint16_t>(select(magnitude < 0x477ff000, finite, special) | sign);
}

// Call visit with a value of the C++ type of `dtype`.
template <typename Visit>
void with_dtype(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::float32:
      return visit(float{});
    case Dtype::float64:
      return visit(double{});
    case Dtype::float16:
      return visit(Half{});
    case Dtype::bfloat16:
      return visit(BFloat16{});
  }
}

}  // namespace
}  // namespace fastflow
