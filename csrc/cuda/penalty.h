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

// Where the blocks of a launch count themselves. It must be 0 before the launch, and is again after it; no other launch
// may use it at the same time.
struct Counter {
  unsigned* address = nullptr;  // null: the static one with this index, which a stream has for itself
  int index = 0;
};
constexpr int kStaticCounters = 1024;

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
  Counter counter;
  int multiprocessors;
};

// Several launches, in order on the stream, where the tensors are more than a table holds.
template <Mode mode>
cudaError_t launch_penalty(const PenaltyLaunch& launch, cudaStream_t stream);

// data *= factor, fp32 or fp64 on the device.
cudaError_t launch_scale(void* data, int64_t numel, Dtype dtype, Scalar factor, int multiprocessors,
                         cudaStream_t stream);

}  // namespace ewc
