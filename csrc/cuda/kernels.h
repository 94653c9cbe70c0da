// The CUDA kernels.  Each works on the device that is current and on the given stream, and throws std::runtime_error
// if it cannot be launched.
#pragma once

#include "../interpolate.h"

namespace fastflow::cuda {

void interpolate_forward(const InterpolateArgs& args, Dtype dtype, void* stream);
void interpolate_backward(const InterpolateArgs& args, Dtype dtype, void* stream);

}  // namespace fastflow::cuda
