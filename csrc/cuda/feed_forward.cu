// The activation between the two products of feed_forward on CUDA, and its backward pass.
#include "kernels.h"
#include "linear.cuh"

namespace fastflow::cuda {
namespace {

template <typename T, int count>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const void* hidden, void* out, Activation activation, int64_t elements) {
  const int64_t n = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * count;
  if (n >= elements) return;
  auto x = load_product<T, count>(hidden, n);
#pragma unroll
  for (int i = 0; i < count; ++i) x[i] = activate(activation, x[i]).value;
  store_saturated<T, count>(x, out, n);
}

template <typename T, int count>
__global__ void __launch_bounds__(kThreads) backward_kernel(const ActivationBackwardArgs args, int64_t elements) {
  const int64_t n = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * count;
  if (n >= elements) return;
  auto x = load_product<T, count>(args.pre_activation, n), grad = load<T, count>(args.grad, n);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const auto result = activate(args.activation, x[i]);
    x[i] = result.value;
    grad[i] *= result.derivative;
  }
  store_saturated<T, count>(x, args.activated, n);
  store<T, count>(grad, args.grad_pre_activation, n);
}

}  // namespace

void activation_forward(const void* hidden, void* out, Activation activation, int64_t elements, Dtype dtype,
                        void* stream) {
  if (elements == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_packs<T>(fits_packs<T>(elements, {layout_of(hidden)}), [&](auto size) {
      constexpr int count = decltype(size)::value;
      forward_kernel<T, count>
          <<<blocks_for(elements, kThreads * count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              hidden, out, activation, elements);
    });
  });
  check_launch("activation_forward");
}

void activation_backward(const ActivationBackwardArgs& args, int64_t elements, Dtype dtype, void* stream) {
  if (elements == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_packs<T>(fits_packs<T>(elements, {layout_of(args.grad), layout_of(args.pre_activation)}), [&](auto size) {
      constexpr int count = decltype(size)::value;
      backward_kernel<T, count>
          <<<blocks_for(elements, kThreads * count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, elements);
    });
  });
  check_launch("activation_backward");
}

}  // namespace fastflow::cuda
