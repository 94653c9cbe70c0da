// The CPU kernels, one table per instruction set.  A kernel works on a part of the whole, so the caller brings the
// threads.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "../attention.h"
#include "../conv_block.h"
#include "../dropout.h"
#include "../euler_step.h"
#include "../grouped_conv.h"
#include "../interpolate.h"
#include "../linear.h"

namespace fastflow::cpu {

#define FASTFLOW_DECLARE_KERNELS(capability)                                                                           \
  namespace capability {                                                                                               \
  void interpolate_forward(const InterpolateArgs& args, Dtype dtype, int64_t first_tile, int64_t last_tile);           \
  void interpolate_backward(const InterpolateArgs& args, Dtype dtype, int64_t first_tile, int64_t last_tile);          \
  int64_t attention_workspace(const AttentionArgs& args, Dtype dtype, bool backward);                                  \
  void attention_forward(const AttentionArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next);         \
  void attention_backward(const AttentionArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next);        \
  void attention_sum(const void* sums, int64_t groups, int64_t count, Dtype dtype, void* result, int64_t begin,        \
                     int64_t end);                                                                                     \
  int64_t pack_panels(int64_t rows, Dtype dtype);                                                                      \
  int64_t pack_elements(int64_t rows, int64_t depth, Dtype dtype);                                                     \
  void pack(const Weights& weights, Dtype dtype, void* packed, int64_t first_panel, int64_t last_panel);               \
  bool is_packed(const Weights& weights, Dtype dtype, const void* packed);                                             \
  int64_t projection_workspace(const LinearArgs& args, Dtype dtype);                                                   \
  void projection_forward(const LinearArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next);           \
  int64_t feed_forward_workspace(const LinearArgs& args, Dtype dtype);                                                 \
  void feed_forward_forward(const LinearArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next);         \
  void norm_backward(const NormBackwardArgs& args, Dtype dtype, void* workspace, int64_t first, int64_t last);         \
  void activation_backward(const ActivationBackwardArgs& args, Dtype dtype, int64_t begin, int64_t end);               \
  void gate_frames(const GatedFramesArgs& args, Dtype dtype, int64_t begin, int64_t end);                              \
  void column_sums(const void* x, const void* y, int64_t rows, int64_t stride, Dtype dtype, void* sums, int64_t begin, \
                   int64_t end);                                                                                       \
  void add_gated_gradient(const GatedGradientArgs& args, Dtype dtype, int64_t begin, int64_t end);                     \
  void thin_forward(const ThinArgs& args, const Weight& weight, int64_t column, Dtype dtype, void* workspace,          \
                    int64_t begin, int64_t end);                                                                       \
  void thin_input_gradient(const ThinArgs& args, Dtype dtype, void* workspace, int64_t begin, int64_t end);            \
  void thin_weight_gradient(const ThinArgs& args, Dtype dtype, int64_t begin, int64_t end);                            \
  int64_t product_workspace(const ProductArgs& args, Dtype dtype);                                                     \
  void product(const ProductArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next);                     \
  int64_t conv_block_shared(const ConvBlockArgs& args, Dtype dtype, bool backward);                                    \
  ConvBlockPlan conv_block_plan(const ConvBlockArgs& args, Dtype dtype, ConvBlockPhase phase);                         \
  void conv_block_run(const ConvBlockArgs& args, Dtype dtype, ConvBlockPhase phase, void* workspace,                   \
                      std::atomic<int64_t>& next);                                                                     \
  int64_t grouped_conv_shared(const GroupedConvArgs& args, Dtype dtype, bool backward);                                \
  int64_t grouped_conv_workspace(const GroupedConvArgs& args, Dtype dtype);                                            \
  int64_t grouped_conv_tasks(const GroupedConvArgs& args, Dtype dtype, GroupedConvPhase phase);                        \
  void grouped_conv(const GroupedConvArgs& args, Dtype dtype, GroupedConvPhase phase, void* workspace,                 \
                    std::atomic<int64_t>& next);                                                                       \
  void euler_step(const EulerStepArgs& args, Dtype x, Dtype velocity, int64_t begin, int64_t end);                     \
  void dropout(const DropoutArgs& args, Dtype dtype, int64_t begin, int64_t end);                                      \
  }
FASTFLOW_DECLARE_KERNELS(baseline)
FASTFLOW_DECLARE_KERNELS(avx2)
FASTFLOW_DECLARE_KERNELS(avx512)
#undef FASTFLOW_DECLARE_KERNELS

struct Kernels {
  const char* capability;
  decltype(&baseline::interpolate_forward) interpolate_forward;
  decltype(&baseline::interpolate_backward) interpolate_backward;
  // Elements (of the type of lse) of the workspace that each thread of the two below needs.
  decltype(&baseline::attention_workspace) attention_workspace;
  // Take task after task, by `next`, until none is left: every thread calls it with a workspace of its own.
  decltype(&baseline::attention_forward) attention_forward;
  decltype(&baseline::attention_backward) attention_backward;
  // result[n] = sum over groups of sums[group * count + n], for n in [begin, end).
  decltype(&baseline::attention_sum) attention_sum;

