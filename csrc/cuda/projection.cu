// What follows the product of a projection on CUDA: gate and residual, and the backward pass of the gate.
#include "kernels.h"
#include "linear.cuh"

namespace fastflow::cuda {
namespace {

template <typename T, int count>
__global__ void __launch_bounds__(kThreads) residual_kernel(const GatedResidualArgs args) {
  const int64_t frame = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (frame >= args.batch * args.frames) return;
  const int64_t b = frame / args.frames, t = frame % args.frames;
  const int64_t begin = b * args.residual.row_stride + t * args.residual.frame_stride;
  for_packs<count>(args.channels, threadIdx.x % kWarp, kWarp, [&](int64_t c) {
    const int64_t offset = frame * args.channels + c;
    auto y = load_product<T, count>(args.y, offset);
    const auto residual = load<T, count>(args.residual.data, begin + c * args.residual.channel_stride);
    const auto gate = load<T, count>(args.gate, b, c, 1);
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] = residual[i] + gate[i] * y[i];
    store_saturated<T, count>(y, args.out, offset);
  });
}

// One row n of the weight: its warps take rows of the batch for the gate, then its threads take channels of the weight.
template <typename T, int count>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GateBackwardArgs args) {
  using Real = Wide<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t n = blockIdx.x, channels = args.channels;
  const Real* sums = static_cast<const Real*>(args.sums);
  const T* gates = static_cast<const T*>(args.gate.data) + n * args.gate.channel_stride;

  for (int64_t b = threadIdx.x / kWarp; b < args.batch; b += kWarps) {
    const int64_t at = b * args.rows + n;
    Real sum = 0;
    for_packs<count>(channels, lane, kWarp, [&](int64_t c) {
      const auto product = load<T, count>(args.products, at * channels + c);
      const auto weight = load<T, count>(args.weight, n * channels + c);
#pragma unroll
      for (int i = 0; i < count; ++i) sum += product[i] * weight[i];
    });
    sum = warp_sum(sum);
    if (args.bias) sum += widen(static_cast<const T*>(args.bias)[n]) * sums[at];
    if (lane == 0) narrow(sum, static_cast<T*>(args.grad_gate)[at]);
  }

  for_packs<count>(channels, threadIdx.x, kThreads, [&](int64_t c) {
    Pack<T, count> total = {};
#pragma unroll 1
    for (int64_t b = 0; b < args.batch; ++b) {
      const Real gate = widen(gates[b * args.gate.row_stride]);
      const auto product = load<T, count>(args.products, (b * args.rows + n) * channels + c);
#pragma unroll
      for (int i = 0; i < count; ++i) total[i] += gate * product[i];
    }
    store<T, count>(total, args.grad_weight, n * channels + c);
  });
  if (threadIdx.x == 0) {
    Real total = 0;
#pragma unroll 1
    for (int64_t b = 0; b < args.batch; ++b) total += widen(gates[b * args.gate.row_stride]) * sums[b * args.rows + n];
    narrow(total, static_cast<T*>(args.grad_bias)[n]);
  }
}

}  // namespace

void gated_residual(const GatedResidualArgs& args, Dtype dtype, void* stream) {
  const unsigned blocks = blocks_for(args.batch * args.frames, kWarps);
  if (blocks == 0) return;
  const Signal& x = args.residual;
  const Layout residual = {x.data, x.channel_stride, {x.row_stride, x.frame_stride}};
  const Layout gate = {args.gate.data, args.gate.channel_stride, {args.gate.row_stride}};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_packs<T>(fits_packs<T>(args.channels, {layout_of(args.y), residual, gate}), [&](auto size) {
      residual_kernel<T, decltype(size)::value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
  });
  check_launch("gated_residual");
}

void gate_backward(const GateBackwardArgs& args, Dtype dtype, void* stream) {
  const unsigned blocks = blocks_for(args.rows, 1);
  if (blocks == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = fits_packs<T>(args.channels, {layout_of(args.products), layout_of(args.weight)});
    with_packs<T>(fits, [&](auto size) {
      gate_kernel<T, decltype(size)::value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
  });
  check_launch("gate_backward");
}

}  // namespace fastflow::cuda
