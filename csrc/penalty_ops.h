// The three penalty ops as the dispatcher calls them, written once: check, build the table, run the device's kernel, tell
// autograd what has changed.
#pragma once

#include "checks.h"

namespace ewc {

// One call's checked arguments. grad_scale, found_inf and maximize keep their defaults where an op has none.
struct PenaltyCall {
  const Table& table;
  at::ScalarType param, grad;  // dtypes
  const at::Tensor& anchor;
  const at::Tensor& fisher;
  const at::Tensor& ewc_lambda;
  const at::Tensor& delta;
  const std::optional<at::Tensor>& scale;
  const std::optional<at::Tensor>& constant;
  const std::optional<at::Tensor>& grad_scale;
  const std::optional<at::Tensor>& found_inf;
  bool maximize;
  const Result& result;  // uninitialised: the kernel fills it
};

inline at::ScalarType dtype_of(at::TensorList tensors) {
  return tensors.empty() ? at::kFloat : tensors[0].scalar_type();
}

// `Device::run<mode>(const PenaltyCall&)` is the device's kernel.
template <typename Device>
struct PenaltyOps {
  static Result penalty(at::TensorList params, const at::Tensor& anchor, const at::Tensor& fisher,
                        at::IntArrayRef offsets, at::IntArrayRef strides, const at::Tensor& ewc_lambda,
                        const at::Tensor& delta, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& constant) {
    const Scalars scalars(anchor, params.size(), ewc_lambda, delta, scale, constant);
    const Table table(params, std::nullopt, anchor, fisher, offsets, strides);
    const Result result = empty_result(params, anchor);
    const auto dtype = dtype_of(params);
    Device::template run<Mode::kValue>({table, dtype, dtype, anchor, fisher, ewc_lambda, delta, scale, constant,
                                        std::nullopt, std::nullopt, false, result});
    return result;
  }

  static Result penalty_grad(at::TensorList params, at::Tensor grad, const at::Tensor& anchor, const at::Tensor& fisher,
                             at::IntArrayRef offsets, at::IntArrayRef strides, const at::Tensor& ewc_lambda,
                             const at::Tensor& delta, const std::optional<at::Tensor>& scale,
                             const std::optional<at::Tensor>& constant, const std::optional<at::Tensor>& grad_scale,
                             const std::optional<at::Tensor>& found_inf) {
    const Scalars scalars(anchor, params.size(), ewc_lambda, delta, scale, constant, grad_scale, found_inf);
    Table table(params, std::nullopt, anchor, fisher, offsets, strides);
    table.write_to(grad, anchor);
    const Result result = empty_result(params, anchor);
    Device::template run<Mode::kWrite>({table, dtype_of(params), grad.scalar_type(), anchor, fisher, ewc_lambda, delta,
                                        scale, constant, grad_scale, found_inf, false, result});
    bump_version(grad);
    return result;
  }

  static Result penalty_accumulate_(at::TensorList params, at::TensorList grads, const at::Tensor& anchor,
                                    const at::Tensor& fisher, at::IntArrayRef offsets, at::IntArrayRef strides,
                                    const at::Tensor& ewc_lambda, const at::Tensor& delta,
                                    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& constant,
                                    const std::optional<at::Tensor>& grad_scale,
                                    const std::optional<at::Tensor>& found_inf, bool maximize) {
    const Scalars scalars(anchor, params.size(), ewc_lambda, delta, scale, constant, grad_scale, found_inf);
    const Table table(params, grads, anchor, fisher, offsets, strides);
    const Result result = empty_result(params, anchor);
    Device::template run<Mode::kAccumulate>({table, dtype_of(params), dtype_of(grads), anchor, fisher, ewc_lambda,
                                             delta, scale, constant, grad_scale, found_inf, maximize, result});
    table.finish();
    for (const at::Tensor& grad : grads) bump_version(grad);
    return result;
  }
};

}  // namespace ewc
