// conv_block on the CPU, forward and backward.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its
// namespace, and with -ffp-contract=fast for the products.
//
// A task is a block of frames of one row.  Its input is copied once, masked and with the frames around it, so that each
// of the three taps is a product of rows that begin one further down.  Sums over frames are formed per block and
// combined in the blocks' order: the result does not depend on the number of threads.
#include "../conv_block.h"

#include <cmath>

#include "dtypes.h"
#include "kernels.h"
#include "matmul.h"
#include "mish.h"
#include "transpose.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kBlock = 48;   // frames
constexpr int64_t kDepth = 256;  // of a product, so that a panel of the right matrix stays in the first cache
constexpr int64_t kTaps = 3;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Room for `width` columns in whole panels: an odd number of cache lines, so that a column uses every set of a cache.
template <typename Real>
int64_t stride_of(int64_t width) {
  constexpr int64_t line = 64 / sizeof(Real);
  const int64_t stride = round_up(width, max_of(line, kColumns<Real>));
  return stride / line % 2 ? stride : stride + line;
}

// ------------------------------------------------------------------------------------------------ memory
// Hands out aligned pieces; without memory it only counts.
template <typename Real>
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<Real*>(memory)) {
    if (memory_) memory_ += -reinterpret_cast<uintptr_t>(memory_) % 64 / sizeof(Real);
  }
  Real* take(int64_t count) {
    Real* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count, 64 / sizeof(Real));
    return piece;
  }
  int64_t total() const { return used_ + 64 / sizeof(Real); }

 private:
  Real* memory_;
  int64_t used_ = 0;
};

enum Sum { kGradient, kGradientTimesX, kOutput, kTime, kSums };  // of dz, dz * normalised y, dy and grad

// What the threads share.  A packed weight is a panel of kColumns columns after the other, each with a row for every
// input channel and tap.
template <typename Real>
struct Shared {
  int64_t blocks, channel_stride, width_stride;
  Real *weight, *moments;            // forward: the moments of each block and group
  Real *transposed, *sums, *dy, *x;  // backward; dy and x with the frames of zeros that the taps reach

  Shared(Pieces<Real> pieces, const ConvBlockArgs& args, bool backward, int64_t* total = nullptr)
      : blocks(ceil_div(args.frames, kBlock)),
        channel_stride(stride_of<Real>(args.channels)),
        width_stride(stride_of<Real>(args.width)),
        weight(),
        moments(),
        transposed(),
        sums(),
        dy(),
        x() {
    const int64_t rows = args.batch * (args.frames + kTaps - 1), all_blocks = args.batch * blocks;
    if (backward) {
      transposed = pieces.take(args.grad_x ? round_up(args.channels, kColumns<Real>) * kTaps * args.width : 0);
      sums = pieces.take(all_blocks * kSums * width_stride);
      dy = pieces.take(rows * width_stride);
      x = pieces.take(args.grad_weight ? rows * channel_stride : 0);
    } else {
      weight = pieces.take(round_up(args.width, kColumns<Real>) * kTaps * args.channels);
      moments = pieces.take(all_blocks * 2 * args.groups);
    }
    if (total) *total = pieces.total();
  }
  Real* sum(int64_t b, int64_t block, Sum which) const {
    return sums + ((b * blocks + block) * kSums + which) * width_stride;
  }
  // Frame t of dy, from -right_of(args), and of x, from -left_of(args).
  Real* dy_row(const ConvBlockArgs& args, int64_t b, int64_t t) const {
    return dy + (b * (args.frames + kTaps - 1) + t + right_of(args)) * width_stride;
  }
  Real* x_row(const ConvBlockArgs& args, int64_t b, int64_t t) const {
    return x + (b * (args.frames + kTaps - 1) + t + left_of(args)) * channel_stride;
  }
};

constexpr int64_t kWeightRows = 96;   // output channels of a task of the weight's gradient
constexpr int64_t kWeightDepth = 96;  // frames of one of its products
template <typename Real>
constexpr int64_t kWeightColumns = 2 * kColumns<Real>;  // its input channels

// What each thread needs.
template <typename Real>
struct Local {
  Real *input, *output;                                                             // a block of frames
  Real *bias, *scale, *shift, *time, *mean, *rstd, *factor, *first, *second, *row;  // of all channels each

