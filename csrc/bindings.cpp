// The extension module fastflow._C: argument checks and the registration of every op with torch's stable ABI, and for
// Python the facts of the build and the control of CPU capabilities.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "build_info.h"
#include "cpu/kernels.h"
#include "interpolate.h"

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
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
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

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastflow, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cpu));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward_cpu));
}

#ifdef FASTFLOW_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastflow, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cuda));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward_cuda));
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
