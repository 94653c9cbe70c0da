// The products of projection with a few frames only, as those of the adaLN layers of a DiT have: 4 times 1024 by 1024
// times 6144.  What counts is the way of the weight, or of its gradient, through memory: it goes it once, unpacked.
// Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "kernels.h"
#include "linear.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kTile = 4;  // frames whose sums are in registers

template <int64_t count, typename Real>
void dot_products(const Real* x, int64_t channels, const Real* weight, Real* sums) {
  Vector<Real> parts[count] = {};
  int64_t c = 0;
  for (; c + kLanes<Real> <= channels; c += kLanes<Real>) {
    const Vector<Real> w = load(weight + c);
#pragma GCC unroll 4
    for (int64_t f = 0; f < count; ++f) parts[f] += w * load(x + f * channels + c);
  }
  for (int64_t f = 0; f < count; ++f) {
    sums[f] = reduce<Real>(parts[f], [](Vector<Real> a, Vector<Real> b) { return a + b; });
    for (int64_t rest = c; rest < channels; ++rest) sums[f] += weight[rest] * x[f * channels + rest];
  }
}

template <typename T>
void forward_of(const ThinArgs& args, const Weight& weight, int64_t column, int64_t begin, int64_t end,
                Wide<T>* memory) {
  using Real = Wide<T>;
  const Real* x = static_cast<const Real*>(args.x);
  const T* bias = static_cast<const T*>(weight.bias.data);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = static_cast<const T*>(weight.data) + n * weight.stride;
    const Real* wide = memory;
    if constexpr (std::is_same_v<T, Real>)
      wide = row;
    else
      read_channels(row, 1, args.channels, memory);
    const Real constant = bias ? widen(bias[n * weight.bias.channel_stride]) : Real(0);
    for (int64_t first = 0; first < args.frames; first += kTile) {
      const int64_t count = min_of(kTile, args.frames - first);
      const Real* frames = x + first * args.channels;
      Real sums[kTile];
      if (count == 4) dot_products<4>(frames, args.channels, wide, sums);
      if (count == 3) dot_products<3>(frames, args.channels, wide, sums);
      if (count == 2) dot_products<2>(frames, args.channels, wide, sums);
      if (count == 1) dot_products<1>(frames, args.channels, wide, sums);
      T* out = static_cast<T*>(args.out) + first * args.rows + column + n;
      for (int64_t f = 0; f < count; ++f) narrow(sums[f] + constant, out[f * args.rows]);
    }
  }
}

constexpr int64_t kRowsAtOnce = 8;    // of the weight
constexpr int64_t kSummedRows = 256;  // have sums of their own, as one long sum would lose digits

// sums[f, c] += sum over `rows` rows n of grad[f, n] * weight[n, c], for `count` channels.
template <int64_t rows, typename Real>
void add_rows(const ThinArgs& args, const Real* grad, const Real* weight, int64_t count, Real* sums) {
  for (int64_t f = 0; f < args.frames; ++f, sums += count) {
    Vector<Real> factors[rows];
    for (int64_t n = 0; n < rows; ++n) factors[n] = broadcast(grad[f * args.rows + n]);
    int64_t c = 0;
    for (; c + kLanes<Real> <= count; c += kLanes<Real>) {
      Vector<Real> sum = factors[0] * load(weight + c);
#pragma GCC unroll 8
      for (int64_t n = 1; n < rows; ++n) sum += factors[n] * load(weight + n * args.channels + c);
      store(sums + c, load(sums + c) + sum);
    }
    for (; c < count; ++c)
      for (int64_t n = 0; n < rows; ++n) sums[c] += factors[n][0] * weight[n * args.channels + c];
  }
}

template <typename Real>
void input_gradient_of(const ThinArgs& args, Real* sums, int64_t begin, int64_t end) {
  const Real *grad = static_cast<const Real*>(args.grad), *weight = static_cast<const Real*>(args.weight) + begin;
  Real* out = static_cast<Real*>(args.out) + begin;
  const int64_t count = end - begin;
  for (int64_t f = 0; f < args.frames; ++f) std::fill_n(out + f * args.channels, count, Real{});
  for (int64_t first = 0; first < args.rows; first += kSummedRows) {
    const int64_t last = min_of(first + kSummedRows, args.rows);
    std::fill_n(sums, args.frames * count, Real{});
    int64_t n = first;
    for (; n + kRowsAtOnce <= last; n += kRowsAtOnce)
      add_rows<kRowsAtOnce>(args, grad + n, weight + n * args.channels, count, sums);
    for (; n < last; ++n) add_rows<1>(args, grad + n, weight + n * args.channels, count, sums);
    for (int64_t f = 0; f < args.frames; ++f)
      for (int64_t c = 0; c < count; ++c) out[f * args.channels + c] += sums[f * count + c];
  }
}

template <typename Real>
void weight_gradient_of(const ThinArgs& args, int64_t begin, int64_t end) {
  const Real *x = static_cast<const Real*>(args.x), *grad = static_cast<const Real*>(args.grad);
  Vector<Real> factors[kThinFrames];
  for (int64_t n = begin; n < end; ++n) {
    Real* out = static_cast<Real*>(args.out) + n * args.channels;
    for (int64_t f = 0; f < args.frames; ++f) factors[f] = broadcast(grad[f * args.rows + n]);
    int64_t c = 0;
    for (; c + kLanes<Real> <= args.channels; c += kLanes<Real>) {
      Vector<Real> sum = {};
      for (int64_t f = 0; f < args.frames; ++f) sum += factors[f] * load(x + f * args.channels + c);
      store(out + c, sum);
    }
    for (; c < args.channels; ++c) {
      out[c] = 0;
      for (int64_t f = 0; f < args.frames; ++f) out[c] += factors[f][0] * x[f * args.channels + c];
    }
  }
}

}  // namespace

void thin_forward(const ThinArgs& args, const Weight& weight, int64_t column, Dtype dtype, void* workspace,
                  int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_of<T>(args, weight, column, begin, end, static_cast<Wide<T>*>(workspace));
  });
}

void thin_input_gradient(const ThinArgs& args, Dtype dtype, void* workspace, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto zero) {
    using Real = Wide<decltype(zero)>;
    input_gradient_of(args, static_cast<Real*>(workspace), begin, end);
  });
}

void thin_weight_gradient(const ThinArgs& args, Dtype dtype, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto zero) { weight_gradient_of<Wide<decltype(zero)>>(args, begin, end); });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
