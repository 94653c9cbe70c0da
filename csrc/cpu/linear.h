// What the ops around a matrix product share: the normalisation before it, and gate and residual after it.
#pragma once

#include <algorithm>
#include <cmath>

#include "../linear.h"
#include "dtypes.h"
#include "pack.h"
#include "philox.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

// Rows in a piece of a thread's workspace.  The stride is an odd number of cache lines: a column then uses every set of
// a cache.
template <typename Real>
struct Block {
  Real* data;
  int64_t stride;

  static int64_t stride_of(int64_t width) {
    constexpr int64_t line = 64 / sizeof(Real), panel = line > kColumns<Real> ? line : kColumns<Real>;
    const int64_t stride = ceil_div(width, panel) * panel;
    return stride / line % 2 ? stride : stride + line;
  }
  // Takes its memory from `free`, and moves that on.
  Block(Real*& free, int64_t rows, int64_t width) : data(free), stride(stride_of(width)) { free += rows * stride; }
  Real* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
void read_channels(const T* from, int64_t stride, int64_t count, Wide<T>* __restrict to) {
  if (stride == 1)
    for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c]);
  else
    for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c * stride]);
}

template <typename T>
void write_channels(const Wide<T>* __restrict from, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) narrow(from[c], to[c]);
}

// Row b of some vectors, or `otherwise` everywhere if there are none.
template <typename T>
void read_vector(const Vectors& x, int64_t b, int64_t count, Wide<T> otherwise, Wide<T>* to) {
  if (x.data)
    read_channels(static_cast<const T*>(x.data) + b * x.row_stride, x.channel_stride, count, to);
  else
    std::fill_n(to, count, otherwise);
}

// The sum of term(vector) over whole vectors and of term(number) over the rest: a loop with its sum in a register.
template <typename Real, typename Term>
inline Real sum_of(const Real* x, int64_t count, const Term& term) {
  Vector<Real> sums = {};
  int64_t c = 0;
  for (; c + kLanes<Real> <= count; c += kLanes<Real>) sums += term(load(x + c));
  Real sum = reduce<Real>(sums, [](Vector<Real> a, Vector<Real> b) { return a + b; });
  for (; c < count; ++c) sum += term(x[c]);
  return sum;
}

// (x - mean) / deviation * scale + shift.  The variance takes a pass of its own, as the difference of two large sums
// would lose digits, and so does what rounding left out of the mean, which is much where x is far from zero.
template <typename Real>
void normalise(const Real* __restrict scale, const Real* __restrict shift, int64_t count, Real eps, Real* __restrict x,
               Real& mean, Real& rstd) {
  const Real rough = sum_of(x, count, [](auto v) { return v; }) / count;
  const Real m = mean = rough + sum_of(x, count, [rough](auto v) { return v - rough; }) / count;
  const Real variance = sum_of(x, count, [m](auto v) { return (v - m) * (v - m); }) / count;
  const Real factor = rstd = 1 / std::sqrt(variance + eps);
  for (int64_t c = 0; c < count; ++c) x[c] = (x[c] - m) * factor * scale[c] + shift[c];
}

// Reads frames of x one after the other, in increasing order, and normalises them.
template <typename T>
class Reader {
 public:
  using Real = Wide<T>;

  static int64_t elements(const LinearArgs& args) { return 2 * Block<Real>::stride_of(args.channels); }
  Reader(const LinearArgs& args, Real*& free)
      : args_(args),
        scale_(Block<Real>(free, 1, args.channels).data),
        shift_(Block<Real>(free, 1, args.channels).data) {}

  // Frames [first, first + count) of all rows one after the other.
  void read(int64_t first, int64_t count, const Block<Real>& to) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t frame = first + i, b = frame / args_.frames, t = frame % args_.frames;
      const T* from = static_cast<const T*>(args_.x.data) + b * args_.x.row_stride + t * args_.x.frame_stride;
      read_channels(from, args_.x.channel_stride, args_.channels, to.row(i));
      if (!args_.norm) continue;
      if (const int64_t row = args_.row_of ? args_.row_of[frame] : b; row != row_) {
        read_vector<T>(args_.scale, row, args_.channels, 1, scale_);
        read_vector<T>(args_.shift, row, args_.channels, 0, shift_);
        row_ = row;
      }
      Real* stats = static_cast<Real*>(args_.stats) + frame;
      normalise(scale_, shift_, args_.channels, static_cast<Real>(args_.eps), to.row(i), stats[0],
                stats[args_.batch * args_.frames]);
    }
  }

 private:
  const LinearArgs& args_;
  Real *scale_, *shift_;
  int64_t row_ = -1;  // whose scale and shift are held
};

// Results of frames [first, first + count), of `columns` channels from `column` on: times the gate, plus the residual.
template <typename T>
[[gnu::always_inline]] inline void finish(const LinearArgs& args, int64_t first, int64_t count, int64_t column,
                                          int64_t columns, Wide<T>* results, int64_t stride) {
  const Vectors& gates = args.gate;
  const Signal& x = args.residual;
  int64_t b = first / args.frames, t = first % args.frames;
  for (int64_t i = 0; i < count; ++i) {
    Wide<T>* __restrict y = results + i * stride;
    T* __restrict out = static_cast<T*>(args.out) + (first + i) * args.out_channels + column;
    if (T* ungated = static_cast<T*>(args.ungated))
      for (int64_t c = 0; c < columns; ++c) narrow(y[c], ungated[(first + i) * args.out_channels + column + c]);
    if (gates.data) {
      const int64_t row = args.row_of ? args.row_of[first + i] : b;
      const T* gate = static_cast<const T*>(gates.data) + row * gates.row_stride + column * gates.channel_stride;
      for (int64_t c = 0; c < columns; ++c) y[c] *= widen(gate[c * gates.channel_stride]);
    }
    if (x.data) {
      const T* residual =
          static_cast<const T*>(x.data) + b * x.row_stride + t * x.frame_stride + column * x.channel_stride;
      if (x.channel_stride == 1)
        for (int64_t c = 0; c < columns; ++c) y[c] += widen(residual[c]);
      else
        for (int64_t c = 0; c < columns; ++c) y[c] += widen(residual[c * x.channel_stride]);
    }
    for (int64_t c = 0; c < columns; ++c) narrow(y[c], out[c]);
    if (++t == args.frames) t = 0, ++b;
  }
}

// Dropout of frames [first, first + count), of `columns` channels from `column` on, as of the whole [B, T, width].
template <int64_t most, typename Real>
void drop_block(const Dropout& dropout, int64_t width, int64_t first, int64_t count, int64_t column, int64_t columns,
                Real* data, int64_t stride) {
  Real factors[most + 4];
  for (int64_t i = 0; i < count; ++i) {
    Real* __restrict x = data + i * stride;
    const int64_t begin = (first + i) * width + column, before = begin % 4;  // factors come in groups of 4
    dropout_factors<most + 4>(dropout, 0, 0, begin - before, columns + before, factors);
    for (int64_t c = 0; c < columns; ++c) x[c] *= factors[before + c];
  }
}

// Call visit(first, count) for task after task of args.block frames, until none is left.
template <typename Visit>
void for_each_block(const LinearArgs& args, std::atomic<int64_t>& next, const Visit& visit) {
  const int64_t frames = args.batch * args.frames;
  for (int64_t first; (first = args.block * next++) < frames;) visit(first, min_of(args.block, frames - first));
}

}  // namespace
}  // namespace fastflow
