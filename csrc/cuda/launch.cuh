// What every CUDA kernel needs: the 16-bit types, the choice of a type, and the check of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../common.h"

namespace fastflow::cuda {
namespace {

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;  // the type to compute in

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// What the forward pass has rounded to T: +-65504 for an infinite float16; NaN stays NaN.  See fastflow/ops/half.py.
template <typename T>
__device__ inline T saturated(T x) {
  return x;
}
__device__ inline __half saturated(__half x) {
  return __hmax_nan(__hmin_nan(x, __ushort_as_half(0x7bff)), __ushort_as_half(0xfbff));
}

// Call visit with a value of the CUDA type of `dtype`.
template <typename Visit>
void with_dtype(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::float32:
      return visit(float{});
    case Dtype::float64:
      return visit(double{});
    case Dtype::float16:
      return visit(__half{});
    case Dtype::bfloat16:
      return visit(__nv_bfloat16{});
  }
}

inline void check_launch(const char* kernel) {
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string("fastflow: launch of ") + kernel + " failed: " + cudaGetErrorString(error));
}

}  // namespace
}  // namespace fastflow::cuda
