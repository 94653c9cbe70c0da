// The product of two large matrices, as the gradients of linear layers are.  A task is a tile of the result.  It goes
// by kDepth terms of the sums at a time: copies these of both matrices closer together, and adds their products.
// Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "kernels.h"
#include "linear.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kDepth = 256;

// Where a thread copies both matrices to, and what of the result is beyond the last whole panel.
template <typename Real>
struct Copies {
  Block<Real> left;  // rows or columns, as in the matrix
  Real* right;       // panels
  Block<Real> edge;

  static int64_t elements(const ProductArgs& args) {
    const int64_t left =
        args.transposed ? kDepth * Block<Real>::stride_of(args.block) : args.block * Block<Real>::stride_of(kDepth);
    return left + kDepth * kProductColumns + args.block * Block<Real>::stride_of(kColumns<Real>);
  }
  Copies(const ProductArgs& args, Real* free)
      : left(free, args.transposed ? kDepth : args.block, args.transposed ? args.block : kDepth),
        right(free),
        edge(free += kDepth * kProductColumns, args.block, kColumns<Real>) {}
};

template <typename Real>
void copy_left(const ProductArgs& args, int64_t first, int64_t rows, int64_t k, int64_t depth, const Block<Real>& to) {
  const Real* a = static_cast<const Real*>(args.a);
  if (args.transposed)
    for (int64_t n = 0; n < depth; ++n) std::copy_n(a + (k + n) * args.rows + first, rows, to.row(n));
  else
    for (int64_t i = 0; i < rows; ++i) std::copy_n(a + (first + i) * args.depth + k, depth, to.row(i));
}

// Panels of kDepth rows; what the last one has beyond the columns is zero.
template <typename Real>
void copy_right(const ProductArgs& args, int64_t first, int64_t columns, int64_t k, int64_t depth, Real* to) {
  constexpr int64_t width = kColumns<Real>;
  for (int64_t n = 0; n < depth; ++n, to += width) {
    const Real* from = static_cast<const Real*>(args.b) + (k + n) * args.columns + first;
    int64_t j = 0;
    for (; j + width <= columns; j += width) std::copy_n(from + j, width, to + j * kDepth);
    if (j == columns) continue;
    std::copy_n(from + j, columns - j, to + j * kDepth);
    std::fill_n(to + j * kDepth + columns - j, width - columns + j, Real{});
  }
}

template <typename Real>
void multiply_task(const ProductArgs& args, int64_t row, int64_t column, const Copies<Real>& copies) {
  constexpr int64_t width = kColumns<Real>;
  const int64_t rows = min_of(args.block, args.rows - row), columns = min_of(kProductColumns, args.columns - column);
  const int64_t panels = columns / width, whole = panels * width;
  Real* const out = static_cast<Real*>(args.out) + row * args.columns + column;
  for (int64_t k = 0; k < args.depth; k += kDepth) {
    const int64_t depth = min_of(kDepth, args.depth - k);
    copy_right(args, column, columns, k, depth, copies.right);
    copy_left(args, row, rows, k, depth, copies.left);
    const auto multiply_panels = [&](int64_t first, int64_t count, Real* to, int64_t stride) {
      const Panels<Real> right = {copies.right + first * kDepth * width, width, kDepth * width};
      if (args.transposed)
        multiply<Left::columns>(rows, count, depth, copies.left.data, copies.left.stride, right, to, stride, k > 0);
      else
        multiply<Left::rows>(rows, count, depth, copies.left.data, copies.left.stride, right, to, stride, k > 0);
    };
    multiply_panels(0, panels, out, args.columns);
    if (whole < columns) multiply_panels(panels, 1, copies.edge.data, copies.edge.stride);
  }
  for (int64_t i = 0; i < rows && whole < columns; ++i)
    std::copy_n(copies.edge.row(i), columns - whole, out + i * args.columns + whole);
}

}  // namespace

int64_t product_workspace(const ProductArgs& args, Dtype dtype) {
  int64_t elements = 0;
  with_dtype(dtype, [&](auto zero) { elements = Copies<Wide<decltype(zero)>>::elements(args); });
  return elements;
}

void product(const ProductArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using Real = Wide<decltype(zero)>;
    const Copies<Real> copies(args, static_cast<Real*>(workspace));
    const int64_t across = ceil_div(args.columns, kProductColumns), tasks = across * ceil_div(args.rows, args.block);
    for (int64_t task; (task = next++) < tasks;)
      multiply_task(args, task / across * args.block, task % across * kProductColumns, copies);
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
