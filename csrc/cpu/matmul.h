// Products of small matrices in the caches, by tiles of kRows x kColumns sums in registers.
#pragma once

#include "simd.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

// kRows x 2 vectors of sums, two vectors of the right matrix and an element of the left one fill the registers.
#if defined(__AVX512F__)
constexpr int64_t kRows = 12;  // of 32 registers
#elif defined(__AVX2__)
constexpr int64_t kRows = 6;  // of 16
#else
constexpr int64_t kRows = 4;  // of 16, which also hold products where there is no fused multiply-add
#endif

template <typename Real>
constexpr int64_t kColumns = 2 * kLanes<Real>;

// Columns in panels of kColumns: element (k, j) is data[j / kColumns * panel_stride + k * stride + j % kColumns].
// A row-major matrix is one with panel_stride = kColumns.
template <typename Real>
struct Panels {
  const Real* data;
  int64_t stride, panel_stride;

  const Real* panel(int64_t p) const { return data + p * panel_stride; }
};

// The memory of a left matrix: one row after the other, or one column after the other.
enum class Left { rows, columns };

// What a product is added to: rows of kColumns numbers, all the same where the stride is 0, or zeros where data is
// null.
template <typename Real>
struct Start {
  const Real* data;
  int64_t stride;
};

// c = start + a b for `rows` rows and kColumns columns, with depth > 0.  Inside a larger function, or with a loop that
// may not run at all, the sums would not stay in registers.
template <Left layout, int64_t rows, typename Real>
[[gnu::noinline]] void multiply_tile(const Real* a, int64_t a_stride, const Real* b, int64_t b_stride, int64_t depth,
                                     Start<Real> start, Real* c, int64_t c_stride) {
  Vector<Real> sums[rows][2] = {};
  if (start.data)
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      sums[i][0] = load(start.data + i * start.stride);
      sums[i][1] = load(start.data + i * start.stride + kLanes<Real>);
    }
  do {
    const Vector<Real> left = load(b), right = load(b + kLanes<Real>);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const Vector<Real> factor = broadcast(layout == Left::rows ? a[i * a_stride] : a[i]);
      sums[i][0] += factor * left;
      sums[i][1] += factor * right;
    }
    a += layout == Left::rows ? 1 : a_stride;
    b += b_stride;
  } while (--depth);
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
    store(c + i * c_stride, sums[i][0]);
    store(c + i * c_stride + kLanes<Real>, sums[i][1]);
  }
}

// The same for 1 to kRows rows.
template <Left layout, typename Real, int64_t most = kRows>
inline void multiply_rows(int64_t rows, const Real* a, int64_t a_stride, const Real* b, int64_t b_stride, int64_t depth,
                          Start<Real> start, Real* c, int64_t c_stride) {
  if (rows == most)
    multiply_tile<layout, most>(a, a_stride, b, b_stride, depth, start, c, c_stride);
  else if constexpr (most > 1)
    multiply_rows<layout, Real, most - 1>(rows, a, a_stride, b, b_stride, depth, start, c, c_stride);
}

// c (+)= a b for all of `rows` rows and `panels` panels; whole panels of c are written.
template <Left layout, typename Real>
void multiply(int64_t rows, int64_t panels, int64_t depth, const Real* a, int64_t a_stride, Panels<Real> b, Real* c,
              int64_t c_stride, bool accumulate) {
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t i = 0; i < rows; i += kRows) {
      Real* tile = c + i * c_stride + p * kColumns<Real>;
      multiply_rows<layout>(min_of(kRows, rows - i), layout == Left::rows ? a + i * a_stride : a + i, a_stride,
                            b.panel(p), b.stride, depth, Start<Real>{accumulate ? tile : nullptr, c_stride}, tile,
                            c_stride);
    }
}

}  // namespace
}  // namespace fastflow
