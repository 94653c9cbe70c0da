// Which instruction set runs.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace fastflow::cpu {
namespace {

#define FASTFLOW_TABLE(capability)      \
  {#capability,                         \
   &capability::interpolate_forward,    \
   &capability::interpolate_backward,   \
   &capability::attention_workspace,    \
   &capability::attention_forward,      \
   &capability::attention_backward,     \
   &capability::attention_sum,          \
   &capability::pack_panels,            \
   &capability::pack_elements,          \
   &capability::pack,                   \
   &capability::is_packed,              \
   &capability::projection_workspace,   \
   &capability::projection_forward,     \
   &capability::feed_forward_workspace, \
   &capability::feed_forward_forward,   \
   &capability::norm_backward,          \
   &capability::activation_backward,    \
   &capability::gate_frames,            \
   &capability::column_sums,            \
   &capability::add_gated_gradient,     \
   &capability::thin_forward,           \
   &capability::thin_input_gradient,    \
   &capability::thin_weight_gradient,   \
   &capability::product_workspace,      \
   &capability::product,                \
   &capability::conv_block_shared,      \
   &capability::conv_block_plan,        \
   &capability::conv_block_run,         \
   &capability::grouped_conv_shared,    \
   &capability::grouped_conv_workspace, \
   &capability::grouped_conv_tasks,     \
   &capability::grouped_conv,           \
   &capability::euler_step,             \
   &capability::dropout}

const std::vector<Kernels>& supported_tables() {
  static const std::vector<Kernels> tables = [] {
    std::vector<Kernels> found = {FASTFLOW_TABLE(baseline)};
#ifdef FASTFLOW_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back(FASTFLOW_TABLE(avx2));
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(FASTFLOW_TABLE(avx512));
    }
#endif
    return found;
  }();
  return tables;
}

#undef FASTFLOW_TABLE

const Kernels& find_table(const std::string& name, const std::string& source) {
  std::string names;
  for (const Kernels& table : supported_tables()) {
    if (name == table.capability) return table;
    names += (names.empty() ? "" : ", ") + std::string(table.capability);
  }
  const bool known = name == "avx2" || name == "avx512";
  throw std::invalid_argument(source + " must be one of " + names + " on this CPU; got '" + name + "'" +
                              (known ? ", which this CPU cannot run" : ""));
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_acquire);
  if (!table) {  // two threads may both get here; they find the same table
    const char* name = std::getenv("FASTFLOW_CPU_CAPABILITY");
    table = name && *name ? &find_table(name, "FASTFLOW_CPU_CAPABILITY") : &supported_tables().back();
    selected.store(table, std::memory_order_release);
  }
  return *table;
}

void select_capability(const std::string& name) { selected = &find_table(name, "capability"); }

std::vector<std::string> supported_capabilities() {
  std::vector<std::string> names;
  for (const Kernels& table : supported_tables()) names.push_back(table.capability);
  return names;
}

}  // namespace fastflow::cpu
