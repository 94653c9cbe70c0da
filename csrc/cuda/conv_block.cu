// conv_block on CUDA: everything around the convolution, which is torch's.
//
// A pass over y has a thread for each channel and chunk of frames; neighbouring threads have neighbouring channels.
// Between two passes, what is normalised together is combined: by a block for each row and group (GroupNorm), or by a
// warp for each frame (LayerNorm), which reads the frame itself.  Every sum has one order.
#include "../conv_block.h"
#include "../mish.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastflow::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;  // of a multiprocessor at once, at least, where the compiler must be told
constexpr int kChunk = 16;  // frames

enum Sum { kGradient, kGradientTimesX, kOutput, kTime };  // of dz, dz * normalised y, dy and grad

// ------------------------------------------------------------------------------------------------ sums
template <typename Real>
__device__ Real warp_sum(Real x) {  // for all threads of the warp
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

template <typename Real>
__device__ Real block_sum(Real x) {  // for all threads of the block
  __shared__ Real parts[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  Real total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
  __syncthreads();
  return total;
}

// ------------------------------------------------------------------------------------------------ positions
__host__ __device__ int64_t chunks_of(const ConvBlockArgs& args) { return ceil_div(args.frames, kChunk); }

// The frames [first, last) of a channel.
struct Chunk {
  int64_t b, index, first, last, c;
};

__device__ bool find_chunk(const ConvBlockArgs& args, int64_t frames, int64_t channels, Chunk& chunk) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, chunks = ceil_div(frames, kChunk);
  chunk.c = n % channels;
  chunk.index = n / channels % chunks;
  chunk.b = n / channels / chunks;
  chunk.first = chunk.index * kChunk;
  chunk.last = min_of(chunk.first + kChunk, frames);
  return chunk.b < args.batch;
}

// The row and the frame of this warp.
__device__ bool find_frame(const ConvBlockArgs& args, int64_t& b, int64_t& t) {
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  b = n / args.frames;
  t = n % args.frames;
  return b < args.batch;
}

// Where a chunk keeps its sums of one kind, for all channels.
__device__ int64_t sum_at(const ConvBlockArgs& args, Sum kind, int64_t b, int64_t index) {
  return ((kind * args.batch + b) * chunks_of(args) + index) * args.width;
}

// Of the frame or of the group of a row, in mean, rstd and means.
__device__ int64_t statistic_at(const ConvBlockArgs& args, int64_t b, int64_t t, int64_t c) {
  return args.groups ? b * args.groups + c / (args.width / args.groups) : b * args.frames + t;
}

__device__ int64_t offset_of(const Sequence& x, int64_t b, int64_t t, int64_t c) {
  return b * x.row_stride + t * x.frame_stride + c * x.channel_stride;
}

template <typename T>
__device__ Wide<T> value(const void* vector, int64_t c) {
  return widen(static_cast<const T*>(vector)[c]);
}

// The convolution's result is torch's, and may be infinite.
template <typename T>
__device__ Wide<T> y_at(const ConvBlockArgs& args, int64_t b, int64_t t, int64_t c) {
  return widen(saturated(static_cast<const T*>(args.y)[(b * args.frames + t) * args.width + c]));
}

template <typename T>
__device__ Wide<T> grad_at(const ConvBlockArgs& args, int64_t b, int64_t t, int64_t c) {
  return value<T>(args.grad.data, offset_of(args.grad, b, t, c));
}

// ------------------------------------------------------------------------------------------------ padding
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pad_kernel(const ConvBlockArgs args, const int64_t before, const int64_t frames) {
  Chunk chunk;
  if (!find_chunk(args, frames, args.channels, chunk)) return;
  const int64_t length = length_of(args, chunk.b);
  for (int64_t n = chunk.first; n < chunk.last; ++n) {
    const int64_t t = n - before;
    T x{};
    if (t >= 0 && t < length) x = static_cast<const T*>(args.x.data)[offset_of(args.x, chunk.b, t, chunk.c)];
    static_cast<T*>(args.out)[(chunk.b * frames + n) * args.channels + chunk.c] = x;
  }
}

// ------------------------------------------------------------------------------------------------ forward
// Of each channel and chunk the mean and the sum of the squared distances from it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    channel_moments_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  Chunk chunk;
  if (!find_chunk(args, args.frames, args.width, chunk)) return;
  const int64_t last = min_of(chunk.last, active_frames(args, chunk.b));
  Real sum = 0, squares = 0;
  for (int64_t t = chunk.first; t < last; ++t) sum += y_at<T>(args, chunk.b, t, chunk.c);
  const Real mean = sum / static_cast<Real>(max_of(last - chunk.first, 1));
  for (int64_t t = chunk.first; t < last; ++t) {
    const Real distance = y_at<T>(args, chunk.b, t, chunk.c) - mean;
    squares += distance * distance;
  }
  Real* moments = static_cast<Real*>(passes.moments) + 2 * sum_at(args, Sum{}, chunk.b, chunk.index) + chunk.c;
  moments[0] = mean;
  moments[args.width] = squares;
}