  Local(Pieces<Real> pieces, const ConvBlockArgs& args, int64_t* total = nullptr) {
    const int64_t channels = stride_of<Real>(args.channels), width = stride_of<Real>(args.width);
    input = pieces.take(max_of((kBlock + kTaps - 1) * channels, kWeightRows * kTaps * kWeightColumns<Real>));
    output = pieces.take(kBlock * max_of(channels, width));
    for (Real** array : {&bias, &scale, &shift, &time, &mean, &rstd, &factor, &first, &second, &row})
      *array = pieces.take(width);
    if (total) *total = pieces.total();
  }
};

template <typename Real>
void clear(Real* x, int64_t count) {
  for (int64_t n = 0; n < count; ++n) x[n] = 0;
}

// A row in the type to compute in, and zeros up to `padded`.
template <typename T>
void read_row(const T* from, int64_t count, int64_t padded, Wide<T>* __restrict to) {
  for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c]);
  for (int64_t c = count; c < padded; ++c) to[c] = 0;
}

template <typename T>
void write_row(const Wide<T>* __restrict from, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) narrow(from[c], to[c]);
}

// Frames [first, first + count) of a row of the batch, zero outside [0, length).
template <typename T>
void read_frames(const Sequence& x, int64_t b, int64_t first, int64_t count, int64_t length, int64_t channels,
                 int64_t stride, Wide<T>* to) {
  const int64_t begin = min_of(max_of(-first, 0), count), end = min_of(max_of(length - first, begin), count);
  clear(to, begin * stride);
  clear(to + end * stride, (count - end) * stride);
  const T* from = static_cast<const T*>(x.data) + b * x.row_stride + first * x.frame_stride;
  if (x.channel_stride == 1) {
    for (int64_t i = begin; i < end; ++i) read_row(from + i * x.frame_stride, channels, stride, to + i * stride);
    return;
  }
  constexpr int64_t kTile = 16;  // channels, so that the lines of memory read stay in the cache from frame to frame
  for (int64_t c = 0; c < stride; c += kTile)
    for (int64_t i = begin; i < end; ++i)
      for (int64_t n = c; n < min_of(c + kTile, stride); ++n)
        to[i * stride + n] = n < channels ? widen(from[i * x.frame_stride + n * x.channel_stride]) : Wide<T>(0);
}

// ------------------------------------------------------------------------------------------------ weights
// Panel p of the weight for the forward pass: its columns are output channels.
template <typename T>
void pack_panel(const ConvBlockArgs& args, int64_t p, Wide<T>* packed) {
  constexpr int64_t columns = kColumns<Wide<T>>;
  const int64_t depth = kTaps * args.channels;
  const T* rows[columns] = {};
  for (int64_t j = 0; j < min_of(columns, args.width - p * columns); ++j)
    rows[j] = static_cast<const T*>(args.weight) + (p * columns + j) * depth;
  transpose_rows(rows, depth, packed);
}

// Panel p of the weight for the gradient of x: its columns are input channels.
template <typename T>
void pack_transposed_panel(const ConvBlockArgs& args, int64_t p, Wide<T>* packed) {
  constexpr int64_t columns = kColumns<Wide<T>>;
  const T* weight = static_cast<const T*>(args.weight) + p * columns * kTaps;
  const int64_t used = min_of(columns, args.channels - p * columns);
  for (int64_t o = 0; o < args.width; ++o) {
    Wide<T>* __restrict to = packed + o * kTaps * columns;
    const T* from = weight + o * args.channels * kTaps;
    for (int64_t j = 0; j < used; ++j)
      for (int64_t tap = 0; tap < kTaps; ++tap) to[tap * columns + j] = widen(from[j * kTaps + tap]);
    for (int64_t j = used; j < columns; ++j)
      for (int64_t tap = 0; tap < kTaps; ++tap) to[tap * columns + j] = 0;
  }
}

// c[r] = sum over taps of row r + tap (backwards: r + 2 - tap) of x times that tap of the packed weight.
template <typename Real>
void convolve(int64_t rows, const Real* x, int64_t x_stride, int64_t inputs, int64_t outputs, Real* packed,
              bool backwards, Real* c, int64_t c_stride) {
  constexpr int64_t columns = kColumns<Real>;
  const int64_t depth = ceil_div(inputs, ceil_div(inputs, kDepth));
  for (int64_t k = 0; k < inputs; k += depth)
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const Panels<Real> panels = {packed + (k * kTaps + tap) * columns, kTaps * columns, inputs * kTaps * columns};
      multiply<Left::rows>(rows, ceil_div(outputs, columns), min_of(depth, inputs - k),
                           x + (backwards ? kTaps - 1 - tap : tap) * x_stride + k, x_stride, panels, c, c_stride,
                           k > 0 || tap > 0);
    }
}

