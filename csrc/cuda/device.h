// What the bindings of CUDA kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "counters.h"
#include "penalty.h"

namespace ewc {

inline Dtype dtype_code(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", dtype);
  }
}

inline int multiprocessors(at::Device device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()));
  return count;
}

inline Scalar scalar_of(const at::Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == at::kDouble}; }

inline Scalar scalar_of(const std::optional<at::Tensor>& t) { return t.has_value() ? scalar_of(*t) : Scalar{}; }

// Of a launch whose kernel sums F d^2 and d^2: its tensors, their chunks, results, counters. Returns the scratch memory,
// to be kept until the launch.
template <typename Launch, typename Entry>
at::Tensor set_up(Launch& launch, const std::vector<Entry>& entries, const Result& result, CounterPool& pool,
                  const c10::cuda::CUDAStream& stream) {
  const auto& [penalty, predicted, by_tensor] = result;
  int64_t numel = 0, chunks = 0;
  for (const Entry& entry : entries) numel += entry.numel;
  launch.chunk = chunk_elements(numel);
  for (const Entry& entry : entries) chunks += chunk_count(entry.numel, launch.chunk);
  static_assert(sizeof(Counters) == sizeof(double), "the counters' place in the scratch");
  const at::Tensor scratch = at::empty({2 * chunks + 1}, by_tensor.options());
  double* slots = scratch.mutable_data_ptr<double>();
  launch.entries = entries.data();
  launch.num_tensors = static_cast<int64_t>(entries.size());
  launch.penalty = penalty.mutable_data_ptr();
  launch.predicted = predicted.mutable_data_ptr();
  launch.by_tensor = by_tensor.mutable_data_ptr<double>();
  launch.slots = reinterpret_cast<double2*>(slots);
  C10_CUDA_CHECK(pool.take(stream.device_index(), stream.id(), stream, slots + 2 * chunks, &launch.counters));
  launch.multiprocessors = multiprocessors(stream.device());
  return scratch;
}

}  // namespace ewc
