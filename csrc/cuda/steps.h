// What the binding calls: the launchers of the optimizer steps, without torch headers.
#pragma once

#include "penalty.h"

namespace ewc {

// What all steps have. Pointers are the device's but for `entries`, and for those that are marked so below.
struct StepLaunch {
  const StepEntry* entries;
  int64_t num_tensors;
  const void* anchor;  // null: there is no penalty
  const void* fisher;
  Dtype param_dtype, grad_dtype, state_dtype, anchor_dtype, fisher_dtype;  // of what there is
  Coupling coupling;
  Scalar ewc_lambda, delta, scale, constant, grad_scale, found_inf;
  void* penalty;      // fp64 where the parameters are, else fp32; so is `predicted`
  void* predicted;
  double* by_tensor;  // 2 x num_tensors: penalty, predicted forgetting
  double2* slots;     // scratch, one for each chunk of all tensors
  int64_t chunk;      // elements
  CountersOf counters;
  int multiprocessors;
};

// Entries' data: parameters, gradients, first and second moments, their maxima with amsgrad.
struct AdamWCall {
  AdamWOptions options;
  Scalar lr;                 // instead of the number
  const void* const* steps;  // the host's, to numbers on the device
  const int64_t* ordinals;   // the host's; with a seed
  int64_t seed;              // -1: bf16 is rounded to nearest
  bool fp64_steps;           // else fp32
  bool amsgrad;
};
cudaError_t launch_adamw(const StepLaunch& launch, const AdamWCall& call, cudaStream_t stream);

// Entries' data: parameters, gradients, momentum buffers where there is momentum.
struct SgdCall {
  SgdOptions options;
  Scalar lr;
  bool first;
};
cudaError_t launch_sgd(const StepLaunch& launch, const SgdCall& call, cudaStream_t stream);

// Entries' data: parameters, moments if any.
struct ProximalCall {
  const double* rates;  // four for each tensor
  Metric metric;
};
cudaError_t launch_proximal(const StepLaunch& launch, const ProximalCall& call, cudaStream_t stream);

}  // namespace ewc
