// What every kernel shares: no torch header, so kernels build and can be tested without torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTFLOW_HD __host__ __device__
#else
#define FASTFLOW_HD
#endif

// Functions in the headers shared by several translation units are `static inline`: a CPU kernel is compiled once per
// instruction set, and a function with external linkage would be merged into one copy, compiled for any of them.

namespace fastflow {

enum class Dtype { float32, float64, float16, bfloat16 };

FASTFLOW_HD static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTFLOW_HD static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTFLOW_HD static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A multiplication and an addition rounded once, on any hardware.
#ifdef __CUDA_ARCH__
FASTFLOW_HD static inline float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTFLOW_HD static inline double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
FASTFLOW_HD static inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTFLOW_HD static inline double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

}  // namespace fastflow
