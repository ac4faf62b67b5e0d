// CUDA side of the penalty ops: from tensors to the launchers of penalty.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "penalty.h"
#include "penalty_ops.h"

namespace ewc {
namespace {

Dtype dtype_code(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", dtype);
  }
}

Scalar scalar_of(const at::Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == at::kDouble}; }

Scalar scalar_of(const std::optional<at::Tensor>& t) { return t.has_value() ? scalar_of(*t) : Scalar{}; }

int multiprocessors(at::Device device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()));
  return count;
}

// A stream's launches come one after the other and can share a counter that stays zero between them. A graph may be
// replayed beside anything, and so has one in its own scratch, set to zero by a node of the graph; so do the launches
// of streams beyond the static counters.
Counter counter_for(const c10::cuda::CUDAStream& stream, void* scratch) {
  cudaStreamCaptureStatus capture{};
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  if (capture == cudaStreamCaptureStatusNone) {
    static std::mutex mutex;
    static std::map<std::pair<c10::DeviceIndex, c10::StreamId>, int> indices;
    const std::lock_guard<std::mutex> lock(mutex);
    const int next = static_cast<int>(indices.size());
    const auto key = std::make_pair(stream.device_index(), stream.id());
    const auto known = indices.find(key);
    if (known != indices.end()) return {nullptr, known->second};
    if (next < kStaticCounters) return {nullptr, indices[key] = next};
  }
  C10_CUDA_CHECK(cudaMemsetAsync(scratch, 0, sizeof(unsigned), stream));
  return {static_cast<unsigned*>(scratch), 0};
}

struct Cuda {
  template <Mode mode>
  static void run(const PenaltyCall& call) {
    const at::Device device = call.anchor.device();
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    const auto& entries = call.table.entries;
    int64_t chunks = 0;
    for (const Entry& entry : entries) chunks += chunk_count(entry.numel);
    const at::Tensor scratch = at::empty({2 * chunks + 1}, call.anchor.options().dtype(at::kDouble));
    double* slots = scratch.mutable_data_ptr<double>();
    const auto& [penalty, predicted, by_tensor] = call.result;

    PenaltyLaunch launch{};
    launch.entries = entries.data();
    launch.num_tensors = static_cast<int64_t>(entries.size());
    launch.anchor = call.anchor.const_data_ptr();
    launch.fisher = call.fisher.const_data_ptr();
    launch.param_dtype = dtype_code(call.param);
    launch.grad_dtype = dtype_code(call.grad);
    launch.anchor_dtype = dtype_code(call.anchor.scalar_type());
    launch.fisher_dtype = dtype_code(call.fisher.scalar_type());
    launch.ewc_lambda = scalar_of(call.ewc_lambda);
    launch.delta = scalar_of(call.delta);
    launch.scale = scalar_of(call.scale);
    launch.constant = scalar_of(call.constant);
    launch.grad_scale = scalar_of(call.grad_scale);
    launch.found_inf = scalar_of(call.found_inf);
    launch.maximize = call.maximize;
    launch.penalty = penalty.mutable_data_ptr();
    launch.predicted = predicted.mutable_data_ptr();
    launch.by_tensor = by_tensor.mutable_data_ptr<double>();
    launch.slots = reinterpret_cast<double2*>(slots);
    launch.counter = counter_for(stream, slots + 2 * chunks);
    launch.multiprocessors = multiprocessors(device);
    C10_CUDA_CHECK(launch_penalty<mode>(launch, stream));
  }
};

// Whether the factor is 1 only the device knows: the version moves in any case.
void scale_(at::Tensor buffer, const at::Tensor& factor) {
  check_scale(buffer, factor);
  const at::Device device = buffer.device();
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch_scale(buffer.mutable_data_ptr(), buffer.numel(), dtype_code(buffer.scalar_type()),
                              scalar_of(factor), multiprocessors(device),
                              c10::cuda::getCurrentCUDAStream(device.index())));
  bump_version(buffer);
}

}  // namespace
}  // namespace ewc

TORCH_LIBRARY_IMPL(ewc_fast, CUDA, m) {
  m.impl("penalty", ewc::PenaltyOps<ewc::Cuda>::penalty);
  m.impl("penalty_grad", ewc::PenaltyOps<ewc::Cuda>::penalty_grad);
  m.impl("penalty_accumulate_", ewc::PenaltyOps<ewc::Cuda>::penalty_accumulate_);
  m.impl("scale_", ewc::scale_);
}
