// grouped_conv: arguments.  The maths is in fastflow/ops/grouped_conv.py.
#pragma once

#include "common.h"

namespace fastflow {

// Everything is contiguous.
struct GroupedConvArgs {
  int64_t batch, frames, groups, inputs, outputs, taps;  // inputs and outputs: channels of a group
  const void* x;                                         // [B, T, groups * inputs]
  const void* weight;                                    // [groups * outputs, inputs, taps]
  const void* bias;                                      // [groups * outputs], or null

  void* out;  // [B, T, groups * outputs]
  void* y;    // the same before Mish; null in a forward pass that saves nothing

  const void* grad;                        // backward: of out
  void *grad_x, *grad_weight, *grad_bias;  // null if nobody asked for them
  void* shared;                            // memory for all threads, of grouped_conv_shared elements
};

// What must be complete before the next one starts: forward, then backward.
enum class GroupedConvPhase { arrange, convolve, differentiate, products };

}  // namespace fastflow
