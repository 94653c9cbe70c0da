// The CUDA kernels.  Each works on the device that is current and on the given stream, and throws std::runtime_error
// if it cannot be launched.
#pragma once

#include "../interpolate.h"
#include "../linear.h"

namespace fastflow::cuda {

void interpolate_forward(const InterpolateArgs& args, Dtype dtype, void* stream);
void interpolate_backward(const InterpolateArgs& args, Dtype dtype, void* stream);

// Every tensor has the dtype, but for statistics and sums, which are float32 (float64 for float64).
void norm_forward(const NormForwardArgs& args, Dtype dtype, void* stream);
void norm_backward(const NormBackwardArgs& args, Dtype dtype, void* stream);
void gated_residual(const GatedResidualArgs& args, Dtype dtype, void* stream);
void gate_backward(const GateBackwardArgs& args, Dtype dtype, void* stream);
void activation_forward(const void* hidden, void* out, Activation activation, int64_t elements, Dtype dtype,
                        void* stream);
void activation_backward(const ActivationBackwardArgs& args, int64_t elements, Dtype dtype, void* stream);

}  // namespace fastflow::cuda
