// GELU (erf and tanh) and SiLU with their derivatives, on vectors.
#pragma once

#include <cmath>

#include "../linear.h"
#include "simd.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

template <typename Real>
inline Vector<Real> absolute(Vector<Real> x) {
  return x < 0 ? -x : x;
}

// P(X < x) of the standard normal distribution.
inline Vector<double> normal_cdf(Vector<double> x) {
  for (int64_t l = 0; l < kLanes<double>; ++l) x[l] = 0.5 * std::erfc(-0.70710678118654752440 * x[l]);
  return x;
}

// With q(z) = -log P(X < -z), by a polynomial on [0, 6]: minimax in the error of the probability, which is 2.3e-9, and
// 3.3e-8 with float32's rounding.  Beyond, the probability is below 1e-9.
inline Vector<float> normal_cdf(Vector<float> x) {
  constexpr float terms[] = {0.693147182f,    0.797884941f,    0.318305641f,    0.036354553f,    -0.0048227245f,
                             8.98688086e-06f, 0.000185509896f, -4.8052596e-05f, 5.93329605e-06f, -3.05698251e-07f};
  constexpr int count = sizeof terms / sizeof *terms;
  const Vector<float> z = absolute<float>(x);
  Vector<float> q = broadcast(terms[count - 1]);
#pragma GCC unroll 16
  for (int k = count - 2; k >= 0; --k) q = q * z + terms[k];
  const Vector<float> tail = z > 6.0f ? Vector<float>{} : exponential<float>(-q);
  return x > 0 ? 1.0f - tail : tail;
}

// 1 / (1 + exp(-x)), and its derivative, whose relative error is small on both sides.
template <typename Real>
struct Sigmoid {
  static constexpr Real kLargest = sizeof(Real) == 4 ? 88 : 709;
  Vector<Real> power, value;

  explicit Sigmoid(Vector<Real> x)
      : power(exponential<Real>(-x > kLargest ? broadcast(kLargest) : -x)), value(Real(1) / (power + Real(1))) {}
  Vector<Real> derivative() const { return power * value * value; }
};

template <typename Real>
struct Gelu {
  Vector<Real> x, cdf;

  explicit Gelu(Vector<Real> x) : x(x), cdf(normal_cdf(x)) {}
  Vector<Real> value() const { return x * cdf; }
  Vector<Real> derivative() const {
    return cdf + x * Real(0.39894228040143267794) * exponential<Real>(x * x * Real(-0.5));
  }
};

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and (1 + tanh(u)) / 2 = sigmoid(2 u).
template <typename Real>
struct GeluTanh {
  static constexpr Real kFactor = 1.59576912160573071176, kCubic = 0.044715;
  Vector<Real> x;
  Sigmoid<Real> gate;

  explicit GeluTanh(Vector<Real> x) : x(x), gate(x * (x * x * kCubic + Real(1)) * kFactor) {}
  Vector<Real> value() const { return x * gate.value; }
  Vector<Real> derivative() const {
    return gate.value + x * gate.derivative() * (x * x * (3 * kCubic) + Real(1)) * kFactor;
  }
};

template <typename Real>
struct Silu {
  Vector<Real> x;
  Sigmoid<Real> gate;

  explicit Silu(Vector<Real> x) : x(x), gate(x) {}
  Vector<Real> value() const { return x * gate.value; }
  Vector<Real> derivative() const { return gate.value + x * gate.derivative(); }
};

// Call visit with the function of a vector that makes one of the above.
template <typename Real, typename Visit>
void with_activation(Activation activation, const Visit& visit) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::gelu:
      return visit([](Vector<Real> x) { return Gelu<Real>(x); });
    case Activation::gelu_tanh:
      return visit([](Vector<Real> x) { return GeluTanh<Real>(x); });
    case Activation::silu:
      return visit([](Vector<Real> x) { return Silu<Real>(x); });
  }
}

}  // namespace
}  // namespace fastflow
