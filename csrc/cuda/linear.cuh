// What the passes around a matrix product share: a warp takes a frame, and its lanes take packs of neighbouring
// channels, which are read and written at once where memory allows.
#pragma once

#include <initializer_list>

#include "../linear.h"
#include "launch.cuh"

namespace fastflow::cuda {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;

template <typename T, int count>
struct alignas(count * sizeof(T)) Packed {
  T values[count];
};

template <typename T, int count>
struct Pack {
  using Real = Wide<T>;
  Real values[count];

  __device__ Real& operator[](int i) { return values[i]; }
  __device__ const Real& operator[](int i) const { return values[i]; }
};

// A stride other than 1 only for packs of one.
template <typename T, int count>
__device__ Pack<T, count> load(const void* data, int64_t offset, bool saturates = false) {
  const auto packed = *reinterpret_cast<const Packed<T, count>*>(static_cast<const T*>(data) + offset);
  Pack<T, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack[i] = widen(saturates ? saturated(packed.values[i]) : packed.values[i]);
  return pack;
}

// What cuBLAS made in the forward pass.
template <typename T, int count>
__device__ Pack<T, count> load_product(const void* data, int64_t offset) {
  return load<T, count>(data, offset, true);
}

template <typename T, int count>
__device__ void store(const Pack<T, count>& pack, void* data, int64_t offset, bool saturates = false) {
  Packed<T, count> packed;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    narrow(pack[i], packed.values[i]);
    if (saturates) packed.values[i] = saturated(packed.values[i]);
  }
  *reinterpret_cast<Packed<T, count>*>(static_cast<T*>(data) + offset) = packed;
}

// What the forward pass makes.
template <typename T, int count>
__device__ void store_saturated(const Pack<T, count>& pack, void* data, int64_t offset) {
  store<T, count>(pack, data, offset, true);
}

// Channels from c on of row b, or `otherwise` if there are no vectors.
template <typename T, int count>
__device__ Pack<T, count> load(const Vectors& x, int64_t b, int64_t c, Wide<T> otherwise) {
  if (x.data) return load<T, count>(x.data, b * x.row_stride + c * x.channel_stride);
  Pack<T, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack[i] = otherwise;
  return pack;
}

template <typename Real>
__device__ Real warp_sum(Real x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  return x;
}

// visit(c) for every pack of channels, in turns among threads; unrolled, it would take twice the registers.
template <int count, typename Visit>
__device__ void for_packs(int64_t channels, int thread, int threads, const Visit& visit) {
#pragma unroll 1
  for (int64_t c = thread * count; c < channels; c += threads * count) visit(c);
}

// ------------------------------------------------------------------------------------------------ on the host
// Elements of a pack.
template <typename T>
constexpr int kPack = sizeof(T) == 8 ? 2 : 4;

struct Layout {
  const void* data;
  int64_t channel_stride;
  std::initializer_list<int64_t> strides;  // the others
};

// Whether all of them can be read in packs.
template <typename T>
bool fits_packs(int64_t channels, std::initializer_list<Layout> layouts) {
  if (channels % kPack<T>) return false;
  for (const Layout& layout : layouts) {
    if (!layout.data) continue;
    if (layout.channel_stride != 1 || reinterpret_cast<uintptr_t>(layout.data) % (kPack<T> * sizeof(T))) return false;
    for (const int64_t stride : layout.strides)
      if (stride % kPack<T>) return false;
  }
  return true;
}

inline Layout layout_of(const void* contiguous) { return {contiguous, 1, {}}; }

inline unsigned blocks_for(int64_t count, int64_t each) {
  const int64_t blocks = ceil_div(count, each);
  if (blocks > INT32_MAX) throw std::runtime_error("fastflow: the tensor is too large for one launch");
  return static_cast<unsigned>(blocks);
}

template <int count>
struct PackSize {
  static constexpr int value = count;
};

// Call visit with the size of a pack.
template <typename T, typename Visit>
void with_packs(bool fits, const Visit& visit) {
  if (fits)
    visit(PackSize<kPack<T>>{});
  else
    visit(PackSize<1>{});
}

}  // namespace
}  // namespace fastflow::cuda