// Combines them (Chan, Golub, LeVeque 1979) with the frames whose y is the bias: a chunk after the others.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    group_moments_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  const int64_t b = blockIdx.x / args.groups, g = blockIdx.x % args.groups, size = args.width / args.groups;
  const int64_t active = active_frames(args, b), counted = counted_frames(args, b), chunks = ceil_div(active, kChunk);
  const auto visit = [&](const auto& add) {
    for (int64_t e = threadIdx.x; e < (chunks + 1) * size; e += kThreads) {
      const int64_t index = e / size, c = g * size + e % size;
      const Real* moments = static_cast<Real*>(passes.moments) + 2 * sum_at(args, Sum{}, b, index) + c;
      if (index == chunks)
        add(static_cast<Real>(counted - active), value<T>(args.bias, c), Real(0));
      else
        add(static_cast<Real>(min_of(kChunk, active - index * kChunk)), moments[0], moments[args.width]);
    }
  };
  const Real count = static_cast<Real>(max_of(counted * size, 1));
  Real sum = 0, squares = 0;
  visit([&](Real frames, Real mean, Real) { sum += frames * mean; });
  const Real mean = block_sum(sum) / count;
  visit([&](Real frames, Real part, Real within) { squares += within + frames * (part - mean) * (part - mean); });
  const Real variance = block_sum(squares) / count;
  if (threadIdx.x > 0) return;
  static_cast<Real*>(args.mean)[blockIdx.x] = mean;
  static_cast<Real*>(args.rstd)[blockIdx.x] = Real(1) / std::sqrt(variance + static_cast<Real>(args.eps));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) frame_moments_kernel(const ConvBlockArgs args) {
  using Real = Wide<T>;
  int64_t b, t;
  if (!find_frame(args, b, t)) return;
  const int64_t lane = threadIdx.x % kWarp, width = t < length_of(args, b) ? args.width : 0;
  Real sum = 0, squares = 0;
  for (int64_t c = lane; c < width; c += kWarp) sum += y_at<T>(args, b, t, c);
  const Real mean = warp_sum(sum) / static_cast<Real>(args.width);
  for (int64_t c = lane; c < width; c += kWarp) {
    const Real distance = y_at<T>(args, b, t, c) - mean;
    squares += distance * distance;
  }
  const Real variance = warp_sum(squares) / static_cast<Real>(args.width);
  if (lane > 0) return;
  static_cast<Real*>(args.mean)[b * args.frames + t] = mean;
  static_cast<Real*>(args.rstd)[b * args.frames + t] =
      width ? Real(1) / std::sqrt(variance + static_cast<Real>(args.eps)) : Real(0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) normalise_kernel(const ConvBlockArgs args) {
  using Real = Wide<T>;
  Chunk chunk;
  if (!find_chunk(args, args.frames, args.width, chunk)) return;
  const int64_t b = chunk.b, c = chunk.c, length = length_of(args, b);
  const Real scale = value<T>(args.norm_weight, c), shift = value<T>(args.norm_bias, c);
  const Real time = args.time_bias ? value<T>(args.time_bias, b * args.width + c) : Real(0);
  for (int64_t t = chunk.first; t < chunk.last; ++t) {
    Real out = time;
    if (t < length) {
      const int64_t at = statistic_at(args, b, t, c);
      const Real mean = static_cast<const Real*>(args.mean)[at], rstd = static_cast<const Real*>(args.rstd)[at];
      out += mish((y_at<T>(args, b, t, c) - mean) * rstd * scale + shift);
    }
    T result;
    narrow(out, result);
    static_cast<T*>(args.out)[(b * args.frames + t) * args.width + c] = saturated(result);
  }
}

// ------------------------------------------------------------------------------------------------ backward
// The normalised y of one element, and dz, the gradient before Mish.
template <typename T>
struct Element {
  Wide<T> x, dz, rstd;
};

template <typename T>
__device__ Element<T> element_at(const ConvBlockArgs& args, int64_t b, int64_t t, int64_t c, int64_t length) {
  using Real = Wide<T>;
  const int64_t at = statistic_at(args, b, t, c);
  const Real mean = static_cast<const Real*>(args.mean)[at], rstd = static_cast<const Real*>(args.rstd)[at];
  const Real x = (y_at<T>(args, b, t, c) - mean) * rstd;
  if (t >= length) return {x, Real(0), rstd};
  const Real slope = mish_slope(x * value<T>(args.norm_weight, c) + value<T>(args.norm_bias, c));
  return {x, grad_at<T>(args, b, t, c) * slope, rstd};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  Chunk chunk;
  if (!find_chunk(args, args.frames, args.width, chunk)) return;
  const int64_t length = length_of(args, chunk.b);
  Real sum = 0, products = 0;
  for (int64_t t = chunk.first; t < min_of(chunk.last, length); ++t) {
    const Element<T> element = element_at<T>(args, chunk.b, t, chunk.c, length);
    sum += element.dz;
    products += element.dz * element.x;
  }
  Real* sums = static_cast<Real*>(passes.sums) + chunk.c;
  sums[sum_at(args, kGradient, chunk.b, chunk.index)] = sum;
  sums[sum_at(args, kGradientTimesX, chunk.b, chunk.index)] = products;
}

// The means of h = dz * scale and of h * normalised y.
template <typename T>
__global__ void __launch_bounds__(kThreads) group_means_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  const int64_t b = blockIdx.x / args.groups, g = blockIdx.x % args.groups, size = args.width / args.groups;
  const Real* sums = static_cast<const Real*>(passes.sums);
  Real sum = 0, products = 0;
  for (int64_t e = threadIdx.x; e < ceil_div(length_of(args, b), kChunk) * size; e += kThreads) {
    const int64_t index = e / size, c = g * size + e % size;
    const Real scale = value<T>(args.norm_weight, c);
    sum += scale * sums[sum_at(args, kGradient, b, index) + c];
    products += scale * sums[sum_at(args, kGradientTimesX, b, index) + c];
  }
  const Real count = static_cast<Real>(max_of(counted_frames(args, b) * size, 1));
  const Real mean = block_sum(sum) / count, mean_x = block_sum(products) / count;
  if (threadIdx.x > 0) return;
  Real* means = static_cast<Real*>(passes.means) + 2 * int64_t{blockIdx.x};
  means[0] = mean;
  means[1] = mean_x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) frame_means_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  int64_t b, t;
  if (!find_frame(args, b, t)) return;
  const int64_t lane = threadIdx.x % kWarp, length = length_of(args, b), width = t < length ? args.width : 0;
  Real sum = 0, products = 0;
  for (int64_t c = lane; c < width; c += kWarp) {
    const Element<T> element = element_at<T>(args, b, t, c, length);
    const Real h = element.dz * value<T>(args.norm_weight, c);
    sum += h;
    products += h * element.x;
  }
  sum = warp_sum(sum);
  products = warp_sum(products);
  if (lane > 0) return;
  Real* means = static_cast<Real*>(passes.means) + 2 * (b * args.frames + t);
  means[0] = sum / static_cast<Real>(args.width);
  means[1] = products / static_cast<Real>(args.width);
}

