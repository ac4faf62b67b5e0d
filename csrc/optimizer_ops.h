// The optimizer ops' arguments, checked and as pointers. Everything is checked before anything is written.
#pragma once

#include "checks.h"

namespace ewc {

// A list of an op, one tensor per parameter or none at all.
struct TensorLists {
  struct One {
    at::TensorList tensors;
    const char* name;
    bool written;
  };
  std::vector<One> all;  // the first are the parameters
};

// What the penalty adds to an op; without an anchor there is none.
struct Quadratic {
  const std::optional<at::Tensor>& anchor;
  const std::optional<at::Tensor>& fisher;
  at::IntArrayRef offsets;
  const std::optional<at::Tensor>& ewc_lambda;
  const std::optional<at::Tensor>& delta;
  const std::optional<at::Tensor>& scale;
  const std::optional<at::Tensor>& constant;

  bool present() const { return anchor.has_value(); }
};

inline void check_number(const std::optional<at::Tensor>& t, const char* name, const at::Tensor& home) {
  if (!t.has_value()) return;
  TORCH_CHECK_VALUE(t->numel() == 1, name, " must hold one number, got shape ", t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat || t->scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->device() == home.device(), name, " is on ", t->device(), ", params[0] on ", home.device());
}

// Tensors that are not laid out in memory as `strides` say are copied for the call; `finish` copies written ones back.
class StepTable {
 public:
  StepTable(const TensorLists& lists, at::IntArrayRef strides, const Quadratic& q) {
    const at::TensorList params = lists.all[0].tensors;
    const size_t n = params.size();
    for (const auto& list : lists.all) {
      TORCH_CHECK_VALUE(list.tensors.empty() || list.tensors.size() == n, list.name, " has ", list.tensors.size(),
                        " tensors for ", n, " parameters");
    }
    int64_t length = 0;
    if (q.present()) {
      TORCH_CHECK_VALUE(q.fisher.has_value() && q.ewc_lambda.has_value() && q.delta.has_value(),
                        "an anchor needs fisher, ewc_lambda and delta beside it");
      check_state(*q.anchor, "anchor", *q.anchor);
      check_state(*q.fisher, "fisher", *q.anchor);
      check_scalar(*q.ewc_lambda, "ewc_lambda", *q.anchor);
      check_scalar(*q.delta, "delta", *q.anchor);
      check_per_tensor(q.scale, "scale", n, *q.anchor, /*fp32_allowed=*/true);
      check_per_tensor(q.constant, "constant", n, *q.anchor, /*fp32_allowed=*/false);
      TORCH_CHECK_VALUE(n == 0 || q.anchor->device() == params[0].device(), "anchor is on ", q.anchor->device(),
                        ", params[0] on ", n == 0 ? q.anchor->device() : params[0].device());
      length = q.anchor->numel();
    }
    TORCH_CHECK_VALUE(q.offsets.size() == n, "offsets has ", q.offsets.size(), " entries for ", n, " parameters");
    std::vector<at::IntArrayRef> laid;
    laid.reserve(n);
    size_t position = 0;
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& p = params[i];
      check_member(p, params[0], params[0], "params[0]", "params", i);
      const size_t dims = static_cast<size_t>(p.dim());
      TORCH_CHECK_VALUE(position + dims <= strides.size(), "strides ends before params[", i, "]");
      laid.push_back(strides.slice(position, dims));
      position += dims;
      const int64_t offset = q.offsets[i];
      TORCH_CHECK_VALUE(q.present() ? offset >= -1 && offset <= length - p.numel() : offset == -1, "params[", i,
                        "] has ", p.numel(), " elements at offset ", offset, ", the anchor ", length);
      TORCH_CHECK_VALUE(!is_dense(p) || same_order(p, laid[i]), "params[", i, "] has strides ", p.strides(),
                        ", the call says ", laid[i]);
      for (const auto& list : lists.all) {
        if (list.tensors.empty()) continue;
        const at::Tensor& t = list.tensors[i];
        check_member(t, list.tensors[0], params[0], "params[0]", list.name, i);
        TORCH_CHECK_VALUE(t.sizes() == p.sizes(), list.name, "[", i, "] has shape ", t.sizes(), ", its parameter ",
                          p.sizes());
        for (int64_t d = 0; list.written && d < t.dim(); ++d) {
          TORCH_CHECK_VALUE(t.size(d) < 2 || t.stride(d) != 0, list.name, "[", i, "] has strides ", t.strides(),
                            ": elements share memory; clone() it first");
        }
      }
    }
    TORCH_CHECK_VALUE(position == strides.size(), "strides has ", strides.size(), " entries for ", position,
                      " dimensions");
    for (const auto& list : lists.all) {
      if (list.written) check_distinct(list.tensors, list.name, "step a parameter once per call");
    }
    // The last check: tensors may be touched from here on.
    entries.resize(n);
    for (size_t i = 0; i < n; ++i) {
      StepEntry& entry = entries[i];
      entry.offset = q.offsets[i];
      entry.numel = params[i].numel();
      for (int l = 0; l < kMaxLists; ++l) entry.data[l] = nullptr;
      for (size_t l = 0; l < lists.all.size(); ++l) {
        const auto& list = lists.all[l];
        if (list.tensors.empty()) continue;
        const at::Tensor& t = list.tensors[i];
        if (is_dense(t) && same_order(t, laid[i])) {
          entry.data[l] = list.written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
        } else {
          const at::Tensor copy = at::empty_strided(t.sizes(), laid[i], t.options());
          TORCH_CHECK_VALUE(copy.is_non_overlapping_and_dense(), "strides ", laid[i], " leave gaps for shape ",
                            t.sizes());
          copy.copy_(t);
          entry.data[l] = copy.mutable_data_ptr();
          copies_.push_back(copy);
          if (list.written) write_back_.emplace_back(t, copy);
        }
      }
    }
  }

