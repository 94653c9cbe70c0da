// Weights in the order in which products read them: for every panel of kColumns rows of the weight, its bias, then
// kColumns values per input channel.  What a panel has beyond the last row is zero.
#pragma once

#include "../linear.h"
#include "dtypes.h"
#include "matmul.h"
#include "transpose.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

constexpr int64_t kPanelDepth = 256;  // a product goes by so many channels at a time, whose panel stays in the cache

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
  transpose_rows(rows, weights.depth, panel + kColumns<Real>);
}

// Whether packed weights are these, as far as one element and one bias in every two panels tell.  Bits are compared, as
// NaN differs from itself.
template <typename T>
bool holds_panels(const Weights& weights, const void* packed) {
  using Real = Wide<T>;
  int64_t row = 0;  // of all parts
  for (int64_t w = 0; w < weights.count; ++w) {
    const Weight& part = weights.parts[w];
    for (int64_t r = 0; r < part.rows; r += 2 * kColumns<Real> - 1) {
      const int64_t k = (r * 31) % weights.depth, p = (row + r) / kColumns<Real>, column = (row + r) % kColumns<Real>;
      const Real* panel = static_cast<const Real*>(packed) + panel_offset<Real>(weights.depth, p) + column;
      const T* bias = static_cast<const T*>(part.bias.data);
      const Real expected[] = {bias ? widen(bias[r * part.bias.channel_stride]) : Real(0),
                               widen(static_cast<const T*>(part.data)[r * part.stride + k])};
      const Real found[] = {panel[0], panel[(k + 1) * kColumns<Real>]};
      if (__builtin_memcmp(expected, found, sizeof found)) return false;
    }
    row += part.rows;
  }
  return true;
}

// c = start + a * panel for `rows` rows, `depth` values of the panel from `values` on.  Meanwhile as many from `ahead`
// on, which the next product reads, come closer: a model's weights are larger than every cache, and fetching them would
// take a tenth of the time.
template <typename Real>
void multiply_packed(int64_t rows, int64_t depth, const Real* a, int64_t a_stride, const Real* values,
                     const Real* ahead, Start<Real> start, Real* c, int64_t c_stride) {
  constexpr int64_t line = 64 / sizeof(Real);
  const int64_t count = depth * kColumns<Real>, share = ceil_div(ceil_div(count, ceil_div(rows, kRows)), line) * line;
  for (int64_t i = 0, next = 0; i < rows; i += kRows, next += share) {
    for (int64_t n = next; n < min_of(next + share, count); n += line) __builtin_prefetch(ahead + n, 0, 2);
    multiply_rows<Left::rows>(min_of(kRows, rows - i), a + i * a_stride, a_stride, values, kColumns<Real>, depth,
                              Start<Real>{start.data + i * start.stride, start.stride}, c + i * c_stride, c_stride);
  }
}

// c = bias + a * weight in `panels` panels from `first` on, for `rows` rows.  The panels take turns within a part of
// the channels, so that this part of a stays in the cache; the panel that is next comes closer.
template <typename Real>
void multiply_panels(int64_t rows, int64_t panels, int64_t depth, const Real* a, int64_t a_stride, const Real* packed,
                     int64_t first, Real* c, int64_t c_stride) {
  const auto values_of = [&](int64_t p, int64_t k) {
    return packed + panel_offset<Real>(depth, first + p) + (k + 1) * kColumns<Real>;
  };
  for (int64_t k = 0; k < depth; k += kPanelDepth) {
    const int64_t count = min_of(kPanelDepth, depth - k);
    for (int64_t p = 0; p < panels; ++p) {
      const Real* bias = packed + panel_offset<Real>(depth, first + p);
      const Real* ahead = p + 1 < panels      ? values_of(p + 1, k)
                          : k + count < depth ? values_of(0, k + count)
                                              : values_of(panels, 0);
      Real* sums = c + p * kColumns<Real>;
      multiply_packed(rows, count, a + k, a_stride, values_of(p, k), ahead,
                      k ? Start<Real>{sums, c_stride} : Start<Real>{bias, 0}, sums, c_stride);
    }
  }
}

}  // namespace
}  // namespace fastflow