// dy = rstd * (h - mean(h) - x * mean(h * x)), the zeros around it, and all sums over the chunk's frames.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    centre_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  Chunk chunk;
  if (!find_chunk(args, args.frames, args.width, chunk)) return;
  const int64_t b = chunk.b, c = chunk.c, length = length_of(args, b), active = active_frames(args, b);
  const Real* means = static_cast<const Real*>(passes.means);
  T* dy_row =
      static_cast<T*>(passes.dy) + (b * (passes.before + args.frames + passes.after) + passes.before) * args.width + c;
  Real sum = 0, products = 0, output = 0;
  for (int64_t t = chunk.first; t < chunk.last; ++t) {
    Real dy = 0;
    if (t < active) {
      const Element<T> element = element_at<T>(args, b, t, c, length);
      const Real* mean = means + 2 * statistic_at(args, b, t, c);
      const Real h = element.dz * value<T>(args.norm_weight, c);
      dy = (h - mean[0] - element.x * mean[1]) * element.rstd;
      sum += element.dz;
      products += element.dz * element.x;
      output += dy;
    }
    narrow(dy, dy_row[t * args.width]);
  }
  if (chunk.first == 0) {
    for (int64_t t = -passes.before; t < 0; ++t) dy_row[t * args.width] = T{};
    if (args.groups) {  // the frames with dz = 0 whose y is the bias
      const int64_t at = statistic_at(args, b, 0, c);
      const Real rstd = static_cast<const Real*>(args.rstd)[at];
      const Real x = (value<T>(args.bias, c) - static_cast<const Real*>(args.mean)[at]) * rstd;
      const Real rest = static_cast<Real>(counted_frames(args, b) - active);
      output -= rest * rstd * (means[2 * at] + x * means[2 * at + 1]);
    }
  }
  if (chunk.last == args.frames)
    for (int64_t t = args.frames; t < args.frames + passes.after; ++t) dy_row[t * args.width] = T{};
  Real* sums = static_cast<Real*>(passes.sums) + c;
  sums[sum_at(args, kGradient, b, chunk.index)] = sum;
  sums[sum_at(args, kGradientTimesX, b, chunk.index)] = products;
  sums[sum_at(args, kOutput, b, chunk.index)] = output;
  if (!args.grad_time_bias) return;
  Real time = 0;  // also on padding, where the bias was added, too
  for (int64_t t = chunk.first; t < chunk.last; ++t) time += grad_at<T>(args, b, t, c);
  sums[sum_at(args, kTime, b, chunk.index)] = time;
}

