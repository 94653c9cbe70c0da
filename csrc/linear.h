// projection and feed_forward: arguments.  The maths is in fastflow/ops/{norm,projection,feed_forward}.py.
#pragma once

#include "common.h"

namespace fastflow {

enum class Activation { none, gelu, gelu_tanh, silu };

// [B, T, C]; strides in elements.
struct Signal {
  void* data;
  int64_t row_stride, frame_stride, channel_stride;
};

// [B, C], or [C] with row_stride 0; data is null if there is none.
struct Vectors {
  const void* data;
  int64_t row_stride, channel_stride;
};

// [rows, depth] with its bias [rows].
struct Weight {
  const void* data;
  int64_t rows, stride;
  Vectors bias;
};

// Matrices below each other as one, [rows, depth].
struct Weights {
  const Weight* parts;
  int64_t count, rows, depth;
};

struct LinearArgs {
  int64_t batch, frames;
  Signal x;

  bool norm;  // of x, over its channels
  Vectors scale, shift;
  double eps;
  void* stats;  // mean and 1 / deviation of each frame, [2, B, T]

  // The first has rows = `hidden` and is followed by the activation, if there is one.
  int64_t channels, hidden, out_channels;
  Activation activation;
  const void *packed_hidden, *packed_out;  // by Kernels::pack
  void* pre_activation;                    // [B, T, hidden], or null

  Vectors gate;     // of the result
  Signal residual;  // added to it, or null
  void* out;        // [B, T, out_channels]

  int64_t block;  // frames of a task, of all rows one after the other
};

// The two passes of a backward over frames, in float32 or float64, all contiguous.
struct NormBackwardArgs {
  int64_t batch, frames, channels;
  const void *grad, *x, *stats;  // grad: of the normalised x
  Vectors scale, shift;
  const void* grad_residual;  // added to grad_x, or null
  void *grad_x, *normalised;  // [B, T, C]
  void* sums;                 // [B, ceil(T / kNormChunk), 2, C]: of grad * (x - mean) / deviation, and of grad
};
constexpr int64_t kNormChunk = 64;

struct ActivationBackwardArgs {
  Activation activation;
  const void *grad, *pre_activation;
  void *activated, *grad_pre_activation;
};

}  // namespace fastflow
