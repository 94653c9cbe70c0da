// grouped_conv on the CPU, forward and backward.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its
// namespace, and with -ffp-contract=fast for the products.
//
// The frames of a group are copied to lie one after the other, with frames of zeros around a row.  All that the taps of
// a frame read is then one piece of memory, and so is that of the next frame, which begins one frame later: a
// convolution is a product with a matrix whose rows overlap.
#include "../grouped_conv.h"

#include "kernels.h"
#include "linear.h"
#include "mish.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kBlock = 96;   // frames of a task, at most
constexpr int64_t kTaps = 8;     // taps of a task of the weight's gradient
constexpr int64_t kDepth = 256;  // frames of one of its products

template <typename Real>
constexpr int64_t padded(int64_t channels) {
  return ceil_div(channels, kColumns<Real>) * kColumns<Real>;
}

// Frames of a task: whole tiles, the same number in all tasks but the last.
int64_t block_of(const GroupedConvArgs& args) {
  const int64_t blocks = max_of(1, ceil_div(args.frames, kBlock));
  return max_of(1, ceil_div(ceil_div(args.frames, blocks), kRows)) * kRows;
}

bool is_backward(GroupedConvPhase phase) { return phase >= GroupedConvPhase::differentiate; }

// What the threads share, group by group: the packed weight, dy with zeros after each row of the batch, and x with
// zeros before it.
template <typename Real>
struct Shared {
  int64_t inputs, outputs;  // of a group, in whole panels
  int64_t rows;             // frames with those that the taps reach
  int64_t weight_count, dy_count, x_count;
  Real* data;

  Shared(const GroupedConvArgs& args, bool backward)
      : inputs(padded<Real>(args.inputs)),
        outputs(padded<Real>(args.outputs)),
        rows(args.frames + args.taps - 1),
        weight_count(!backward     ? (1 + args.taps * args.inputs) * outputs
                     : args.grad_x ? (1 + args.taps * outputs) * inputs
                                   : 0),
        dy_count(backward ? args.batch * rows * outputs : 0),
        x_count(!backward || args.grad_weight ? padded<Real>(args.batch * rows * args.inputs) : 0),
        data(static_cast<Real*>(args.shared)) {}

  int64_t group_count() const { return weight_count + dy_count + x_count; }
  Real* weight(int64_t g) const { return data + g * group_count(); }
  Real* dy(int64_t g, int64_t b) const { return weight(g) + weight_count + b * rows * outputs; }
  Real* x(const GroupedConvArgs& args, int64_t g, int64_t b) const {
    return weight(g) + weight_count + dy_count + b * rows * args.inputs;
  }
};

template <typename T>
const T* at(const void* data, int64_t index) {
  return static_cast<const T*>(data) + index;
}
template <typename T>
T* at(void* data, int64_t index) {
  return static_cast<T*>(data) + index;
}

// ------------------------------------------------------------------------------------------------ weights
// Panel p for the forward pass: its columns are output channels, its rows the input channels of tap after tap.
// `transposed` holds a panel, in which the taps follow each other.
template <typename T>
void pack_panel(const GroupedConvArgs& args, int64_t g, int64_t p, Wide<T>* transposed, Wide<T>* to) {
  constexpr int64_t columns = kColumns<Wide<T>>;
  const int64_t first = g * args.outputs + p * columns, depth = args.inputs * args.taps;
  const int64_t used = min_of(columns, args.outputs - p * columns);
  const T* rows[columns] = {};
  for (int64_t j = 0; j < columns; ++j) to[j] = args.bias && j < used ? widen(*at<T>(args.bias, first + j)) : 0;
  for (int64_t j = 0; j < used; ++j) rows[j] = at<T>(args.weight, (first + j) * depth);
  transpose_rows(rows, depth, transposed);
  for (int64_t c = 0; c < args.inputs; ++c)
    for (int64_t tap = 0; tap < args.taps; ++tap, transposed += columns)
      std::copy_n(transposed, columns, to + (1 + tap * args.inputs + c) * columns);
}

// Panel p for the gradient of x: its columns are input channels, its rows the output channels of tap after tap, the
// last tap first.
template <typename T>
void pack_transposed_panel(const GroupedConvArgs& args, int64_t g, int64_t p, int64_t outputs, Wide<T>* to) {
  constexpr int64_t columns = kColumns<Wide<T>>;
  const int64_t used = min_of(columns, args.inputs - p * columns);
  std::fill_n(to, columns, Wide<T>{});
  for (int64_t o = 0; o < outputs; ++o) {
    const T* weight = at<T>(args.weight, ((g * args.outputs + o) * args.inputs + p * columns) * args.taps);
    for (int64_t tap = 0; tap < args.taps; ++tap) {
      Wide<T>* row = to + (1 + tap * outputs + o) * columns;
      const int64_t given = o < args.outputs ? used : 0;
      for (int64_t j = 0; j < given; ++j) row[j] = widen(weight[j * args.taps + args.taps - 1 - tap]);
      for (int64_t j = given; j < columns; ++j) row[j] = 0;
    }
  }
}

