// CUDA side of the penalty ops: from tensors to the launchers of penalty.h.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "device.h"
#include "penalty.h"
#include "penalty_ops.h"

namespace ewc {
namespace {

CounterPool& counter_pool() {
  static CounterPool pool;
  return pool;
}

struct Cuda {
  template <Mode mode>
  static void run(const PenaltyCall& call) {
    const at::Device device = call.anchor.device();
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    PenaltyLaunch launch{};
    const at::Tensor scratch = set_up(launch, call.table.entries, call.result, counter_pool(), stream);
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
