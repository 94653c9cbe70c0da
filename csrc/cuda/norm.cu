// The normalisation over channels and its backward pass on CUDA.  Frames are read again, out of a cache, rather than
// held in registers, so that any number of channels fits.
#include "kernels.h"
#include "linear.cuh"

namespace fastflow::cuda {
namespace {

template <typename T, int count>
__global__ void __launch_bounds__(kThreads) forward_kernel(const NormForwardArgs args) {
  using Real = Wide<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t frame = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, frames = args.batch * args.frames;
  if (frame >= frames) return;
  const int64_t b = frame / args.frames, t = frame % args.frames, channels = args.channels;
  const int64_t begin = b * args.x.row_stride + t * args.x.frame_stride;
  const auto read = [&](int64_t c) { return load<T, count>(args.x.data, begin + c * args.x.channel_stride); };

  // one after the other, as the difference of two large sums would lose digits
  Real sum = 0;
  for_packs<count>(channels, lane, kWarp, [&](int64_t c) {
    const auto x = read(c);
#pragma unroll
    for (int i = 0; i < count; ++i) sum += x[i];
  });
  const Real mean = warp_sum(sum) / static_cast<Real>(channels);
  Real squares = 0;
  for_packs<count>(channels, lane, kWarp, [&](int64_t c) {
    const auto x = read(c);
#pragma unroll
    for (int i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  });
  const Real variance = warp_sum(squares) / static_cast<Real>(channels);
  const Real rstd = 1 / sqrt(variance + static_cast<Real>(args.eps));

  for_packs<count>(channels, lane, kWarp, [&](int64_t c) {
    auto x = read(c);
    const auto scale = load<T, count>(args.scale, b, c, 1), shift = load<T, count>(args.shift, b, c, 0);
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = (x[i] - mean) * rstd * scale[i] + shift[i];
    store_saturated<T, count>(x, args.out, frame * channels + c);
  });
  if (lane == 0) {
    static_cast<Real*>(args.stats)[frame] = mean;
    static_cast<Real*>(args.stats)[frames + frame] = rstd;
  }
}

// One chunk of one row: its warps take frames, then its threads take channels for the sums over frames.  The formula is
// that of csrc/cpu/projection.cpp.  Four blocks at once, as ptxas aims at more for sm_100 by itself, and spills.
template <typename T, int count>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(const NormBackwardArgs args) {
  using Real = Wide<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t channels = args.channels, chunks = ceil_div(args.frames, kNormChunk);
  const int64_t b = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t begin = b * args.frames + chunk * kNormChunk;
  const int64_t end = b * args.frames + min_of((chunk + 1) * kNormChunk, args.frames);
  const Real *means = static_cast<const Real*>(args.stats), *rstds = means + args.batch * args.frames;

  for (int64_t frame = begin + threadIdx.x / kWarp; frame < end; frame += kWarps) {
    const Real mean = means[frame], rstd = rstds[frame];
    Real sum = 0, product = 0;
    for_packs<count>(channels, lane, kWarp, [&](int64_t c) {
      const auto x = load<T, count>(args.x, frame * channels + c),
                 grad = load<T, count>(args.grad, frame * channels + c);
      const auto scale = load<T, count>(args.scale, b, c, 1);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        sum += grad[i] * scale[i];
        product += grad[i] * scale[i] * ((x[i] - mean) * rstd);
      }
    });
    const Real constant = warp_sum(sum) / static_cast<Real>(channels);
    const Real along = warp_sum(product) / static_cast<Real>(channels);
    for_packs<count>(channels, lane, kWarp, [&](int64_t c) {
      const int64_t offset = frame * channels + c;
      auto x = load<T, count>(args.x, offset), grad = load<T, count>(args.grad, offset);
      const auto scale = load<T, count>(args.scale, b, c, 1), shift = load<T, count>(args.shift, b, c, 0);
      const auto beside = load<T, count>(Vectors{args.grad_residual, 0, 1}, 0, offset, 0);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const Real xhat = (x[i] - mean) * rstd;
        grad[i] = (grad[i] * scale[i] - constant - xhat * along) * rstd + beside[i];
        x[i] = xhat * scale[i] + shift[i];
      }
      store<T, count>(grad, args.grad_x, offset);
      store_saturated<T, count>(x, args.normalised, offset);
    });
  }

  Real* const sums = static_cast<Real*>(args.sums) + int64_t{blockIdx.x} * 2 * channels;
  for_packs<count>(channels, threadIdx.x, kThreads, [&](int64_t c) {
    Real of_scale[count] = {}, of_shift[count] = {};
#pragma unroll 1
    for (int64_t frame = begin; frame < end; ++frame) {
      const Real mean = means[frame], rstd = rstds[frame];
      const auto x = load<T, count>(args.x, frame * channels + c),
                 grad = load<T, count>(args.grad, frame * channels + c);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        of_scale[i] += grad[i] * ((x[i] - mean) * rstd);
        of_shift[i] += grad[i];
      }
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      sums[c + i] = of_scale[i];
      sums[channels + c + i] = of_shift[i];
    }
  });
}

Layout layout_of(const Vectors& x) { return {x.data, x.channel_stride, {x.row_stride}}; }

}  // namespace

void norm_forward(const NormForwardArgs& args, Dtype dtype, void* stream) {
  const unsigned blocks = blocks_for(args.batch * args.frames, kWarps);
  if (blocks == 0) return;
  const Layout x = {args.x.data, args.x.channel_stride, {args.x.row_stride, args.x.frame_stride}};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool fits = fits_packs<T>(args.channels, {x, layout_of(args.scale), layout_of(args.shift)});
    with_packs<T>(fits, [&](auto size) {
      forward_kernel<T, decltype(size)::value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
  });
  check_launch("norm_forward");
}

void norm_backward(const NormBackwardArgs& args, Dtype dtype, void* stream) {
  const unsigned blocks = blocks_for(args.batch * ceil_div(args.frames, kNormChunk), 1);
  if (blocks == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool fits =
        fits_packs<T>(args.channels, {layout_of(args.x), layout_of(args.grad), layout_of(args.grad_residual),
                                      layout_of(args.scale), layout_of(args.shift)});
    with_packs<T>(fits, [&](auto size) {
      backward_kernel<T, decltype(size)::value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
  });
  check_launch("norm_backward");
}

}  // namespace fastflow::cuda
