// The extension module fastflow._C: argument checks and the registration of every op with torch's stable ABI, and for
// Python the facts of the build and the control of CPU capabilities.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "build_info.h"
#include "conv_block.h"
#include "cpu/kernels.h"
#include "dropout.h"
#include "euler_step.h"
#include "grouped_conv.h"
#include "interpolate.h"
#include "linear.h"

#ifdef FASTFLOW_CUDA
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#endif

namespace fastflow {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// What the kernels of a call share, and what each of its threads works in.
enum class Scratch { shared, threads };

// Memory that the calling thread keeps from call to call, as fresh memory costs a page fault for every 4 KiB.  What it
// holds lasts until the next request for the same purpose.
template <Scratch purpose>
char* scratch(int64_t bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const int64_t lines = ceil_div(bytes, 64);
    memory.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(64 * lines))));
    STD_TORCH_CHECK(memory != nullptr, "no memory for ", bytes, " bytes of workspace");
    size = bytes;
  }
  return memory.get();
}

constexpr int64_t kWorkspaceMargin = 1024;  // bytes between the workspaces of two threads

// Calls run(workspace, next) in as many threads as there are, or as there are tasks, each with `bytes` of its own; they
// take one task after the other by `next`.
template <typename Run>
void run_tasks(int64_t tasks, int64_t bytes, const Run& run) {
  if (tasks == 0) return;
  const int64_t workers = min_of(torch::stable::get_num_threads(), tasks);
  const int64_t stride = ceil_div(bytes, kWorkspaceMargin) * kWorkspaceMargin + kWorkspaceMargin;
  char* const memory = scratch<Scratch::threads>(workers * stride);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) { run(memory + begin * stride, next); });
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "the data must be float32, float64, float16 or bfloat16");
  }
}

Frames frames_of(const Tensor& x, bool channels_first) {
  const int frame = channels_first ? 2 : 1, channel = channels_first ? 1 : 2;
  return {x.size(frame), x.stride(0), x.stride(frame), x.stride(channel)};
}

void set_rows(const Tensor& rows, const Tensor& x, InterpolateArgs& args) {
  STD_TORCH_CHECK(rows.dim() == 3 && rows.size(0) == args.batch && rows.size(2) == 2, "rows must have shape [",
                  args.batch, ", S, 2]");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "rows must be int64");
  STD_TORCH_CHECK(rows.device() == x.device(), "rows must be on the device of the data");
  STD_TORCH_CHECK(rows.size(1) <= kMaxSegments, "rows must hold at most ", kMaxSegments, " segments, got ",
                  rows.size(1));
  args.segments = static_cast<int>(rows.size(1));
  args.rows = static_cast<const int64_t*>(rows.data_ptr());
  for (int d = 0; d < 3; ++d) args.rows_stride[d] = rows.stride(d);
}

void set_shared(const std::vector<int64_t>& shared, InterpolateArgs& args) {
  STD_TORCH_CHECK(shared.size() % 2 == 0 && shared.size() <= 2 * kMaxSegments, "shared must hold at most ",
                  kMaxSegments, " pairs of lengths, got ", shared.size(), " numbers");
  int64_t in_left = args.in.frames, out_left = args.out.frames;
  for (size_t k = 0; k < shared.size(); ++k) {
    int64_t& left = k % 2 ? out_left : in_left;
    STD_TORCH_CHECK(shared[k] >= 0, "shared must hold lengths >= 0, got ", shared[k]);
    STD_TORCH_CHECK(shared[k] <= left, "shared holds more ", k % 2 ? "output" : "input",
                    " frames than the tensor: ", shared[k], " where ", left, " are left");
    left -= shared[k];
    args.shared[k] = shared[k];
  }
  args.segments = static_cast<int>(shared.size() / 2);
}

struct Interpolation {
  InterpolateArgs args;
  Dtype dtype;
  Tensor result;
};

Interpolation prepare(const Tensor& source, Tensor result, int64_t channels, Frames in, Frames out,
                      const std::optional<Tensor>& rows, const std::vector<int64_t>& shared) {
  InterpolateArgs args{};
  args.source = source.data_ptr();
  args.result = result.data_ptr();
  args.batch = source.size(0);
  args.channels = channels;
  args.in = in;
  args.out = out;
  if (rows)
    set_rows(*rows, source, args);
  else
    set_shared(shared, args);
  return {args, dtype_of(source), std::move(result)};
}

Interpolation prepare_forward(const Tensor& x, const std::optional<Tensor>& rows, const std::vector<int64_t>& shared,
                              int64_t frames, bool channels_first) {
  STD_TORCH_CHECK(x.dim() == 3, "x must have shape [B, T, C], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(frames >= 0, "frames must be >= 0, got ", frames);
  const int64_t batch = x.size(0), channels = x.size(2);
  Tensor out = channels_first ? torch::stable::new_empty(x, {batch, channels, frames})
                              : torch::stable::new_empty(x, {batch, frames, channels});
  return prepare(x, out, channels, frames_of(x, false), frames_of(out, channels_first), rows, shared);
}

Interpolation prepare_backward(const Tensor& grad, const std::optional<Tensor>& rows,
                               const std::vector<int64_t>& shared, int64_t in_frames, bool channels_first) {
  STD_TORCH_CHECK(grad.dim() == 3, "grad must have 3 dimensions, got ", grad.dim());
  STD_TORCH_CHECK(in_frames >= 0, "in_frames must be >= 0, got ", in_frames);
  const int64_t batch = grad.size(0), channels = grad.size(channels_first ? 1 : 2);
  Tensor grad_in = torch::stable::new_empty(grad, {batch, in_frames, channels});
  return prepare(grad, grad_in, channels, frames_of(grad_in, false), frames_of(grad, channels_first), rows, shared);
}

using CpuKernel = decltype(cpu::Kernels::interpolate_forward);

Tensor run_cpu(CpuKernel cpu::Kernels::* kernel, int64_t frames, const Interpolation& op) {
  const CpuKernel run = cpu::kernels().*kernel;
  const int64_t tiles = op.args.batch * ceil_div(frames, kInterpolateTile);
  const int64_t grain = max_of(1, kGrain / max_of(1, kInterpolateTile * op.args.channels));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { run(op.args, op.dtype, begin, end); });
  return op.result;
}

Tensor interpolate_cpu(const Tensor& x, std::optional<Tensor> rows, std::vector<int64_t> shared, int64_t frames,
                       bool channels_first) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  return run_cpu(&cpu::Kernels::interpolate_forward, frames, prepare_forward(x, rows, shared, frames, channels_first));
}

Tensor interpolate_backward_cpu(const Tensor& grad, std::optional<Tensor> rows, std::vector<int64_t> shared,
                                int64_t in_frames, bool channels_first) {
  STD_TORCH_CHECK(grad.is_cpu(), "grad must be on the CPU");
  return run_cpu(&cpu::Kernels::interpolate_backward, in_frames,
                 prepare_backward(grad, rows, shared, in_frames, channels_first));
}

// ------------------------------------------------------------------------------------------------ attention
using OptionalTensor = std::optional<Tensor>;

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t wide_size(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? 8 : 4; }

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

void check_tensor(const char* name, const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " must have the dtype that belongs to q's");
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = x.size(d) == shape[d];
  STD_TORCH_CHECK(fits, name, " must have shape ", shape_text(shape));
}

Heads heads_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }
Heads table_of(const Tensor& x) { return {x.data_ptr(), 0, x.stride(0), x.stride(1), x.stride(2)}; }
Heads bias_of(const Tensor& x) { return {x.data_ptr(), 0, x.stride(0), 0, x.stride(1)}; }

// The numbers of the schema, in its order.
struct Rule {
  OptionalTensor lengths;
  int64_t chunk_size, num_left_chunks, key_offset;
  bool padded_queries;
  double scale, dropout_p;
  OptionalTensor seed;
};

// The tensors of the relative position term.
struct Relative {
  Tensor position, bias_u, bias_v;
};

void check_dropout(const char* name, double p) {
  STD_TORCH_CHECK(p >= 0 && p < 1, name, " must lie in [0, 1), got ", p);
}

Dropout dropout_of(double p, const Tensor& seed) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed must be one int64 on the CPU");
  const uint64_t value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
  return {value, static_cast<uint32_t>(std::fmin(std::nearbyint(p * 0x1p32), 0xFFFFFFFFp0)), 1 / (1 - p)};
}

void set_rule(const Rule& rule, AttentionArgs& args) {
  constexpr int64_t kFar = int64_t{1} << 60;  // positions and their sums do not overflow
  STD_TORCH_CHECK(rule.chunk_size >= 0, "chunk_size must be >= 0, got ", rule.chunk_size);
  STD_TORCH_CHECK(rule.num_left_chunks < 0 || rule.chunk_size > 0, "num_left_chunks needs a chunk_size > 0");
  STD_TORCH_CHECK(rule.key_offset >= 0 && rule.key_offset < kFar, "key_offset must be >= 0 and below 2**60, got ",
                  rule.key_offset);
  check_dropout("dropout_p", rule.dropout_p);
  if (rule.lengths) {
    const ScalarType dtype = rule.lengths->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "lengths must be int32 or int64");
    check_tensor("lengths", *rule.lengths, {args.batch}, dtype);
    args.lengths = rule.lengths->data_ptr();
    args.lengths_are_64_bit = dtype == ScalarType::Long;
    args.lengths_stride = rule.lengths->stride(0);
  }
  args.chunk_size = min_of(rule.chunk_size, kFar);
  args.num_left_chunks = rule.num_left_chunks;
  args.key_offset = rule.key_offset;
  args.padded_queries = rule.padded_queries;
  args.scale = rule.scale;
  args.drops = rule.dropout_p > 0;
  if (!args.drops) return;
  STD_TORCH_CHECK(rule.seed, "dropout needs a seed");
  args.dropout = dropout_of(rule.dropout_p, *rule.seed);
}

void check_width(int64_t width) {
  STD_TORCH_CHECK(width > 0 && width <= kMaxWidth && width % 8 == 0,
                  "the head dimension must be a multiple of 8 up to ", kMaxWidth, ", got ", width);
}

AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Relative>& relative,
                             const Rule& rule) {
  STD_TORCH_CHECK(q.is_cpu() && q.dim() == 4, "q must have shape [B, H, Tq, D] and be on the CPU");
  STD_TORCH_CHECK(k.dim() == 4, "k must have shape [B, H, Tk, D]");
  dtype_of(q);
  AttentionArgs args{};
  args.batch = q.size(0), args.heads = q.size(1), args.queries = q.size(2), args.width = q.size(3);
  args.keys = k.size(2);
  check_width(args.width);
  const ScalarType dtype = q.scalar_type();
  const std::vector<int64_t> key_shape = {args.batch, args.heads, args.keys, args.width};
  check_tensor("k", k, key_shape, dtype);
  check_tensor("v", v, key_shape, dtype);
  args.q = heads_of(q), args.k = heads_of(k), args.v = heads_of(v);
  set_rule(rule, args);
  if (relative) {
    check_tensor("position", relative->position, {args.heads, 2 * args.keys - 1, args.width}, dtype);
    check_tensor("bias_u", relative->bias_u, {args.heads, args.width}, dtype);
    check_tensor("bias_v", relative->bias_v, {args.heads, args.width}, dtype);
    STD_TORCH_CHECK(args.key_offset + args.queries <= args.keys,
                    "with a relative position, key_offset + Tq must be at most Tk ", args.keys, ", got ",
                    args.key_offset + args.queries);
    args.relative = true;
    args.position = table_of(relative->position);
    args.bias_u = bias_of(relative->bias_u), args.bias_v = bias_of(relative->bias_v);
  }
  return args;
}

// [B, H, T, D], in memory [B, T, H, D].
Tensor new_heads(const Tensor& like) {
  Tensor memory = torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
  return torch::stable::transpose(memory, 1, 2);
}

using AttentionKernel = decltype(cpu::Kernels::attention_forward);

void run_attention(AttentionKernel kernel, const AttentionArgs& args, const Tensor& q, int64_t tasks, bool backward) {
  if (tasks == 0) return;
  const Dtype dtype = dtype_of(q);
  run_tasks(tasks, cpu::kernels().attention_workspace(args, dtype, backward) * wide_size(q),
            [&](void* workspace, std::atomic<int64_t>& next) { kernel(args, dtype, workspace, next); });
}

