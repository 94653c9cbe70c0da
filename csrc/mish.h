// Mish (Misra 2019) with its derivative.
#pragma once

#include <cmath>

#include "common.h"

namespace fastflow {

// mish(x) = x tanh(log(1 + exp(x))) = x n / (n + 2) with e = exp(x) and n = e (e + 2).  From kLinear on the factor
// rounds to 1.
constexpr int kLinear = 20;

template <typename Real>
FASTFLOW_HD static inline Real mish(Real x) {
  const Real e = std::exp(x > kLinear ? Real(kLinear) : x), n = e * (e + Real(2));
  return x * (n / (n + Real(2)));
}

// mish'(x) = n / (n + 2) + 4 x e (e + 1) / (n + 2)^2
template <typename Real>
FASTFLOW_HD static inline Real mish_slope(Real x) {
  if (x > kLinear) x = Real(kLinear);
  const Real e = std::exp(x), n = e * (e + Real(2)), inverse = Real(1) / (n + Real(2));
  return inverse * (n + Real(4) * x * e * ((e + Real(1)) * inverse));
}

}  // namespace fastflow
