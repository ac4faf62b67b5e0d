// fisher_accumulate_ on the CPU: which loop for which dtypes, and who runs which chunk.
#include "fisher_kernels.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "fisher_ops.h"

namespace ewc {
namespace {

using FisherFn = void (*)(const FisherEntry&, int64_t, int64_t, double);

template <typename M>
FisherFn fisher_loop(at::ScalarType grad) {
  switch (grad) {
    case at::kDouble: return fisher_chunk<double, M>;
    case at::kBFloat16: return fisher_chunk<bf16, M>;
    case at::kHalf: return fisher_chunk<f16, M>;
    default: return fisher_chunk<float, M>;
  }
}

// Elements of a tensor that make a task: kChunk of its gradients, and no less than a block.
int64_t elements_per_task(const FisherEntry& entry) {
  return std::max(kBlock, kChunk / entry.rows / kBlock * kBlock);
}

struct CpuFisher {
  static void run(const FisherCall& call) {
    const auto& entries = call.entries;
    const int64_t n = static_cast<int64_t>(entries.size());
    std::vector<int64_t> first(n + 1, 0);
    int64_t total = 0;  // gradients
    for (int64_t t = 0; t < n; ++t) {
      const int64_t step = elements_per_task(entries[t]);
      first[t + 1] = first[t] + (entries[t].numel + step - 1) / step;
      total += entries[t].numel * entries[t].rows;
    }
    const FisherFn loop = call.fisher == at::kDouble ? fisher_loop<double>(call.grad) : fisher_loop<float>(call.grad);
    // Fewer than kChunk gradients are not worth waking a thread for.
    const int64_t tasks = first[n], grain = std::max<int64_t>(1, tasks * kChunk / total);
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t t = tensor_of_chunk(first.data(), n, task);
        const int64_t step = elements_per_task(entries[t]), start = (task - first[t]) * step;
        loop(entries[t], start, std::min(start + step, entries[t].numel), call.weight);
      }
    });
  }
};

}  // namespace
}  // namespace ewc

TORCH_LIBRARY_IMPL(ewc_fast, CPU, m) { m.impl("fisher_accumulate_", ewc::fisher_accumulate_<ewc::CpuFisher>); }