void run_forward(AttentionArgs& args, const Tensor& q) {
  // A row and head is one task, which reads its keys once; only where these are few are their queries divided.
  const int64_t heads = args.batch * args.heads, threads = torch::stable::get_num_threads();
  args.query_chunks = heads > 0 && heads < threads ? ceil_div(2 * threads, heads) : 1;
  run_attention(cpu::kernels().attention_forward, args, q, heads * args.query_chunks, false);
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Relative>& relative, const Rule& rule) {
  AttentionArgs args = attention_args(q, k, v, relative, rule);
  Tensor out = new_heads(q);
  Tensor lse = torch::stable::new_empty(q, {args.batch, args.heads, args.queries}, wide_type(q));
  args.out = heads_of(out);
  args.lse = lse.data_ptr();
  run_forward(args, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor lengths,
                                         int64_t chunk_size, int64_t num_left_chunks, int64_t key_offset,
                                         bool padded_queries, double scale, double dropout_p, OptionalTensor seed) {
  return attend(q, k, v, {},
                {lengths, chunk_size, num_left_chunks, key_offset, padded_queries, scale, dropout_p, seed});
}

std::tuple<Tensor, Tensor> relative_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& position, const Tensor& bias_u, const Tensor& bias_v,
                                                  OptionalTensor lengths, int64_t chunk_size, int64_t num_left_chunks,
                                                  int64_t key_offset, bool padded_queries, double scale,
                                                  double dropout_p, OptionalTensor seed) {
  return attend(q, k, v, Relative{position, bias_u, bias_v},
                {lengths, chunk_size, num_left_chunks, key_offset, padded_queries, scale, dropout_p, seed});
}

// What the backward pass gets from the forward pass, and its gradient.
struct Saved {
  Tensor grad, out, lse;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Sets what the two backward passes share; the results are the gradients of q, k and v.
Gradients set_backward(const Tensor& q, const Tensor& k, const Saved& saved, AttentionArgs& args) {
  const std::vector<int64_t> shape = {args.batch, args.heads, args.queries, args.width};
  check_tensor("grad", saved.grad, shape, q.scalar_type());
  check_tensor("out", saved.out, shape, q.scalar_type());
  check_tensor("lse", saved.lse, {args.batch, args.heads, args.queries}, wide_type(q));
  STD_TORCH_CHECK(saved.lse.is_contiguous(), "lse must be contiguous");
  args.grad = heads_of(saved.grad), args.out = heads_of(saved.out);
  args.lse = saved.lse.data_ptr();
  Gradients grads = {new_heads(q), new_heads(k), new_heads(k)};
  args.grad_q = heads_of(std::get<0>(grads));
  args.grad_k = heads_of(std::get<1>(grads));
  args.grad_v = heads_of(std::get<2>(grads));
  return grads;
}

Gradients attention_backward_cpu(const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q,
                                 const Tensor& k, const Tensor& v, OptionalTensor lengths, int64_t chunk_size,
                                 int64_t num_left_chunks, int64_t key_offset, bool padded_queries, double scale,
                                 double dropout_p, OptionalTensor seed) {
  const Rule rule = {lengths, chunk_size, num_left_chunks, key_offset, padded_queries, scale, dropout_p, seed};
  AttentionArgs args = attention_args(q, k, v, {}, rule);
  const Gradients grads = set_backward(q, k, {grad, out, lse}, args);
  args.groups = args.batch;
  run_attention(cpu::kernels().attention_backward, args, q, args.groups * args.heads, true);
  return grads;
}

// The sum over groups, in their order: [groups, ...] -> the rest, in the dtype of `like`.
Tensor sum_groups(const void* sums, int64_t groups, const Tensor& like) {
  Tensor result = torch::stable::new_empty(like, like.sizes());
  const int64_t count = result.numel();
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    cpu::kernels().attention_sum(sums, groups, count, dtype_of(like), result.data_ptr(), begin, end);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> relative_attention_backward_cpu(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& position, const Tensor& bias_u, const Tensor& bias_v, OptionalTensor lengths, int64_t chunk_size,
    int64_t num_left_chunks, int64_t key_offset, bool padded_queries, double scale, double dropout_p,
    OptionalTensor seed) {
  constexpr int64_t kTasks =
      64;  // enough for any CPU's threads; each costs a copy of the gradient of a head's position
  const Rule rule = {lengths, chunk_size, num_left_chunks, key_offset, padded_queries, scale, dropout_p, seed};
  AttentionArgs args = attention_args(q, k, v, Relative{position, bias_u, bias_v}, rule);
  const auto [grad_q, grad_k, grad_v] = set_backward(q, k, {grad, out, lse}, args);
  args.groups = min_of(args.batch, ceil_div(kTasks, max_of(1, args.heads)));
  const Tensor position_sums =
      torch::stable::new_empty(q, {args.groups, args.heads, 2 * args.keys - 1, args.width}, wide_type(q));
  const Tensor bias_sums = torch::stable::new_empty(q, {2, args.groups, args.heads, args.width}, wide_type(q));
  args.position_sums = position_sums.data_ptr();
  args.bias_sums = bias_sums.data_ptr();
  run_attention(cpu::kernels().attention_backward, args, q, args.groups * args.heads, true);
  const char* bias_u_sums = static_cast<const char*>(bias_sums.data_ptr());
  const char* bias_v_sums = bias_u_sums + bias_sums.numel() / 2 * bias_sums.element_size();
  return {grad_q,
          grad_k,
          grad_v,
          sum_groups(position_sums.data_ptr(), args.groups, position),
          sum_groups(bias_u_sums, args.groups, bias_u),
          sum_groups(bias_v_sums, args.groups, bias_v)};
}

// The numbers of the schema, in its order.
struct SelfRule {
  OptionalTensor lengths;
  std::optional<std::vector<int64_t>> sizes;
  int64_t chunk_size;
  double scale;
  OptionalTensor rotary;
};

// Attention of qkv [B, T, 3, H, D] with itself; B == 1 where the rows lie one after the other.
struct SelfAttention {
  AttentionArgs args{};
  std::vector<int64_t> sizes, row_starts;  // of rows that lie one after the other

  SelfAttention(const Tensor& qkv, const SelfRule& rule) {
    STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 5 && qkv.size(2) == 3,
                    "qkv must have shape [B, T, 3, H, D] and be on the CPU");
    dtype_of(qkv);
    args.batch = qkv.size(0), args.heads = qkv.size(3), args.width = qkv.size(4);
    args.queries = args.keys = qkv.size(1);
    check_width(args.width);
    set_rule({rule.lengths, rule.chunk_size, -1, 0, false, rule.scale, 0, {}}, args);
    if (rule.sizes) set_sizes(rule);
    args.q = part(qkv, 0), args.k = part(qkv, 1), args.v = part(qkv, 2);
    if (rule.rotary) set_rotary(*rule.rotary, wide_type(qkv));
  }
  SelfAttention(const SelfAttention&) = delete;  // args points to the sizes
  SelfAttention& operator=(const SelfAttention&) = delete;

  // [B, T, H, D]
  Heads heads(const Tensor& x) const {
    return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1), x.stride(3), starts()};
  }
  // q, k or v of [B, T, 3, H, D]
  Heads part(const Tensor& x, int64_t index) const {
    char* data = static_cast<char*>(x.data_ptr()) + index * x.stride(2) * static_cast<int64_t>(x.element_size());
    return {data, x.stride(0), x.stride(3), x.stride(1), x.stride(4), starts()};
  }

 private:
  const int64_t* starts() const { return row_starts.empty() ? nullptr : row_starts.data(); }

  void set_sizes(const SelfRule& rule) {
    STD_TORCH_CHECK(!rule.lengths && args.batch == 1, "sizes need qkv of B == 1 and no lengths, got B ", args.batch);
    sizes = *rule.sizes, row_starts = {0};
    int64_t largest = 0;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 0 && size <= args.queries, "sizes must lie in [0, ", args.queries, "], got ", size);
      row_starts.push_back(row_starts.back() + size);
      largest = max_of(largest, size);
    }
    STD_TORCH_CHECK(row_starts.back() == args.queries, "sizes must add up to the frames, ", args.queries, ", got ",
                    row_starts.back());
    args.batch = static_cast<int64_t>(sizes.size());
    args.queries = args.keys = largest;
    args.lengths = sizes.data(), args.lengths_are_64_bit = true, args.lengths_stride = 1;
  }

  void set_rotary(const Tensor& rotary, ScalarType dtype) {
    const int64_t frames = rotary.dim() == 3 ? rotary.size(1) : 0;
    check_tensor("rotary", rotary, {2, max_of(frames, args.queries), args.width / 2}, dtype);
    const int64_t stride = rotary.stride(0) * static_cast<int64_t>(rotary.element_size());
    STD_TORCH_CHECK(rotary.stride(1) == args.width / 2 && rotary.stride(2) == 1,
                    "the cosines and the sines of rotary must be contiguous");
    args.cos = rotary.data_ptr(), args.sin = static_cast<const char*>(args.cos) + stride;
  }
};

std::tuple<Tensor, Tensor> self_attention_cpu(const Tensor& qkv, OptionalTensor lengths,
                                              std::optional<std::vector<int64_t>> sizes, int64_t chunk_size,
                                              double scale, OptionalTensor rotary) {
  SelfAttention op(qkv, {lengths, std::move(sizes), chunk_size, scale, rotary});
  AttentionArgs& args = op.args;
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), args.heads, args.width});
  Tensor lse = torch::stable::new_empty(qkv, {args.batch, args.heads, args.queries}, wide_type(qkv));
  args.out = op.heads(out);
  args.lse = lse.data_ptr();
  run_forward(args, qkv);
  return {out, lse};
}

Tensor self_attention_backward_cpu(const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& qkv,
                                   OptionalTensor lengths, std::optional<std::vector<int64_t>> sizes,
                                   int64_t chunk_size, double scale, OptionalTensor rotary) {
  SelfAttention op(qkv, {lengths, std::move(sizes), chunk_size, scale, rotary});
  AttentionArgs& args = op.args;
  const std::vector<int64_t> shape = {qkv.size(0), qkv.size(1), args.heads, args.width};
  check_tensor("grad", grad, shape, qkv.scalar_type());
  check_tensor("out", out, shape, qkv.scalar_type());
  check_tensor("lse", lse, {args.batch, args.heads, args.queries}, wide_type(qkv));
  STD_TORCH_CHECK(lse.is_contiguous(), "lse must be contiguous");
  Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes());
  args.grad = op.heads(grad), args.out = op.heads(out);
  args.lse = lse.data_ptr();
  args.grad_q = op.part(grad_qkv, 0), args.grad_k = op.part(grad_qkv, 1), args.grad_v = op.part(grad_qkv, 2);
  args.groups = args.batch;
  run_attention(cpu::kernels().attention_backward, args, qkv, args.groups * args.heads, true);
  return grad_qkv;
}

// ------------------------------------------------------------------------------------------------ projection,
// feed_forward
constexpr int64_t kRowStep = 6;              // frames of a task are a multiple: AVX2's register tile, half of AVX-512's
constexpr int64_t kBlockBytes = 600 * 1024;  // of input of a task: the more, the less often it reads the weights
constexpr int64_t kMostRows = 24 * kRowStep;  // of a task

// The rows of the batch among the frames of x [B, T, C], one row after the other; with `sizes`, of B == 1.
struct Rows {
  std::vector<int64_t> starts = {0};  // of each row, then the end
  std::vector<int64_t> of_frames;     // with sizes, the row of each frame

  explicit Rows(const Tensor& x, const std::optional<std::vector<int64_t>>& sizes = {}) {
    if (!sizes) {
      for (int64_t b = 0; b < x.size(0); ++b) starts.push_back(starts.back() + x.size(1));
      return;
    }
    for (const int64_t size : *sizes) {
      STD_TORCH_CHECK(size >= 0 && size <= x.size(1), "sizes must lie in [0, ", x.size(1), "], got ", size);
      of_frames.insert(of_frames.end(), static_cast<size_t>(size), count());
      starts.push_back(starts.back() + size);
    }
    STD_TORCH_CHECK(x.size(0) == 1 && starts.back() == x.size(1), "sizes must add up to the frames of one row, ",
                    x.size(1), ", got ", starts.back());
  }
  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t size(int64_t row) const { return starts[row + 1] - starts[row]; }
  const int64_t* of_frame() const { return of_frames.empty() ? nullptr : of_frames.data(); }
};

Signal signal_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// The norm of the schema, in its order.
struct NormRule {
  OptionalTensor scale, shift;
  std::optional<double> eps;  // none: no norm
};

// [size], or, where `batch` >= 0, [batch, size].
Vectors vectors_of(const char* name, const OptionalTensor& x, int64_t batch, int64_t size, ScalarType dtype) {
  if (!x) return {};
  const bool per_row = batch >= 0 && x->dim() == 2;
  if (per_row)
    check_tensor(name, *x, {batch, size}, dtype);
  else
    check_tensor(name, *x, {size}, dtype);
  return {x->data_ptr(), per_row ? x->stride(0) : 0, x->stride(per_row ? 1 : 0)};
}

