// What the binding calls: the launcher of fisher_accumulate_, without torch headers.
#pragma once

#include "penalty.h"

namespace ewc {

// A block of samples is work for the whole device, and its Fisher may be one matrix: chunks down to a turn of a block.
inline int64_t fisher_chunk_elements(int64_t numel) { return chunk_elements(numel, kBlock); }

// All pointers but `entries` are the device's; there is an entry at least, and none is empty.
struct FisherLaunch {
  const FisherEntry* entries;
  int64_t num_tensors;
  Dtype fisher_dtype, grad_dtype;  // the Fisher's is fp32 or fp64
  double weight;
  int64_t chunk;  // elements of the Fisher
  int multiprocessors;
};

// Several launches, in order on the stream, where the tensors are more than a table holds.
cudaError_t launch_fisher(const FisherLaunch& launch, cudaStream_t stream);

}  // namespace ewc
