// Weights in the order in which products read them: for every panel of kColumns rows of the weight, its bias, then
// kColumns values per input channel.  What a panel has beyond the last row is zero.
#pragma once

#include "../linear.h"
#include "dtypes.h"
#include "matmul.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

constexpr int64_t kPanelDepth = 256;  // a product goes by so many channels at a time, whose panel stays in the cache

// Rows become columns: Eklundh's transposition, which swaps blocks of half the size in each step.
template <typename Real>
inline void transpose(Vector<Real> (&x)[kLanes<Real>]) {
  constexpr int64_t lanes = kLanes<Real>;
  const Integers<Real> lane = lane_numbers<Real>();
#pragma GCC unroll 8
  for (int64_t distance = lanes / 2; distance > 0; distance /= 2) {
    const auto d = static_cast<Integer<Real>>(distance), width = static_cast<Integer<Real>>(lanes);
    const Integers<Real> upper = (lane & d) != 0;
    const Integers<Real> low = upper ? lane - d + width : lane;  // lanes of the second operand count on
    const Integers<Real> high = upper ? lane + width : lane + d;
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i)
      if (!(i & distance)) {
        const Vector<Real> a = x[i], b = x[i + distance];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + distance] = __builtin_shuffle(a, b, high);
      }
  }
}

template <typename T>
inline Vector<Wide<T>> load_wide(const T* from) {
  Vector<Wide<T>> x = {};
  for (int64_t l = 0; l < kLanes<Wide<T>>; ++l) x[l] = widen(from[l]);
  return x;
}
template <>
inline Vector<float> load_wide(const float* from) {
  return load(from);
}
template <>
inline Vector<double> load_wide(const double* from) {
  return load(from);
}

// kColumns rows of `depth` values, null where there is none -> element (k, row) at to[k * kColumns + row].
template <typename T>
void pack_rows(const T* const* rows, int64_t depth, Wide<T>* to) {
  using Real = Wide<T>;
  constexpr int64_t lanes = kLanes<Real>, columns = kColumns<Real>;
  int64_t k = 0;
  for (; k + columns <= depth; k += columns)  // a square, so that cache lines are read and written as a whole
    for (int64_t row = 0; row < columns; row += lanes)
      for (int64_t step = k; step < k + columns; step += lanes) {
        Vector<Real> tile[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) tile[i] = rows[row + i] ? load_wide(rows[row + i] + step) : Vector<Real>{};
        transpose<Real>(tile);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) store(to + (step + i) * columns + row, tile[i]);
      }
  for (; k < depth; ++k)
    for (int64_t i = 0; i < columns; ++i) to[k * columns + i] = rows[i] ? widen(rows[i][k]) : Real{};
}

template <typename Real>
constexpr int64_t panels_of(int64_t rows) {
  return ceil_div(rows, kColumns<Real>);
}

// Where panel p begins; its values follow the bias.
template <typename Real>
inline int64_t panel_offset(int64_t depth, int64_t p) {
  return p * (depth + 1) * kColumns<Real>;
}

template <typename T>
void pack_panel(const Weights& weights, int64_t p, Wide<T>* packed) {
  using Real = Wide<T>;
  const T* rows[kColumns<Real>] = {};
  Real* panel = packed + panel_offset<Real>(weights.depth, p);
  for (int64_t i = 0; i < kColumns<Real>; ++i) panel[i] = 0;
  int64_t first = -p * kColumns<Real>;  // of a part, in this panel
  for (int64_t w = 0; w < weights.count; first += weights.parts[w++].rows) {
    const Weight& part = weights.parts[w];
    const T* bias = static_cast<const T*>(part.bias.data);
    for (int64_t i = max_of(first, 0); i < min_of(first + part.rows, kColumns<Real>); ++i) {
      rows[i] = static_cast<const T*>(part.data) + (i - first) * part.stride;
      if (bias) panel[i] = widen(bias[(i - first) * part.bias.channel_stride]);
    }
  }
  pack_rows(rows, weights.depth, panel + kColumns<Real>);
}

// c = bias + a * panel, for `rows` rows and kColumns columns.
template <typename Real>
void multiply_panel(int64_t rows, int64_t depth, const Real* a, int64_t a_stride, Real* panel, Real* c,
                    int64_t c_stride) {
  const Vector<Real> left = load(panel), right = load(panel + kLanes<Real>);
  for (int64_t i = 0; i < rows; ++i) {
    store(c + i * c_stride, left);
    store(c + i * c_stride + kLanes<Real>, right);
  }
  for (int64_t k = 0; k < depth; k += kPanelDepth)
    multiply<Left::rows>(rows, 1, min_of(kPanelDepth, depth - k), a + k, a_stride,
                         Panels<Real>{panel + (k + 1) * kColumns<Real>, kColumns<Real>, 0}, c, c_stride, true);
}

}  // namespace
}  // namespace fastflow