// Weights below each other, with what their pointers need to live.
struct Stack {
  std::vector<Tensor> tensors;
  std::vector<Weight> parts;
  int64_t rows = 0, depth;

  Stack(const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases, int64_t depth, ScalarType dtype)
      : depth(depth) {
    STD_TORCH_CHECK(!weights.empty() && weights.size() == biases.size(), "weights and biases must be as many, got ",
                    weights.size(), " and ", biases.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      STD_TORCH_CHECK(weights[i].dim() == 2, "a weight must have shape [N, C]");
      const int64_t count = weights[i].size(0);
      check_tensor("a weight", weights[i], {count, depth}, dtype);
      tensors.push_back(weights[i].stride(1) == 1 ? weights[i] : torch::stable::contiguous(weights[i]));
      parts.push_back(
          {tensors[i].data_ptr(), count, tensors[i].stride(0), vectors_of("a bias", biases[i], -1, count, dtype)});
      rows += count;
    }
  }
  Weights weights() const { return {parts.data(), static_cast<int64_t>(parts.size()), rows, depth}; }
};

// A stack, its packed form if the caller keeps one, and where the kernel finds it.
struct Packing {
  const Stack& stack;
  const OptionalTensor& kept;
  const void*& packed;
};

// The kept form, if there is one and it belongs to these weights; of the others the panels are shared among the
// threads.
void pack_weights(const Tensor& x, const std::vector<Packing>& packings) {
  const cpu::Kernels& kernels = cpu::kernels();
  const Dtype dtype = dtype_of(x);
  std::vector<int64_t> panels = {0}, offsets = {0};
  for (const auto& [stack, kept, packed] : packings) {
    const int64_t elements = kernels.pack_elements(stack.rows, stack.depth, dtype);
    packed = nullptr;
    if (kept) {
      check_tensor("packed", *kept, {elements}, wide_type(x));
      STD_TORCH_CHECK(kept->is_contiguous(), "packed must be contiguous");
      if (kernels.is_packed(stack.weights(), dtype, kept->data_ptr())) packed = kept->data_ptr();
    }
    panels.push_back(panels.back() + (packed ? 0 : kernels.pack_panels(stack.rows, dtype)));
    offsets.push_back(offsets.back() + (packed ? 0 : elements));
  }
  const int64_t size = wide_size(x);
  char* const memory = scratch<Scratch::shared>(offsets.back() * size);
  for (size_t i = 0; i < packings.size(); ++i)
    if (!packings[i].packed) packings[i].packed = memory + offsets[i] * size;
  torch::stable::parallel_for(0, panels.back(), 4, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < packings.size(); ++i) {
      const int64_t first = max_of(begin, panels[i]) - panels[i], last = min_of(end, panels[i + 1]) - panels[i];
      if (first < last)
        kernels.pack(packings[i].stack.weights(), dtype, const_cast<void*>(packings[i].packed), first, last);
    }
  });
}

Tensor pack_weights_cpu(std::vector<Tensor> weights, std::vector<OptionalTensor> biases) {
  STD_TORCH_CHECK(!weights.empty() && weights[0].is_cpu() && weights[0].dim() == 2,
                  "weights must have shape [N, C] and be on the CPU");
  const Stack stack(weights, biases, weights[0].size(1), weights[0].scalar_type());
  const Dtype dtype = dtype_of(weights[0]);
  Tensor packed = torch::stable::new_empty(weights[0], {cpu::kernels().pack_elements(stack.rows, stack.depth, dtype)},
                                           wide_type(weights[0]));
  torch::stable::parallel_for(0, cpu::kernels().pack_panels(stack.rows, dtype), 4, [&](int64_t begin, int64_t end) {
    cpu::kernels().pack(stack.weights(), dtype, packed.data_ptr(), begin, end);
  });
  return packed;
}

LinearArgs linear_args(const Tensor& x, const Rows& rows, const NormRule& norm, const Tensor& stats,
                       int64_t out_channels, const std::optional<Dropout>& dropout, const OptionalTensor& gate,
                       const OptionalTensor& residual, const Tensor& out) {
  const ScalarType dtype = x.scalar_type();
  LinearArgs args{};
  args.batch = x.size(0), args.frames = x.size(1), args.channels = x.size(2);
  args.x = signal_of(x);
  args.row_of = rows.of_frame();
  args.norm = norm.eps.has_value();
  args.eps = norm.eps.value_or(0);
  args.scale = vectors_of("scale", norm.scale, rows.count(), args.channels, dtype);
  args.shift = vectors_of("shift", norm.shift, rows.count(), args.channels, dtype);
  args.stats = stats.data_ptr();
  args.out_channels = out_channels;
  args.drops = dropout.has_value();
  args.dropout = dropout.value_or(Dropout{});
  if (gate) check_tensor("gate", *gate, {rows.count(), out_channels}, dtype);
  args.gate = vectors_of("gate", gate, rows.count(), out_channels, dtype);
  if (residual) {
    check_tensor("residual", *residual, {args.batch, args.frames, out_channels}, dtype);
    args.residual = signal_of(*residual);
  }
  args.out = out.data_ptr();
  return args;
}

// Blocks of rows whose width (in elements) fits into a thread's cache, as many for every thread.
void run_linear(decltype(cpu::Kernels::projection_workspace) elements_of,
                decltype(cpu::Kernels::projection_forward) kernel, LinearArgs& args, const Tensor& x, int64_t width) {
  const int64_t frames = args.batch * args.frames, threads = torch::stable::get_num_threads();
  if (frames == 0 || args.out_channels == 0) return;
  const int64_t size = wide_size(x);
  const int64_t most = min_of(max_of(kBlockBytes / (width * size) / kRowStep, 1) * kRowStep, kMostRows);
  const int64_t blocks = ceil_div(ceil_div(frames, most), threads) * threads;
  args.block = ceil_div(ceil_div(frames, blocks), kRowStep) * kRowStep;
  const Dtype dtype = dtype_of(x);
  run_tasks(ceil_div(frames, args.block), elements_of(args, dtype) * size,
            [&](void* workspace, std::atomic<int64_t>& next) { kernel(args, dtype, workspace, next); });
}

void check_signal(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.size(2) > 0, "x must have shape [B, T, C] and be on the CPU");
}

Tensor new_stats(const Tensor& x, const NormRule& norm) {
  return torch::stable::new_empty(x, {norm.eps ? 2 : 0, x.size(0), x.size(1)}, wide_type(x));
}

// Whether the kernels of csrc/cpu/thin.cpp compute a product with x.
bool is_thin(const Tensor& x) { return x.size(0) * x.size(1) <= kThinFrames; }

Tensor thin_projection(const Tensor& x, const Stack& stack) {
  const int64_t channels = x.size(2), frames = x.size(0) * x.size(1);
  const Tensor wide = torch::stable::contiguous(torch::stable::to(x, wide_type(x)));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), stack.rows});
  const ThinArgs args = {frames, channels, stack.rows, wide.data_ptr(), nullptr, nullptr, out.data_ptr()};
  int64_t column = 0;
  for (const Weight& part : stack.parts) {
    torch::stable::parallel_for(0, part.rows, max_of(1, kGrain / channels), [&](int64_t begin, int64_t end) {
      const auto workspace = std::make_unique<char[]>(static_cast<size_t>(channels * wide.element_size()));
      cpu::kernels().thin_forward(args, part, column, dtype_of(x), workspace.get(), begin, end);
    });
    column += part.rows;
  }
  return out;
}

// Lets the kernel write the result before the gate too.
void set_ungated(const Tensor& out, Tensor& ungated, LinearArgs& args) {
  ungated = torch::stable::empty_like(out);
  args.ungated = ungated.data_ptr();
}

// What projection computes, and the statistics of its norm.
std::tuple<Tensor, Tensor> project(const Tensor& x, const Rows& rows, const Stack& stack, const NormRule& norm,
                                   const std::optional<Dropout>& dropout, const OptionalTensor& residual,
                                   const OptionalTensor& gate, const OptionalTensor& packed,
                                   Tensor* ungated = nullptr) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), stack.rows}), stats = new_stats(x, norm);
  LinearArgs args = linear_args(x, rows, norm, stats, stack.rows, dropout, gate, residual, out);
  if (ungated) set_ungated(out, *ungated, args);
  pack_weights(x, {{stack, packed, args.packed_out}});
  run_linear(cpu::kernels().projection_workspace, cpu::kernels().projection_forward, args, x, args.channels);
  return {out, stats};
}

std::tuple<Tensor, Tensor> projection_cpu(const Tensor& x, std::vector<Tensor> weights,
                                          std::vector<OptionalTensor> biases, OptionalTensor scale,
                                          OptionalTensor shift, std::optional<double> eps, OptionalTensor residual,
                                          OptionalTensor gate, OptionalTensor packed) {
  check_signal(x);
  const NormRule norm = {scale, shift, eps};
  const Stack stack(weights, biases, x.size(2), x.scalar_type());
  if (is_thin(x) && !eps && !residual && !gate) return {thin_projection(x, stack), new_stats(x, norm)};
  return project(x, Rows(x), stack, norm, {}, residual, gate, packed);
}

// The two linear layers of a feed-forward with their packed forms, if the caller keeps these, and what is between them.
struct FeedForward {
  Stack first, second;
  Activation activation;
  OptionalTensor packed_1, packed_2;

  FeedForward(const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              int64_t activation, OptionalTensor packed_1, OptionalTensor packed_2)
      : first({w1}, {b1}, x.size(2), x.scalar_type()),
        second({w2}, {b2}, first.rows, x.scalar_type()),
        activation(static_cast<Activation>(activation)),
        packed_1(std::move(packed_1)),
        packed_2(std::move(packed_2)) {
    STD_TORCH_CHECK(first.rows > 0, "w1 must have shape [H, C]");
    STD_TORCH_CHECK(activation >= 1 && activation <= 3, "activation must be 1, 2 or 3, got ", activation);
  }
};

// What feed_forward computes, the statistics of its norm, and the hidden layer before the activation if `saves`.
std::tuple<Tensor, Tensor, Tensor> feed(const Tensor& x, const Rows& rows, const FeedForward& op, const NormRule& norm,
                                        const std::optional<Dropout>& dropout, const OptionalTensor& gate,
                                        bool residual, bool saves, Tensor* ungated = nullptr) {
  const Stack &first = op.first, &second = op.second;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), second.rows}), stats = new_stats(x, norm);
  Tensor hidden = torch::stable::new_empty(x, {saves ? x.size(0) : 0, x.size(1), first.rows});
  LinearArgs args = linear_args(x, rows, norm, stats, second.rows, dropout, gate,
                                residual ? OptionalTensor(x) : OptionalTensor(), out);
  if (ungated) set_ungated(out, *ungated, args);
  args.activation = op.activation;
  args.hidden = first.rows;
  args.pre_activation = saves ? hidden.data_ptr() : nullptr;
  pack_weights(x, {{first, op.packed_1, args.packed_hidden}, {second, op.packed_2, args.packed_out}});
  run_linear(cpu::kernels().feed_forward_workspace, cpu::kernels().feed_forward_forward, args, x,
             (args.channels + args.out_channels + 1) / 2);
  return {out, stats, hidden};
}

std::tuple<Tensor, Tensor, Tensor> feed_forward_cpu(const Tensor& x, const Tensor& w1, OptionalTensor b1,
                                                    const Tensor& w2, OptionalTensor b2, int64_t activation,
                                                    OptionalTensor scale, OptionalTensor shift,
                                                    std::optional<double> eps, OptionalTensor gate, bool residual,
                                                    bool save_hidden, OptionalTensor packed_1,
                                                    OptionalTensor packed_2) {
  check_signal(x);
  const FeedForward op(x, w1, b1, w2, b2, activation, packed_1, packed_2);
  return feed(x, Rows(x), op, {scale, shift, eps}, {}, gate, residual, save_hidden);
}