// ------------------------------------------------------------------------------------------------ activation
// x -> mish((x - mean) * scale + shift) + time
template <typename Real>
[[gnu::noinline]] void activate(Real* x, int64_t width, const Real* mean, const Real* scale, Real factor,
                                const Real* shift, const Real* time) {
  for (int64_t c = 0; c < width; c += kLanes<Real>) {
    const Vector<Real> z = (load(x + c) - load(mean + c)) * (load(scale + c) * factor) + load(shift + c);
    store(x + c, mish<Real>(z) + load(time + c));
  }
}

// ------------------------------------------------------------------------------------------------ statistics
template <typename Real>
Real total_of(Vector<Real> x) {
  return reduce<Real>(x, [](Vector<Real> a, Vector<Real> b) { return a + b; });
}

struct Moments {
  double mean, rstd;
};

// Of a row that is zero from `width` on; subtracts the mean and keeps these zeros.
template <typename Real>
[[gnu::noinline]] Moments centre_row(Real* x, int64_t width, double eps) {
  Vector<Real> sum = {}, squares = {};
  for (int64_t c = 0; c < width; c += kLanes<Real>) sum += load(x + c);
  const Real mean = total_of<Real>(sum) / static_cast<Real>(width);
  for (int64_t c = 0; c < width; c += kLanes<Real>) store(x + c, load(x + c) - mean);
  for (int64_t c = width; c % kLanes<Real>; ++c) x[c] = 0;
  for (int64_t c = 0; c < width; c += kLanes<Real>) {
    const Vector<Real> d = load(x + c);
    squares += d * d;
  }
  return {mean, 1 / std::sqrt(static_cast<double>(total_of<Real>(squares)) / static_cast<double>(width) + eps)};
}

// For every group the mean of a block and the sum of the squared distances from it.  `sums` and `centres`: scratch.
template <typename Real>
void find_moments(const ConvBlockArgs& args, const Real* y, int64_t stride, int64_t rows, Real* sums, Real* centres,
                  Real* moments) {
  const int64_t width = args.width, size = width / args.groups;
  clear(sums, stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < stride; c += kLanes<Real>) store(sums + c, load(sums + c) + load(y + r * stride + c));
  for (int64_t g = 0; g < args.groups; ++g) {
    double sum = 0;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += sums[c];
    moments[g] = static_cast<Real>(sum / static_cast<double>(rows * size));
    for (int64_t c = g * size; c < (g + 1) * size; ++c) centres[c] = moments[g];
  }
  clear(sums, stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes<Real>) {
      const Vector<Real> d = load(y + r * stride + c) - load(centres + c);
      store(sums + c, load(sums + c) + d * d);
    }
  for (int64_t g = 0; g < args.groups; ++g) {
    double sum = 0;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += sums[c];
    moments[args.groups + g] = static_cast<Real>(sum);
  }
}

// Adds a part to the moments of the whole (Chan, Golub, LeVeque 1979).
struct Total {
  double count = 0, mean = 0, squares = 0;

  void add(double part_count, double part_mean, double part_squares) {
    if (part_count == 0) return;
    const double distance = part_mean - mean, sum = count + part_count;
    mean += distance * part_count / sum;
    squares += part_squares + distance * distance * count * part_count / sum;
    count = sum;
  }
};

// The moments of group g of a row of the batch, all blocks and the frames whose y is the bias.
template <typename Real>
Moments combine_moments(const ConvBlockArgs& args, int64_t b, int64_t g, const Shared<Real>& shared, const Real* bias) {
  const int64_t size = args.width / args.groups, active = active_frames(args, b);
  Total total, channels;
  for (int64_t block = 0; block * kBlock < active; ++block) {
    const int64_t rows = min_of(kBlock, active - block * kBlock);
    const Real* moments = shared.moments + (b * shared.blocks + block) * 2 * args.groups;
    total.add(static_cast<double>(rows * size), moments[g], moments[args.groups + g]);
  }
  for (int64_t c = g * size; c < (g + 1) * size; ++c) channels.add(1, bias[c], 0);
  const auto rest = static_cast<double>(counted_frames(args, b) - active);
  total.add(rest * static_cast<double>(size), channels.mean, rest * channels.squares);
  const double variance = total.count ? total.squares / total.count : 0;
  return {total.mean, 1 / std::sqrt(variance + args.eps)};
}

