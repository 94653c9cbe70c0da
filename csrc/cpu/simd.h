// Vectors of the instruction set that the file is compiled for, as GCC's and Clang's vector extensions.
#pragma once

#include "../common.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using integer = int32_t;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  using integer = int64_t;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integers __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;
template <typename Real>
using Integer = typename VectorOf<Real>::integer;  // as wide as Real
template <typename Real>
using Integers = typename VectorOf<Real>::integers;  // also the result of a comparison

template <typename Real>
constexpr int64_t kLanes = kVectorBytes / sizeof(Real);

// The pointers need no alignment.
template <typename Real>
inline Vector<Real> load(const Real* from) {
  Vector<Real> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <typename Real>
inline void store(Real* to, Vector<Real> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

template <typename Real>
inline Vector<Real> broadcast(Real x) {
  return x - Vector<Real>{};
}

template <typename Real>
inline Integers<Real> lane_numbers() {
  Integers<Real> lanes;
  for (int64_t l = 0; l < kLanes<Real>; ++l) lanes[l] = l;
  return lanes;
}

template <typename Real>
inline Vector<Real> larger_of(Vector<Real> x, Vector<Real> y) {
  return x > y ? x : y;
}

// combine(x[0], x[1], ...), in pairs, pairs of pairs and so on.
template <typename Real, typename Combine>
inline Real reduce(Vector<Real> x, const Combine& combine) {
#pragma GCC unroll 8
  for (int64_t distance = kLanes<Real> / 2; distance > 0; distance /= 2)
    x = combine(x, __builtin_shuffle(x, lane_numbers<Real>() ^ static_cast<Integer<Real>>(distance)));
  return x[0];
}

template <typename Real>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer, which is left in the low bits
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -87.33f;  // below, the result would not be a normal number
  static constexpr int kMantissaBits = 23, kTerms = 7;
};
template <>
struct Exponential<double> {
  static constexpr double kShift = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kLowest = -708.39;
  static constexpr int kMantissaBits = 52, kTerms = 13;
};

template <typename Real>
constexpr Real inverse_factorial(int k) {
  double factorial = 1;
  for (int factor = 2; factor <= k; ++factor) factorial *= factor;
  return static_cast<Real>(1 / factorial);
}

// exp(x) for x up to about 88 (709), within 2 units in the last place; 0 where it would be subnormal; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2)/2, and exp(r) by its Taylor series, whose remainder is below half a unit.
template <typename Real>
inline Vector<Real> exponential(Vector<Real> x) {
  using Parameters = Exponential<Real>;
  const Vector<Real> shifted = x * Real(1.44269504088896340736) + Parameters::kShift;
  const Vector<Real> n = shifted - Parameters::kShift;
  const Vector<Real> r = (x - n * Parameters::kLn2High) - n * Parameters::kLn2Low;
  Vector<Real> series = broadcast(inverse_factorial<Real>(Parameters::kTerms));
#pragma GCC unroll 16
  for (int k = Parameters::kTerms - 1; k >= 0; --k) series = series * r + inverse_factorial<Real>(k);
  const Integers<Real> power = __builtin_bit_cast(Integers<Real>, shifted) << Parameters::kMantissaBits;
  const Integers<Real> bits = __builtin_bit_cast(Integers<Real>, series) + power;
  return x < Parameters::kLowest ? Vector<Real>{} : __builtin_bit_cast(Vector<Real>, bits);
}

}  // namespace
}  // namespace fastflow