void check_wide(const char* name, const Tensor& x, const std::vector<int64_t>& shape, const Tensor& like) {
  check_tensor(name, x, shape, wide_type(like));
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// Where the chunks of norm_backward begin that each row has, then the end.
std::vector<int64_t> chunks_of(const Rows& rows) {
  std::vector<int64_t> starts = {0};
  for (int64_t row = 0; row < rows.count(); ++row)
    starts.push_back(starts.back() + ceil_div(rows.size(row), kNormChunk));
  return starts;
}

// The gradient of x, the normalised x, and for every chunk of frames what norm_backward sums up, [chunks, 2, C].
std::tuple<Tensor, Tensor, Tensor> norm_backward_cpu(const Tensor& grad, const Tensor& x, const Rows& rows,
                                                     const std::vector<int64_t>& chunks, const Tensor& stats,
                                                     const OptionalTensor& scale, const OptionalTensor& shift,
                                                     const OptionalTensor& grad_residual) {
  check_signal(x);
  const int64_t batch = x.size(0), frames = x.size(1), channels = x.size(2);
  const std::vector<int64_t> shape = {batch, frames, channels};
  check_wide("x", x, shape, x);
  check_wide("grad", grad, shape, x);
  check_wide("stats", stats, {2, batch, frames}, x);
  if (grad_residual) check_wide("grad_residual", *grad_residual, shape, x);
  Tensor grad_x = torch::stable::new_empty(x, shape), normalised = torch::stable::new_empty(x, shape);
  Tensor sums = torch::stable::new_empty(x, {chunks.back(), 2, channels});
  const NormBackwardArgs args = {batch,
                                 frames,
                                 channels,
                                 grad.data_ptr(),
                                 x.data_ptr(),
                                 stats.data_ptr(),
                                 vectors_of("scale", scale, rows.count(), channels, x.scalar_type()),
                                 vectors_of("shift", shift, rows.count(), channels, x.scalar_type()),
                                 grad_residual ? grad_residual->data_ptr() : nullptr,
                                 grad_x.data_ptr(),
                                 normalised.data_ptr(),
                                 sums.data_ptr(),
                                 rows.count(),
                                 rows.starts.data(),
                                 chunks.data()};
  const int64_t tasks = chunks.back(), workers = min_of(torch::stable::get_num_threads(), tasks);
  const int64_t bytes = 2 * channels * x.element_size();
  char* const memory = scratch<Scratch::threads>(workers * bytes);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    cpu::kernels().norm_backward(args, dtype_of(x), memory + begin * bytes, tasks * begin / workers,
                                 tasks * end / workers);
  });
  return {grad_x, normalised, sums};
}

// What the activation gives, and the gradient of what went into it.
std::tuple<Tensor, Tensor> activation_backward_cpu(const Tensor& grad, const Tensor& hidden, Activation activation,
                                                   const std::optional<Dropout>& dropout) {
  check_signal(hidden);
  const std::vector<int64_t> shape = {hidden.size(0), hidden.size(1), hidden.size(2)};
  check_wide("hidden", hidden, shape, hidden);
  check_wide("grad", grad, shape, hidden);
  Tensor activated = torch::stable::new_empty(hidden, shape), grad_hidden = torch::stable::new_empty(hidden, shape);
  const ActivationBackwardArgs args = {
      activation,     grad.data_ptr(),     hidden.data_ptr(),          activated.data_ptr(), grad_hidden.data_ptr(),
      hidden.numel(), dropout.has_value(), dropout.value_or(Dropout{})};
  torch::stable::parallel_for(
      0, ceil_div(args.count, kDropoutGroup), ceil_div(kGrain, kDropoutGroup),
      [&](int64_t begin, int64_t end) { cpu::kernels().activation_backward(args, dtype_of(hidden), begin, end); });
  return {activated, grad_hidden};
}

// The backward passes of projection and feed_forward, in float32 or float64.
Tensor as_matrix(const Tensor& x) { return torch::stable::view(x, {x.size(0) * x.size(1), x.size(2)}); }

constexpr int64_t kProductRows = 288, kProductStep = 12;  // of a task at most, and a multiple of every register tile

// Fills `out`, [rows, columns] in any shape, with a b; a is [rows, depth] or, if `transposed`, [depth, rows].  All are
// contiguous.
void multiply(const Tensor& a, bool transposed, const Tensor& b, Tensor& out) {
  STD_TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && out.is_contiguous(), "matrices must be contiguous");
  const int64_t depth = b.size(0), columns = b.size(1), rows = a.size(transposed ? 1 : 0);
  if (depth == 0) torch::stable::zero_(out);
  if (depth == 0 || rows == 0 || columns == 0) return;
  ProductArgs args = {rows, depth, columns, a.data_ptr(), transposed, b.data_ptr(), out.data_ptr(), 0};
  // Tasks of about the same size, and as many for every thread.
  const int64_t threads = torch::stable::get_num_threads(), across = ceil_div(columns, kProductColumns);
  int64_t down = ceil_div(rows, kProductRows);
  while (down * across % threads && down * kProductStep < rows) ++down;
  args.block = ceil_div(ceil_div(rows, down), kProductStep) * kProductStep;
  const cpu::Kernels& kernels = cpu::kernels();
  const Dtype dtype = dtype_of(a);
  run_tasks(ceil_div(rows, args.block) * across, kernels.product_workspace(args, dtype) * wide_size(a),
            [&](void* workspace, std::atomic<int64_t>& next) { kernels.product(args, dtype, workspace, next); });
}

// grad @ weight, [B, T, C].
Tensor gradient_of_input(const Tensor& grad, const Tensor& weight) {
  const int64_t channels = weight.size(1);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), grad.size(1), channels});
  const Tensor dense = torch::stable::contiguous(weight);
  if (!is_thin(grad)) {
    multiply(as_matrix(grad), false, dense, out);
    return out;
  }
  const int64_t frames = grad.size(0) * grad.size(1), rows = weight.size(0);
  const ThinArgs args = {frames, channels, rows, nullptr, grad.data_ptr(), dense.data_ptr(), out.data_ptr()};
  torch::stable::parallel_for(0, channels, max_of(64, kGrain / max_of(1, rows)), [&](int64_t begin, int64_t end) {
    const auto workspace = std::make_unique<char[]>(static_cast<size_t>(frames * (end - begin) * grad.element_size()));
    cpu::kernels().thin_input_gradient(args, dtype_of(grad), workspace.get(), begin, end);
  });
  return out;
}

// grad.T @ x, [N, C].
Tensor gradient_of_weight(const Tensor& grad, const Tensor& x) {
  const int64_t rows = grad.size(2), channels = x.size(2), frames = grad.size(0) * grad.size(1);
  Tensor out = torch::stable::new_empty(grad, {rows, channels});
  if (!is_thin(grad)) {
    multiply(as_matrix(grad), true, as_matrix(x), out);
    return out;
  }
  const ThinArgs args = {frames, channels, rows, x.data_ptr(), grad.data_ptr(), nullptr, out.data_ptr()};
  torch::stable::parallel_for(0, rows, max_of(1, kGrain / max_of(1, channels)), [&](int64_t begin, int64_t end) {
    cpu::kernels().thin_weight_gradient(args, dtype_of(grad), begin, end);
  });
  return out;
}

// What is not wanted, or not there.
Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// The sums of columns [0, columns) of `rows` rows from x on, or of x * y; `stride` elements lie between two rows.
void sum_columns(const void* x, int64_t rows, int64_t stride, int64_t columns, Dtype dtype, void* sums,
                 const void* y = nullptr) {
  torch::stable::parallel_for(0, columns, max_of(64, kGrain / max_of(rows, 1)), [&](int64_t begin, int64_t end) {
    cpu::kernels().column_sums(x, y, rows, stride, dtype, sums, begin, end);
  });
}

// The frames of row b of [B, T, C].
Tensor row_of(const Tensor& x, const Rows& rows, int64_t b) {
  Tensor matrix = as_matrix(x);
  return torch::stable::narrow(matrix, 0, rows.starts[b], rows.size(b));
}

struct GradientOfLinear {
  Tensor weight, bias, gate;
};

// Of gate * (x @ weight.T + bias), from the gradient of the result, and with a gate that times it, `scaled`.  If
// `added` is the product, the gate needs no products of each row.
GradientOfLinear gradient_of_linear(const Tensor& grad, const Tensor& scaled, const Tensor& x, const Rows& batch,
                                    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gate,
                                    bool wants_bias, const OptionalTensor& added = {}) {
  const int64_t rows = weight.size(0), channels = weight.size(1);
  const Dtype dtype = dtype_of(grad);
  if (gate && added && added->numel()) {
    GradientOfLinear found = gradient_of_linear(scaled, scaled, x, batch, weight, bias, {}, wants_bias);
    found.gate = torch::stable::new_empty(x, {batch.count(), rows});
    for (int64_t b = 0; b < batch.count(); ++b)
      sum_columns(row_of(grad, batch, b).data_ptr(), batch.size(b), rows, rows, dtype,
                  torch::stable::select(found.gate, 0, b).data_ptr(), row_of(*added, batch, b).data_ptr());
    return found;
  }
  if (!gate) {
    Tensor sums = torch::stable::new_empty(x, {wants_bias ? rows : 0});
    if (wants_bias) sum_columns(grad.data_ptr(), batch.starts.back(), rows, rows, dtype, sums.data_ptr());
    return {gradient_of_weight(grad, x), sums, nothing(x)};
  }
  check_tensor("gate", *gate, {batch.count(), rows}, x.scalar_type());
  if (bias) check_tensor("bias", *bias, {rows}, x.scalar_type());
  GradientOfLinear found = {torch::stable::new_zeros(x, {rows, channels}), torch::stable::new_zeros(x, {rows}),
                            torch::stable::new_empty(x, {batch.count(), rows})};
  Tensor products = torch::stable::new_empty(x, {rows, channels});
  const Tensor sums = torch::stable::new_empty(x, {rows}), dense_weight = torch::stable::contiguous(weight),
               dense_gate = torch::stable::contiguous(*gate);
  const OptionalTensor dense_bias = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : OptionalTensor();
  for (int64_t b = 0; b < batch.count(); ++b) {
    const Tensor grad_row = row_of(grad, batch, b);
    multiply(grad_row, true, row_of(x, batch, b), products);
    sum_columns(grad_row.data_ptr(), batch.size(b), rows, rows, dtype, sums.data_ptr());
    const GatedGradientArgs args = {channels,
                                    products.data_ptr(),
                                    sums.data_ptr(),
                                    dense_weight.data_ptr(),
                                    dense_bias ? dense_bias->data_ptr() : nullptr,
                                    torch::stable::select(dense_gate, 0, b).data_ptr(),
                                    found.weight.data_ptr(),
                                    found.bias.data_ptr(),
                                    torch::stable::select(found.gate, 0, b).data_ptr()};
    torch::stable::parallel_for(0, rows, max_of(1, kGrain / channels), [&](int64_t begin, int64_t end) {
      cpu::kernels().add_gated_gradient(args, dtype, begin, end);
    });
  }
  return found;
}

// The gradient of scale or shift, which is like one of them: [C], [rows, C] or none; `sums` is norm_backward's.
Tensor gradient_of_vectors(const OptionalTensor& like, const Tensor& sums, const std::vector<int64_t>& chunks,
                           int64_t which) {
  if (!like) return nothing(sums);
  const int64_t channels = sums.size(2), size = sums.element_size();
  Tensor result = torch::stable::new_empty(sums, like->sizes());
  const auto sum_chunks = [&](int64_t first, int64_t last, int64_t row) {
    sum_columns(static_cast<const char*>(sums.data_ptr()) + (2 * first + which) * channels * size, last - first,
                2 * channels, channels, dtype_of(sums), static_cast<char*>(result.data_ptr()) + row * channels * size);
  };
  if (like->dim() == 1) sum_chunks(0, chunks.back(), 0);
  for (size_t row = 0; like->dim() == 2 && row + 1 < chunks.size(); ++row)
    sum_chunks(chunks[row], chunks[row + 1], static_cast<int64_t>(row));
  return result;
}

struct NormGradient {
  Tensor x, normalised, scale, shift;
};

NormGradient gradient_of_norm(const Tensor& grad, const Tensor& x, const Rows& rows, const Tensor& stats,
                              const NormRule& norm, const OptionalTensor& grad_residual) {
  // One scale for all rows is summed up as if they were one: the same bits with them and without.
  const auto per_row = [](const OptionalTensor& vectors) { return vectors && vectors->dim() == 2; };
  const Rows apart = per_row(norm.scale) || per_row(norm.shift) ? rows : Rows(x);
  const std::vector<int64_t> chunks = chunks_of(apart);
  const auto [grad_x, normalised, sums] =
      norm_backward_cpu(grad, x, apart, chunks, stats, norm.scale, norm.shift, grad_residual);
  return {grad_x, normalised, gradient_of_vectors(norm.scale, sums, chunks, 0),
          gradient_of_vectors(norm.shift, sums, chunks, 1)};
}

// Weights below each other, in memory of their own where they are several.
Tensor joined(const std::vector<Tensor>& weights) {
  if (weights.size() == 1) return weights[0];
  int64_t rows = 0;
  for (const Tensor& weight : weights) rows += weight.size(0);
  Tensor result = torch::stable::new_empty(weights[0], {rows, weights[0].size(1)});
  int64_t first = 0;
  for (const Tensor& weight : weights) {
    Tensor part = torch::stable::narrow(result, 0, first, weight.size(0));
    torch::stable::copy_(part, weight);
    first += weight.size(0);
  }
  return result;
}

