// CUDA side of the optimizer ops: from tensors to the launchers of steps.h.
#include "optimizer_ops.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "device.h"
#include "steps.h"

namespace ewc {
namespace {

CounterPool& counter_pool() {
  static CounterPool pool;
  return pool;
}

struct Cuda {
  static void adamw(const StepCall& call, at::TensorList steps, const AdamWOptions& options) {
    std::vector<at::Tensor> copies;  // of another dtype than the first has
    std::vector<const void*> pointers;
    pointers.reserve(steps.size());
    for (const at::Tensor& step : steps) {
      if (step.scalar_type() != steps[0].scalar_type()) copies.push_back(step.to(steps[0].scalar_type()));
      pointers.push_back((step.scalar_type() != steps[0].scalar_type() ? copies.back() : step).const_data_ptr());
    }
    AdamWCall own{};
    own.options = options;
    own.lr = scalar_of(call.lr);
    own.steps = pointers.data();
    own.ordinals = call.ordinals.data();
    own.seed = call.seed;
    own.fp64_steps = !steps.empty() && steps[0].scalar_type() == at::kDouble;
    own.amsgrad = call.has(4);
    run(call, 2, [&](const StepLaunch& launch, cudaStream_t stream) { return launch_adamw(launch, own, stream); });
  }

  static void sgd(const StepCall& call, const SgdOptions& options, bool first) {
    const SgdCall own{options, scalar_of(call.lr), first};
    run(call, 2, [&](const StepLaunch& launch, cudaStream_t stream) { return launch_sgd(launch, own, stream); });
  }

  static void proximal(const StepCall& call, const at::Tensor& rates, bool root) {
    const Metric metric = !call.has(1) ? Metric::kConstant : root ? Metric::kRoot : Metric::kLinear;
    const ProximalCall own{rates.const_data_ptr<double>(), metric};
    run(call, 1, [&](const StepLaunch& launch, cudaStream_t stream) { return launch_proximal(launch, own, stream); });
  }

 private:
  // first_state: the first of the optimizer's own lists.
  template <typename Launcher>
  static void run(const StepCall& call, size_t first_state, Launcher launcher) {
    const Quadratic& q = call.q;
    const at::Device device = std::get<0>(call.result).device();
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    StepLaunch launch{};
    const at::Tensor scratch = set_up(launch, call.table.entries, call.result, counter_pool(), stream);
    const auto dtype = [&](size_t list) { return call.has(list) ? dtype_code(call.dtype(list)) : Dtype::kFloat32; };
    launch.param_dtype = dtype(0);
    launch.grad_dtype = dtype(1);
    launch.state_dtype = dtype(first_state);
    launch.coupling = call.coupling;
    if (q.present()) {
      launch.anchor = q.anchor->const_data_ptr();
      launch.fisher = q.fisher->const_data_ptr();
      launch.anchor_dtype = dtype_code(q.anchor->scalar_type());
      launch.fisher_dtype = dtype_code(q.fisher->scalar_type());
      launch.ewc_lambda = scalar_of(q.ewc_lambda);
      launch.delta = scalar_of(q.delta);
      launch.scale = scalar_of(q.scale);
      launch.constant = scalar_of(q.constant);
    }
    launch.grad_scale = scalar_of(call.grad_scale);
    launch.found_inf = scalar_of(call.found_inf);
    C10_CUDA_CHECK(launcher(launch, stream));
  }
};

}  // namespace
}  // namespace ewc

TORCH_LIBRARY_IMPL(ewc_fast, CUDA, m) {
  m.impl("adamw_", ewc::StepOps<ewc::Cuda>::adamw_);
  m.impl("sgd_", ewc::StepOps<ewc::Cuda>::sgd_);
  m.impl("proximal_", ewc::StepOps<ewc::Cuda>::proximal_);
}