// ------------------------------------------------------------------------------------------------ forward
template <typename T>
void read_parameters(const ConvBlockArgs& args, const Local<Wide<T>>& local) {
  const int64_t stride = stride_of<Wide<T>>(args.width);
  read_row(static_cast<const T*>(args.norm_weight), args.width, stride, local.scale);
  read_row(static_cast<const T*>(args.norm_bias), args.width, stride, local.shift);
  read_row(static_cast<const T*>(args.bias), args.width, stride, local.bias);
  clear(local.mean, stride);
  clear(local.time, stride);
}

template <typename T>
void read_time(const ConvBlockArgs& args, int64_t b, const Local<Wide<T>>& local) {
  if (args.time_bias)
    read_row(static_cast<const T*>(args.time_bias) + b * args.width, args.width, args.width, local.time);
}

template <typename T>
T* frame_of(void* data, const ConvBlockArgs& args, int64_t b, int64_t t) {
  return static_cast<T*>(data) + (b * args.frames + t) * args.width;
}

// Frames [first, last) of the results that lie past a row's end.
template <typename T>
void write_padding(const ConvBlockArgs& args, int64_t b, int64_t first, int64_t last, const Local<Wide<T>>& local) {
  for (int64_t t = first; t < last; ++t) write_row(local.time, args.width, frame_of<T>(args.out, args, b, t));
}

// Zeros, so that whatever is saved is a function of the input.
template <typename T>
void clear_saved(const ConvBlockArgs& args, int64_t b, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    T* y = frame_of<T>(args.y, args, b, t);
    for (int64_t c = 0; c < args.width; ++c) y[c] = T{};
    if (args.groups) continue;
    static_cast<Wide<T>*>(args.mean)[b * args.frames + t] = 0;
    static_cast<Wide<T>*>(args.rstd)[b * args.frames + t] = 0;
  }
}

// LayerNorm and all that follows, of one frame.
template <typename T>
void finish_frame(const ConvBlockArgs& args, int64_t b, int64_t t, Wide<T>* y, const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  const Moments moments = centre_row(y, args.width, args.eps);
  if (args.mean) {
    static_cast<Real*>(args.mean)[b * args.frames + t] = static_cast<Real>(moments.mean);
    static_cast<Real*>(args.rstd)[b * args.frames + t] = static_cast<Real>(moments.rstd);
  }
  activate(y, args.width, local.mean, local.scale, static_cast<Real>(moments.rstd), local.shift, local.time);
  write_row(y, args.width, frame_of<T>(args.out, args, b, t));
}

template <typename T>
void convolve_block(const ConvBlockArgs& args, int64_t b, int64_t block, const Shared<Wide<T>>& shared,
                    const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  const int64_t first = block * kBlock, last = min_of(first + kBlock, args.frames), stride = shared.width_stride;
  const int64_t length = length_of(args, b), active = max_of(first, min_of(last, active_frames(args, b)));
  const int64_t rows = active - first;
  if (rows > 0) {
    read_frames<T>(args.x, b, first - left_of(args), rows + kTaps - 1, length, args.channels, shared.channel_stride,
                   local.input);
    convolve(rows, local.input, shared.channel_stride, args.channels, args.width, shared.weight, false, local.output,
             stride);
  }
  read_time<T>(args, b, local);
  for (int64_t r = 0; r < rows; ++r) {
    Real* y = local.output + r * stride;
    for (int64_t c = 0; c < args.width; ++c) y[c] += local.bias[c];
    for (int64_t c = args.width; c < stride; ++c) y[c] = 0;
    if (args.y) write_row(y, args.width, frame_of<T>(args.y, args, b, first + r));
    if (args.groups == 0) finish_frame<T>(args, b, first + r, y, local);
  }
  if (args.mean) clear_saved<T>(args, b, active, last);
  if (args.groups == 0)
    write_padding<T>(args, b, active, last, local);
  else if (rows > 0)
    find_moments(args, local.output, stride, rows, local.first, local.second,
                 shared.moments + (b * shared.blocks + block) * 2 * args.groups);
}

