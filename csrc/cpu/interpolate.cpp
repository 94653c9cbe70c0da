// interpolate on the CPU.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "../interpolate.h"

#include "dtypes.h"
#include "kernels.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kFrames = kInterpolateTile;
constexpr int64_t kChannels = 64;
constexpr int64_t kElements = kFrames * kChannels;  // of float 16 KiB, which stay in the L1 cache

// a * x + b * y.  The build sets -ffp-contract=off, so this is where a fused multiply-add is chosen: torch's kernels
// use one where the hardware has it.
template <typename Real>
inline Real weighted_sum(Real a, Real x, Real b, Real y) {
#if defined(__FMA__) || defined(__aarch64__)
  return fused_multiply_add(a, x, b * y);
#else
  return a * x + b * y;
#endif
}

template <typename Real>
inline Real add_weighted(Real sum, Real a, Real x) {
#if defined(__FMA__) || defined(__aarch64__)
  return fused_multiply_add(a, x, sum);
#else
  return sum + a * x;
#endif
}

// Memory of one row as [frame, channel].
template <typename T>
struct Plane {
  T* data;
  int64_t frame_stride, channel_stride;

  T* at(int64_t frame, int64_t channel) const { return data + frame * frame_stride + channel * channel_stride; }
};

// Ask early for the cache lines of a short row: the processor sees no pattern in the rows of a tile.  Any address will
// do, so what comes after the last tile needs no special care.
template <int kForWriting, typename T>
void prefetch(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(row + i, kForWriting);
}

template <typename T>
Plane<T> plane_of(T* data, const Frames& side, int64_t b) {
  return {data + b * side.batch_stride, side.frame_stride, side.channel_stride};
}

// The copy of a loop for unit strides is the one that the compiler vectorises.
template <typename T, typename To>
void blend(const T* first, const T* second, int64_t stride, Wide<T> weight, int64_t count, To* __restrict out) {
  if (stride == 1) {
    for (int64_t c = 0; c < count; ++c)
      narrow(weighted_sum(1 - weight, widen(first[c]), weight, widen(second[c])), out[c]);
  } else {
    for (int64_t c = 0; c < count; ++c)
      narrow(weighted_sum(1 - weight, widen(first[c * stride]), weight, widen(second[c * stride])), out[c]);
  }
}

template <typename T>
void fill_zero(T* out, int64_t count) {
  for (int64_t c = 0; c < count; ++c) out[c] = T{};
}

// to[column][row] = from[row][column], converted on the way.  Of a block of four by four, whose size it knows, the
// compiler makes a transposition in registers.
template <typename From, typename To>
void transpose(const From* __restrict from, int64_t from_stride, int64_t rows, int64_t columns, To* __restrict to,
               int64_t to_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t row = 0; row < whole_rows; row += 4)
    for (int64_t column = 0; column < whole_columns; column += 4) {
      Wide<From> block[16];
      To narrowed[16];
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t c = 0; c < 4; ++c) block[c * 4 + r] = widen(from[(row + r) * from_stride + column + c]);
      for (int64_t k = 0; k < 16; ++k) narrow(block[k], narrowed[k]);
      for (int64_t c = 0; c < 4; ++c)
        for (int64_t r = 0; r < 4; ++r) to[(column + c) * to_stride + row + r] = narrowed[c * 4 + r];
    }
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = column < whole_columns ? whole_rows : 0; row < rows; ++row)
      narrow(widen(from[row * from_stride + column]), to[column * to_stride + row]);
}

// A tile is [frame, channel] in rows of `width`.

