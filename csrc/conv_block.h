// conv_block: arguments and the frames that take part.  The maths is in fastflow/ops/conv_block.py.
#pragma once

#include "common.h"

namespace fastflow {

// [B, T, channels]; strides in elements.
struct Sequence {
  const void* data;
  int64_t row_stride, frame_stride, channel_stride;
};

struct ConvBlockArgs {
  int64_t batch, frames, channels, width;  // x is [B, T, channels], the result [B, T, width]
  int64_t groups;                          // of GroupNorm; 0: LayerNorm
  bool causal, exact;
  double eps;

  // Contiguous, but for x: [width, channels, 3], [width] and [B, width]; time_bias and lengths may be null.
  Sequence x;
  const void *weight, *bias, *norm_weight, *norm_bias, *time_bias;
  const int64_t* lengths;

  // Results of the forward pass, contiguous.  y is the convolution's output: that of GroupNorm may be `out` itself,
  // that of LayerNorm null.  mean and rstd, [B, groups] or [B, T] in the type to compute in, are null if nothing is
  // saved for the backward pass.
  void *out, *y, *mean, *rstd;

  // Backward: the results are contiguous, and null if nobody asked for them.
  Sequence grad;
  void *grad_x, *grad_weight, *grad_bias, *grad_norm_weight, *grad_norm_bias, *grad_time_bias;

  void* shared;  // memory for all threads, of conv_block_shared elements
};

// What must be complete before the next one starts: forward, then backward.
enum class ConvBlockPhase { pack, convolve, normalise, differentiate, centre, products };

// Tasks of a phase, and elements of memory that each thread needs.
struct ConvBlockPlan {
  int64_t tasks, elements;
};

// Frames of x that a frame sees to its left and to its right.
FASTFLOW_HD static inline int64_t left_of(const ConvBlockArgs& args) { return args.causal ? 2 : 1; }
FASTFLOW_HD static inline int64_t right_of(const ConvBlockArgs& args) { return args.causal ? 0 : 1; }

FASTFLOW_HD static inline int64_t length_of(const ConvBlockArgs& args, int64_t b) {
  return args.lengths ? min_of(max_of(args.lengths[b], 0), args.frames) : args.frames;
}

// Frames whose y is computed.  GroupNorm of the padded row counts the others, too: they see no frame of x, so their y
// is the bias.
FASTFLOW_HD static inline int64_t active_frames(const ConvBlockArgs& args, int64_t b) {
  const int64_t length = length_of(args, b);
  if (args.groups == 0 || args.exact || length == 0) return length;
  return min_of(args.frames, length + left_of(args));
}

// Frames that GroupNorm counts.
FASTFLOW_HD static inline int64_t counted_frames(const ConvBlockArgs& args, int64_t b) {
  return args.exact ? length_of(args, b) : args.frames;
}

// What the CUDA kernels share: between the passes over y, and with the convolution.
struct ConvBlockPasses {
  void* moments;       // forward, GroupNorm: of each chunk of frames, [B, chunks, 2, width]
  void *sums, *means;  // backward: [4, B, chunks, width], and of h and h * normalised y, [B, groups or T, 2]
  void* dy;            // [B, before + T + after, width], zero where it is not computed
  int64_t before, after;
};

}  // namespace fastflow