// GroupNorm and all that follows.
template <typename T>
void normalise_block(const ConvBlockArgs& args, int64_t b, int64_t block, const Shared<Wide<T>>& shared,
                     const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  const int64_t first = block * kBlock, last = min_of(first + kBlock, args.frames), size = args.width / args.groups;
  const int64_t end = max_of(first, min_of(last, length_of(args, b)));
  for (int64_t g = 0; g < args.groups && (first < end || block == 0); ++g) {
    const Moments moments = combine_moments(args, b, g, shared, local.bias);
    const Real mean = static_cast<Real>(moments.mean), rstd = static_cast<Real>(moments.rstd);
    if (args.mean && block == 0) {
      static_cast<Real*>(args.mean)[b * args.groups + g] = mean;
      static_cast<Real*>(args.rstd)[b * args.groups + g] = rstd;
    }
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      local.mean[c] = mean;
      local.factor[c] = rstd * local.scale[c];
    }
  }
  read_time<T>(args, b, local);
  for (int64_t t = first; t < end; ++t) {
    read_row(frame_of<T>(args.y, args, b, t), args.width, args.width, local.row);
    activate(local.row, args.width, local.mean, local.factor, Real(1), local.shift, local.time);
    write_row(local.row, args.width, frame_of<T>(args.out, args, b, t));
  }
  write_padding<T>(args, b, end, last, local);
}

// ------------------------------------------------------------------------------------------------ backward
// The normalised y of one frame and dz, the gradient before Mish, in place of y and of the output's gradient; adds dz
// and dz * y to their sums.  The step of mean and rstd is that of the channels, or 0 for LayerNorm.
template <int64_t step, typename Real>
[[gnu::noinline]] void differentiate_row(int64_t width, Real* y, Real* grad, const Real* mean, const Real* rstd,
                                         const Local<Real>& local, Real* sums, Real* sums_times_x) {
  for (int64_t c = 0; c < width; c += kLanes<Real>) {
    const Vector<Real> m = step ? load(mean + step * c) : broadcast(*mean);
    const Vector<Real> s = step ? load(rstd + step * c) : broadcast(*rstd);
    const Vector<Real> x = (load(y + c) - m) * s;
    const Vector<Real> dz = load(grad + c) * mish_slope<Real>(x * load(local.scale + c) + load(local.shift + c));
    store(y + c, x);
    store(grad + c, dz);
    store(sums + c, load(sums + c) + dz);
    store(sums_times_x + c, load(sums_times_x + c) + dz * x);
  }
}

// LayerNorm backward of one frame: dz -> dy, added to its sum.
template <typename Real>
[[gnu::noinline]] void centre_gradient(int64_t width, const Real* x, Real* grad, Real rstd, const Real* scale,
                                       Real* sums) {
  Vector<Real> sum = {}, products = {};
  for (int64_t c = 0; c < width; c += kLanes<Real>) {
    const Vector<Real> h = load(grad + c) * load(scale + c);
    sum += h;
    products += h * load(x + c);
  }
  const Real mean = total_of<Real>(sum) / static_cast<Real>(width);
  const Real slope = total_of<Real>(products) / static_cast<Real>(width);
  for (int64_t c = 0; c < width; c += kLanes<Real>) {
    const Vector<Real> dy = (load(grad + c) * load(scale + c) - mean - load(x + c) * slope) * rstd;
    store(grad + c, dy);
    store(sums + c, load(sums + c) + dy);
  }
}

// mean and rstd of GroupNorm for every channel.
template <typename Real>
void spread_moments(const ConvBlockArgs& args, int64_t b, const Local<Real>& local) {
  const int64_t size = args.width / args.groups;
  for (int64_t c = 0; c < args.width; ++c) {
    local.mean[c] = static_cast<const Real*>(args.mean)[b * args.groups + c / size];
    local.rstd[c] = static_cast<const Real*>(args.rstd)[b * args.groups + c / size];
  }
}

// The frames around the active ones that the taps reach.
template <typename Real>
void clear_around(const ConvBlockArgs& args, int64_t b, const Shared<Real>& shared) {
  const int64_t length = length_of(args, b), active = active_frames(args, b);
  for (int64_t t = -right_of(args); t < 0; ++t) clear(shared.dy_row(args, b, t), shared.width_stride);
  for (int64_t t = active; t < length + left_of(args); ++t) clear(shared.dy_row(args, b, t), shared.width_stride);
  if (!args.grad_weight) return;
  for (int64_t t = -left_of(args); t < 0; ++t) clear(shared.x_row(args, b, t), shared.channel_stride);
  for (int64_t t = length; t < active + right_of(args); ++t) clear(shared.x_row(args, b, t), shared.channel_stride);
}

