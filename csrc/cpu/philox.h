// What survives dropout: Philox4x32 (Salmon et al., SC 2011) with 7 rounds, as defined in fastflow/ops/dropout.py.
#pragma once

#include "../dropout.h"

namespace fastflow {
namespace {  // one copy per translation unit, see common.h

constexpr int kPhiloxRounds = 7;

// factors[n] for numbers [first, first + count) of row i of a matrix: 0 if dropped, dropout.scale if not.  `first` must
// be a multiple of 4; up to 3 factors past the end are written.  Plain loops, for the compiler to vectorise.
template <int64_t most, typename Real>
void dropout_factors(const Dropout& dropout, int64_t matrix, int64_t i, int64_t first, int64_t count,
                     Real* __restrict factors) {
  constexpr int64_t counters = most / 4;
  uint32_t c0[counters], c1[counters], c2[counters], c3[counters];
  for (int64_t n = 0; n < counters; ++n) {
    c0[n] = static_cast<uint32_t>(first / 4 + n);
    c1[n] = static_cast<uint32_t>(i);
    c2[n] = static_cast<uint32_t>(matrix);
    c3[n] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int64_t n = 0; n < counters; ++n) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0[n], product2 = uint64_t{0xCD9E8D57} * c2[n];
      c0[n] = static_cast<uint32_t>(product2 >> 32) ^ c1[n] ^ k0;
      c1[n] = static_cast<uint32_t>(product2);
      c2[n] = static_cast<uint32_t>(product0 >> 32) ^ c3[n] ^ k1;
      c3[n] = static_cast<uint32_t>(product0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint32_t threshold = dropout.threshold;
  const Real kept = static_cast<Real>(dropout.scale);
  for (int64_t n = 0; n < ceil_div(count, 4); ++n) {
    factors[4 * n] = c0[n] >= threshold ? kept : 0;
    factors[4 * n + 1] = c1[n] >= threshold ? kept : 0;
    factors[4 * n + 2] = c2[n] >= threshold ? kept : 0;
    factors[4 * n + 3] = c3[n] >= threshold ? kept : 0;
  }
}

}  // namespace
}  // namespace fastflow
