// The CPU kernels, one table per instruction set.  A kernel works on a range of tiles, so the caller brings the
// threads.
#pragma once

#include <string>
#include <vector>

#include "../interpolate.h"

namespace fastflow::cpu {

#define FASTFLOW_DECLARE_KERNELS(capability)                                                                  \
  namespace capability {                                                                                      \
  void interpolate_forward(const InterpolateArgs& args, Dtype dtype, int64_t first_tile, int64_t last_tile);  \
  void interpolate_backward(const InterpolateArgs& args, Dtype dtype, int64_t first_tile, int64_t last_tile); \
  }
FASTFLOW_DECLARE_KERNELS(baseline)
FASTFLOW_DECLARE_KERNELS(avx2)
FASTFLOW_DECLARE_KERNELS(avx512)
#undef FASTFLOW_DECLARE_KERNELS

struct Kernels {
  const char* capability;
  decltype(&baseline::interpolate_forward) interpolate_forward;
  decltype(&baseline::interpolate_backward) interpolate_backward;
};

// The table in force: the best that this CPU runs, unless FASTFLOW_CPU_CAPABILITY or select_capability names another.
const Kernels& kernels();

// Throws std::invalid_argument if the name is unknown or this CPU cannot run it.
void select_capability(const std::string& name);

// The names that this CPU runs, the best one last.
std::vector<std::string> supported_capabilities();

}  // namespace fastflow::cpu
