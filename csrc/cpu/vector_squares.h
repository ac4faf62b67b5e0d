// The squares that a tap takes of vectors, one for each sample: plain C++ that the compiler vectorises. No torch headers.
#pragma once

#include <cstdint>

#include "clones.h"

namespace ewc {
namespace {

template <typename M>
EWC_CLONES void squares(const M* __restrict__ from, M* __restrict__ to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * from[i];
}

// The same, and added to sums.
template <typename M>
EWC_CLONES void squares_and_sums(const M* __restrict__ from, M* __restrict__ to, double* __restrict__ sums, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[i] * from[i];
    sums[i] += static_cast<double>(to[i]);
  }
}

}  // namespace
}  // namespace ewc
