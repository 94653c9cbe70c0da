// projection and feed_forward: arguments.  The maths is in fastflow/ops/{norm,projection,feed_forward}.py.
#pragma once

#include <cmath>

#include "common.h"
#include "dropout.h"

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
  const int64_t* row_of;  // each frame's row of the vectors, where rows lie one after the other in one of x; or null

  bool norm;  // of x, over its channels
  Vectors scale, shift;
  double eps;
  void* stats;  // mean and 1 / deviation of each frame, [2, B, T]

  // The first has rows = `hidden` and is followed by the activation, if there is one.
  int64_t channels, hidden, out_channels;
  Activation activation;
  const void *packed_hidden, *packed_out;  // by Kernels::pack
  void* pre_activation;                    // [B, T, hidden], or null

  bool drops;
  Dropout dropout;  // if it drops any: of the result, before the gate; in feed_forward of what the activation gives
  Vectors gate;     // of the result
  void* ungated;    // the result before it, [B, T, out_channels], or null
  Signal residual;  // added to it, or null
  void* out;        // [B, T, out_channels]

  int64_t block;  // frames of a task, of all rows one after the other
};

// The passes of the backward over frames.  On the CPU in float32 or float64; x, grad and results are contiguous.
struct NormBackwardArgs {
  int64_t batch, frames, channels;
  const void *grad, *x, *stats;  // grad: of the normalised x
  Vectors scale, shift;
  const void* grad_residual;  // added to grad_x, or null
  void *grad_x, *normalised;  // [B, T, C]
  void* sums;                 // [B, ceil(T / kNormChunk), 2, C]: of grad * (x - mean) / deviation, and of grad
  // On the CPU, of the rows that scale and shift have, which may lie one after the other in one of x: where each begins
  // among all frames, and its first chunk among all chunks; then the end.
  int64_t rows = 0;
  const int64_t *starts = nullptr, *chunk_starts = nullptr;
};
constexpr int64_t kNormChunk = 16;  // as in fastflow/ops/norm.py

// What a row of the batch adds to the gradients of gate * (x @ weight.T + bias), and the gradient of its gate, from the
// products grad.T @ x and the sums of grad over the row's frames.  On the CPU; contiguous, in float32 or float64.
struct GatedGradientArgs {
  int64_t channels;
  const void *products, *sums;       // [N, C], [N]
  const void *weight, *bias, *gate;  // [N, C], [N] or null, [N]
  void *grad_weight, *grad_bias, *grad_gate;
};

// Products with at most kThinFrames frames, on the CPU; contiguous, in the type to compute in but for the result of the
// forward.
constexpr int64_t kThinFrames = 16;  // as in fastflow/ops/projection.py
struct ThinArgs {
  int64_t frames, channels, rows;  // rows: of the weight
  const void* x;                   // [frames, channels]
  const void* grad;                // of the result, [frames, rows]
  const void* weight;              // [rows, channels]
  void* out;                       // the result, the gradient of x, or that of the weight
};

// out = a b with more frames, on the CPU; contiguous, in float32 or float64.
constexpr int64_t kProductColumns = 512;  // of a task
struct ProductArgs {
  int64_t rows, depth, columns;
  const void* a;  // [rows, depth], or if `transposed` [depth, rows]
  bool transposed;
  const void* b;  // [depth, columns]
  void* out;      // [rows, columns]
  int64_t block;  // rows of a task, a multiple of 12
};

struct ActivationBackwardArgs {
  Activation activation;
  const void *grad, *pre_activation;
  void *activated, *grad_pre_activation;
  // On the CPU.
  int64_t count = 0;  // of numbers
  bool drops = false;
  Dropout dropout = {};  // of what the activation gives, if it drops any
};

// out = grad * gate, with the gate of a frame's row.  On the CPU; contiguous, in float32 or float64.
struct GatedFramesArgs {
  int64_t channels;
  const void* grad;
  Vectors gate;
  int64_t rows;
  const int64_t* starts;  // as in NormBackwardArgs
  void* out;
};

// The passes of a GPU beside these two; what is not a Signal or Vectors is contiguous.
struct NormForwardArgs {
  int64_t batch, frames;
  Signal x;
  int64_t channels;
  Vectors scale, shift;
  double eps;
  void *out, *stats;  // as in LinearArgs
};

// out = residual + gate * y
struct GatedResidualArgs {
  int64_t batch, frames, channels;
  const void* y;
  Signal residual;
  Vectors gate;
  void* out;
};

// Of gate * (x @ weight.T + bias), from the products grad_b.T @ x_b of each row of the batch.
struct GateBackwardArgs {
  int64_t batch, rows, channels;  // rows: of the weight
  const void *products, *sums;    // [B, rows, C]; of grad over frames [B, rows], in float32 or float64
  const void *weight, *bias;      // [rows, C], [rows] or null
  Vectors gate;
  void *grad_weight, *grad_bias, *grad_gate;
};

// The formulas of csrc/cpu/activation.h for single numbers.
template <typename Real>
struct Activated {
  Real value, derivative;
};

// 1 / (1 + exp(-x)), which overflows nowhere and whose derivative is exact on both sides.
template <typename Real>
FASTFLOW_HD static inline Activated<Real> sigmoid(Real x) {
  const Real power = std::exp(x < 0 ? x : -x), value = 1 / (1 + power);
  return {x < 0 ? power * value : value, power * value * value};
}

template <typename Real>
FASTFLOW_HD static inline Activated<Real> activate(Activation activation, Real x) {
  if (activation == Activation::gelu) {
    const Real cdf = Real(0.5) * std::erfc(Real(-0.70710678118654752440) * x);
    return {x * cdf, cdf + x * Real(0.39894228040143267794) * std::exp(Real(-0.5) * x * x)};
  }
  constexpr Real factor = Real(1.59576912160573071176), cubic = Real(0.044715);
  const bool tanh = activation == Activation::gelu_tanh;
  const Activated<Real> gate = sigmoid(tanh ? factor * x * (1 + cubic * x * x) : x);
  const Real slope = tanh ? factor * (1 + 3 * cubic * x * x) : Real(1);
  return {x * gate.value, gate.value + x * gate.derivative * slope};
}

}  // namespace fastflow
