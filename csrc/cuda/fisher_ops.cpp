// CUDA side of fisher_accumulate_: from tensors to the launcher of fisher.h.
#include "fisher_ops.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "device.h"
#include "fisher.h"

namespace ewc {
namespace {

struct CudaFisher {
  static void run(const FisherCall& call) {
    const c10::cuda::CUDAGuard guard(call.device);
    FisherLaunch launch{};
    launch.entries = call.entries.data();
    launch.num_tensors = static_cast<int64_t>(call.entries.size());
    launch.fisher_dtype = dtype_code(call.fisher);
    launch.grad_dtype = dtype_code(call.grad);
    launch.weight = call.weight;
    launch.chunk = fisher_chunk_elements(call.numel);
    launch.multiprocessors = multiprocessors(call.device);
    C10_CUDA_CHECK(launch_fisher(launch, c10::cuda::getCurrentCUDAStream(call.device.index())));
  }
};

}  // namespace
}  // namespace ewc

TORCH_LIBRARY_IMPL(ewc_fast, CUDA, m) { m.impl("fisher_accumulate_", ewc::fisher_accumulate_<ewc::CudaFisher>); }
