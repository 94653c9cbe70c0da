// interpolate on CUDA.  A block makes a tile of frames x channels: it computes with its threads along the dimension in
// which the source is contiguous, and writes, out of shared memory, along that in which the result is.
#include "../interpolate.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastflow::cuda {
namespace {

constexpr int kFrames = 32, kChannels = 64, kThreads = 256;

template <typename Real>
using Tile = Real[kFrames][kChannels + 1];  // the odd width keeps columns out of one bank

struct Grid {
  unsigned frame_tiles, channel_tiles, blocks;
};

// One block for every tile of a result with that many frames.
Grid make_grid(const InterpolateArgs& args, int64_t frames) {
  const int64_t frame_tiles = ceil_div(frames, kFrames), channel_tiles = ceil_div(args.channels, kChannels);
  const int64_t blocks = args.batch * frame_tiles * channel_tiles;
  if (blocks > INT32_MAX) throw std::runtime_error("fastflow: interpolate: the tensor is too large for one launch");
  return {static_cast<unsigned>(frame_tiles), static_cast<unsigned>(channel_tiles), static_cast<unsigned>(blocks)};
}

struct Block {
  int64_t b, frame, channel;  // the row, and the first frame and channel of the tile
  int frames, channels;       // how much of the tile lies inside the tensor
};

__device__ Block find_block(const InterpolateArgs& args, const Grid& grid, int64_t frames) {
  const unsigned row_tile = blockIdx.x / grid.channel_tiles;
  const int64_t channel = int64_t{blockIdx.x % grid.channel_tiles} * kChannels;
  const int64_t frame = int64_t{row_tile % grid.frame_tiles} * kFrames;
  return {row_tile / grid.frame_tiles, frame, channel, static_cast<int>(min_of(kFrames, frames - frame)),
          static_cast<int>(min_of(kChannels, args.channels - channel))};
}

// visit(frame, channel) for the elements of the tile, neighbouring threads along the contiguous dimension of `side`.
template <typename Visit>
__device__ void for_elements(const Block& block, const Frames& side, const Visit& visit) {
  const bool channels_fastest = side.channel_stride <= side.frame_stride;
  for (int n = threadIdx.x; n < kFrames * kChannels; n += kThreads) {
    const int frame = channels_fastest ? n / kChannels : n % kFrames;
    const int channel = channels_fastest ? n % kChannels : n / kFrames;
    if (frame < block.frames && channel < block.channels) visit(frame, channel);
  }
}

__device__ int64_t offset_of(const Frames& side, int64_t b, int64_t frame, int64_t channel) {
  return b * side.batch_stride + frame * side.frame_stride + channel * side.channel_stride;
}

template <typename T>
__device__ void store_tile(const InterpolateArgs& args, const Block& block, const Frames& side,
                           const Tile<Wide<T>>& tile) {
  T* result = static_cast<T*>(args.result);
  for_elements(block, side, [&](int frame, int channel) {
    narrow(tile[frame][channel], result[offset_of(side, block.b, block.frame + frame, block.channel + channel)]);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const InterpolateArgs args, const Grid grid) {
  using Real = Wide<T>;
  __shared__ Segment<Real> segments[kMaxSegments];
  __shared__ Tap<Real> taps[kFrames];
  __shared__ Tile<Real> tile;
  const Block block = find_block(args, grid, args.out.frames);

  if (threadIdx.x == 0) find_segments(args, block.b, segments);
  __syncthreads();
  if (threadIdx.x < block.frames) {
    const int64_t j = block.frame + threadIdx.x;
    Tap<Real> tap = {-1, -1, Real(0)};  // no segment
    for (int k = 0; k < args.segments; ++k)
      if (segments[k].in_frames > 0 && segments[k].out_start <= j && j < segments[k].out_stop)
        tap = find_tap(segments[k], j);
    taps[threadIdx.x] = tap;
  }
  __syncthreads();

  const T* source = static_cast<const T*>(args.source);
  for_elements(block, args.in, [&](int frame, int channel) {
    const Tap<Real> tap = taps[frame];
    Real value = 0;
    if (tap.first >= 0) {
      const Real first = widen(source[offset_of(args.in, block.b, tap.first, block.channel + channel)]);
      const Real second = widen(source[offset_of(args.in, block.b, tap.second, block.channel + channel)]);
      value = fused_multiply_add(1 - tap.weight, first, tap.weight * second);
    }
    tile[frame][channel] = value;
  });
  __syncthreads();
  store_tile<T>(args, block, args.out, tile);
}

// The output frames [begin, end) that read one input frame, all of one segment.
struct Readers {
  int64_t begin, end;
  int segment;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const InterpolateArgs args, const Grid grid) {
  using Real = Wide<T>;
  __shared__ Segment<Real> segments[kMaxSegments];
  __shared__ Readers readers[kFrames];
  __shared__ Tile<Real> tile;
  const Block block = find_block(args, grid, args.in.frames);

  if (threadIdx.x == 0) find_segments(args, block.b, segments);
  __syncthreads();
  if (threadIdx.x < block.frames) {
    const int64_t i = block.frame + threadIdx.x;
    Readers found = {0, 0, 0};
    for (int k = 0; k < args.segments; ++k)
      if (segments[k].in_start <= i && i < segments[k].in_start + segments[k].in_frames)
        found = {first_reader(segments[k], i - 1), first_reader(segments[k], i + 1), k};
    readers[threadIdx.x] = found;
  }
  __syncthreads();

  const T* source = static_cast<const T*>(args.source);
  for_elements(block, args.out, [&](int frame, int channel) {
    const Readers reader = readers[frame];
    const Segment<Real>& segment = segments[reader.segment];
    const int64_t i = block.frame + frame;
    Real sum = 0;
    for (int64_t j = reader.begin; j < reader.end; ++j) {
      const Tap<Real> tap = find_tap(segment, j);
      const Real grad = widen(source[offset_of(args.out, block.b, j, block.channel + channel)]);
      if (tap.first == i) sum = fused_multiply_add(1 - tap.weight, grad, sum);
      if (tap.second == i) sum = fused_multiply_add(tap.weight, grad, sum);
    }
    tile[frame][channel] = sum;
  });
  __syncthreads();
  store_tile<T>(args, block, args.in, tile);
}

}  // namespace

void interpolate_forward(const InterpolateArgs& args, Dtype dtype, void* stream) {
  const Grid grid = make_grid(args, args.out.frames);
  if (grid.blocks == 0) return;
  with_dtype(dtype, [&](auto zero) {
    forward_kernel<decltype(zero)><<<grid.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, grid);
  });
  check_launch("interpolate_forward");
}

void interpolate_backward(const InterpolateArgs& args, Dtype dtype, void* stream) {
  const Grid grid = make_grid(args, args.in.frames);
  if (grid.blocks == 0) return;
  with_dtype(dtype, [&](auto zero) {
    backward_kernel<decltype(zero)><<<grid.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, grid);
  });
  check_launch("interpolate_backward");
}

}  // namespace fastflow::cuda
