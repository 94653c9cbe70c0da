// euler_step: arguments and arithmetic, shared by csrc/cpu and csrc/cuda.  The formula is in
// fastflow/ops/euler_step.py.
#pragma once

#include "common.h"

namespace fastflow {

// [row, frame, channel] in elements, in any order of memory.
struct Strides {
  int64_t row, frame, channel;
};

// The results are contiguous.
struct EulerStepArgs {
  int64_t batch, frames, channels;
  const void* x;
  Strides x_strides;
  const void* velocity;  // twice the rows of x
  Strides velocity_strides;
  const void* dt;  // one number of the dtype of x
  double rate;
  void* after;    // of the dtype of x; null where `doubled` has the same
  void* doubled;  // of the dtype of velocity
};

// Every operation is rounded by itself: the build forbids their contraction.
template <typename Real>
FASTFLOW_HD static inline Real guided_step(Real x, Real conditional, Real unconditional, Real dt,
                                           Real conditional_weight, Real unconditional_weight) {
  const Real guided = conditional_weight * conditional - unconditional_weight * unconditional;
  return x + dt * guided;
}

}  // namespace fastflow
