// Rows of memory -> panels of kColumns columns, the form of a product's right matrix.
#pragma once

#include "dtypes.h"
#include "matmul.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

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

// kColumns rows of `depth` values, null where there is none, become a panel: element (k, row) at to[k * kColumns +
// row].
template <typename T>
void transpose_rows(const T* const* rows, int64_t depth, Wide<T>* to) {
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

}  // namespace
}  // namespace fastflow