GradientOfLinear no_gradients(const Tensor& like) { return {nothing(like), nothing(like), nothing(like)}; }

void check_gradient(const Tensor& grad, const Tensor& scaled, const Tensor& x, int64_t rows) {
  const std::vector<int64_t> shape = {x.size(0), x.size(1), rows};
  check_wide("grad", grad, shape, x);
  check_wide("scaled", scaled, shape, x);
}

// `scaled` is grad * gate, or grad without a gate.  What is not wanted or does not exist has the shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projection_backward_cpu(
    const Tensor& grad, const Tensor& scaled, const Tensor& x, const Tensor& stats, std::vector<Tensor> weights,
    OptionalTensor bias, OptionalTensor scale, OptionalTensor shift, bool normalises, OptionalTensor gate, bool wants_x,
    bool wants_weights, bool wants_bias) {
  check_signal(x);
  check_wide("x", x, {x.size(0), x.size(1), x.size(2)}, x);
  const Stack stack(weights, std::vector<OptionalTensor>(weights.size()), x.size(2), x.scalar_type());
  check_gradient(grad, scaled, x, stack.rows);
  const Tensor weight = joined(weights);
  const Rows rows(x);
  OptionalTensor grad_x;
  if (wants_x || normalises) grad_x = gradient_of_input(scaled, weight);
  NormGradient norm = {nothing(x), x, nothing(x), nothing(x)};
  if (normalises) {
    norm = gradient_of_norm(*grad_x, x, rows, stats, {scale, shift, {}}, {});
    grad_x = norm.x;
  }
  GradientOfLinear linear = no_gradients(x);
  if (wants_weights) linear = gradient_of_linear(grad, scaled, norm.normalised, rows, weight, bias, gate, wants_bias);
  return {grad_x.value_or(nothing(x)), linear.weight, linear.bias, linear.gate, norm.scale, norm.shift};
}

using FeedForwardGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a gradient says of feed_forward, in float32 or float64; `scaled` as for projection.
struct FeedForwardBackward {
  Tensor grad, scaled, x, stats, hidden, w1, w2;
  OptionalTensor b2;
  Activation activation;
  std::optional<Dropout> dropout;
  NormRule norm;
  OptionalTensor gate, added;  // added: as for gradient_of_linear
  bool normalises, residual, wants_x, wants_first, wants_second;

  // The gradients of x, w1, b1, w2, b2, scale, shift and gate.
  FeedForwardGradients run(const Rows& rows) const {
    check_wide("x", x, {x.size(0), x.size(1), x.size(2)}, x);
    check_tensor("w1", w1, {w1.size(0), x.size(2)}, x.scalar_type());
    check_tensor("w2", w2, {w2.size(0), w1.size(0)}, x.scalar_type());
    check_gradient(grad, scaled, x, w2.size(0));
    check_wide("hidden", hidden, {x.size(0), x.size(1), w1.size(0)}, x);
    if (added && added->numel()) check_wide("added", *added, {x.size(0), x.size(1), w2.size(0)}, x);
    const auto [activated, grad_hidden] =
        activation_backward_cpu(gradient_of_input(scaled, w2), hidden, activation, dropout);
    GradientOfLinear first = no_gradients(x), second = no_gradients(x);
    if (wants_second) second = gradient_of_linear(grad, scaled, activated, rows, w2, b2, gate, true, added);
    Tensor grad_x = wants_x || normalises ? gradient_of_input(grad_hidden, w1) : nothing(x);
    NormGradient of_norm = {nothing(x), x, nothing(x), nothing(x)};
    if (normalises) {
      of_norm = gradient_of_norm(grad_x, x, rows, stats, norm, residual ? OptionalTensor(grad) : OptionalTensor());
      grad_x = of_norm.x;
    }
    if (wants_first) first = gradient_of_linear(grad_hidden, grad_hidden, of_norm.normalised, rows, w1, {}, {}, true);
    return {grad_x, first.weight, first.bias, second.weight, second.bias, of_norm.scale, of_norm.shift, second.gate};
  }
};

FeedForwardGradients feed_forward_backward_cpu(const Tensor& grad, const Tensor& scaled, const Tensor& x,
                                               const Tensor& stats, const Tensor& hidden, const Tensor& w1,
                                               const Tensor& w2, OptionalTensor b2, int64_t activation,
                                               OptionalTensor scale, OptionalTensor shift, bool normalises,
                                               OptionalTensor gate, bool residual, bool wants_x, bool wants_first,
                                               bool wants_second) {
  check_signal(x);
  const FeedForwardBackward op = {grad,
                                  scaled,
                                  x,
                                  stats,
                                  hidden,
                                  w1,
                                  w2,
                                  b2,
                                  static_cast<Activation>(activation),
                                  {},
                                  {scale, shift, {}},
                                  gate,
                                  {},
                                  normalises,
                                  residual,
                                  wants_x,
                                  wants_first,
                                  wants_second};
  return op.run(Rows(x));
}

// ------------------------------------------------------------------------------------------------ transformer_block
// Of contiguous x.
Tensor drop(const Tensor& x, const Dropout& dropout) {
  Tensor out = torch::stable::empty_like(x);
  const DropoutArgs args = {dropout, x.numel(), x.data_ptr(), out.data_ptr()};
  const Dtype dtype = dtype_of(x);
  const auto run = cpu::kernels().dropout;
  torch::stable::parallel_for(0, ceil_div(args.count, kDropoutGroup), ceil_div(kGrain, kDropoutGroup),
                              [&](int64_t begin, int64_t end) { run(args, dtype, begin, end); });
  return out;
}

std::optional<Dropout> optional_dropout(double rate, const OptionalTensor& seed) {
  check_dropout("a rate", rate);
  if (rate == 0) return {};
  STD_TORCH_CHECK(seed, "dropout needs a seed");
  return dropout_of(rate, *seed);
}

constexpr int64_t kAddedFrames = 2048;  // as in fastflow/ops/transformer_block.py

// projection, self_attention, projection and feed_forward.  `weights` and `biases` are those of q, k, v, out and the
// two of feed_forward, `norms` scale and shift of the two norms; `rates` and `seeds` are those of the dropouts after
// out and inside feed_forward; `packed` has the weights of qkv and of the others in packed form, or nothing.
struct TransformerBlock {
  int64_t batch, frames, heads, inner;
  Rows rows;
  NormRule norm_1, norm_2;
  SelfRule attention;
  OptionalTensor gate_1, gate_2, packed_qkv, packed_out;
  std::optional<Dropout> dropout_1, dropout_2;
  std::vector<Tensor> weights_qkv;
  std::vector<OptionalTensor> biases_qkv;
  Stack qkv, out;
  FeedForward feed_forward;

  TransformerBlock(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
                   const std::vector<OptionalTensor>& norms, double eps_1, double eps_2,
                   const std::vector<OptionalTensor>& gates, int64_t heads, int64_t activation, SelfRule attention,
                   const std::vector<double>& rates, const std::vector<OptionalTensor>& seeds,
                   std::vector<OptionalTensor> packed)
      : batch(x.size(0)),
        frames(x.size(1)),
        heads(heads),
        inner(weights.at(0).size(0)),
        rows(x, attention.sizes),
        norm_1{norms.at(0), norms.at(1), eps_1},
        norm_2{norms.at(2), norms.at(3), eps_2},
        attention(std::move(attention)),
        gate_1(gates.at(0)),
        gate_2(gates.at(1)),
        packed_qkv(packed.at(0)),
        packed_out(packed.at(1)),
        dropout_1(optional_dropout(rates.at(0), seeds.at(0))),
        dropout_2(optional_dropout(rates.at(1), seeds.at(1))),
        weights_qkv{weights.at(0), weights.at(1), weights.at(2)},
        biases_qkv{biases.at(0), biases.at(1), biases.at(2)},
        qkv(weights_qkv, biases_qkv, x.size(2), x.scalar_type()),
        out({weights.at(3)}, {biases.at(3)}, inner, x.scalar_type()),
        feed_forward(x, weights.at(4), biases.at(4), weights.at(5), biases.at(5), activation, packed.at(2),
                     packed.at(3)) {
    STD_TORCH_CHECK(heads > 0 && inner % heads == 0, "heads must divide the width of q, ", inner, ", got ", heads);
  }
  // Whether the gradients of gates come from what they scale, which is kept or computed again.  Else they come from
  // products of each row, whose way through memory costs the less the more frames there are.  It depends on the shape
  // alone, so that the gradients are the same whatever is kept.
  bool keeps_added() const { return batch * frames <= kAddedFrames; }
};

// What the backward pass reads besides x; a tensor that was not kept is empty.
struct BlockState {
  Tensor stats_1, qkv, attended, lse, middle, stats_2, hidden;
  Tensor added_1, added_2;  // what is added to x, before the gates
};

void find_qkv(const TransformerBlock& op, const Tensor& x, BlockState& state) {
  const auto [qkv, stats] = project(x, op.rows, op.qkv, op.norm_1, {}, {}, {}, op.packed_qkv);
  state.qkv = torch::stable::view(qkv, {op.batch, op.frames, 3, op.heads, op.inner / op.heads});
  state.stats_1 = stats;
}

// The block up to its second half; `added` as for project.
void find_middle(const TransformerBlock& op, const Tensor& x, BlockState& state, Tensor* added) {
  const auto& [lengths, sizes, chunk_size, scale, rotary] = op.attention;
  find_qkv(op, x, state);
  std::tie(state.attended, state.lse) = self_attention_cpu(state.qkv, lengths, sizes, chunk_size, scale, rotary);
  const Tensor attended = torch::stable::view(state.attended, {op.batch, op.frames, op.inner});
  state.middle = std::get<0>(project(attended, op.rows, op.out, {}, op.dropout_1, x, op.gate_1, op.packed_out, added));
}

constexpr int64_t kKeepQkv = 2, kKeepHidden = 4;  // bits, as in fastflow/ops/transformer_block.py

// The result and, unless `keep` is 0, the state; what of it is not kept is empty.
std::vector<Tensor> transformer_block_cpu(const Tensor& x, std::vector<Tensor> weights,
                                          std::vector<OptionalTensor> biases, std::vector<OptionalTensor> norms,
                                          double eps_1, double eps_2, std::vector<OptionalTensor> gates, int64_t heads,
                                          int64_t activation, OptionalTensor lengths,
                                          std::optional<std::vector<int64_t>> sizes, int64_t chunk_size, double scale,
                                          OptionalTensor rotary, std::vector<double> rates,
                                          std::vector<OptionalTensor> seeds, std::vector<OptionalTensor> packed,
                                          int64_t keep) {
  check_signal(x);
  const TransformerBlock op(x, weights, biases, norms, eps_1, eps_2, gates, heads, activation,
                            {lengths, std::move(sizes), chunk_size, scale, rotary}, rates, seeds, packed);
  BlockState state;
  state.added_1 = state.added_2 = nothing(x);
  const bool added = keep && op.keeps_added();
  find_middle(op, x, state, added && op.gate_1 ? &state.added_1 : nullptr);
  const auto [out, stats_2, hidden] = feed(state.middle, op.rows, op.feed_forward, op.norm_2, op.dropout_2, op.gate_2,
                                           true, keep & kKeepHidden, added && op.gate_2 ? &state.added_2 : nullptr);
  if (!keep) return {out};
  return {out,          state.stats_1, keep & kKeepQkv ? state.qkv : nothing(x), state.attended, state.lse,
          state.middle, stats_2,       keep & kKeepHidden ? hidden : nothing(x), state.added_1,  state.added_2};
}

// The state that was kept, with the rest computed again; `kept` is what transformer_block gave, but for the result.
BlockState restored_state(const TransformerBlock& op, const Tensor& x, const std::vector<Tensor>& kept) {
  BlockState state;
  const bool has_inputs = !kept.empty();
  if (has_inputs) {
    STD_TORCH_CHECK(kept.size() == 9, "the state must be 9 tensors or none, got ", kept.size());
    state = {kept[0], kept[1], kept[2], kept[3], kept[4], kept[5], kept[6], kept[7], kept[8]};
    if (!state.qkv.numel()) find_qkv(op, x, state);
  } else {
    state.added_1 = state.added_2 = nothing(x);
    find_middle(op, x, state, op.gate_1 && op.keeps_added() ? &state.added_1 : nullptr);
  }
  if (!has_inputs && op.gate_2 && op.keeps_added())
    std::tie(std::ignore, state.stats_2, state.hidden) =
        feed(state.middle, op.rows, op.feed_forward, op.norm_2, op.dropout_2, op.gate_2, true, true, &state.added_2);
  else if (!has_inputs || !state.hidden.numel())
    std::tie(state.hidden, state.stats_2) =
        project(state.middle, op.rows, op.feed_forward.first, op.norm_2, {}, {}, {}, op.feed_forward.packed_1);
  return state;
}

