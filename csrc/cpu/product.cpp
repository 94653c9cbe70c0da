// The product of two large matrices, as the gradients of linear layers are.  A task is a tile of the result, which adds
// the products of kDepth terms of the sums at a time.
// Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "kernels.h"
#include "linear.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

// A tile of AVX-512 needs so few numbers per multiply-add that they may come from where they are.  Smaller tiles want
// them closer together: a thread copies them.
constexpr bool kReadsInPlace = kRows >= 12;
constexpr int64_t kDepth = kReadsInPlace ? 512 : 256;
constexpr int64_t kPage = 4096;  // bytes; rows that far apart use the same few places of a cache, so are copied as well

template <typename Real>
struct Copies {
  Block<Real> left;  // rows or columns, as in the matrix
  Real* right;       // panels
  Real* last;        // the panel that only part of is in the matrix
  Block<Real> sums;  // of that

  static int64_t elements(const ProductArgs& args) {
    const int64_t left =
        args.transposed ? kDepth * Block<Real>::stride_of(args.block) : args.block * Block<Real>::stride_of(kDepth);
    const int64_t right = kDepth * ((kReadsInPlace ? 0 : kProductColumns) + kColumns<Real>);
    return left + right + args.block * Block<Real>::stride_of(kColumns<Real>);
  }
  Copies(const ProductArgs& args, Real* free)
      : left(free, args.transposed ? kDepth : args.block, args.transposed ? args.block : kDepth),
        right(free),
        last(free += kReadsInPlace ? 0 : kDepth * kProductColumns),
        sums(free += kDepth * kColumns<Real>, args.block, kColumns<Real>) {}
};

template <typename Real>
struct Strided {
  const Real* data;
  int64_t stride;
};

// Rows [first, first + rows) of terms [k, k + depth), as they are or copied.
template <typename Real>
Strided<Real> left_of(const ProductArgs& args, int64_t first, int64_t rows, int64_t k, int64_t depth,
                      const Block<Real>& copy) {
  const int64_t stride = args.transposed ? args.rows : args.depth;
  const Real* a = static_cast<const Real*>(args.a) + (args.transposed ? k * stride + first : first * stride + k);
  if (kReadsInPlace && stride * sizeof(Real) % kPage) return {a, stride};
  const int64_t count = args.transposed ? depth : rows, length = args.transposed ? rows : depth;
  for (int64_t n = 0; n < count; ++n) std::copy_n(a + n * stride, length, copy.row(n));
  return {copy.data, copy.stride};
}

// Columns [first, first + panels * kColumns) of terms [k, k + depth), as they are or copied.
template <typename Real>
Panels<Real> right_of(const ProductArgs& args, int64_t first, int64_t panels, int64_t k, int64_t depth, Real* copy) {
  constexpr int64_t width = kColumns<Real>;
  const Real* b = static_cast<const Real*>(args.b) + k * args.columns + first;
  if (kReadsInPlace) return {b, args.columns, width};
  for (int64_t n = 0; n < depth; ++n)
    for (int64_t p = 0; p < panels; ++p)
      std::copy_n(b + n * args.columns + p * width, width, copy + (p * kDepth + n) * width);
  return {copy, width, kDepth * width};
}

// The last `columns` columns from `first` on, filled up with zeros.
template <typename Real>
Panels<Real> last_of(const ProductArgs& args, int64_t first, int64_t columns, int64_t k, int64_t depth, Real* copy) {
  constexpr int64_t width = kColumns<Real>;
  const Real* b = static_cast<const Real*>(args.b) + k * args.columns + first;
  for (int64_t n = 0; n < depth; ++n)
    std::fill_n(std::copy_n(b + n * args.columns, columns, copy + n * width), width - columns, Real{});
  return {copy, width, width};
}

template <typename Real>
void multiply_task(const ProductArgs& args, int64_t row, int64_t column, const Copies<Real>& copies) {
  const int64_t rows = min_of(args.block, args.rows - row), columns = min_of(kProductColumns, args.columns - column);
  const int64_t panels = columns / kColumns<Real>, whole = panels * kColumns<Real>, rest = columns - whole;
  Real* const out = static_cast<Real*>(args.out) + row * args.columns + column;
  for (int64_t k = 0; k < args.depth; k += kDepth) {
    const int64_t depth = min_of(kDepth, args.depth - k);
    const Strided<Real> left = left_of(args, row, rows, k, depth, copies.left);
    const auto add = [&](int64_t panels, Panels<Real> right, Real* sums, int64_t stride) {
      if (args.transposed)
        multiply<Left::columns>(rows, panels, depth, left.data, left.stride, right, sums, stride, k > 0);
      else
        multiply<Left::rows>(rows, panels, depth, left.data, left.stride, right, sums, stride, k > 0);
    };
    add(panels, right_of(args, column, panels, k, depth, copies.right), out, args.columns);
    if (rest) add(1, last_of(args, column + whole, rest, k, depth, copies.last), copies.sums.data, copies.sums.stride);
  }
  for (int64_t i = 0; i < rows && rest; ++i) std::copy_n(copies.sums.row(i), rest, out + i * args.columns + whole);
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
