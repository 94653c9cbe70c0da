// euler_step on CUDA: a thread computes one element, in the order of the results.
#include "../euler_step.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastflow::cuda {
namespace {

constexpr int kThreads = 256;

template <typename X, typename V>
__global__ void __launch_bounds__(kThreads) euler_step_kernel(const EulerStepArgs args, const int64_t count) {
  using Real = Wide<X>;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  const int64_t c = n % args.channels, t = n / args.channels % args.frames, b = n / args.channels / args.frames;
  const Strides &xs = args.x_strides, &vs = args.velocity_strides;
  const X x = static_cast<const X*>(args.x)[b * xs.row + t * xs.frame + c * xs.channel];
  const V* velocity = static_cast<const V*>(args.velocity) + b * vs.row + t * vs.frame + c * vs.channel;
  const Real after = guided_step<Real>(widen(x), widen(velocity[0]), widen(velocity[args.batch * vs.row]),
                                       widen(*static_cast<const X*>(args.dt)), static_cast<Real>(1.0 + args.rate),
                                       static_cast<Real>(args.rate));
  if (args.after) narrow(after, static_cast<X*>(args.after)[n]);
  V result;
  narrow(after, result);
  result = saturated(result);
  static_cast<V*>(args.doubled)[n] = result;
  static_cast<V*>(args.doubled)[count + n] = result;
}

template <typename X, typename V>
void launch(const EulerStepArgs& args, void* stream) {
  const int64_t count = args.batch * args.frames * args.channels;
  const int64_t blocks = ceil_div(count, kThreads);
  if (blocks > INT32_MAX) throw std::runtime_error("fastflow: euler_step: the tensor is too large for one launch");
  if (blocks == 0) return;
  euler_step_kernel<X, V>
      <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, count);
  check_launch("euler_step");
}

}  // namespace

void euler_step(const EulerStepArgs& args, Dtype x, Dtype velocity, void* stream) {
  if (x == velocity) return with_dtype(x, [&](auto zero) { launch<decltype(zero), decltype(zero)>(args, stream); });
  if (velocity == Dtype::float16) return launch<float, __half>(args, stream);
  launch<float, __nv_bfloat16>(args, stream);
}

}  // namespace fastflow::cuda
