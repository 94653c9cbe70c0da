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

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t bits = magnitude < 0x0400   ? __builtin_bit_cast(uint32_t, subnormal)
                        : magnitude < 0x7c00 ? normal
                                             : special;
  return __builtin_bit_cast(float, bits | sign);
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

inline void narrow(float x, Half& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The spacing of floats in [0.5, 1) is that of subnormal halves, so this addition does the rounding.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>((magnitude < 0x477ff000u ? finite : special) | sign);
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
