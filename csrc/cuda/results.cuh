// What kernels share that sum F d^2 and d^2: their counters, and results from the sums of chunks.
#pragma once

#include "multi_tensor.cuh"

namespace ewc {
namespace {

// Zero from the start. Each .cu has its own.
__device__ Counters static_counters[kStreamCounters + kCaptureCounters];

EWC_DEVICE Counters& counters_of(const CountersOf& of) {
  return of.address != nullptr ? *of.address : static_counters[of.index];
}

// Requested at once by a lane: one after the other, the slots of a large tensor would cost a memory latency each. A
// warp has 4 KB on the way, so that the 8,000 slots of the largest embeddings (260M parameters) take 32 latencies.
constexpr int kSlotsInFlight = 8;

// Rows of by_tensor from the slots, a warp for each tensor; after the last launch the totals. All in fixed order.
template <typename M, typename Arguments>
EWC_DEVICE void finish(const Arguments& arguments) {
  const auto& launch = arguments.launch;
  const auto& table = arguments.table;
  const double ewc_lambda = read(launch.ewc_lambda, 0, 0.0), delta = read(launch.delta, 0, 0.0);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double* values = launch.by_tensor;
  double* forgetting = launch.by_tensor + launch.num_tensors;
#pragma unroll 1
  for (int t = warp; t < table.size; t += kWarps) {
    const uint32_t begin = table.first[t], end = t + 1 < table.size ? table.first[t + 1] : table.chunks;
    const int64_t row = arguments.first_row + t;
    const double constant = read(launch.constant, row, 0.0), scale = read(launch.scale, row, 1.0);
    double2 mine = make_double2(0, 0);
#pragma unroll 1
    for (uint32_t slot = begin + lane; slot < end; slot += kSlotsInFlight * kWarp) {
      double2 parts[kSlotsInFlight];
#pragma unroll
      for (int k = 0; k < kSlotsInFlight; ++k) {
        parts[k] = make_double2(0, 0);
        if (slot + k * kWarp < end) parts[k] = __ldcg(&launch.slots[slot + k * kWarp]);
      }
#pragma unroll
      for (int k = 0; k < kSlotsInFlight; ++k) mine = sum(mine, parts[k]);
    }
    mine = warp_sum(mine);
    if (lane == 0) {
      values[row] = penalty_value(ewc_lambda, delta, scale, mine.x, constant, mine.y);
      forgetting[row] = predicted_forgetting(mine.x, constant);
    }
  }
  if (!arguments.last) return;
  __syncthreads();  // other warps' rows
  double2 mine = make_double2(0, 0);
  for (int64_t row = threadIdx.x; row < launch.num_tensors; row += kThreads) {
    mine = sum(mine, make_double2(values[row], forgetting[row]));
  }
  mine = block_sum(mine);
  if (threadIdx.x == 0) {
    *static_cast<M*>(launch.penalty) = static_cast<M>(mine.x);
    *static_cast<M*>(launch.predicted) = static_cast<M>(mine.y);
  }
}

}  // namespace
}  // namespace ewc
