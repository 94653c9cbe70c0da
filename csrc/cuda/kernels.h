// The CUDA kernels.  Each works on the device that is current and on the given stream, and throws std::runtime_error
// if it cannot be launched.
#pragma once

#include "../conv_block.h"
#include "../euler_step.h"
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

// args.x within the rows' lengths, after `before` frames of zeros and ahead of `after`: args.out is
// [B, before + T + after, channels].
void conv_block_pad(const ConvBlockArgs& args, int64_t before, int64_t after, Dtype dtype, void* stream);

// From args.y to args.out, args.mean and args.rstd, and back from args.grad to passes.dy and the gradients of bias,
// norm_weight, norm_bias and time_bias.
int64_t conv_block_chunks(const ConvBlockArgs& args);
void conv_block_normalise(const ConvBlockArgs& args, const ConvBlockPasses& passes, Dtype dtype, void* stream);
void conv_block_differentiate(const ConvBlockArgs& args, const ConvBlockPasses& passes, Dtype dtype, void* stream);
// The dtypes of x and velocity: equal, or float32 and one of 16 bits.
void euler_step(const EulerStepArgs& args, Dtype x, Dtype velocity, void* stream);

}  // namespace fastflow::cuda