// dz of a block (dy for LayerNorm), its sums, and the copy of x.
template <typename T>
void differentiate_block(const ConvBlockArgs& args, int64_t b, int64_t block, const Shared<Wide<T>>& shared,
                         const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  const int64_t first = block * kBlock, last = min_of(first + kBlock, args.frames), stride = shared.width_stride;
  const int64_t length = length_of(args, b), active = max_of(first, min_of(last, active_frames(args, b)));
  const int64_t width = args.width, end = max_of(first, min_of(last, length));
  clear(shared.sum(b, block, kGradient), kSums * stride);
  if (block == 0) clear_around(args, b, shared);
  if (args.grad_weight && end > first)
    read_frames<T>(args.x, b, first, end - first, length, args.channels, shared.channel_stride,
                   shared.x_row(args, b, first));
  if (args.grad_time_bias) {  // which is added on padding, too
    Real* sums = shared.sum(b, block, kTime);
    read_frames<T>(args.grad, b, first, last - first, args.frames, width, stride, local.output);
    for (int64_t r = 0; r < last - first; ++r)
      for (int64_t c = 0; c < width; ++c) sums[c] += local.output[r * stride + c];
  }
  if (active > first)
    read_frames<T>(args.grad, b, first, active - first, length, width, stride, shared.dy_row(args, b, first));
  if (args.groups) spread_moments(args, b, local);
  Real *sums = shared.sum(b, block, kGradient), *sums_times_x = shared.sum(b, block, kGradientTimesX);
  for (int64_t t = first; t < end; ++t) {
    Real* dy = shared.dy_row(args, b, t);
    read_row(frame_of<T>(args.y, args, b, t), width, stride, local.row);
    if (args.groups) {
      differentiate_row<1>(width, local.row, dy, local.mean, local.rstd, local, sums, sums_times_x);
    } else {
      const int64_t frame = b * args.frames + t;
      const Real *mean = static_cast<Real*>(args.mean) + frame, *rstd = static_cast<Real*>(args.rstd) + frame;
      differentiate_row<0>(width, local.row, dy, mean, rstd, local, sums, sums_times_x);
      centre_gradient(width, local.row, dy, *rstd, local.scale, shared.sum(b, block, kOutput));
    }
  }
}

// GroupNorm backward: with h = dz * scale, dy = rstd * (h - mean(h) - x * mean(h * x)), means over the group's frames
// and channels.  `first` and `second` become these means for every channel.
template <typename Real>
void find_gradient_means(const ConvBlockArgs& args, int64_t b, const Shared<Real>& shared, const Local<Real>& local) {
  const int64_t size = args.width / args.groups;
  const double count = static_cast<double>(counted_frames(args, b) * size);
  for (int64_t g = 0; g < args.groups; ++g) {
    double sum = 0, products = 0;
    for (int64_t block = 0; block * kBlock < length_of(args, b); ++block)
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        sum += static_cast<double>(local.scale[c]) * shared.sum(b, block, kGradient)[c];
        products += static_cast<double>(local.scale[c]) * shared.sum(b, block, kGradientTimesX)[c];
      }
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      local.first[c] = static_cast<Real>(sum / count);
      local.second[c] = static_cast<Real>(products / count);
    }
  }
}

// One frame of it: dz -> dy.
template <typename Real>
[[gnu::noinline]] void centre_group_gradient(int64_t width, const Real* y, Real* grad, const Local<Real>& local,
                                             Real* sums) {
  for (int64_t c = 0; c < width; c += kLanes<Real>) {
    const Vector<Real> rstd = load(local.rstd + c), x = (load(y + c) - load(local.mean + c)) * rstd;
    const Vector<Real> h = load(grad + c) * load(local.scale + c);
    const Vector<Real> dy = (h - load(local.first + c) - x * load(local.second + c)) * rstd;
    store(grad + c, dy);
    store(sums + c, load(sums + c) + dy);
  }
}

