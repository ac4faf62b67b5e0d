// Argument checks and the table of pointers, shared by the devices. Everything is checked before anything is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "chunks.h"

namespace ewc {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // penalty, predicted, by_tensor

inline bool is_parameter_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_dtype(const at::Tensor& t, const char* name, bool fp16_allowed) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(fp16_allowed || dtype != at::kHalf, name, " is float16, which zeroes small Fisher entries and ",
                    "overflows on large ones: use bfloat16, float32 or float64");
  TORCH_CHECK_TYPE(is_parameter_dtype(dtype), name, " has dtype ", dtype, "; expected float64, float32, bfloat16",
                   fp16_allowed ? " or float16" : "");
}

inline void check_state(const at::Tensor& t, const char* name, const at::Tensor& anchor) {
  check_dtype(t, name, /*fp16_allowed=*/false);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.is_contiguous(), name, " must be a flat (1-D, contiguous) buffer");
  TORCH_CHECK_VALUE(t.device() == anchor.device(), name, " is on ", t.device(), ", anchor on ", anchor.device());
  TORCH_CHECK_VALUE(t.numel() == anchor.numel(), name, " has ", t.numel(), " elements, anchor ", anchor.numel());
}

// A scalar that lives on the device and is read there.
inline void check_scalar(const at::Tensor& t, const char* name, const at::Tensor& anchor) {
  TORCH_CHECK_VALUE(t.numel() == 1, name, " must hold one number, got shape ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == anchor.device(), name, " is on ", t.device(), ", anchor on ", anchor.device());
}

inline void check_scalar(const std::optional<at::Tensor>& t, const char* name, const at::Tensor& anchor) {
  if (t.has_value()) check_scalar(*t, name, anchor);
}

inline void check_per_tensor(const std::optional<at::Tensor>& t, const char* name, size_t n, const at::Tensor& anchor,
                             bool fp32_allowed) {
  if (!t.has_value()) return;
  TORCH_CHECK_VALUE(t->dim() == 1 && t->is_contiguous() && static_cast<size_t>(t->numel()) == n, name,
                    " must be 1-D with one number for each of the ", n, " tensors, got shape ", t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == at::kDouble || (fp32_allowed && t->scalar_type() == at::kFloat), name,
                   " must be float64", fp32_allowed ? " or float32" : "", ", got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->device() == anchor.device(), name, " is on ", t->device(), ", anchor on ", anchor.device());
}

// Of everything that an op of this package changes: autograd must see that a tensor it has saved is stale.
inline void bump_version(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// A tensor of a list; `home` is whatever says on which device the call is.
inline void check_member(const at::Tensor& t, const at::Tensor& first, const at::Tensor& home, const char* home_name,
                         const char* list, size_t i) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, list, "[", i, "] is ", t.layout(), "; expected a dense tensor");
  TORCH_CHECK_TYPE(is_parameter_dtype(t.scalar_type()), list, "[", i, "] has dtype ", t.scalar_type(),
                   "; expected float64, float32, bfloat16 or float16");
  TORCH_CHECK_TYPE(t.scalar_type() == first.scalar_type(), list, "[", i, "] has dtype ", t.scalar_type(), ", ", list,
                   "[0] ", first.scalar_type(), ": one call takes one dtype");
  TORCH_CHECK_VALUE(t.device() == home.device(), list, "[", i, "] is on ", t.device(), ", ", home_name, " on ",
                    home.device());
}

// Two tensors that begin in one place, or dense ones that reach into each other, would be written by two threads at
// once. Others may lie between each other's elements, as columns of a matrix do; they are copied and copied back in turn.
inline void check_distinct(at::TensorList tensors, const char* list, const char* remedy) {
  if (tensors.size() < 2) return;
  std::vector<std::pair<const void*, size_t>> places;
  places.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() > 0) places.emplace_back(tensors[i].const_data_ptr(), i);
  }
  std::sort(places.begin(), places.end());
  std::pair<const void*, size_t> furthest{nullptr, 0};  // the end of a dense tensor
  for (size_t k = 0; k < places.size(); ++k) {
    const auto [place, i] = places[k];
    const bool dense = tensors[i].is_non_overlapping_and_dense();
    const bool same = k > 0 && places[k - 1].first == place;
    TORCH_CHECK_VALUE(!same && !(dense && place < furthest.first), list, "[",
                      same ? places[k - 1].second : furthest.second, "] and ", list, "[", i,
                      "] share their memory: ", remedy);
    if (dense) furthest = std::max(furthest, {static_cast<const char*>(place) + tensors[i].nbytes(), i});
  }
}

inline bool is_dense(const at::Tensor& t) { return t.is_non_overlapping_and_dense() && !t.is_neg(); }

// Whether the last dimensions of a tensor are laid in memory by these strides.
inline bool same_order(const at::Tensor& t, at::IntArrayRef laid) {
  if (t.numel() == 0) return true;
  const int64_t leading = t.dim() - static_cast<int64_t>(laid.size());
  for (size_t d = 0; d < laid.size(); ++d) {
    if (t.size(leading + d) != 1 && t.stride(leading + d) != laid[d]) return false;
  }
  return true;
}

