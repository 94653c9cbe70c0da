// projection on the CPU, the packing of weights for it and for feed_forward, and the backward pass of the normalisation
// that both begin with.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include <type_traits>

#include "kernels.h"
#include "linear.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kGroup = 64;  // channels whose results are written together, several cache lines of each frame

template <typename T>
int64_t elements_of(const LinearArgs& args) {
  using Real = Wide<T>;
  return Reader<T>::elements(args) +
         args.block * (Block<Real>::stride_of(args.channels) + Block<Real>::stride_of(kGroup));
}

template <typename T>
void project(const LinearArgs& args, Wide<T>* memory, std::atomic<int64_t>& next) {
  using Real = Wide<T>;
  Reader<T> reader(args, memory);
  const Block<Real> input(memory, args.block, args.channels), results(memory, args.block, kGroup);
  // Whether a product is the result as it is, and formed in one step over the channels.
  const bool is_final = std::is_same_v<T, Real> && args.channels <= kPanelDepth && !args.drops && !args.ungated &&
                        !args.gate.data && !args.residual.data;
  const Real* packed = static_cast<const Real*>(args.packed_out);
  for_each_block(args, next, [&](int64_t first, int64_t count) {
    reader.read(first, count, input);
    for (int64_t group = 0; group < args.out_channels; group += kGroup) {
      const int64_t columns = min_of(kGroup, args.out_channels - group);
      const bool in_place = is_final && columns % kColumns<Real> == 0;
      Real* to = in_place ? static_cast<Real*>(args.out) + first * args.out_channels + group : results.data;
      multiply_panels(count, panels_of<Real>(columns), args.channels, input.data, input.stride, packed,
                      group / kColumns<Real>, to, in_place ? args.out_channels : results.stride);
      if (in_place) continue;
      if (args.drops)
        drop_block<kGroup>(args.dropout, args.out_channels, first, count, group, columns, results.data, results.stride);
      if (columns == kGroup)
        finish<T>(args, first, count, group, kGroup, results.data, results.stride);
      else
        finish<T>(args, first, count, group, columns, results.data, results.stride);
    }
  });
}

// Frames [begin, end) of one row: grad_x = (g - mean(g) - xhat mean(g xhat)) / deviation with g = grad * scale and the
// means over channels.
template <typename Real>
void norm_chunk(const NormBackwardArgs& args, int64_t begin, int64_t end, const Real* scale, const Real* shift,
                Real* __restrict sums) {
  const int64_t channels = args.channels, frames = args.batch * args.frames;
  std::fill_n(sums, 2 * channels, Real{});
  for (int64_t frame = begin; frame < end; ++frame) {
    const Real* grad = static_cast<const Real*>(args.grad) + frame * channels;
    const Real* x = static_cast<const Real*>(args.x) + frame * channels;
    const Real* residual = static_cast<const Real*>(args.grad_residual);
    Real* __restrict grad_x = static_cast<Real*>(args.grad_x) + frame * channels;
    Real* __restrict normalised = static_cast<Real*>(args.normalised) + frame * channels;
    const Real mean = static_cast<const Real*>(args.stats)[frame];
    const Real rstd = static_cast<const Real*>(args.stats)[frames + frame];
    for (int64_t c = 0; c < channels; ++c) {
      const Real xhat = (x[c] - mean) * rstd;
      normalised[c] = grad[c] * scale[c] * xhat;
      grad_x[c] = grad[c] * scale[c];
      sums[c] += grad[c] * xhat;
      sums[channels + c] += grad[c];
    }
    const auto itself = [](auto v) { return v; };
    const Real along = sum_of(normalised, channels, itself) / channels,
               constant = sum_of(grad_x, channels, itself) / channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Real xhat = (x[c] - mean) * rstd;
      grad_x[c] = (grad_x[c] - constant - xhat * along) * rstd;
      normalised[c] = xhat * scale[c] + shift[c];
    }
    if (residual)
      for (int64_t c = 0; c < channels; ++c) grad_x[c] += residual[frame * channels + c];
  }
}

constexpr int64_t kSummed = 64;  // columns at a time

// Of x, or of x * y where y is not null.
template <typename Real>
void sum_columns(const Real* x, const Real* y, int64_t rows, int64_t stride, int64_t columns, Real* __restrict sums) {
  if (rows > kNormChunk) {
    Real rest[kSummed];
    const int64_t half = rows / 2, offset = half * stride;
    sum_columns(x, y, half, stride, columns, sums);
    sum_columns(x + offset, y ? y + offset : y, rows - half, stride, columns, rest);
    for (int64_t c = 0; c < columns; ++c) sums[c] += rest[c];
    return;
  }
  std::fill_n(sums, columns, Real{});
  for (int64_t i = 0; i < rows; ++i)
    if (y)
      for (int64_t c = 0; c < columns; ++c) sums[c] += x[i * stride + c] * y[i * stride + c];
    else
      for (int64_t c = 0; c < columns; ++c) sums[c] += x[i * stride + c];
}