Tensor dropped(const Tensor& grad, const std::optional<Dropout>& dropout) {
  return dropout ? drop(grad, *dropout) : grad;
}

// grad * gate, with the gate of each row.
Tensor gated(const Tensor& grad, const Rows& rows, const OptionalTensor& gate) {
  if (!gate) return grad;
  const int64_t channels = grad.size(2);
  Tensor out = torch::stable::empty_like(grad);
  const Vectors vectors = vectors_of("gate", gate, rows.count(), channels, grad.scalar_type());
  const GatedFramesArgs args = {channels, grad.data_ptr(), vectors, rows.count(), rows.starts.data(), out.data_ptr()};
  torch::stable::parallel_for(0, rows.starts.back(), max_of(1, kGrain / channels), [&](int64_t begin, int64_t end) {
    cpu::kernels().gate_frames(args, dtype_of(grad), begin, end);
  });
  return out;
}

// Bits of what the caller wants of transformer_block_backward.
constexpr int64_t kWantQkv = 1, kWantOut = 2, kWantFirst = 4, kWantSecond = 8;

// The gradients of x; the weights and biases of qkv, as one each, of out and of the two of feed_forward; scale and
// shift of the norms; and the gates.  What is not wanted or does not exist has the shape [0].  In float32 or float64.
std::vector<Tensor> transformer_block_backward_cpu(const Tensor& grad, const Tensor& x, std::vector<Tensor> kept,
                                                   std::vector<Tensor> weights, std::vector<OptionalTensor> biases,
                                                   std::vector<OptionalTensor> norms, double eps_1, double eps_2,
                                                   std::vector<OptionalTensor> gates, int64_t heads, int64_t activation,
                                                   OptionalTensor lengths, std::optional<std::vector<int64_t>> sizes,
                                                   int64_t chunk_size, double scale, OptionalTensor rotary,
                                                   std::vector<double> rates, std::vector<OptionalTensor> seeds,
                                                   int64_t wanted) {
  check_signal(x);
  const std::vector<int64_t> shape = {x.size(0), x.size(1), x.size(2)};
  check_wide("x", x, shape, x);
  check_wide("grad", grad, shape, x);
  const TransformerBlock op(x, weights, biases, norms, eps_1, eps_2, gates, heads, activation,
                            {lengths, sizes, chunk_size, scale, rotary}, rates, seeds, {{}, {}, {}, {}});
  const BlockState state = restored_state(op, x, kept);
  check_wide("middle", state.middle, shape, x);
  if (state.added_1.numel()) check_wide("added", state.added_1, shape, x);
  const auto [grad_middle, w1, b1, w2, b2, scale_2, shift_2, gate_2] =
      FeedForwardBackward{grad,
                          gated(grad, op.rows, op.gate_2),
                          state.middle,
                          state.stats_2,
                          state.hidden,
                          weights[4],
                          weights[5],
                          biases[5],
                          op.feed_forward.activation,
                          op.dropout_2,
                          op.norm_2,
                          op.gate_2,
                          state.added_2,
                          true,
                          true,
                          true,
                          (wanted & kWantFirst) != 0,
                          (wanted & kWantSecond) != 0}
          .run(op.rows);
  const Tensor of_out = dropped(grad_middle, op.dropout_1);
  const Tensor attended = torch::stable::view(state.attended, {op.batch, op.frames, op.inner});
  GradientOfLinear out = no_gradients(x), first = no_gradients(x);
  const Tensor scaled = gated(of_out, op.rows, op.gate_1);
  if (wanted & kWantOut)  // what was kept for the gate is dropped already
    out = gradient_of_linear(state.added_1.numel() ? grad_middle : of_out, scaled, attended, op.rows, weights[3],
                             biases[3], op.gate_1, true, state.added_1);
  const Tensor grad_attended = gradient_of_input(scaled, weights[3]);
  const Tensor grad_qkv = torch::stable::view(
      self_attention_backward_cpu(torch::stable::view(grad_attended, state.attended.sizes()), state.attended, state.lse,
                                  state.qkv, lengths, sizes, chunk_size, scale, rotary),
      {op.batch, op.frames, 3 * op.inner});
  const Tensor weight = joined(op.weights_qkv);
  const NormGradient norm =
      gradient_of_norm(gradient_of_input(grad_qkv, weight), x, op.rows, state.stats_1, op.norm_1, grad_middle);
  const bool has_bias = op.biases_qkv[0] || op.biases_qkv[1] || op.biases_qkv[2];
  if (wanted & kWantQkv)
    first = gradient_of_linear(grad_qkv, grad_qkv, norm.normalised, op.rows, weight, {}, {}, has_bias);
  return {norm.x, first.weight, first.bias, out.weight, out.bias, w1,       b1,    w2,
          b2,     norm.scale,   norm.shift, scale_2,    shift_2,  out.gate, gate_2};
}

// A gradient of that shape and where its numbers go, or one of shape [0] and null if it is not wanted.
Tensor gradient_if(bool wanted, const Tensor& like, const std::vector<int64_t>& shape, void*& data) {
  Tensor gradient = torch::stable::new_empty(like, wanted ? shape : std::vector<int64_t>{0});
  data = wanted ? gradient.data_ptr() : nullptr;
  return gradient;
}

// ------------------------------------------------------------------------------------------------ conv_block
Sequence sequence_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// The numbers of the schema, in its order.
struct ConvRule {
  int64_t groups;
  bool causal, exact;
  double eps;
};

// The parameters, contiguous.
struct ConvBlock {
  ConvBlockArgs args;
  Tensor weight, bias, norm_weight, norm_bias;
};

ConvBlock conv_block_args(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight,
                          const Tensor& norm_bias, const OptionalTensor& lengths, const ConvRule& rule) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "x must have shape [B, T, C] and be on the CPU");
  dtype_of(x);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(weight.dim() == 3 && x.size(2) > 0 && weight.size(0) > 0, "weight must have shape [C', C, 3]");
  check_tensor("weight", weight, {weight.size(0), x.size(2), 3}, dtype);
  ConvBlockArgs args{};
  args.batch = x.size(0), args.frames = x.size(1), args.channels = x.size(2), args.width = weight.size(0);
  check_tensor("bias", bias, {args.width}, dtype);
  check_tensor("norm_weight", norm_weight, {args.width}, dtype);
  check_tensor("norm_bias", norm_bias, {args.width}, dtype);
  STD_TORCH_CHECK(rule.groups >= 0 && (rule.groups == 0 || args.width % rule.groups == 0),
                  "groups must be 0 or divide ", args.width, ", got ", rule.groups);
  args.groups = rule.groups, args.causal = rule.causal, args.exact = rule.exact, args.eps = rule.eps;
  if (lengths) {
    check_tensor("lengths", *lengths, {args.batch}, ScalarType::Long);
    STD_TORCH_CHECK(lengths->is_contiguous(), "lengths must be contiguous");
    args.lengths = static_cast<const int64_t*>(lengths->data_ptr());
  }
  ConvBlock op = {args, torch::stable::contiguous(weight), torch::stable::contiguous(bias),
                  torch::stable::contiguous(norm_weight), torch::stable::contiguous(norm_bias)};
  op.args.x = sequence_of(x);
  op.args.weight = op.weight.data_ptr(), op.args.bias = op.bias.data_ptr();
  op.args.norm_weight = op.norm_weight.data_ptr(), op.args.norm_bias = op.norm_bias.data_ptr();
  return op;
}

void run_conv_block(ConvBlockArgs args, const Tensor& x, bool backward, std::initializer_list<ConvBlockPhase> phases) {
  const cpu::Kernels& kernels = cpu::kernels();
  const Dtype dtype = dtype_of(x);
  const int64_t size = wide_size(x);
  args.shared = scratch<Scratch::shared>(kernels.conv_block_shared(args, dtype, backward) * size);
  const int64_t elements = kernels.conv_block_plan(args, dtype, *phases.begin()).elements;
  char* const memory = scratch<Scratch::threads>(torch::stable::get_num_threads() * elements * size);
  for (const ConvBlockPhase phase : phases) {
    const int64_t tasks = kernels.conv_block_plan(args, dtype, phase).tasks;
    const int64_t threads = min_of(torch::stable::get_num_threads(), tasks);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      kernels.conv_block_run(args, dtype, phase, memory + begin * elements * size, next);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                          const Tensor& norm_weight, const Tensor& norm_bias,
                                                          OptionalTensor lengths, OptionalTensor time_bias,
                                                          int64_t groups, bool causal, bool exact, double eps,
                                                          bool save) {
  auto [args, w, b, scale, shift] =
      conv_block_args(x, weight, bias, norm_weight, norm_bias, lengths, {groups, causal, exact, eps});
  OptionalTensor time;
  if (time_bias) {
    check_tensor("time_bias", *time_bias, {args.batch, args.width}, x.scalar_type());
    time = torch::stable::contiguous(*time_bias);
    args.time_bias = time->data_ptr();
  }
  const std::vector<int64_t> shape = {args.batch, args.frames, args.width};
  const std::vector<int64_t> statistics = {args.batch, groups ? groups : args.frames};
  const auto saved = [&](std::vector<int64_t> shape) { return save ? shape : std::vector<int64_t>{0}; };
  Tensor out = torch::stable::new_empty(x, shape), y = torch::stable::new_empty(x, saved(shape));
  Tensor mean = torch::stable::new_zeros(x, saved(statistics), wide_type(x));
  Tensor rstd = torch::stable::new_zeros(x, saved(statistics), wide_type(x));
  args.out = out.data_ptr();
  args.y = save ? y.data_ptr() : groups ? args.out : nullptr;
  args.mean = save ? mean.data_ptr() : nullptr;
  args.rstd = save ? rstd.data_ptr() : nullptr;
  run_conv_block(args, x, false, {ConvBlockPhase::pack, ConvBlockPhase::convolve, ConvBlockPhase::normalise});
  return {out, y, mean, rstd};
}

// The gradients of x, weight, bias, norm_weight, norm_bias and time_bias; `wanted` has a bit for each, in this order,
// and one that is not wanted has the shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_backward_cpu(
    const Tensor& grad, const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias, OptionalTensor lengths, int64_t groups,
    bool causal, bool exact, double eps, int64_t wanted) {
  auto [args, w, b, scale, shift] =
      conv_block_args(x, weight, bias, norm_weight, norm_bias, lengths, {groups, causal, exact, eps});
  const std::vector<int64_t> shape = {args.batch, args.frames, args.width};
  const std::vector<int64_t> statistics = {args.batch, groups ? groups : args.frames};
  check_tensor("grad", grad, shape, x.scalar_type());
  check_tensor("y", y, shape, x.scalar_type());
  check_tensor("mean", mean, statistics, wide_type(x));
  check_tensor("rstd", rstd, statistics, wide_type(x));
  STD_TORCH_CHECK(y.is_contiguous() && mean.is_contiguous() && rstd.is_contiguous(),
                  "y, mean and rstd must be contiguous");
  args.grad = sequence_of(grad);
  args.y = y.data_ptr(), args.mean = mean.data_ptr(), args.rstd = rstd.data_ptr();
  Tensor grad_x = gradient_if(wanted >> 0 & 1, x, {args.batch, args.frames, args.channels}, args.grad_x);
  Tensor grad_weight = gradient_if(wanted >> 1 & 1, x, {args.width, args.channels, 3}, args.grad_weight);
  Tensor grad_bias = gradient_if(wanted >> 2 & 1, x, {args.width}, args.grad_bias);
  Tensor grad_norm_weight = gradient_if(wanted >> 3 & 1, x, {args.width}, args.grad_norm_weight);
  Tensor grad_norm_bias = gradient_if(wanted >> 4 & 1, x, {args.width}, args.grad_norm_bias);
  Tensor grad_time_bias = gradient_if(wanted >> 5 & 1, x, {args.batch, args.width}, args.grad_time_bias);
  run_conv_block(args, x, true, {ConvBlockPhase::differentiate, ConvBlockPhase::centre, ConvBlockPhase::products});
  return {grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_time_bias};
}

// ------------------------------------------------------------------------------------------------ grouped_conv
// The tensors are contiguous.
GroupedConvArgs grouped_conv_args(const Tensor& x, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "x must have shape [B, T, C] and be on the CPU");
  dtype_of(x);
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(2) > 0, "weight must have shape [C', C / groups, K > 0]");
  const int64_t channels = x.size(2), width = weight.size(0);
  STD_TORCH_CHECK(groups > 0 && channels > 0 && width > 0 && channels % groups == 0 && width % groups == 0,
                  "groups must divide ", channels, " and ", width, " channels, got ", groups);
  check_tensor("weight", weight, {width, channels / groups, weight.size(2)}, x.scalar_type());
  GroupedConvArgs args{};
  args.batch = x.size(0), args.frames = x.size(1), args.groups = groups, args.taps = weight.size(2);
  args.inputs = channels / groups, args.outputs = width / groups;
  args.x = x.data_ptr(), args.weight = weight.data_ptr();
  return args;
}

