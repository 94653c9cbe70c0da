// dropout: arguments, also for that inside attention.  What is kept is defined in fastflow/ops/dropout.py.
#pragma once

#include "common.h"

namespace fastflow {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // random words below it drop
  double scale;        // of what is kept
};

constexpr int64_t kDropoutGroup = 1024;  // numbers of a task

struct DropoutArgs {
  Dropout dropout;
  int64_t count;  // of numbers
  const void* x;  // contiguous, as out
  void* out;
};

}  // namespace fastflow