template <typename Real>
void add_gated(const GatedGradientArgs& args, int64_t n) {
  const int64_t first = n * args.channels;
  const Real *products = static_cast<const Real*>(args.products) + first,
             *weight = static_cast<const Real*>(args.weight) + first;
  const Real gate = static_cast<const Real*>(args.gate)[n], sum = static_cast<const Real*>(args.sums)[n];
  Real* __restrict grad_weight = static_cast<Real*>(args.grad_weight) + first;
  Vector<Real> along = {};
  int64_t c = 0;
  for (; c + kLanes<Real> <= args.channels; c += kLanes<Real>) along += load(products + c) * load(weight + c);
  Real grad_gate = reduce<Real>(along, [](Vector<Real> a, Vector<Real> b) { return a + b; });
  for (; c < args.channels; ++c) grad_gate += products[c] * weight[c];
  for (c = 0; c < args.channels; ++c) grad_weight[c] += gate * products[c];
  static_cast<Real*>(args.grad_bias)[n] += gate * sum;
  static_cast<Real*>(args.grad_gate)[n] = grad_gate + (args.bias ? static_cast<const Real*>(args.bias)[n] * sum : 0);
}

// The row, of those that begin at `starts`, that n lies in.
int64_t row_of(const int64_t* starts, int64_t rows, int64_t n) {
  return std::upper_bound(starts, starts + rows, n) - starts - 1;
}

template <typename Real>
void gate_frames_of(const GatedFramesArgs& args, int64_t begin, int64_t end) {
  int64_t row = row_of(args.starts, args.rows, begin);
  for (int64_t frame = begin; frame < end; ++frame) {
    while (frame >= args.starts[row + 1]) ++row;
    const Real* grad = static_cast<const Real*>(args.grad) + frame * args.channels;
    const Real* gate = static_cast<const Real*>(args.gate.data) + row * args.gate.row_stride;
    Real* __restrict out = static_cast<Real*>(args.out) + frame * args.channels;
    if (args.gate.channel_stride == 1)
      for (int64_t c = 0; c < args.channels; ++c) out[c] = grad[c] * gate[c];
    else
      for (int64_t c = 0; c < args.channels; ++c) out[c] = grad[c] * gate[c * args.gate.channel_stride];
  }
}

template <typename Visit>
void with_wide(Dtype dtype, const Visit& visit) {
  with_dtype(dtype, [&](auto zero) { visit(Wide<decltype(zero)>{}); });
}

}  // namespace

int64_t pack_panels(int64_t rows, Dtype dtype) {
  int64_t panels = 0;
  with_wide(dtype, [&](auto zero) { panels = panels_of<decltype(zero)>(rows); });
  return panels;
}

int64_t pack_elements(int64_t rows, int64_t depth, Dtype dtype) {
  int64_t elements = 0;
  with_wide(dtype, [&](auto zero) {
    using Real = decltype(zero);
    elements = panel_offset<Real>(depth, panels_of<Real>(rows));
  });
  return elements;
}

void pack(const Weights& weights, Dtype dtype, void* packed, int64_t first_panel, int64_t last_panel) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t p = first_panel; p < last_panel; ++p) pack_panel<T>(weights, p, static_cast<Wide<T>*>(packed));
  });
}

bool is_packed(const Weights& weights, Dtype dtype, const void* packed) {
  bool same = true;
  with_dtype(dtype, [&](auto zero) { same = holds_panels<decltype(zero)>(weights, packed); });
  return same;
}

int64_t projection_workspace(const LinearArgs& args, Dtype dtype) {
  int64_t elements = 0;
  with_dtype(dtype, [&](auto zero) { elements = elements_of<decltype(zero)>(args); });
  return elements;
}

void projection_forward(const LinearArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    project<T>(args, static_cast<Wide<T>*>(workspace), next);
  });
}

void norm_backward(const NormBackwardArgs& args, Dtype dtype, void* workspace, int64_t first, int64_t last) {
  with_wide(dtype, [&](auto zero) {
    using Real = decltype(zero);
    Real *scale = static_cast<Real*>(workspace), *shift = scale + args.channels;
    int64_t row = -1;
    for (int64_t n = first; n < last; ++n) {
      if (const int64_t at = row_of(args.chunk_starts, args.rows, n); at != row) {
        row = at;
        read_vector<Real>(args.scale, row, args.channels, 1, scale);
        read_vector<Real>(args.shift, row, args.channels, 0, shift);
      }
      const int64_t begin = args.starts[row] + (n - args.chunk_starts[row]) * kNormChunk;
      norm_chunk<Real>(args, begin, min_of(begin + kNormChunk, args.starts[row + 1]), scale, shift,
                       static_cast<Real*>(args.sums) + n * 2 * args.channels);
    }
  });
}

void column_sums(const void* x, const void* y, int64_t rows, int64_t stride, Dtype dtype, void* sums, int64_t begin,
                 int64_t end) {
  with_wide(dtype, [&](auto zero) {
    using Real = decltype(zero);
    const Real *from = static_cast<const Real*>(x), *factors = static_cast<const Real*>(y);
    for (int64_t c = begin; c < end; c += kSummed)
      sum_columns(from + c, factors ? factors + c : factors, rows, stride, min_of(kSummed, end - c),
                  static_cast<Real*>(sums) + c);
  });
}

void gate_frames(const GatedFramesArgs& args, Dtype dtype, int64_t begin, int64_t end) {
  with_wide(dtype, [&](auto zero) { gate_frames_of<decltype(zero)>(args, begin, end); });
}

void add_gated_gradient(const GatedGradientArgs& args, Dtype dtype, int64_t begin, int64_t end) {
  with_wide(dtype, [&](auto zero) {
    for (int64_t n = begin; n < end; ++n) add_gated<decltype(zero)>(args, n);
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
