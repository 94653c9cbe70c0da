// interpolate on the CPU.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "../interpolate.h"

#include "dtypes.h"
#include "kernels.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kFrames = kInterpolateTile;
constexpr int64_t kChannels = 64;  // with kFrames, a float tile of 16 KiB stays in the L1 cache

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

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

// Copy a tile between row-major [frame, kChannels] and memory with other strides.

template <typename T>
void store_tile(const Wide<T>* tile, int64_t frames, int64_t channels, Plane<T> to) {
  if (to.channel_stride == 1) {
    for (int64_t j = 0; j < frames; ++j) {
      T* out = to.at(j, 0);
      for (int64_t c = 0; c < channels; ++c) narrow(tile[j * kChannels + c], out[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      T* out = to.at(0, c);
      for (int64_t j = 0; j < frames; ++j) narrow(tile[j * kChannels + c], out[j * to.frame_stride]);
    }
  }
}

template <typename T>
void load_tile(Plane<const T> from, int64_t frames, int64_t channels, Wide<T>* tile) {
  if (from.channel_stride == 1) {
    for (int64_t j = 0; j < frames; ++j) {
      const T* in = from.at(j, 0);
      for (int64_t c = 0; c < channels; ++c) tile[j * kChannels + c] = widen(in[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      const T* in = from.at(0, c);
      for (int64_t j = 0; j < frames; ++j) tile[j * kChannels + c] = widen(in[j * from.frame_stride]);
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
  Wide<T> tile[kFrames * kChannels];
  for (int64_t c = 0; c < args.channels; c += kChannels) {
    const int64_t channels = min_of(kChannels, args.channels - c);
    for (int64_t j = begin; j < end; ++j) blend_frame(j, c, channels, tile + (j - begin) * kChannels);
    store_tile<T>(tile, end - begin, channels, {out.at(begin, c), out.frame_stride, out.channel_stride});
  }
}

// Add what output frames [begin, end) of one segment give to input frames [first, last), whose sums are rows of `sums`.
template <typename T>
void gather(const Segment<Wide<T>>& segment, Plane<const T> grad, int64_t begin, int64_t end, int64_t first,
            int64_t last, int64_t channels, Wide<T>* sums) {
  using Real = Wide<T>;
  Real tile[kFrames * kChannels];
  const auto add = [&](int64_t i, Real weight, const Real* __restrict row) {
    if (i < first || i >= last) return;
    Real* __restrict sum = sums + (i - first) * kChannels;
    for (int64_t c = 0; c < channels; ++c) sum[c] = add_weighted(sum[c], weight, row[c]);
  };
  for (int64_t chunk = begin; chunk < end; chunk += kFrames) {
    const int64_t stop = min_of(chunk + kFrames, end);
    load_tile<T>({grad.at(chunk, 0), grad.frame_stride, grad.channel_stride}, stop - chunk, channels, tile);
    for (int64_t j = chunk; j < stop; ++j) {
      const Tap<Real> tap = find_tap(segment, j);
      const Real* row = tile + (j - chunk) * kChannels;
      add(tap.first, 1 - tap.weight, row);
      add(tap.second, tap.weight, row);
    }
  }
}

// One tile: the gradient of input frames [begin, end) of row b, all channels.
template <typename T>
void backward_tile(const InterpolateArgs& args, int64_t b, int64_t begin, int64_t end) {
  using Real = Wide<T>;
  Segment<Real> segments[kMaxSegments];
  find_segments(args, b, segments);
  const Plane<const T> grad = plane_of(static_cast<const T*>(args.source), args.out, b);
  const Plane<T> out = plane_of(static_cast<T*>(args.result), args.in, b);

  Real sums[kFrames * kChannels];
  for (int64_t c = 0; c < args.channels; c += kChannels) {
    const int64_t channels = min_of(kChannels, args.channels - c);
    fill_zero(sums, (end - begin) * kChannels);
    for (int k = 0; k < args.segments; ++k) {
      const Segment<Real>& segment = segments[k];
      const int64_t first = max_of(begin, segment.in_start);
      const int64_t last = min_of(end, segment.in_start + segment.in_frames);
      if (first >= last) continue;
      // Readers of frame i have it as their first frame, or as the second after frame i - 1.
      const int64_t from = first_reader(segment, first - 1);
      const int64_t to = first_reader(segment, last);
      gather<T>(segment, {grad.at(0, c), grad.frame_stride, grad.channel_stride}, from, to, first, last, channels,
                sums + (first - begin) * kChannels);
    }
    store_tile<T>(sums, end - begin, channels, {out.at(begin, c), out.frame_stride, out.channel_stride});
  }
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
