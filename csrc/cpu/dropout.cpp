// dropout on the CPU.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its namespace.
#include "dtypes.h"
#include "kernels.h"
#include "philox.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kNumbers = 256;  // at a time

template <typename T>
void drop(const DropoutArgs& args, int64_t begin, int64_t end) {
  Wide<T> factors[kNumbers];
  for (int64_t first = begin; first < end; first += kNumbers) {
    const int64_t count = min_of(kNumbers, end - first);
    dropout_factors<kNumbers>(args.dropout, 0, 0, first, count, factors);
    const T* x = static_cast<const T*>(args.x) + first;
    T* out = static_cast<T*>(args.out) + first;
    for (int64_t i = 0; i < count; ++i) narrow(widen(x[i]) * factors[i], out[i]);
  }
}

}  // namespace

void dropout(const DropoutArgs& args, Dtype dtype, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto zero) {
    drop<decltype(zero)>(args, begin * kDropoutGroup, min_of(end * kDropoutGroup, args.count));
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
