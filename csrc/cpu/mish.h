// The Mish of ../mish.h on vectors.
#pragma once

#include "../mish.h"
#include "simd.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

template <typename Real>
inline Vector<Real> at_most_linear(Vector<Real> x) {  // NaN stays NaN
  return x > Real(kLinear) ? broadcast(Real(kLinear)) : x;
}

template <typename Real>
inline Vector<Real> mish(Vector<Real> x) {
  const Vector<Real> e = exponential<Real>(at_most_linear<Real>(x)), n = e * (e + Real(2));
  return x * (n / (n + Real(2)));
}

template <typename Real>
inline Vector<Real> mish_slope(Vector<Real> x) {
  x = at_most_linear<Real>(x);
  const Vector<Real> e = exponential<Real>(x), n = e * (e + Real(2)), inverse = Real(1) / (n + Real(2));
  return inverse * (n + Real(4) * x * e * ((e + Real(1)) * inverse));
}

}  // namespace
}  // namespace fastflow
