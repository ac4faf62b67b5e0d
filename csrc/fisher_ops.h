// fisher_accumulate_ as the dispatcher calls it, written once: check, build the table, run the device's kernel, tell
// autograd what has changed.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"

namespace ewc {

// The checked arguments as pointers. A Fisher with gaps in memory is copied for the call and copied back by `finish`;
// gradients that are not laid as their Fisher are copied.
class FisherTable {
 public:
  FisherTable(at::TensorList fisher, at::TensorList grads) {
    const size_t n = fisher.size();
    TORCH_CHECK_VALUE(grads.size() == n, "grads has ", grads.size(), " tensors for ", n, " of fisher");
    for (size_t i = 0; i < n; ++i) check_pair(fisher, grads, i);
    check_distinct(fisher, "fisher", "accumulate into each once per call");  // the last check
    entries.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      const int64_t rows = grads[i].dim() == fisher[i].dim() ? 1 : grads[i].size(0);
      if (fisher[i].numel() > 0 && rows > 0) add(fisher[i], grads[i], rows);
    }
  }

  // After the kernel: Fishers that went through a copy.
  void finish() const {
    for (const auto& [fisher, copy] : write_back_) fisher.copy_(copy);
  }

  std::vector<FisherEntry> entries;  // none is empty

 private:
  static void check_pair(at::TensorList fisher, at::TensorList grads, size_t i) {
    const at::Tensor &f = fisher[i], &g = grads[i];
    const auto dtype = f.scalar_type();
    TORCH_CHECK_VALUE(dtype != at::kBFloat16 && dtype != at::kHalf, "fisher[", i, "] is ",
                      dtype == at::kHalf ? "float16" : "bfloat16",
                      ", in which sums of squares stop growing: accumulate in float32 or float64");
    check_member(f, fisher[0], fisher[0], "fisher[0]", "fisher", i);
    check_member(g, grads[0], fisher[0], "fisher[0]", "grads", i);
    const bool block = g.dim() == f.dim() + 1;
    TORCH_CHECK_VALUE((block ? g.sizes().slice(1) : g.sizes()) == f.sizes(), "grads[", i, "] has shape ", g.sizes(),
                      ", fisher[", i, "] ", f.sizes(), ": expected that, or one leading dimension more for samples");
    TORCH_CHECK_VALUE(is_dense(f) || !may_overlap(f), "fisher[", i, "] has strides ", f.strides(),
                      ": elements share memory; clone() it first");
  }

  // Whether elements may lie in one place: exact for all views that slicing, permuting and expanding make.
  static bool may_overlap(const at::Tensor& t) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) == 0) return false;
      if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
    }
    std::sort(dims.begin(), dims.end());
    int64_t last = 0;  // the furthest element of the dimensions so far
    for (const auto& [stride, size] : dims) {
      if (stride <= last) return true;
      last += (size - 1) * stride;
    }
    return false;
  }

  void add(const at::Tensor& f, const at::Tensor& g, int64_t rows) {
    at::Tensor fisher = f, grad = g;
    if (!is_dense(f)) {
      fisher = at::empty(f.sizes(), f.options());
      fisher.copy_(f);
      write_back_.emplace_back(f, fisher);
    }
    int64_t stride = rows > 1 ? g.stride(0) : 0;
    if (!same_order(g, fisher.strides())) {
      std::vector<int64_t> strides = fisher.strides().vec();
      if (g.dim() > f.dim()) strides.insert(strides.begin(), f.numel());
      grad = at::empty_strided(g.sizes(), strides, g.options());
      grad.copy_(g);
      copies_.push_back(grad);
      stride = rows > 1 ? f.numel() : 0;
    }
    // Not looked at is a gradient's negative bit, which its square has not.
    entries.push_back({fisher.mutable_data_ptr(), grad.const_data_ptr(), f.numel(), rows, stride});
  }

  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back_;
};

// One call's checked arguments; there is an entry at least.
struct FisherCall {
  const std::vector<FisherEntry>& entries;
  int64_t numel;                    // of all Fishers
  at::ScalarType fisher, grad;      // dtypes
  at::Device device;
  double weight;
};

// `Device::run(const FisherCall&)` is the device's kernel.
template <typename Device>
void fisher_accumulate_(at::TensorList fisher, at::TensorList grads, double weight) {
  TORCH_CHECK_VALUE(std::isfinite(weight), "weight must be finite, got ", weight);
  const FisherTable table(fisher, grads);
  int64_t numel = 0;
  for (const FisherEntry& entry : table.entries) numel += entry.numel;
  if (numel > 0) {
    Device::run({table.entries, numel, fisher[0].scalar_type(), grads[0].scalar_type(), fisher[0].device(), weight});
  }
  table.finish();
  for (const at::Tensor& f : fisher) bump_version(f);
}

}  // namespace ewc