void run_grouped_conv(GroupedConvArgs args, const Tensor& x, bool backward,
                      std::initializer_list<GroupedConvPhase> phases) {
  const cpu::Kernels& kernels = cpu::kernels();
  const Dtype dtype = dtype_of(x);
  const int64_t size = wide_size(x);
  args.shared = scratch<Scratch::shared>(kernels.grouped_conv_shared(args, dtype, backward) * size);
  for (const GroupedConvPhase phase : phases)
    run_tasks(
        kernels.grouped_conv_tasks(args, dtype, phase), kernels.grouped_conv_workspace(args, dtype) * size,
        [&](void* memory, std::atomic<int64_t>& next) { kernels.grouped_conv(args, dtype, phase, memory, next); });
}

std::tuple<Tensor, Tensor> grouped_conv_cpu(const Tensor& given_x, const Tensor& given_weight, OptionalTensor bias,
                                            int64_t groups, bool save) {
  const Tensor x = torch::stable::contiguous(given_x), weight = torch::stable::contiguous(given_weight);
  GroupedConvArgs args = grouped_conv_args(x, weight, groups);
  OptionalTensor constant;
  if (bias) {
    check_tensor("bias", *bias, {weight.size(0)}, x.scalar_type());
    constant = torch::stable::contiguous(*bias);
    args.bias = constant->data_ptr();
  }
  const std::vector<int64_t> shape = {args.batch, args.frames, weight.size(0)};
  Tensor out = torch::stable::new_empty(x, shape);
  Tensor y = torch::stable::new_empty(x, save ? shape : std::vector<int64_t>{0});
  args.out = out.data_ptr();
  args.y = save ? y.data_ptr() : nullptr;
  run_grouped_conv(args, x, false, {GroupedConvPhase::arrange, GroupedConvPhase::convolve});
  return {out, y};
}

// The gradients of x, weight and bias; `wanted` has a bit for each, and one that is not wanted has the shape [0].
std::tuple<Tensor, Tensor, Tensor> grouped_conv_backward_cpu(const Tensor& given_grad, const Tensor& given_y,
                                                             const Tensor& given_x, const Tensor& given_weight,
                                                             int64_t groups, int64_t wanted) {
  const Tensor x = torch::stable::contiguous(given_x), weight = torch::stable::contiguous(given_weight);
  const Tensor grad = torch::stable::contiguous(given_grad), y = torch::stable::contiguous(given_y);
  GroupedConvArgs args = grouped_conv_args(x, weight, groups);
  const std::vector<int64_t> shape = {args.batch, args.frames, weight.size(0)};
  check_tensor("grad", grad, shape, x.scalar_type());
  check_tensor("y", y, shape, x.scalar_type());
  args.grad = grad.data_ptr(), args.y = y.data_ptr();
  Tensor grad_x = gradient_if(wanted >> 0 & 1, x, {args.batch, args.frames, x.size(2)}, args.grad_x);
  Tensor grad_weight = gradient_if(wanted >> 1 & 1, x, {weight.size(0), weight.size(1), args.taps}, args.grad_weight);
  Tensor grad_bias = gradient_if(wanted >> 2 & 1, x, {weight.size(0)}, args.grad_bias);
  run_grouped_conv(args, x, true, {GroupedConvPhase::differentiate, GroupedConvPhase::products});
  return {grad_x, grad_weight, grad_bias};
}

// ------------------------------------------------------------------------------------------------ euler_step
struct EulerStep {
  EulerStepArgs args;
  Dtype x, velocity;
  Tensor after, doubled;
};

EulerStep prepare_euler_step(const Tensor& x, const Tensor& velocity, const Tensor& dt, double rate) {
  STD_TORCH_CHECK(x.dim() == 3, "x must have shape [B, T, C], got ", x.dim(), " dimensions");
  const int64_t batch = x.size(0), frames = x.size(1), channels = x.size(2);
  const std::vector<int64_t> shape = {batch, frames, channels}, doubled_shape = {2 * batch, frames, channels};
  STD_TORCH_CHECK(velocity.dim() == 3 && velocity.size(0) == 2 * batch && velocity.size(1) == frames &&
                      velocity.size(2) == channels,
                  "velocity must have shape ", shape_text(doubled_shape));
  const Dtype of_x = dtype_of(x), of_velocity = dtype_of(velocity);
  const bool same = of_x == of_velocity;
  STD_TORCH_CHECK(same || (of_x == Dtype::float32 && of_velocity != Dtype::float64),
                  "velocity must have the dtype of x, or 16 bits where x is float32");
  STD_TORCH_CHECK(dt.numel() == 1 && dt.scalar_type() == x.scalar_type(), "dt must be one number of the dtype of x");
  STD_TORCH_CHECK(velocity.device() == x.device() && dt.device() == x.device(),
                  "velocity and dt must be on the device of x");
  Tensor after = torch::stable::new_empty(x, same ? std::vector<int64_t>{0} : shape);
  Tensor doubled = torch::stable::new_empty(velocity, doubled_shape);
  const EulerStepArgs args = {batch,
                              frames,
                              channels,
                              x.data_ptr(),
                              {x.stride(0), x.stride(1), x.stride(2)},
                              velocity.data_ptr(),
                              {velocity.stride(0), velocity.stride(1), velocity.stride(2)},
                              dt.data_ptr(),
                              rate,
                              same ? nullptr : after.data_ptr(),
                              doubled.data_ptr()};
  return {args, of_x, of_velocity, after, doubled};
}

std::tuple<Tensor, Tensor> euler_step_cpu(const Tensor& x, const Tensor& velocity, const Tensor& dt, double rate) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  const EulerStep op = prepare_euler_step(x, velocity, dt, rate);
  const auto run = cpu::kernels().euler_step;
  const int64_t grain = max_of(1, kGrain / max_of(1, op.args.channels));
  torch::stable::parallel_for(0, op.args.batch * op.args.frames, grain,
                              [&](int64_t begin, int64_t end) { run(op.args, op.x, op.velocity, begin, end); });
  return {op.after, op.doubled};
}

// ------------------------------------------------------------------------------------------------ dropout
Tensor dropout_cpu(const Tensor& x, double p, const Tensor& seed) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  check_dropout("p", p);
  return drop(torch::stable::contiguous(x), dropout_of(p, seed));
}

#ifdef FASTFLOW_CUDA

// torch's current stream.  The function is looked up when first needed: a module linked to libtorch_cuda would not load
// with a torch without CUDA.
void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "torch has no current stream on CUDA device ", device);
  return stream;
}

template <typename Kernel>
Tensor run_cuda(const Kernel& kernel, const Interpolation& op) {
  const int32_t device = op.result.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  kernel(op.args, op.dtype, current_stream(device));
  return op.result;
}

Tensor interpolate_cuda(const Tensor& x, std::optional<Tensor> rows, std::vector<int64_t> shared, int64_t frames,
                        bool channels_first) {
  STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
  return run_cuda(cuda::interpolate_forward, prepare_forward(x, rows, shared, frames, channels_first));
}

Tensor interpolate_backward_cuda(const Tensor& grad, std::optional<Tensor> rows, std::vector<int64_t> shared,
                                 int64_t in_frames, bool channels_first) {
  STD_TORCH_CHECK(grad.is_cuda(), "grad must be on a CUDA device");
  return run_cuda(cuda::interpolate_backward, prepare_backward(grad, rows, shared, in_frames, channels_first));
}

// The passes of norm, projection and feed_forward.  On a GPU these ops themselves are in Python, where torch's products
// stand between the passes.
void check_on_cuda(const char* name, const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype,
                   const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.device() == like.device(), name, " must be on the CUDA device of the others");
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = x.size(d) == shape[d];
  STD_TORCH_CHECK(fits, name, " must have shape ", shape_text(shape));
}

const void* dense_on_cuda(const char* name, const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype,
                          const Tensor& like) {
  check_on_cuda(name, x, shape, dtype, like);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return x.data_ptr();
}

// [size] or [batch, size].
Vectors vectors_on_cuda(const char* name, const OptionalTensor& x, int64_t batch, int64_t size, const Tensor& like) {
  if (!x) return {};
  const bool per_row = x->dim() == 2;
  check_on_cuda(name, *x, per_row ? std::vector<int64_t>{batch, size} : std::vector<int64_t>{size}, like.scalar_type(),
                like);
  return {x->data_ptr(), per_row ? x->stride(0) : 0, x->stride(per_row ? 1 : 0)};
}

// [B, T, C]
std::vector<int64_t> signal_on_cuda(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 3, name, " must have shape [B, T, C] and be on a CUDA device");
  return {x.size(0), x.size(1), x.size(2)};
}

// Call run(dtype, stream) on the device of x.
template <typename Run>
void on_device_of(const Tensor& x, const Run& run) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  run(dtype_of(x), current_stream(device));
}

std::tuple<Tensor, Tensor> norm_forward_cuda(const Tensor& x, OptionalTensor scale, OptionalTensor shift, double eps) {
  const std::vector<int64_t> shape = signal_on_cuda("x", x);
  const int64_t batch = shape[0], frames = shape[1], channels = shape[2];
  Tensor out = torch::stable::new_empty(x, shape),
         stats = torch::stable::new_empty(x, {2, batch, frames}, wide_type(x));
  const NormForwardArgs args = {batch,
                                frames,
                                signal_of(x),
                                channels,
                                vectors_on_cuda("scale", scale, batch, channels, x),
                                vectors_on_cuda("shift", shift, batch, channels, x),
                                eps,
                                out.data_ptr(),
                                stats.data_ptr()};
  on_device_of(x, [&](Dtype dtype, void* stream) { cuda::norm_forward(args, dtype, stream); });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& stats,
                                                      OptionalTensor scale, OptionalTensor shift,
                                                      OptionalTensor grad_residual) {
  const std::vector<int64_t> shape = signal_on_cuda("x", x);
  const int64_t batch = shape[0], frames = shape[1], channels = shape[2], chunks = ceil_div(frames, kNormChunk);
  const ScalarType dtype = x.scalar_type();
  Tensor grad_x = torch::stable::new_empty(x, shape), normalised = torch::stable::new_empty(x, shape);
  Tensor sums = torch::stable::new_empty(x, {batch, chunks, 2, channels}, wide_type(x));
  const NormBackwardArgs args = {
      batch,
      frames,
      channels,
      dense_on_cuda("grad", grad, shape, dtype, x),
      dense_on_cuda("x", x, shape, dtype, x),
      dense_on_cuda("stats", stats, {2, batch, frames}, wide_type(x), x),
      vectors_on_cuda("scale", scale, batch, channels, x),
      vectors_on_cuda("shift", shift, batch, channels, x),
      grad_residual ? dense_on_cuda("grad_residual", *grad_residual, shape, dtype, x) : nullptr,
      grad_x.data_ptr(),
      normalised.data_ptr(),
      sums.data_ptr()};
  on_device_of(x, [&](Dtype dtype, void* stream) { cuda::norm_backward(args, dtype, stream); });
  return {grad_x, normalised, sums};
}