template <typename T>
void centre_block(const ConvBlockArgs& args, int64_t b, int64_t block, const Shared<Wide<T>>& shared,
                  const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  const int64_t active = active_frames(args, b), first = block * kBlock, last = min_of(first + kBlock, active);
  if (first >= active) return;
  spread_moments(args, b, local);
  find_gradient_means(args, b, shared, local);
  Real* sums = shared.sum(b, block, kOutput);
  for (int64_t t = first; t < last; ++t) {
    read_row(frame_of<T>(args.y, args, b, t), args.width, args.width, local.row);
    centre_group_gradient(args.width, local.row, shared.dy_row(args, b, t), local, sums);
  }
  if (block > 0) return;
  const Real rest = static_cast<Real>(counted_frames(args, b) - active);  // frames with dz = 0, whose y is the bias
  for (int64_t c = 0; c < args.width; ++c) {
    const Real x = (local.bias[c] - local.mean[c]) * local.rstd[c];
    sums[c] -= rest * local.rstd[c] * (local.first[c] + x * local.second[c]);
  }
}

template <typename T>
void write_grad_x(const ConvBlockArgs& args, int64_t b, int64_t block, const Shared<Wide<T>>& shared,
                  const Local<Wide<T>>& local) {
  const int64_t first = block * kBlock, last = min_of(first + kBlock, args.frames), channels = args.channels;
  const int64_t rows = max_of(0, min_of(last, length_of(args, b)) - first), stride = shared.channel_stride;
  if (rows)
    convolve(rows, shared.dy_row(args, b, first - right_of(args)), shared.width_stride, args.width, channels,
             shared.transposed, true, local.output, stride);
  for (int64_t t = first; t < last; ++t) {
    T* to = static_cast<T*>(args.grad_x) + (b * args.frames + t) * channels;
    if (t - first < rows)
      write_row(local.output + (t - first) * stride, channels, to);
    else
      for (int64_t c = 0; c < channels; ++c) to[c] = T{};
  }
}

// For a block of output channels and one of input channels: the product of dy and the shifted x over all frames.
template <typename T>
void write_grad_weight(const ConvBlockArgs& args, int64_t first_row, int64_t first_column,
                       const Shared<Wide<T>>& shared, const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  constexpr int64_t width = kWeightColumns<Real>, stride = kTaps * width;
  const int64_t rows = min_of(kWeightRows, args.width - first_row);
  const int64_t columns = min_of(width, args.channels - first_column);
  Real* products = local.input;
  clear(products, rows * stride);
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t t = 0, active = active_frames(args, b); t < active; t += kWeightDepth)
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        Real* x = shared.x_row(args, b, t + tap - left_of(args)) + first_column;
        multiply<Left::columns>(rows, ceil_div(columns, kColumns<Real>), min_of(kWeightDepth, active - t),
                                shared.dy_row(args, b, t) + first_row, shared.width_stride,
                                Panels<Real>{x, shared.channel_stride, kColumns<Real>}, products + tap * width, stride,
                                true);
      }
  for (int64_t r = 0; r < rows; ++r) {
    T* to = static_cast<T*>(args.grad_weight) + ((first_row + r) * args.channels + first_column) * kTaps;
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t tap = 0; tap < kTaps; ++tap) narrow(products[r * stride + tap * width + c], to[c * kTaps + tap]);
  }
}

// The sum of all blocks of the rows [first, last) of the batch.
template <typename T>
void write_sum(const ConvBlockArgs& args, int64_t first, int64_t last, Sum which, const Shared<Wide<T>>& shared,
               void* result) {
  constexpr int64_t kTile = 64;
  for (int64_t begin = 0; begin < args.width && result; begin += kTile) {
    const int64_t count = min_of(kTile, args.width - begin);
    double total[kTile] = {};
    for (int64_t b = first; b < last; ++b)
      for (int64_t block = 0; block < shared.blocks; ++block) {
        const Wide<T>* sums = shared.sum(b, block, which) + begin;
        for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(sums[c]);
      }
    for (int64_t c = 0; c < count; ++c) narrow(static_cast<Wide<T>>(total[c]), static_cast<T*>(result)[begin + c]);
  }
}

template <typename T>
void write_sums(const ConvBlockArgs& args, const Shared<Wide<T>>& shared) {
  write_sum<T>(args, 0, args.batch, kOutput, shared, args.grad_bias);
  write_sum<T>(args, 0, args.batch, kGradientTimesX, shared, args.grad_norm_weight);
  write_sum<T>(args, 0, args.batch, kGradient, shared, args.grad_norm_bias);
  for (int64_t b = 0; b < args.batch && args.grad_time_bias; ++b)
    write_sum<T>(args, b, b + 1, kTime, shared, static_cast<T*>(args.grad_time_bias) + b * args.width);
}

