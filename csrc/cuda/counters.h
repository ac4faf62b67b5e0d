// Which counters a launch uses. No torch headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "penalty.h"

namespace ewc {

// Gives every launch counters that are 0 before it and that no launch beside it uses, without a memset of its own.
//
// A stream's launches come one after the other, so that they share one set for good: each leaves it at 0. A captured
// launch may be replayed beside anything, also beside another launch that was captured on its stream, and so gets a set
// that is never given out again; replays of its graph come one after the other, for an executable graph never runs
// beside itself. Copies of a graph, instantiated a second time, would share more than counters: results and gradients.
//
// Streams and captures beyond the static sets take theirs in their scratch memory and pay for a memset.
class CounterPool {
 public:
  // `scratch`: sizeof(Counters) bytes that belong to this launch alone, on the stream's device.
  cudaError_t take(int device, int64_t stream_id, cudaStream_t stream, void* scratch, CountersOf* counters) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(stream, &capture);
    if (error != cudaSuccess) return error;
    const int index = capture == cudaStreamCaptureStatusNone ? of_stream(device, stream_id) : of_capture();
    *counters = {index < 0 ? static_cast<Counters*>(scratch) : nullptr, index};
    return index < 0 ? cudaMemsetAsync(scratch, 0, sizeof(Counters), stream) : cudaSuccess;
  }

 private:
  int of_stream(int device, int64_t stream_id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = streams_.try_emplace({device, stream_id}, static_cast<int>(streams_.size())).first;
    return known->second < kStreamCounters ? known->second : -1;
  }

  int of_capture() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return captured_ < kCaptureCounters ? kStreamCounters + captured_++ : -1;
  }

  std::mutex mutex_;
  std::map<std::pair<int, int64_t>, int> streams_;
  int captured_ = 0;
};

}  // namespace ewc
