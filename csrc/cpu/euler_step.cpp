// euler_step on the CPU.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "../euler_step.h"

#include "dtypes.h"
#include "kernels.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

// The channels of one frame, and what all frames share.
template <typename X, typename V>
struct Frame {
  const X* x;
  const V *conditional, *unconditional;
  X* after;  // may be null
  V *first, *second;
  int64_t channels, x_stride, velocity_stride;
  Wide<X> dt, conditional_weight, unconditional_weight;

  // With strides known to be 1 the compiler vectorises it.
  void step(int64_t x_step, int64_t velocity_step) const {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t v = c * velocity_step;
      const Wide<X> value = guided_step<Wide<X>>(widen(x[c * x_step]), widen(conditional[v]), widen(unconditional[v]),
                                                 dt, conditional_weight, unconditional_weight);
      if (after) narrow(value, after[c]);
      V result;
      narrow(value, result);
      first[c] = result;
      second[c] = result;
    }
  }

  void run() const {
    if (x_stride == 1 && velocity_stride == 1)
      step(1, 1);
    else
      step(x_stride, velocity_stride);
  }
};

template <typename X, typename V>
void run_frames(const EulerStepArgs& args, int64_t begin, int64_t end) {
  const Strides &xs = args.x_strides, &vs = args.velocity_strides;
  const int64_t count = args.batch * args.frames * args.channels;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t b = n / args.frames, t = n % args.frames, at = n * args.channels;
    const V* velocity = static_cast<const V*>(args.velocity) + b * vs.row + t * vs.frame;
    V* const doubled = static_cast<V*>(args.doubled) + at;
    Frame<X, V>{static_cast<const X*>(args.x) + b * xs.row + t * xs.frame,
                velocity,
                velocity + args.batch * vs.row,
                args.after ? static_cast<X*>(args.after) + at : nullptr,
                doubled,
                doubled + count,
                args.channels,
                xs.channel,
                vs.channel,
                widen(*static_cast<const X*>(args.dt)),
                static_cast<Wide<X>>(1.0 + args.rate),
                static_cast<Wide<X>>(args.rate)}
        .run();
  }
}

}  // namespace

void euler_step(const EulerStepArgs& args, Dtype x, Dtype velocity, int64_t begin, int64_t end) {
  if (x == velocity)
    return with_dtype(x, [&](auto zero) { run_frames<decltype(zero), decltype(zero)>(args, begin, end); });
  if (velocity == Dtype::float16) return run_frames<float, Half>(args, begin, end);
  run_frames<float, BFloat16>(args, begin, end);
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