// ------------------------------------------------------------------------------------------------ phases
bool is_backward(ConvBlockPhase phase) { return phase >= ConvBlockPhase::differentiate; }

template <typename Real>
int64_t panels_of(int64_t columns) {
  return ceil_div(columns, kColumns<Real>);
}

template <typename Real>
int64_t weight_tasks(const ConvBlockArgs& args) {
  return args.grad_weight ? ceil_div(args.width, kWeightRows) * ceil_div(args.channels, kWeightColumns<Real>) : 0;
}

template <typename Real>
int64_t tasks_of(const ConvBlockArgs& args, ConvBlockPhase phase) {
  const int64_t blocks = args.batch * ceil_div(args.frames, kBlock);
  switch (phase) {
    case ConvBlockPhase::pack:
      return blocks ? panels_of<Real>(args.width) : 0;
    case ConvBlockPhase::normalise:
    case ConvBlockPhase::centre:
      return args.groups ? blocks : 0;
    case ConvBlockPhase::differentiate:
      return blocks && args.grad_x ? blocks + panels_of<Real>(args.channels) : blocks;
    case ConvBlockPhase::products:
      return 1 + weight_tasks<Real>(args) + (args.grad_x ? blocks : 0);
    default:
      return blocks;
  }
}

template <typename T>
void run_task(const ConvBlockArgs& args, ConvBlockPhase phase, int64_t task, const Shared<Wide<T>>& shared,
              const Local<Wide<T>>& local) {
  using Real = Wide<T>;
  constexpr int64_t columns = kColumns<Real>;
  const auto with_block = [&](auto function, int64_t index) {
    function(args, index / shared.blocks, index % shared.blocks, shared, local);
  };
  switch (phase) {
    case ConvBlockPhase::pack:
      return pack_panel<T>(args, task, shared.weight + task * columns * kTaps * args.channels);
    case ConvBlockPhase::convolve:
      return with_block(convolve_block<T>, task);
    case ConvBlockPhase::normalise:
      return with_block(normalise_block<T>, task);
    case ConvBlockPhase::differentiate: {
      const int64_t blocks = args.batch * shared.blocks;
      if (task < blocks) return with_block(differentiate_block<T>, task);
      task -= blocks;
      return pack_transposed_panel<T>(args, task, shared.transposed + task * columns * kTaps * args.width);
    }
    case ConvBlockPhase::centre:
      return with_block(centre_block<T>, task);
    case ConvBlockPhase::products: {
      if (task == 0) return write_sums<T>(args, shared);
      task -= 1;
      if (task >= weight_tasks<Real>(args)) return with_block(write_grad_x<T>, task - weight_tasks<Real>(args));
      const int64_t across = ceil_div(args.channels, kWeightColumns<Real>);
      return write_grad_weight<T>(args, task / across * kWeightRows, task % across * kWeightColumns<Real>, shared,
                                  local);
    }
  }
}

}  // namespace

int64_t conv_block_shared(const ConvBlockArgs& args, Dtype dtype, bool backward) {
  int64_t elements = 0;
  with_dtype(dtype, [&](auto zero) {
    using Real = Wide<decltype(zero)>;
    Shared<Real>(Pieces<Real>(nullptr), args, backward, &elements);
  });
  return elements;
}

ConvBlockPlan conv_block_plan(const ConvBlockArgs& args, Dtype dtype, ConvBlockPhase phase) {
  ConvBlockPlan plan{};
  with_dtype(dtype, [&](auto zero) {
    using Real = Wide<decltype(zero)>;
    Local<Real>(Pieces<Real>(nullptr), args, &plan.elements);
    plan.tasks = tasks_of<Real>(args, phase);
  });
  return plan;
}

void conv_block_run(const ConvBlockArgs& args, Dtype dtype, ConvBlockPhase phase, void* workspace,
                    std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using Real = Wide<T>;
    const Shared<Real> shared(Pieces<Real>(args.shared), args, is_backward(phase));
    const Local<Real> local(Pieces<Real>(workspace), args);
    const int64_t tasks = tasks_of<Real>(args, phase);
    if (phase != ConvBlockPhase::pack) read_parameters<T>(args, local);
    for (int64_t task; (task = next++) < tasks;) run_task<T>(args, phase, task, shared, local);
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