// The checked arguments of a penalty op, as pointers. Tensors that are not laid out in memory as the state is
// are copied for the call; gradients among them are copied back by `finish`.
class Table {
 public:
  Table(at::TensorList params, std::optional<at::TensorList> grads, const at::Tensor& anchor, const at::Tensor& fisher,
        at::IntArrayRef offsets, at::IntArrayRef strides) {
    check_state(anchor, "anchor", anchor);
    check_state(fisher, "fisher", anchor);
    const size_t n = params.size();
    TORCH_CHECK_VALUE(offsets.size() == n, "offsets has ", offsets.size(), " entries for ", n, " parameters");
    TORCH_CHECK_VALUE(!grads || grads->size() == n, "grads has ", grads->size(), " tensors for ", n, " parameters");
    entries.reserve(n);
    size_t position = 0;
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& p = params[i];
      check_member(p, params[0], anchor, "anchor", "params", i);
      const size_t dims = static_cast<size_t>(p.dim());
      TORCH_CHECK_VALUE(position + dims <= strides.size(), "strides ends before params[", i, "]");
      const auto laid = strides.slice(position, dims);
      position += dims;
      const int64_t numel = p.numel(), offset = offsets[i];
      TORCH_CHECK_VALUE(offset >= 0 && offset <= anchor.numel() - numel, "params[", i, "] has ", numel,
                        " elements at offset ", offset, ", the anchor ", anchor.numel());
      if (is_dense(p)) {
        TORCH_CHECK_VALUE(same_order(p, laid), "params[", i, "] has strides ", p.strides(),
                          ", the anchor and the Fisher are laid in the order of strides ", laid);
        entries.push_back({p.const_data_ptr(), nullptr, offset, numel});
      } else {
        entries.push_back({copy_laid(p, laid).const_data_ptr(), nullptr, offset, numel});
      }
      if (grads) {
        const at::Tensor& g = (*grads)[i];
        check_member(g, (*grads)[0], anchor, "anchor", "grads", i);
        TORCH_CHECK_VALUE(g.sizes() == p.sizes(), "grads[", i, "] has shape ", g.sizes(), ", its parameter ", p.sizes());
        for (int64_t d = 0; d < g.dim(); ++d) {
          TORCH_CHECK_VALUE(g.size(d) < 2 || g.stride(d) != 0, "grads[", i, "] has strides ", g.strides(),
                            ": elements share memory; clone() it first");
        }
        laid_of_grad_.push_back(laid);
      }
    }
    TORCH_CHECK_VALUE(position == strides.size(), "strides has ", strides.size(), " entries for ", position,
                      " dimensions");
    if (grads) {
      // The last check: gradients may be touched from here on.
      check_distinct(*grads, "grads", "penalise a parameter once per call");
      for (size_t i = 0; i < n; ++i) {
        const at::Tensor& g = (*grads)[i];
        if (is_dense(g) && same_order(g, laid_of_grad_[i])) {
          entries[i].grad = g.mutable_data_ptr();
        } else {
          const at::Tensor copy = copy_laid(g, laid_of_grad_[i]);
          entries[i].grad = copy.mutable_data_ptr();
          write_back_.emplace_back(g, copy);
        }
      }
    }
  }

  // Gradients go into a flat buffer laid like the anchor.
  void write_to(const at::Tensor& grad, const at::Tensor& anchor) {
    check_dtype(grad, "grad", /*fp16_allowed=*/true);
    TORCH_CHECK_VALUE(grad.dim() == 1 && grad.is_contiguous() && grad.numel() == anchor.numel() &&
                          grad.device() == anchor.device(),
                      "grad must be a flat buffer like the anchor (", anchor.numel(), " elements on ", anchor.device(),
                      "), got shape ", grad.sizes(), " on ", grad.device());
    char* data = static_cast<char*>(grad.mutable_data_ptr());
    for (Entry& entry : entries) entry.grad = data + entry.offset * grad.element_size();
  }

  // After the kernel: gradients that went through a copy.
  void finish() const {
    for (const auto& [grad, copy] : write_back_) grad.copy_(copy);
  }

  std::vector<Entry> entries;

 private:
  at::Tensor copy_laid(const at::Tensor& t, at::IntArrayRef laid) {
    at::Tensor copy = at::empty_strided(t.sizes(), laid, t.options());
    TORCH_CHECK_VALUE(copy.is_non_overlapping_and_dense(), "strides ", laid, " leave gaps for shape ", t.sizes());
    copy.copy_(t);
    copies_.push_back(copy);
    return copy;
  }

  std::vector<at::IntArrayRef> laid_of_grad_;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back_;
};

// The scalars of a penalty, checked; still on the device.
struct Scalars {
  Scalars(const at::Tensor& anchor, size_t n, const at::Tensor& ewc_lambda, const at::Tensor& delta,
          const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& constant,
          const std::optional<at::Tensor>& grad_scale = std::nullopt,
          const std::optional<at::Tensor>& found_inf = std::nullopt) {
    check_scalar(ewc_lambda, "ewc_lambda", anchor);
    check_scalar(delta, "delta", anchor);
    check_per_tensor(scale, "scale", n, anchor, /*fp32_allowed=*/true);
    check_per_tensor(constant, "constant", n, anchor, /*fp32_allowed=*/false);
    check_scalar(grad_scale, "grad_scale", anchor);
    check_scalar(found_inf, "found_inf", anchor);
  }
};

inline void check_scale(const at::Tensor& buffer, const at::Tensor& factor) {
  check_dtype(buffer, "buffer", /*fp16_allowed=*/true);
  TORCH_CHECK_VALUE(buffer.is_contiguous(), "buffer must be contiguous");
  check_scalar(factor, "factor", buffer);
}

inline Result empty_result(at::TensorList params, const at::Tensor& anchor) {
  const bool fp64 = !params.empty() && params[0].scalar_type() == at::kDouble;
  const auto options = anchor.options().dtype(fp64 ? at::kDouble : at::kFloat);
  return {at::empty({}, options), at::empty({}, options),
          at::empty({2, static_cast<int64_t>(params.size())}, anchor.options().dtype(at::kDouble))};
}

}  // namespace ewc
