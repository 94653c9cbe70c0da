// feed_forward on the CPU, and the backward pass of its activation.  Compiled once per instruction set, with
// FASTFLOW_CAPABILITY as its namespace.
//
// A task takes a block of frames through both products, kPanelDepth hidden channels at a time, which stay in the cache
// and are the depth of one step of the second product.
#include "activation.h"
#include "kernels.h"
#include "linear.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

template <typename T>
int64_t elements_of(const LinearArgs& args) {
  using Real = Wide<T>;
  return Reader<T>::elements(args) +
         args.block * (Block<Real>::stride_of(args.channels) + Block<Real>::stride_of(kPanelDepth) +
                       Block<Real>::stride_of(args.out_channels));
}

// Hidden channels [begin, begin + width) of frames [first, first + count), before the activation and after it.
template <typename T>
void find_hidden(const LinearArgs& args, int64_t first, int64_t count, int64_t begin, int64_t width,
                 const Block<Wide<T>>& input, const Block<Wide<T>>& hidden) {
  using Real = Wide<T>;
  const Real* packed = static_cast<const Real*>(args.packed_hidden);
  multiply_panels(count, panels_of<Real>(width), args.channels, input.data, input.stride, packed,
                  begin / kColumns<Real>, hidden.data, hidden.stride);
  if (T* h = static_cast<T*>(args.pre_activation))
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; ++c) narrow(hidden.row(i)[c], h[(first + i) * args.hidden + begin + c]);
  with_activation<Real>(args.activation, [&](auto activate) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; c += kLanes<Real>)
        store(hidden.row(i) + c, activate(load(hidden.row(i) + c)).value());
  });
  if (args.drops)
    drop_block<kPanelDepth>(args.dropout, args.hidden, first, count, begin, width, hidden.data, hidden.stride);
}

template <typename T>
void feed_forward(const LinearArgs& args, Wide<T>* memory, std::atomic<int64_t>& next) {
  using Real = Wide<T>;
  Reader<T> reader(args, memory);
  const Block<Real> input(memory, args.block, args.channels), hidden(memory, args.block, kPanelDepth),
      sums(memory, args.block, args.out_channels);
  const Real* packed = static_cast<const Real*>(args.packed_out);
  for_each_block(args, next, [&](int64_t first, int64_t count) {
    reader.read(first, count, input);
    for (int64_t begin = 0; begin < args.hidden; begin += kPanelDepth) {
      const int64_t width = min_of(kPanelDepth, args.hidden - begin);
      find_hidden<T>(args, first, count, begin, width, input, hidden);
      for (int64_t p = 0; p < panels_of<Real>(args.out_channels); ++p) {
        const Real *panel = packed + panel_offset<Real>(args.hidden, p), *values = panel + (begin + 1) * kColumns<Real>;
        Real* sum = sums.data + p * kColumns<Real>;
        multiply_packed(count, width, hidden.data, hidden.stride, values, values + panel_offset<Real>(args.hidden, 1),
                        begin ? Start<Real>{sum, sums.stride} : Start<Real>{panel, 0}, sum, sums.stride);
      }
    }
    finish<T>(args, first, count, 0, args.out_channels, sums.data, sums.stride);
  });
}

constexpr int64_t kDropped = 256;  // numbers whose dropout is found at a time

template <typename Real>
void activation_backward_of(const ActivationBackwardArgs& args, int64_t begin, int64_t end) {
  const Real* grad = static_cast<const Real*>(args.grad);
  const Real* h = static_cast<const Real*>(args.pre_activation);
  Real *activated = static_cast<Real*>(args.activated), *grad_h = static_cast<Real*>(args.grad_pre_activation);
  with_activation<Real>(args.activation, [&](auto activate) {
    int64_t n = begin;
    for (; n + kLanes<Real> <= end; n += kLanes<Real>) {
      const auto result = activate(load(h + n));
      store(activated + n, result.value());
      store(grad_h + n, load(grad + n) * result.derivative());
    }
    for (; n < end; ++n) {
      const auto result = activate(broadcast(h[n]));
      activated[n] = result.value()[0];
      grad_h[n] = grad[n] * result.derivative()[0];
    }
  });
  if (!args.drops) return;
  Real factors[kDropped];
  for (int64_t first = begin; first < end; first += kDropped) {
    const int64_t count = min_of(kDropped, end - first);
    dropout_factors<kDropped>(args.dropout, 0, 0, first, count, factors);
    for (int64_t i = 0; i < count; ++i) activated[first + i] *= factors[i];
    for (int64_t i = 0; i < count; ++i) grad_h[first + i] *= factors[i];
  }
}

}  // namespace

int64_t feed_forward_workspace(const LinearArgs& args, Dtype dtype) {
  int64_t elements = 0;
  with_dtype(dtype, [&](auto zero) { elements = elements_of<decltype(zero)>(args); });
  return elements;
}

void feed_forward_forward(const LinearArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    feed_forward<T>(args, static_cast<Wide<T>*>(workspace), next);
  });
}

void activation_backward(const ActivationBackwardArgs& args, Dtype dtype, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto zero) {
    activation_backward_of<Wide<decltype(zero)>>(args, begin * kDropoutGroup, min_of(end * kDropoutGroup, args.count));
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