Tensor gated_residual_cuda(const Tensor& y, const Tensor& residual, OptionalTensor gate) {
  const std::vector<int64_t> shape = signal_on_cuda("y", y);
  check_on_cuda("residual", residual, shape, y.scalar_type(), y);
  Tensor out = torch::stable::new_empty(y, shape);
  const GatedResidualArgs args = {shape[0],
                                  shape[1],
                                  shape[2],
                                  dense_on_cuda("y", y, shape, y.scalar_type(), y),
                                  signal_of(residual),
                                  vectors_on_cuda("gate", gate, shape[0], shape[2], y),
                                  out.data_ptr()};
  on_device_of(y, [&](Dtype dtype, void* stream) { cuda::gated_residual(args, dtype, stream); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward_cuda(const Tensor& products, const Tensor& sums, const Tensor& weight,
                                                      OptionalTensor bias, const Tensor& gate) {
  const std::vector<int64_t> shape = signal_on_cuda("products", products);
  const int64_t batch = shape[0], rows = shape[1], channels = shape[2];
  const ScalarType dtype = products.scalar_type();
  Tensor grad_weight = torch::stable::new_empty(products, {rows, channels});
  Tensor grad_bias = torch::stable::new_empty(products, {rows});
  Tensor grad_gate = torch::stable::new_empty(products, {batch, rows});
  check_on_cuda("gate", gate, {batch, rows}, dtype, products);
  const GateBackwardArgs args = {batch,
                                 rows,
                                 channels,
                                 dense_on_cuda("products", products, shape, dtype, products),
                                 dense_on_cuda("sums", sums, {batch, rows}, wide_type(products), products),
                                 dense_on_cuda("weight", weight, {rows, channels}, dtype, products),
                                 bias ? dense_on_cuda("bias", *bias, {rows}, dtype, products) : nullptr,
                                 vectors_on_cuda("gate", gate, batch, rows, products),
                                 grad_weight.data_ptr(),
                                 grad_bias.data_ptr(),
                                 grad_gate.data_ptr()};
  on_device_of(products, [&](Dtype dtype, void* stream) { cuda::gate_backward(args, dtype, stream); });
  return {grad_weight, grad_bias, grad_gate};
}

Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 1 && number <= 3, "activation must be 1, 2 or 3, got ", number);
  return static_cast<Activation>(number);
}

Tensor activation_forward_cuda(const Tensor& hidden, int64_t activation) {
  const std::vector<int64_t> shape = signal_on_cuda("hidden", hidden);
  const void* x = dense_on_cuda("hidden", hidden, shape, hidden.scalar_type(), hidden);
  Tensor out = torch::stable::new_empty(hidden, shape);
  on_device_of(hidden, [&](Dtype dtype, void* stream) {
    cuda::activation_forward(x, out.data_ptr(), activation_of(activation), hidden.numel(), dtype, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> activation_backward_cuda(const Tensor& grad, const Tensor& hidden, int64_t activation) {
  const std::vector<int64_t> shape = signal_on_cuda("hidden", hidden);
  Tensor activated = torch::stable::new_empty(hidden, shape), grad_hidden = torch::stable::new_empty(hidden, shape);
  const ActivationBackwardArgs args = {activation_of(activation),
                                       dense_on_cuda("grad", grad, shape, hidden.scalar_type(), hidden),
                                       dense_on_cuda("hidden", hidden, shape, hidden.scalar_type(), hidden),
                                       activated.data_ptr(), grad_hidden.data_ptr()};
  on_device_of(hidden,
               [&](Dtype dtype, void* stream) { cuda::activation_backward(args, hidden.numel(), dtype, stream); });
  return {activated, grad_hidden};
}

const int64_t* lengths_on_cuda(const OptionalTensor& lengths, const Tensor& x) {
  if (!lengths) return nullptr;
  check_on_cuda("lengths", *lengths, {x.size(0)}, ScalarType::Long, x);
  STD_TORCH_CHECK(lengths->is_contiguous(), "lengths must be contiguous");
  return static_cast<const int64_t*>(lengths->data_ptr());
}

Tensor conv_block_pad_cuda(const Tensor& x, OptionalTensor lengths, int64_t before, int64_t after) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 3, "x must have shape [B, T, C] and be on a CUDA device");
  STD_TORCH_CHECK(before >= 0 && after >= 0, "before and after must be >= 0, got ", before, " and ", after);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), before + x.size(1) + after, x.size(2)});
  ConvBlockArgs args{};
  args.batch = x.size(0), args.frames = x.size(1), args.channels = x.size(2);
  args.x = sequence_of(x), args.lengths = lengths_on_cuda(lengths, x), args.out = out.data_ptr();
  cuda::conv_block_pad(args, before, after, dtype_of(x), current_stream(x.get_device_index()));
  return out;
}

// y is the convolution's output.
ConvBlock conv_block_passes(const Tensor& y, const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias,
                            const OptionalTensor& lengths, const ConvRule& rule) {
  STD_TORCH_CHECK(y.is_cuda() && y.dim() == 3 && y.is_contiguous(),
                  "y must be contiguous, have shape [B, T, C'] and be on a CUDA device");
  ConvBlockArgs args{};
  args.batch = y.size(0), args.frames = y.size(1), args.width = y.size(2);
  check_on_cuda("bias", bias, {args.width}, y.scalar_type(), y);
  check_on_cuda("norm_weight", norm_weight, {args.width}, y.scalar_type(), y);
  check_on_cuda("norm_bias", norm_bias, {args.width}, y.scalar_type(), y);
  STD_TORCH_CHECK(rule.groups >= 0 && (rule.groups == 0 || args.width % rule.groups == 0),
                  "groups must be 0 or divide ", args.width, ", got ", rule.groups);
  args.groups = rule.groups, args.causal = rule.causal, args.exact = rule.exact, args.eps = rule.eps;
  args.lengths = lengths_on_cuda(lengths, y);
  args.y = y.data_ptr();
  ConvBlock op = {args, y, torch::stable::contiguous(bias), torch::stable::contiguous(norm_weight),
                  torch::stable::contiguous(norm_bias)};
  op.args.bias = op.bias.data_ptr();
  op.args.norm_weight = op.norm_weight.data_ptr(), op.args.norm_bias = op.norm_bias.data_ptr();
  return op;
}

std::vector<int64_t> statistics_shape(const ConvBlockArgs& args) {
  return {args.batch, args.groups ? args.groups : args.frames};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_normalise_cuda(const Tensor& y, const Tensor& bias,
                                                             const Tensor& norm_weight, const Tensor& norm_bias,
                                                             OptionalTensor lengths, OptionalTensor time_bias,
                                                             int64_t groups, bool causal, bool exact, double eps) {
  auto [args, conv, b, scale, shift] =
      conv_block_passes(y, bias, norm_weight, norm_bias, lengths, {groups, causal, exact, eps});
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  OptionalTensor time;
  if (time_bias) {
    check_on_cuda("time_bias", *time_bias, {args.batch, args.width}, y.scalar_type(), y);
    time = torch::stable::contiguous(*time_bias);
    args.time_bias = time->data_ptr();
  }
  const int64_t chunks = groups ? cuda::conv_block_chunks(args) : 0;
  Tensor out = torch::stable::new_empty(y, {args.batch, args.frames, args.width});
  Tensor mean = torch::stable::new_empty(y, statistics_shape(args), wide_type(y));
  Tensor rstd = torch::stable::new_empty(y, statistics_shape(args), wide_type(y));
  Tensor moments = torch::stable::new_empty(y, {args.batch, chunks, 2, args.width}, wide_type(y));
  args.out = out.data_ptr(), args.mean = mean.data_ptr(), args.rstd = rstd.data_ptr();
  ConvBlockPasses passes{};
  passes.moments = moments.data_ptr();
  cuda::conv_block_normalise(args, passes, dtype_of(y), current_stream(y.get_device_index()));
  return {out, mean, rstd};
}

// dy with `before` frames of zeros before each row and `after` behind it, and the gradients of bias, norm_weight,
// norm_bias and time_bias; `wanted` has a bit for each of these four, and one that is not wanted has the shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_normalise_backward_cuda(
    const Tensor& grad, const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& bias,
    const Tensor& norm_weight, const Tensor& norm_bias, OptionalTensor lengths, int64_t groups, bool causal, bool exact,
    int64_t before, int64_t after, int64_t wanted) {
  auto [args, conv, b, scale, shift] =
      conv_block_passes(y, bias, norm_weight, norm_bias, lengths, {groups, causal, exact, 0});
  check_on_cuda("grad", grad, {args.batch, args.frames, args.width}, y.scalar_type(), y);
  check_on_cuda("mean", mean, statistics_shape(args), wide_type(y), y);
  check_on_cuda("rstd", rstd, statistics_shape(args), wide_type(y), y);
  STD_TORCH_CHECK(mean.is_contiguous() && rstd.is_contiguous(), "mean and rstd must be contiguous");
  STD_TORCH_CHECK(before >= 0 && after >= 0, "before and after must be >= 0, got ", before, " and ", after);
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  args.grad = sequence_of(grad);
  args.mean = mean.data_ptr(), args.rstd = rstd.data_ptr();
  Tensor grad_bias = gradient_if(wanted >> 0 & 1, y, {args.width}, args.grad_bias);
  Tensor grad_norm_weight = gradient_if(wanted >> 1 & 1, y, {args.width}, args.grad_norm_weight);
  Tensor grad_norm_bias = gradient_if(wanted >> 2 & 1, y, {args.width}, args.grad_norm_bias);
  Tensor grad_time_bias = gradient_if(wanted >> 3 & 1, y, {args.batch, args.width}, args.grad_time_bias);
  Tensor dy = torch::stable::new_empty(y, {args.batch, before + args.frames + after, args.width});
  Tensor sums = torch::stable::new_empty(y, {4, args.batch, cuda::conv_block_chunks(args), args.width}, wide_type(y));
  Tensor means = torch::stable::new_empty(y, {args.batch, groups ? groups : args.frames, 2}, wide_type(y));
  const ConvBlockPasses passes = {nullptr, sums.data_ptr(), means.data_ptr(), dy.data_ptr(), before, after};
  cuda::conv_block_differentiate(args, passes, dtype_of(y), current_stream(y.get_device_index()));
  return {dy, grad_bias, grad_norm_weight, grad_norm_bias, grad_time_bias};
}

std::tuple<Tensor, Tensor> euler_step_cuda(const Tensor& x, const Tensor& velocity, const Tensor& dt, double rate) {
  STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
  const EulerStep op = prepare_euler_step(x, velocity, dt, rate);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda::euler_step(op.args, op.x, op.velocity, current_stream(device));
  return {op.after, op.doubled};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastflow, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cpu));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward_cpu));
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
  m.impl("relative_attention", TORCH_BOX(&relative_attention_cpu));
  m.impl("relative_attention_backward", TORCH_BOX(&relative_attention_backward_cpu));
  m.impl("self_attention", TORCH_BOX(&self_attention_cpu));
  m.impl("self_attention_backward", TORCH_BOX(&self_attention_backward_cpu));
  m.impl("pack_weights", TORCH_BOX(&pack_weights_cpu));
  m.impl("projection", TORCH_BOX(&projection_cpu));
  m.impl("feed_forward", TORCH_BOX(&feed_forward_cpu));
  m.impl("transformer_block", TORCH_BOX(&transformer_block_cpu));
  m.impl("transformer_block_backward", TORCH_BOX(&transformer_block_backward_cpu));
  m.impl("projection_backward", TORCH_BOX(&projection_backward_cpu));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward_cpu));
  m.impl("conv_block", TORCH_BOX(&conv_block_cpu));
  m.impl("conv_block_backward", TORCH_BOX(&conv_block_backward_cpu));
  m.impl("grouped_conv", TORCH_BOX(&grouped_conv_cpu));
  m.impl("grouped_conv_backward", TORCH_BOX(&grouped_conv_backward_cpu));
  m.impl("euler_step", TORCH_BOX(&euler_step_cpu));
  m.impl("dropout", TORCH_BOX(&dropout_cpu));
}

#ifdef FASTFLOW_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastflow, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cuda));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward_cuda));
  m.impl("norm_forward", TORCH_BOX(&norm_forward_cuda));
  m.impl("norm_backward", TORCH_BOX(&norm_backward_cuda));
  m.impl("gated_residual", TORCH_BOX(&gated_residual_cuda));
  m.impl("gate_backward", TORCH_BOX(&gate_backward_cuda));
  m.impl("activation_forward", TORCH_BOX(&activation_forward_cuda));
  m.impl("activation_backward", TORCH_BOX(&activation_backward_cuda));
  m.impl("conv_block_pad", TORCH_BOX(&conv_block_pad_cuda));
  m.impl("conv_block_normalise", TORCH_BOX(&conv_block_normalise_cuda));
  m.impl("conv_block_normalise_backward", TORCH_BOX(&conv_block_normalise_backward_cuda));
  m.impl("euler_step", TORCH_BOX(&euler_step_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "Compiled ops of fastflow, registered as torch.ops.fastflow, and the facts of their build.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FASTFLOW_VERSION;
        info["git"] = FASTFLOW_GIT;
        info["torch"] = FASTFLOW_TORCH_VERSION;
        info["compiler"] = FASTFLOW_COMPILER;
        info["cuda"] = FASTFLOW_CUDA_VERSION[0] != 0;
        info["nvcc"] = FASTFLOW_CUDA_VERSION;
        info["cuda_archs"] = FASTFLOW_CUDA_ARCHS;
        return info;
      },
      "What this module was built from and for, as a dict.");
  m.def(
      "cpu_capability", [] { return cpu::kernels().capability; },
      "The instruction set that the CPU kernels use: baseline, avx2 or avx512.");
  m.def("cpu_capabilities", &cpu::supported_capabilities, "Those that this CPU runs, the best one last.");
  m.def("set_cpu_capability", &cpu::select_capability, py::arg("name"),
        "Choose the instruction set for the whole process; ValueError if this CPU cannot run it.");
}

}  // namespace fastflow