  // Panels and elements (of the type to compute in) of packed weights, and the packing of some of the panels.
  decltype(&baseline::pack_panels) pack_panels;
  decltype(&baseline::pack_elements) pack_elements;
  decltype(&baseline::pack) pack;
  // Whether memory of that size may hold these weights packed: compares an element and a bias in every two panels.
  decltype(&baseline::is_packed) is_packed;
  // Workspaces and tasks as for attention.
  decltype(&baseline::projection_workspace) projection_workspace;
  decltype(&baseline::projection_forward) projection_forward;
  decltype(&baseline::feed_forward_workspace) feed_forward_workspace;
  decltype(&baseline::feed_forward_forward) feed_forward_forward;
  // Chunks [first, last) of kNormChunk frames of a row, one row after the other; the workspace holds 2 * C elements.
  decltype(&baseline::norm_backward) norm_backward;
  // Groups [begin, end) of kDropoutGroup numbers.
  decltype(&baseline::activation_backward) activation_backward;
  // Frames [begin, end), one row after the other.
  decltype(&baseline::gate_frames) gate_frames;
  // Of columns [begin, end) of x, or of x * y if y is not null; in pairs of halves, so that the error grows with the
  // logarithm of the rows.
  decltype(&baseline::column_sums) column_sums;
  // Output channels [begin, end).
  decltype(&baseline::add_gated_gradient) add_gated_gradient;
  // Rows [begin, end) of a weight whose results begin with `column`; the workspace holds C elements.
  decltype(&baseline::thin_forward) thin_forward;
  // Channels [begin, end); the workspace holds as many elements per frame.
  decltype(&baseline::thin_input_gradient) thin_input_gradient;
  // Rows [begin, end).
  decltype(&baseline::thin_weight_gradient) thin_weight_gradient;
  // Workspace and tasks as for attention.
  decltype(&baseline::product_workspace) product_workspace;
  decltype(&baseline::product) product;
  // Elements, of the type to compute in, of the memory that the threads of all phases share.
  decltype(&baseline::conv_block_shared) conv_block_shared;
  decltype(&baseline::conv_block_plan) conv_block_plan;
  // Takes task after task of a phase, as attention does.
  decltype(&baseline::conv_block_run) conv_block_run;
  // As for conv_block; the workspace is the same in all phases.
  decltype(&baseline::grouped_conv_shared) grouped_conv_shared;
  decltype(&baseline::grouped_conv_workspace) grouped_conv_workspace;
  decltype(&baseline::grouped_conv_tasks) grouped_conv_tasks;
  decltype(&baseline::grouped_conv) grouped_conv;
  // Frames [begin, end), one row after the other.  The dtypes: equal, or float32 and one of 16 bits.
  decltype(&baseline::euler_step) euler_step;
  // Groups [begin, end) of kDropoutGroup numbers.
  decltype(&baseline::dropout) dropout;
};

// The table in force: the best that this CPU runs, unless FASTFLOW_CPU_CAPABILITY or select_capability names another.
const Kernels& kernels();

// Throws std::invalid_argument if the name is unknown or this CPU cannot run it.
void select_capability(const std::string& name);

// The names that this CPU runs, the best one last.
std::vector<std::string> supported_capabilities();

}  // namespace fastflow::cpu