// ------------------------------------------------------------------------------------------------ frames
// The channels of a group, of all frames of a row of the batch.
template <typename T>
void copy_x(const GroupedConvArgs& args, int64_t g, int64_t b, Wide<T>* to) {
  const int64_t channels = args.groups * args.inputs;
  to = std::fill_n(to, (args.taps - 1) * args.inputs, Wide<T>{});
  for (int64_t t = 0; t < args.frames; ++t, to += args.inputs)
    read_channels(at<T>(args.x, (b * args.frames + t) * channels + g * args.inputs), 1, args.inputs, to);
}

// dy = grad * mish'(y); `y` holds a row of the panels.
template <typename T>
void differentiate(const GroupedConvArgs& args, int64_t g, int64_t b, int64_t outputs, Wide<T>* dy, Wide<T>* y) {
  using Real = Wide<T>;
  const int64_t channels = args.groups * args.outputs;
  std::fill_n(y, outputs, Real{});
  for (int64_t t = 0; t < args.frames; ++t, dy += outputs) {
    const int64_t first = (b * args.frames + t) * channels + g * args.outputs;
    read_channels(at<T>(args.y, first), 1, args.outputs, y);
    read_channels(at<T>(args.grad, first), 1, args.outputs, dy);
    std::fill(dy + args.outputs, dy + outputs, Real{});
    for (int64_t c = 0; c < outputs; c += kLanes<Real>) store(dy + c, load(dy + c) * mish_slope<Real>(load(y + c)));
  }
  std::fill_n(dy, (args.taps - 1) * outputs, Real{});
}

// ------------------------------------------------------------------------------------------------ products
template <typename T>
void convolve(const GroupedConvArgs& args, int64_t g, int64_t b, int64_t first, const Shared<Wide<T>>& shared,
              Wide<T>* sums) {
  using Real = Wide<T>;
  const int64_t rows = min_of(block_of(args), args.frames - first), stride = shared.outputs;
  multiply_panels(rows, stride / kColumns<Real>, args.taps * args.inputs, shared.x(args, g, b) + first * args.inputs,
                  args.inputs, shared.weight(g), 0, sums, stride);
  for (int64_t r = 0; r < rows; ++r, sums += stride) {
    const int64_t place = (b * args.frames + first + r) * args.groups * args.outputs + g * args.outputs;
    if (args.y) write_channels(sums, args.outputs, at<T>(args.y, place));
    for (int64_t c = 0; c < stride; c += kLanes<Real>) store(sums + c, mish<Real>(load(sums + c)));
    write_channels(sums, args.outputs, at<T>(args.out, place));
  }
}

template <typename T>
void write_grad_x(const GroupedConvArgs& args, int64_t g, int64_t b, int64_t first, const Shared<Wide<T>>& shared,
                  Wide<T>* sums) {
  const int64_t rows = min_of(block_of(args), args.frames - first), stride = shared.inputs;
  multiply_panels(rows, stride / kColumns<Wide<T>>, args.taps * shared.outputs,
                  shared.dy(g, b) + first * shared.outputs, shared.outputs, shared.weight(g), 0, sums, stride);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = (b * args.frames + first + r) * args.groups * args.inputs + g * args.inputs;
    write_channels(sums + r * stride, args.inputs, at<T>(args.grad_x, place));
  }
}

// Of the taps [first, first + kTaps): the products of x, shifted by each of them, and dy over all frames.
template <typename T>
void write_grad_weight(const GroupedConvArgs& args, int64_t g, int64_t first, const Shared<Wide<T>>& shared,
                       Wide<T>* sums) {
  using Real = Wide<T>;
  const int64_t taps = min_of(kTaps, args.taps - first), rows = taps * args.inputs, stride = shared.outputs;
  std::fill_n(sums, rows * stride, Real{});
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t t = 0; t < args.frames; t += kDepth)
      multiply<Left::columns>(rows, stride / kColumns<Real>, min_of(kDepth, args.frames - t),
                              shared.x(args, g, b) + (t + first) * args.inputs, args.inputs,
                              Panels<Real>{shared.dy(g, b) + t * stride, stride, kColumns<Real>}, sums, stride, true);
  for (int64_t o = 0; o < args.outputs; ++o)
    for (int64_t c = 0; c < args.inputs; ++c) {
      T* to = at<T>(args.grad_weight, ((g * args.outputs + o) * args.inputs + c) * args.taps + first);
      for (int64_t tap = 0; tap < taps; ++tap) narrow(sums[(tap * args.inputs + c) * stride + o], to[tap]);
    }
}