  // After the kernel.
  void finish(const TensorLists& lists) const {
    for (const auto& [t, copy] : write_back_) t.copy_(copy);
    for (const auto& list : lists.all) {
      if (!list.written) continue;
      for (const at::Tensor& t : list.tensors) bump_version(t);
    }
  }

  std::vector<StepEntry> entries;

 private:
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back_;
};

inline void check_steps(at::TensorList steps, at::TensorList params) {
  TORCH_CHECK_VALUE(steps.size() == params.size(), "steps has ", steps.size(), " tensors for ", params.size(),
                    " parameters");
  for (size_t i = 0; i < steps.size(); ++i) {
    const at::Tensor& t = steps[i];
    TORCH_CHECK_VALUE(t.numel() == 1, "steps[", i, "] must hold one number, got shape ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "steps[", i,
                     "] must be float32 or float64, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == params[0].device(), "steps[", i, "] is on ", t.device(), ", params[0] on ",
                      params[0].device());
  }
}

// What the ops return, uninitialised; on the parameters' device.
inline Result empty_step_result(at::TensorList params, const Quadratic& q) {
  TORCH_CHECK_VALUE(!params.empty() || q.present(), "no parameters and no anchor: nothing to step");
  return empty_result(params, params.empty() ? *q.anchor : params[0]);
}

// The scalars that every step has.
struct StepCall {
  const StepTable& table;
  const TensorLists& lists;
  const Quadratic& q;
  Coupling coupling;
  const std::optional<at::Tensor>& grad_scale;
  const std::optional<at::Tensor>& found_inf;
  const std::optional<at::Tensor>& lr;  // instead of the number
  int64_t seed;                         // of stochastic rounding, -1 for rounding to nearest
  at::IntArrayRef ordinals;             // each tensor's number, as the rounding's key has it
  const Result& result;

  at::ScalarType dtype(size_t list) const { return lists.all[list].tensors[0].scalar_type(); }
  bool has(size_t list) const { return list < lists.all.size() && !lists.all[list].tensors.empty(); }
};

inline void check_ordinals(int64_t seed, at::IntArrayRef ordinals, at::TensorList params) {
  TORCH_CHECK_VALUE(seed >= -1 && seed <= 0xffffffffll, "seed must lie in [0, 2^32), or be -1, got ", seed);
  TORCH_CHECK_VALUE(seed < 0 || ordinals.size() == params.size(), "ordinals has ", ordinals.size(), " entries for ",
                    params.size(), " parameters");
}

// The three ops as the dispatcher calls them: check, build the table, run the device's kernel, tell autograd what has
// changed. `Device::adamw(const StepCall&, steps, const AdamWOptions&)` and so on are the device's.
template <typename Device>
struct StepOps {
  static Result adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                       at::TensorList max_exp_avg_sqs, at::TensorList steps, at::IntArrayRef strides,
                       const std::optional<at::Tensor>& anchor, const std::optional<at::Tensor>& fisher,
                       at::IntArrayRef offsets, const std::optional<at::Tensor>& ewc_lambda,
                       const std::optional<at::Tensor>& delta, const std::optional<at::Tensor>& scale,
                       const std::optional<at::Tensor>& constant, const std::optional<at::Tensor>& grad_scale,
                       const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& lr_tensor,
                       double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                       bool proximal, int64_t seed, at::IntArrayRef ordinals) {
    const Quadratic q{anchor, fisher, offsets, ewc_lambda, delta, scale, constant};
    const TensorLists lists{{{params, "params", true},
                             {grads, "grads", grad_scale.has_value()},
                             {exp_avgs, "exp_avgs", true},
                             {exp_avg_sqs, "exp_avg_sqs", true},
                             {max_exp_avg_sqs, "max_exp_avg_sqs", true}}};
    for (size_t l = 1; l < 4; ++l) {
      TORCH_CHECK_VALUE(lists.all[l].tensors.size() == params.size(), lists.all[l].name, " has ",
                        lists.all[l].tensors.size(), " tensors for ", params.size(), " parameters");
    }
    const Result result = empty_step_result(params, q);
    if (!params.empty()) {
      check_scalars(params[0], grad_scale, found_inf, lr_tensor);
      for (size_t l = 3; l < 5; ++l) {
        TORCH_CHECK_TYPE(lists.all[l].tensors.empty() ||
                             lists.all[l].tensors[0].scalar_type() == exp_avgs[0].scalar_type(),
                         lists.all[l].name, " must have the dtype of exp_avgs");
      }
    }
    check_steps(steps, params);
    check_ordinals(seed, ordinals, params);
    const StepTable table(lists, strides, q);
    Device::adamw({table, lists, q, coupling(q, proximal), grad_scale, found_inf, lr_tensor, seed, ordinals, result},
                  steps, {lr, beta1, beta2, eps, weight_decay, maximize});
    table.finish(lists);
    return result;
  }

  static Result sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     at::IntArrayRef strides, const std::optional<at::Tensor>& anchor,
                     const std::optional<at::Tensor>& fisher, at::IntArrayRef offsets,
                     const std::optional<at::Tensor>& ewc_lambda, const std::optional<at::Tensor>& delta,
                     const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& constant,
                     const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
                     const std::optional<at::Tensor>& lr_tensor, double lr, double momentum, double dampening,
                     double weight_decay, bool nesterov, bool maximize, bool first, bool proximal) {
    const Quadratic q{anchor, fisher, offsets, ewc_lambda, delta, scale, constant};
    const TensorLists lists{{{params, "params", true},
                             {grads, "grads", grad_scale.has_value()},
                             {momentum_buffers, "momentum_buffers", true}}};
    TORCH_CHECK_VALUE(grads.size() == params.size(), "grads has ", grads.size(), " tensors for ", params.size(),
                      " parameters");
    TORCH_CHECK_VALUE(momentum == 0.0 || momentum_buffers.size() == params.size(), "momentum_buffers has ",
                      momentum_buffers.size(), " tensors for ", params.size(), " parameters");
    const Result result = empty_step_result(params, q);
    if (!params.empty()) check_scalars(params[0], grad_scale, found_inf, lr_tensor);
    const StepTable table(lists, strides, q);
    Device::sgd({table, lists, q, coupling(q, proximal), grad_scale, found_inf, lr_tensor, -1, {}, result},
                {lr, momentum, dampening, weight_decay, nesterov, maximize}, first);
    table.finish(lists);
    return result;
  }

  static Result proximal_(at::TensorList params, at::TensorList moments, at::IntArrayRef strides,
                          const at::Tensor& anchor, const at::Tensor& fisher, at::IntArrayRef offsets,
                          const at::Tensor& ewc_lambda, const at::Tensor& delta, const std::optional<at::Tensor>& scale,
                          const std::optional<at::Tensor>& constant, const std::optional<at::Tensor>& found_inf,
                          const at::Tensor& rates, bool root) {
    const std::optional<at::Tensor> anchor_(anchor), fisher_(fisher), lambda_(ewc_lambda), delta_(delta), none;
    const Quadratic q{anchor_, fisher_, offsets, lambda_, delta_, scale, constant};
    const TensorLists lists{{{params, "params", true}, {moments, "moments", false}}};
    const Result result = empty_step_result(params, q);
    check_number(found_inf, "found_inf", anchor);
    TORCH_CHECK_VALUE(rates.dim() == 2 && rates.is_contiguous() && rates.size(0) == static_cast<int64_t>(params.size()) &&
                          rates.size(1) == 4,
                      "rates must be (", params.size(), ", 4), got ", rates.sizes());
    TORCH_CHECK_TYPE(rates.scalar_type() == at::kDouble, "rates must be float64, got ", rates.scalar_type());
    TORCH_CHECK_VALUE(rates.device() == anchor.device(), "rates is on ", rates.device(), ", anchor on ",
                      anchor.device());
    const StepTable table(lists, strides, q);
    Device::proximal({table, lists, q, Coupling::kProximal, none, found_inf, none, -1, {}, result}, rates, root);
    table.finish(lists);
    return result;
  }

 private:
  static Coupling coupling(const Quadratic& q, bool proximal) {
    if (!q.present()) return Coupling::kNone;
    return proximal ? Coupling::kProximal : Coupling::kCoupled;
  }
  static void check_scalars(const at::Tensor& home, const std::optional<at::Tensor>& grad_scale,
                            const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& lr) {
    check_number(grad_scale, "grad_scale", home);
    check_number(found_inf, "found_inf", home);
    check_number(lr, "lr", home);
  }
};

}  // namespace ewc
