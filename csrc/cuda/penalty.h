// What the binding calls: the penalty's launchers, without torch headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "chunks.h"

namespace ewc {

enum class Dtype : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// One number, or one per tensor, that lives on the device and is read there.
struct Scalar {
  const void* data = nullptr;  // null: absent
  bool fp64 = false;           // else fp32
};

// What the blocks of a launch share. All are 0 before the launch and again after it; no launch that may run at the same
// time uses the same: see CounterPool.
struct Counters {
  unsigned taken;     // chunks, beyond each block's first
  unsigned finished;  // blocks
};
struct CountersOf {
  Counters* address = nullptr;  // null: the static ones with this index
  int index = 0;
};
constexpr int kStreamCounters = 1024, kCaptureCounters = 16384;  // of the static ones, 8 bytes each

// Elements of a chunk, a power of two. It depends on nothing but the number of elements, so that sums are the same on
// every device. Below are the two ends that it lies between, and their arithmetic on an H100 (132 multiprocessors with 3
// blocks each, 3.35 TB/s, a latency of 0.7 us, 20 bytes per element).
//
//   The end of the pass. While more than 1.2 blocks per multiprocessor have work the memory is busy (40 KB of 32 KB
//   each); after that what is left is at most one chunk in a block, at a latency for every 2,048 elements: 11 us for
//   32,768 elements. A pass over 48M parameters takes 290 us, so that this would be up to 4% of it; with 8,192 it is 1%.
//   The last block. It reads 16 bytes of sums for each chunk, 32 KB at a time: 16 us for 1B parameters in chunks of
//   8,192, 4 us (0.1%) in chunks of 32,768.
//   The shortest chunk is two turns of a block: with less, the sums at its end would take as long as its loads.
constexpr int64_t kShortestChunk = 4096, kChunksAimedAt = 8192;
static_assert(kShortestChunk <= kChunk, "kChunk is the longest");

inline int64_t chunk_elements(int64_t numel, int64_t shortest = kShortestChunk) {
  int64_t chunk = shortest;
  while (chunk < kChunk && chunk * kChunksAimedAt < numel) chunk *= 2;
  return chunk;
}

inline int64_t chunk_count(int64_t numel, int64_t chunk) { return (numel + chunk - 1) / chunk; }

// All pointers but `entries` are the device's.
struct PenaltyLaunch {
  const Entry* entries;
  int64_t num_tensors;
  const void* anchor;
  const void* fisher;
  Dtype param_dtype, grad_dtype, anchor_dtype, fisher_dtype;
  Scalar ewc_lambda, delta, scale, constant, grad_scale, found_inf;
  bool maximize;
  void* penalty;      // fp64 where the parameters are, else fp32; so is `predicted`
  void* predicted;
  double* by_tensor;  // 2 x num_tensors: penalty, predicted forgetting
  double2* slots;     // scratch, one for each chunk of all tensors
  int64_t chunk;      // elements
  CountersOf counters;
  int multiprocessors;
};

// Several launches, in order on the stream, where the tensors are more than a table holds.
template <Mode mode>
cudaError_t launch_penalty(const PenaltyLaunch& launch, cudaStream_t stream);

// data *= factor, fp32 or fp64 on the device.
cudaError_t launch_scale(void* data, int64_t numel, Dtype dtype, Scalar factor, int multiprocessors,
                         cudaStream_t stream);

}  // namespace ewc
