// interpolate: arguments and index arithmetic, shared by csrc/cpu and csrc/cuda.  The formula is in
// fastflow/ops/interpolate.py.
#pragma once

#include "common.h"

namespace fastflow {

constexpr int kMaxSegments = 4;

constexpr int64_t kInterpolateTile = 64;  // frames in a tile, the unit of work on the CPU

// One side of the op: [batch, frame, channel] in elements, in any order of memory.
struct Frames {
  int64_t frames;
  int64_t batch_stride, frame_stride, channel_stride;
};

// The forward pass reads `in` and writes `out`; the backward pass reads `out` and writes `in`.
struct InterpolateArgs {
  const void* source;
  void* result;
  int64_t batch, channels;
  Frames in, out;
  int segments;
  int64_t shared[2 * kMaxSegments];  // (s_0, d_0, s_1, d_1, ...), for every row when `rows` is null
  const int64_t* rows;               // [batch, segments, 2]
  int64_t rows_stride[3];
};

// float32 for float32 and the 16-bit types, float64 for float64.
template <typename Real>
struct Segment {
  int64_t in_start, in_frames;
  int64_t out_start, out_stop;  // cut at the end of the output, which does not change the ratio
  Real ratio;                   // input frames per output frame
};

// The segments of row b, cut to what the tensors hold; whatever `rows` contains, no index leaves them.
template <typename Real>
FASTFLOW_HD static inline void find_segments(const InterpolateArgs& args, int64_t b, Segment<Real>* segments) {
  int64_t in_start = 0, out_start = 0;
  for (int k = 0; k < args.segments; ++k) {
    int64_t in_frames, out_frames;
    if (args.rows) {
      const int64_t* pair = args.rows + b * args.rows_stride[0] + k * args.rows_stride[1];
      in_frames = pair[0];
      out_frames = pair[args.rows_stride[2]];
    } else {
      in_frames = args.shared[2 * k];
      out_frames = args.shared[2 * k + 1];
    }
    in_frames = min_of(max_of(in_frames, 0), args.in.frames - in_start);
    out_frames = max_of(out_frames, 0);
    const int64_t out_stop = out_start + min_of(out_frames, args.out.frames - out_start);
    const Real ratio = static_cast<Real>(in_frames) / static_cast<Real>(out_frames);
    segments[k] = {in_start, in_frames, out_start, out_stop, ratio};
    in_start += in_frames;
    out_start = out_stop;
  }
}

// Output frame = (1 - weight) * input frame `first` + weight * input frame `second`.
template <typename Real>
struct Tap {
  int64_t first, second;
  Real weight;
};

// What output frame j of the segment reads.  torch's own F.interpolate, on AVX2 and on CUDA, contracts the product and
// the subtraction into a fused multiply-add; written out here, the result is the same to the bit on any hardware.
// Monotonic in j, because every step is.
template <typename Real>
FASTFLOW_HD static inline Tap<Real> find_tap(const Segment<Real>& segment, int64_t j) {
  const Real position = static_cast<Real>(j - segment.out_start) + Real(0.5);
  Real source = fused_multiply_add(segment.ratio, position, Real(-0.5));
  source = source > 0 ? source : Real(0);
  const int64_t last = segment.in_frames - 1;
  const int64_t first = min_of(static_cast<int64_t>(source), last);
  const Real weight = source - static_cast<Real>(first);
  return {segment.in_start + first, segment.in_start + min_of(first + 1, last), weight < 1 ? weight : Real(1)};
}

// The first output frame of the segment whose `first` is input frame i or a later one.
template <typename Real>
FASTFLOW_HD static inline int64_t first_reader(const Segment<Real>& segment, int64_t i) {
  int64_t low = segment.out_start, high = segment.out_stop;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (find_tap(segment, middle).first < i)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace fastflow