__device__ void* result_of(const ConvBlockArgs& args, int64_t kind) {
  if (kind == kGradient) return args.grad_norm_bias;
  if (kind == kGradientTimesX) return args.grad_norm_weight;
  return kind == kOutput ? args.grad_bias : args.grad_time_bias;
}

// The gradients that are sums over frames.  blockIdx.y: a kind of sum, of all rows; from kTime on, a row of time_bias.
template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const ConvBlockArgs args, const ConvBlockPasses passes) {
  using Real = Wide<T>;
  __shared__ Real parts[kWarps][kWarp];
  const int64_t lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp, c = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t kind = min_of(blockIdx.y, kTime), b = blockIdx.y - kind;
  void* const result = result_of(args, kind);
  if (!result) return;
  const int64_t count = (kind == kTime ? 1 : args.batch) * chunks_of(args);
  const Real* sums = static_cast<const Real*>(passes.sums) + sum_at(args, static_cast<Sum>(kind), b, 0) + c;
  Real sum = 0;
  if (c < args.width)
    for (int64_t e = slice; e < count; e += kWarps) sum += sums[e * args.width];
  parts[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || c >= args.width) return;
  sum = 0;
  for (int n = 0; n < kWarps; ++n) sum += parts[n][lane];
  narrow(sum, static_cast<T*>(result)[b * args.width + c]);
}

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > INT32_MAX) throw std::runtime_error("fastflow: conv_block: the tensor is too large for one launch");
  return static_cast<unsigned>(blocks);
}

}  // namespace

int64_t conv_block_chunks(const ConvBlockArgs& args) { return chunks_of(args); }

void conv_block_pad(const ConvBlockArgs& args, int64_t before, int64_t after, Dtype dtype, void* stream) {
  const int64_t frames = before + args.frames + after;
  const unsigned blocks = blocks_for(args.batch * ceil_div(frames, kChunk) * args.channels);
  if (blocks == 0) return;
  with_dtype(dtype, [&](auto zero) {
    pad_kernel<decltype(zero)><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, before, frames);
  });
  check_launch("conv_block_pad");
}

void conv_block_normalise(const ConvBlockArgs& args, const ConvBlockPasses& passes, Dtype dtype, void* stream) {
  const unsigned blocks = blocks_for(args.batch * chunks_of(args) * args.width);
  const unsigned groups = static_cast<unsigned>(args.batch * args.groups);
  const unsigned frames = blocks_for(args.batch * args.frames * kWarp);
  if (blocks == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.groups) {
      channel_moments_kernel<T><<<blocks, kThreads, 0, on>>>(args, passes);
      group_moments_kernel<T><<<groups, kThreads, 0, on>>>(args, passes);
    } else {
      frame_moments_kernel<T><<<frames, kThreads, 0, on>>>(args);
    }
    normalise_kernel<T><<<blocks, kThreads, 0, on>>>(args);
  });
  check_launch("conv_block_normalise");
}

void conv_block_differentiate(const ConvBlockArgs& args, const ConvBlockPasses& passes, Dtype dtype, void* stream) {
  const unsigned blocks = blocks_for(args.batch * chunks_of(args) * args.width);
  const unsigned groups = static_cast<unsigned>(args.batch * args.groups);
  const unsigned frames = blocks_for(args.batch * args.frames * kWarp);
  if (blocks == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 sums(static_cast<unsigned>(ceil_div(args.width, kWarp)), static_cast<unsigned>(kTime + args.batch));
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.groups) {
      channel_sums_kernel<T><<<blocks, kThreads, 0, on>>>(args, passes);
      group_means_kernel<T><<<groups, kThreads, 0, on>>>(args, passes);
    } else {
      frame_means_kernel<T><<<frames, kThreads, 0, on>>>(args, passes);
    }
    centre_kernel<T><<<blocks, kThreads, 0, on>>>(args, passes);
    reduce_kernel<T><<<sums, kThreads, 0, on>>>(args, passes);
  });
  check_launch("conv_block_differentiate");
}

}  // namespace fastflow::cuda