// The zeros after the rows of the batch are summed with them.
template <typename T>
void write_grad_bias(const GroupedConvArgs& args, int64_t g, const Shared<Wide<T>>& shared, Wide<T>* sums) {
  constexpr Dtype dtype = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;
  column_sums(shared.dy(g, 0), nullptr, args.batch * shared.rows, shared.outputs, dtype, sums, 0, args.outputs);
  write_channels(sums, args.outputs, at<T>(args.grad_bias, g * args.outputs));
}

// ------------------------------------------------------------------------------------------------ phases
// The tasks of a phase are those of each group, by the kinds of work in their order.
struct Tasks {
  int64_t first, second, third;

  int64_t count() const { return first + second + third; }
};

template <typename Real>
Tasks tasks_of(const GroupedConvArgs& args, GroupedConvPhase phase, const Shared<Real>& shared) {
  if (args.batch * args.frames == 0 && !is_backward(phase)) return {};
  const int64_t blocks = args.batch * ceil_div(args.frames, block_of(args));
  switch (phase) {
    case GroupedConvPhase::arrange:
      return {args.batch, shared.outputs / kColumns<Real>, 0};
    case GroupedConvPhase::convolve:
      return {blocks, 0, 0};
    case GroupedConvPhase::differentiate:
      return {args.batch, args.grad_x ? shared.inputs / kColumns<Real> : 0, 0};
    default:
      return {args.grad_weight ? ceil_div(args.taps, kTaps) : 0, args.grad_x ? blocks : 0, args.grad_bias ? 1 : 0};
  }
}

template <typename T>
void run_task(const GroupedConvArgs& args, GroupedConvPhase phase, Tasks tasks, int64_t g, int64_t n,
              const Shared<Wide<T>>& shared, Wide<T>* memory) {
  using Real = Wide<T>;
  const auto with_block = [&](auto function, int64_t index) {
    const int64_t block = block_of(args), blocks = ceil_div(args.frames, block);
    function(args, g, index / blocks, index % blocks * block, shared, memory);
  };
  const bool is_first = n < tasks.first, is_second = !is_first && n < tasks.first + tasks.second;
  const int64_t p = n - tasks.first;
  switch (phase) {
    case GroupedConvPhase::arrange:
      if (is_first) return copy_x<T>(args, g, n, shared.x(args, g, n));
      return pack_panel<T>(args, g, p, memory, shared.weight(g) + panel_offset<Real>(args.taps * args.inputs, p));
    case GroupedConvPhase::convolve:
      return with_block(convolve<T>, n);
    case GroupedConvPhase::differentiate:
      if (is_second)
        return pack_transposed_panel<T>(args, g, p, shared.outputs,
                                        shared.weight(g) + panel_offset<Real>(args.taps * shared.outputs, p));
      if (args.grad_weight) copy_x<T>(args, g, n, shared.x(args, g, n));
      return differentiate<T>(args, g, n, shared.outputs, shared.dy(g, n), memory);
    case GroupedConvPhase::products:
      if (is_first) return write_grad_weight<T>(args, g, n * kTaps, shared, memory);
      if (is_second) return with_block(write_grad_x<T>, p);
      return write_grad_bias<T>(args, g, shared, memory);
  }
}

}  // namespace

int64_t grouped_conv_shared(const GroupedConvArgs& args, Dtype dtype, bool backward) {
  int64_t elements = 0;
  with_dtype(dtype,
             [&](auto zero) { elements = args.groups * Shared<Wide<decltype(zero)>>(args, backward).group_count(); });
  return elements;
}

int64_t grouped_conv_workspace(const GroupedConvArgs& args, Dtype dtype) {
  int64_t elements = 0;
  with_dtype(dtype, [&](auto zero) {
    using Real = Wide<decltype(zero)>;
    const int64_t inputs = padded<Real>(args.inputs), outputs = padded<Real>(args.outputs);
    elements = max_of(max_of(block_of(args) * max_of(inputs, outputs), kTaps * args.inputs * outputs),
                      args.taps * args.inputs * kColumns<Real>);
  });
  return elements;
}

int64_t grouped_conv_tasks(const GroupedConvArgs& args, Dtype dtype, GroupedConvPhase phase) {
  int64_t tasks = 0;
  with_dtype(dtype, [&](auto zero) {
    tasks = args.groups * tasks_of(args, phase, Shared<Wide<decltype(zero)>>(args, is_backward(phase))).count();
  });
  return tasks;
}

void grouped_conv(const GroupedConvArgs& args, Dtype dtype, GroupedConvPhase phase, void* workspace,
                  std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Shared<Wide<T>> shared(args, is_backward(phase));
    const Tasks tasks = tasks_of(args, phase, shared);
    for (int64_t task; (task = next++) < args.groups * tasks.count();)
      run_task<T>(args, phase, tasks, task / tasks.count(), task % tasks.count(), shared,
                  static_cast<Wide<T>*>(workspace));
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
