#include "tap.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/vector_squares.h"

namespace ewc {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

bool are_rows(const at::Tensor& t) { return t.is_cpu() && t.dim() == 2 && t.is_contiguous(); }

// The squares of g and x, rows for samples, and the sums of g's over the samples: at once, for one after the other each
// would wake the threads and send the numbers from core to core.
template <typename M>
void square_rows(const at::Tensor& g, at::Tensor& g_squared, const at::Tensor& x, at::Tensor& x_squared,
                 const at::Tensor& bias) {
  constexpr int64_t kEach = 16384, kMost = 16;  // numbers of a task; tasks, whatever the threads, for sums depend on them
  const int64_t rows = g.size(0), width = g.size(1), x_width = x.size(1);
  const int64_t tasks = std::clamp<int64_t>(rows * (width + x_width) / kEach, 1, std::min<int64_t>(rows, kMost));
  std::vector<double> sums(bias.defined() ? tasks * width : 0, 0.0);
  const M *from = g.const_data_ptr<M>(), *x_from = x.const_data_ptr<M>();
  M *to = g_squared.mutable_data_ptr<M>(), *x_to = x_squared.mutable_data_ptr<M>();
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = rows * task / tasks, end = rows * (task + 1) / tasks;
      squares(x_from + begin * x_width, x_to + begin * x_width, (end - begin) * x_width);
      if (!bias.defined()) {
        squares(from + begin * width, to + begin * width, (end - begin) * width);
        continue;
      }
      for (int64_t row = begin; row < end; ++row) {
        squares_and_sums(from + row * width, to + row * width, &sums[task * width], width);
      }
    }
  });
  if (!bias.defined()) return;
  M* total = bias.mutable_data_ptr<M>();
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[task * width + i];
  }
  for (int64_t i = 0; i < width; ++i) total[i] += static_cast<M>(sums[i]);
  bias.unsafeGetTensorImpl()->bump_version();
}

// Product.add_vectors_, and the bias's sums; g is squared already where there are several backwards.
void add_vectors_(const Sums& sums, const at::Tensor& x, const at::Tensor& g, bool is_squared, const VectorsRule& rule) {
  const at::ScalarType dtype = sums.weight.scalar_type();
  const bool bias_fits = !sums.bias.defined() || (sums.bias.is_contiguous() && sums.bias.scalar_type() == dtype);
  for (int64_t start = 0; start < x.size(0); start += rule.vectors) {
    const int64_t end = std::min(start + rule.vectors, x.size(0));
    const at::Tensor x_part = x.slice(0, start, end).to(dtype), g_part = g.slice(0, start, end);
    at::Tensor x_squared, g_squared = g_part;
    if (!is_squared && bias_fits && are_rows(x_part) && are_rows(g_part) && g_part.scalar_type() == dtype) {
      x_squared = at::empty_like(x_part);
      g_squared = at::empty_like(g_part);
      AT_DISPATCH_FLOATING_TYPES(dtype, "square_rows", [&] {
        square_rows<scalar_t>(g_part, g_squared, x_part, x_squared, sums.bias);
      });
    } else {
      x_squared = x_part.square();
      if (!is_squared) g_squared = g_part.square();
      if (sums.bias.defined()) sums.bias.add_(g_squared.sum(0));
    }
    const at::Tensor left = (rule.left_is_g ? g_squared : x_squared).t();
    const at::Tensor& right = rule.left_is_g ? x_squared : g_squared;
    if (sums.weight.numel() < rule.small) {
      sums.weight.add_(at::mm(left, right));
    } else {
      sums.weight.addmm_(left, right);
    }
  }
}

// The identity. A node of its own and no torch::autograd::Function: what that keeps by name and hands on argument by
// argument takes longer than a small layer's squares.
struct TapVectors : Node {
  Sums sums;
  VectorsRule rule{};
  Several several;
  torch::autograd::SavedVariable x;

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor& sum = sums.weight.defined() ? sums.weight : sums.bias;
    at::Tensor g = grads[0].defined() ? grads[0].to(sum.scalar_type()) : grads[0];
    const bool is_squared = several.squares.defined();
    if (is_squared) {
      if (g.defined()) several.squares.addcmul_(g, g);
      g = *several.again.const_data_ptr<bool>() ? at::Tensor() : several.squares;
    }
    if (g.defined() && sums.weight.defined()) {
      add_vectors_(sums, x.unpack(), g, is_squared, rule);
    } else if (g.defined()) {
      sums.bias.add_((is_squared ? g : g.square()).sum(0));
    }
    return std::move(grads);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
  }

  std::string name() const override { return "TapVectors"; }
};

// Nodes are held by intrusive pointers, by shared ones in older versions of torch (2.11).
template <typename T, typename Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T, [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

}  // namespace

at::Tensor tap_vectors(const at::Tensor& y, const at::Tensor& x, const Sums& sums, const VectorsRule& rule,
                       const Several& several) {
  const at::Tensor& total = sums.weight;
  TORCH_CHECK(y.dim() == 2 && (!sums.bias.defined() || sums.bias.numel() == y.size(1)),
              "tap_vectors: the bias's sums do not fit the output");
  TORCH_CHECK(!total.defined() || (x.dim() == 2 && x.size(0) == y.size(0) && total.dim() == 2 &&
                                   total.size(rule.left_is_g ? 0 : 1) == y.size(1) &&
                                   total.size(rule.left_is_g ? 1 : 0) == x.size(1)),
              "tap_vectors: the weight's sums do not fit input and output");
  TORCH_CHECK(!several.again.defined() || (several.again.is_cpu() && several.again.scalar_type() == at::kBool),
              "tap_vectors: whether another backward follows must be a bool on the CPU");
  at::Tensor tapped = y.detach();  // which the model may change
  const auto node = make_node<TapVectors>();
  node->set_next_edges(torch::autograd::collect_next_edges(y));
  node->sums = sums;
  node->rule = rule;
  node->several = several;
  if (total.defined()) {
    // Kept in the precision in which autocast multiplied.
    const at::Tensor saved = at::isReducedFloatingType(y.scalar_type()) ? x.detach().to(y.scalar_type()) : x.detach();
    node->x = torch::autograd::SavedVariable(saved, /*is_output=*/false);
  }
  torch::autograd::set_history(tapped, node);
  return tapped;
}

}  // namespace ewc