template <typename T>
void store_tile(const Wide<T>* tile, int64_t width, int64_t frames, int64_t channels, Plane<T> to) {
  if (to.frame_stride == 1) return transpose(tile, width, frames, channels, to.data, to.channel_stride);
  for (int64_t j = 0; j < frames; ++j) {
    T* out = to.at(j, 0);
    if (to.channel_stride == 1) {
      for (int64_t c = 0; c < channels; ++c) narrow(tile[j * width + c], out[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) narrow(tile[j * width + c], out[c * to.channel_stride]);
    }
  }
}

template <typename T>
void load_tile(Plane<const T> from, int64_t frames, int64_t channels, Wide<T>* tile, int64_t width) {
  if (from.frame_stride == 1) return transpose(from.data, from.channel_stride, channels, frames, tile, width);
  for (int64_t j = 0; j < frames; ++j) {
    const T* in = from.at(j, 0);
    if (from.channel_stride == 1) {
      for (int64_t c = 0; c < channels; ++c) tile[j * width + c] = widen(in[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) tile[j * width + c] = widen(in[c * from.channel_stride]);
    }
  }
}

// taps[j - begin] for output frames [begin, end); a frame that no segment fills gets first = -1.
template <typename Real>
void find_taps(const InterpolateArgs& args, const Segment<Real>* segments, int64_t begin, int64_t end,
               Tap<Real>* taps) {
  for (int64_t j = begin; j < end; ++j) taps[j - begin] = {-1, -1, Real(0)};
  for (int k = 0; k < args.segments; ++k) {
    const Segment<Real>& segment = segments[k];
    if (segment.in_frames == 0) continue;
    const int64_t stop = min_of(end, segment.out_stop);
    for (int64_t j = max_of(begin, segment.out_start); j < stop; ++j) taps[j - begin] = find_tap(segment, j);
  }
}

// One tile: output frames [begin, end) of row b, all channels.
template <typename T>
void forward_tile(const InterpolateArgs& args, int64_t b, int64_t begin, int64_t end) {
  Segment<Wide<T>> segments[kMaxSegments];
  find_segments(args, b, segments);
  Tap<Wide<T>> taps[kFrames];
  find_taps(args, segments, begin, end, taps);

  const Plane<const T> in = plane_of(static_cast<const T*>(args.source), args.in, b);
  const Plane<T> out = plane_of(static_cast<T*>(args.result), args.out, b);
  const auto blend_frame = [&](int64_t j, int64_t c, int64_t channels, auto* to) {
    const Tap<Wide<T>>& tap = taps[j - begin];
    if (tap.first < 0)
      fill_zero(to, channels);
    else
      blend(in.at(tap.first, c), in.at(tap.second, c), in.channel_stride, tap.weight, channels, to);
  };

  if (out.channel_stride == 1) {
    for (int64_t j = begin; j < end; ++j) blend_frame(j, 0, args.channels, out.at(j, 0));
    return;
  }
  Wide<T> tile[kElements];
  for (int64_t c = 0; c < args.channels; c += kChannels) {
    const int64_t channels = min_of(kChannels, args.channels - c);
    for (int64_t j = begin; j < end; ++j) {
      if (j - begin < channels) prefetch<1>(out.at(begin, c + j - begin), end - begin);
      prefetch<0>(in.at(taps[j - begin].first, c + kChannels), kChannels);
      blend_frame(j, c, channels, tile + (j - begin) * kChannels);
    }
    store_tile<T>(tile, kChannels, end - begin, channels, {out.at(begin, c), out.frame_stride, out.channel_stride});
  }
}

// The gradient of input frames [begin, end) while it is summed: rows of `width`.
template <typename Real>
struct Sums {
  Real* data;
  int64_t width, begin, end, channels;

  void add(int64_t i, Real weight, const Real* __restrict row) const {
    if (i < begin || i >= end) return;
    Real* __restrict sum = data + (i - begin) * width;
    for (int64_t c = 0; c < channels; ++c) sum[c] = add_weighted(sum[c], weight, row[c]);
  }
};

// Add what output frames [begin, end), all of one segment, give.
template <typename T>
void add_readers(const Segment<Wide<T>>& segment, int64_t begin, int64_t end, Plane<const T> grad,
                 const Sums<Wide<T>>& sums) {
  using Real = Wide<T>;
  Real tile[kElements];
  const int64_t chunk = min_of(kFrames, kElements / sums.width);
  for (int64_t from = begin; from < end; from += chunk) {
    const int64_t to = min_of(from + chunk, end);
    load_tile<T>({grad.at(from, 0), grad.frame_stride, grad.channel_stride}, to - from, sums.channels, tile,
                 sums.width);
    const T* next = to < end ? grad.at(to, 0) : grad.at(begin, sums.channels);  // the tile that comes after this one
    for (int64_t j = from; j < to; ++j) {
      if (j - from < sums.channels) prefetch<0>(next + (j - from) * grad.channel_stride, chunk);
      const Tap<Real> tap = find_tap(segment, j);
      const Real* row = tile + (j - from) * sums.width;
      sums.add(tap.first, 1 - tap.weight, row);
      sums.add(tap.second, tap.weight, row);
    }
  }
}

// The gradient of input frames [begin, end) of row b, for channels [channel, channel + channels).
template <typename T>
void backward_block(const InterpolateArgs& args, const Segment<Wide<T>>* segments, Plane<const T> grad, Plane<T> out,
                    int64_t begin, int64_t end, int64_t width, int64_t channels) {
  using Real = Wide<T>;
  Real data[kElements] = {};
  for (int k = 0; k < args.segments; ++k) {
    const Segment<Real>& segment = segments[k];
    const int64_t first = max_of(begin, segment.in_start);
    const int64_t last = min_of(end, segment.in_start + segment.in_frames);
    if (first >= last) continue;
    // A frame is read by those that have it as their first frame, or, after the frame before it, as their second.
    add_readers<T>(segment, first_reader(segment, first - 1), first_reader(segment, last), grad,
                   Sums<Real>{data + (first - begin) * width, width, first, last, channels});
  }
  store_tile<T>(data, width, end - begin, channels, {out.at(begin, 0), out.frame_stride, out.channel_stride});
}

// One tile: the gradient of input frames [begin, end) of row b, all channels.
template <typename T>
void backward_tile(const InterpolateArgs& args, int64_t b, int64_t begin, int64_t end) {
  Segment<Wide<T>> segments[kMaxSegments];
  find_segments(args, b, segments);
  const Plane<const T> grad = plane_of(static_cast<const T*>(args.source), args.out, b);
  const Plane<T> out = plane_of(static_cast<T*>(args.result), args.in, b);

  // Blocks are long in the dimension in which the gradient is contiguous.
  const int64_t longest = grad.channel_stride == 1 ? 8 * kChannels : kChannels;
  const int64_t width = max_of(1, min_of(longest, args.channels));
  const int64_t height = min_of(kFrames, kElements / width);
  for (int64_t i = begin; i < end; i += height)
    for (int64_t c = 0; c < args.channels; c += width)
      backward_block<T>(args, segments, {grad.at(0, c), grad.frame_stride, grad.channel_stride},
                        {out.at(0, c), out.frame_stride, out.channel_stride}, i, min_of(i + height, end), width,
                        min_of(width, args.channels - c));
}

// Call tile(b, begin, end) for tiles [first_tile, last_tile) of a tensor with that many frames in each row.
template <typename Tile>
void for_tiles(int64_t frames, int64_t first_tile, int64_t last_tile, const Tile& tile) {
  const int64_t tiles = ceil_div(frames, kFrames);
  for (int64_t index = first_tile; index < last_tile; ++index) {
    const int64_t begin = index % tiles * kFrames;
    tile(index / tiles, begin, min_of(begin + kFrames, frames));
  }
}

}  // namespace

void interpolate_forward(const InterpolateArgs& args, Dtype dtype, int64_t first_tile, int64_t last_tile) {
  with_dtype(dtype, [&](auto zero) {
    for_tiles(args.out.frames, first_tile, last_tile,
              [&](int64_t b, int64_t begin, int64_t end) { forward_tile<decltype(zero)>(args, b, begin, end); });
  });
}

void interpolate_backward(const InterpolateArgs& args, Dtype dtype, int64_t first_tile, int64_t last_tile) {
  with_dtype(dtype, [&](auto zero) {
    for_tiles(args.in.frames, first_tile, last_tile,
              [&](int64_t b, int64_t begin, int64_t end) { backward_tile<decltype(zero)>(args, b, begin, end); });
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
