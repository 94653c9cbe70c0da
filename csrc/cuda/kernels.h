// The CUDA kernels.  Each works on the device that is current and on the given stream, and throws std::runtime_error
// if it cannot be launched.
#pragma once

#include "../euler_step.h"
#include "../interpolate.h"

namespace fastflow::cuda {

void interpolate_forward(const InterpolateArgs& args, Dtype dtype, void* stream);
void interpolate_backward(const InterpolateArgs& args, Dtype dtype, void* stream);

// The dtypes of x and velocity: equal, or float32 and one of 16 bits.
void euler_step(const EulerStepArgs& args, Dtype x, Dtype velocity, void* stream);

}  // namespace fastflow::cuda
