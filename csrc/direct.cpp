// The ops that are called most, for Python, past torch.ops, which turns every argument into an IValue and back: for a small
// model that takes twice as long as the op. The dispatcher is called as ever, so that profilers and modes see the op.
#include "direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/conv_squares.h"
#include "tap.h"

namespace ewc {
namespace {

using PenaltySignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    at::TensorList, at::TensorList, const at::Tensor&, const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool);
using FisherSignature = void(at::TensorList, at::TensorList, double);
using Optional = const std::optional<at::Tensor>&;
using AdamWSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef,
    Optional, Optional, at::IntArrayRef, Optional, Optional, Optional, Optional, Optional, Optional, Optional, double,
    double, double, double, double, bool, bool, int64_t, at::IntArrayRef);
using SgdSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef, Optional, Optional, at::IntArrayRef, Optional,
    Optional, Optional, Optional, Optional, Optional, Optional, double, double, double, double, bool, bool, bool, bool);
using ProximalSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    at::TensorList, at::TensorList, at::IntArrayRef, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
    const at::Tensor&, const at::Tensor&, Optional, Optional, Optional, const at::Tensor&, bool);

// Arguments of the types that are usual here. `usual` is false once there was another one: torch.ops knows what to do.
struct Reader {
  bool usual = true;

  // Only exact tensors and parameters: a subclass may have a __torch_function__.
  bool is_tensor(PyObject* object) {
    if (!THPVariable_CheckExact(object)) usual = false;
    return usual;
  }
  at::Tensor tensor(PyObject* object) { return is_tensor(object) ? THPVariable_Unpack(object) : at::Tensor(); }
  std::optional<at::Tensor> optional(PyObject* object) {
    return object == Py_None ? std::nullopt : std::optional<at::Tensor>(tensor(object));
  }
  at::Tensor or_undefined(PyObject* object) { return object == Py_None ? at::Tensor() : tensor(object); }
  template <typename Item, typename Read>
  std::vector<Item> list(PyObject* object, Read read) {
    std::vector<Item> items;
    if (!PyList_CheckExact(object)) usual = false;
    const Py_ssize_t n = usual ? PyList_GET_SIZE(object) : 0;
    items.reserve(n);
    for (Py_ssize_t i = 0; usual && i < n; ++i) items.push_back(read(PyList_GET_ITEM(object, i)));
    return items;
  }
  std::vector<at::Tensor> tensors(PyObject* object) {
    return list<at::Tensor>(object, [this](PyObject* item) { return tensor(item); });
  }
  // The parameters' own gradients, which all must have.
  std::vector<at::Tensor> grads_of(const std::vector<at::Tensor>& params) {
    std::vector<at::Tensor> grads;
    if (!usual) return grads;
    grads.reserve(params.size());
    for (const at::Tensor& param : params) {
      grads.push_back(param.grad());
      if (!grads.back().defined() || grads.back().key_set().has(c10::DispatchKey::Python)) usual = false;
    }
    return grads;
  }
  std::vector<int64_t> integers(PyObject* object) {
    return list<int64_t>(object, [this](PyObject* item) {
      if (!PyLong_CheckExact(item)) usual = false;
      return usual ? static_cast<int64_t>(PyLong_AsLongLong(item)) : 0;
    });
  }
  int64_t integer(PyObject* object) {
    if (!PyLong_CheckExact(object)) usual = false;
    return usual ? static_cast<int64_t>(PyLong_AsLongLong(object)) : 0;
  }
  double number(PyObject* object) {
    if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) usual = false;
    return usual ? PyFloat_AsDouble(object) : 0;
  }
  // A tuple of numbers as each row of an fp64 tensor on the CPU.
  at::Tensor rows(PyObject* object, int64_t n) {
    std::vector<double> row;
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(object); ++j) row.push_back(number(PyTuple_GET_ITEM(object, j)));
    if (c10::impl::dispatch_mode_enabled()) usual = false;  // might make a tensor without memory
    if (!usual) return at::Tensor();
    const at::Tensor result = at::empty({n, static_cast<int64_t>(row.size())}, at::kDouble);
    double* to = result.mutable_data_ptr<double>();
    for (int64_t i = 0; i < n; ++i) to = std::copy(row.begin(), row.end(), to);
    return result;
  }
  bool boolean(PyObject* object) {
    if (!PyBool_Check(object)) usual = false;
    return object == Py_True;
  }
  // After the last argument. An integer that is too large is an error.
  bool may_call() const { return usual && !at::impl::torch_function_mode_enabled(); }
};

// Calls an op without the GIL and without a graph.
template <typename Signature, typename... Arguments>
auto call(const c10::TypedOperatorHandle<Signature>& op, Arguments&&... arguments) {
  const pybind11::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  return op.call(std::forward<Arguments>(arguments)...);
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What the ops of the penalty return.
PyObject* wrap(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& result) {
  const THPObjectPtr penalty(THPVariable_Wrap(std::get<0>(result))), predicted(THPVariable_Wrap(std::get<1>(result))),
      by_tensor(THPVariable_Wrap(std::get<2>(result)));
  return PyTuple_Pack(3, penalty.get(), predicted.get(), by_tensor.get());
}

PyObject* penalty_accumulate_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 13, "penalty_accumulate_ takes 13 arguments, got ", n);
  Reader read;
  const auto params = read.tensors(args[0]);
  const auto grads = args[1] == Py_None ? read.grads_of(params) : read.tensors(args[1]);
  const at::Tensor anchor = read.tensor(args[2]), fisher = read.tensor(args[3]);
  const auto offsets = read.integers(args[4]), strides = read.integers(args[5]);
  const at::Tensor ewc_lambda = read.tensor(args[6]), delta = read.tensor(args[7]);
  const auto scale = read.optional(args[8]), constant = read.optional(args[9]);
  const auto grad_scale = read.optional(args[10]), found_inf = read.optional(args[11]);
  const bool maximize = read.boolean(args[12]);
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call()) Py_RETURN_NONE;
  static const auto op = find<PenaltySignature>("ewc_fast::penalty_accumulate_");
  const auto result = call(op, params, grads, anchor, fisher, offsets, strides, ewc_lambda, delta, scale, constant,
                           grad_scale, found_inf, maximize);
  return wrap(result);
  END_HANDLE_TH_ERRORS
}

PyObject* adamw_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 26, "adamw_ takes 26 arguments, got ", n);
  Reader read;
  const auto params = read.tensors(args[0]), grads = read.tensors(args[1]), exp_avgs = read.tensors(args[2]);
  const auto exp_avg_sqs = read.tensors(args[3]), max_exp_avg_sqs = read.tensors(args[4]), steps = read.tensors(args[5]);
  const auto strides = read.integers(args[6]);
  const auto anchor = read.optional(args[7]), fisher = read.optional(args[8]);
  const auto offsets = read.integers(args[9]);
  const auto ewc_lambda = read.optional(args[10]), delta = read.optional(args[11]), scale = read.optional(args[12]);
  const auto constant = read.optional(args[13]), grad_scale = read.optional(args[14]);
  const auto found_inf = read.optional(args[15]), lr_tensor = read.optional(args[16]);
  const double lr = read.number(args[17]), beta1 = read.number(args[18]), beta2 = read.number(args[19]);
  const double eps = read.number(args[20]), weight_decay = read.number(args[21]);
  const bool maximize = read.boolean(args[22]), proximal = read.boolean(args[23]);
  const int64_t seed = read.integer(args[24]);
  const auto ordinals = read.integers(args[25]);
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call()) Py_RETURN_NONE;
  static const auto op = find<AdamWSignature>("ewc_fast::adamw_");
  return wrap(call(op, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, strides, anchor, fisher, offsets,
                   ewc_lambda, delta, scale, constant, grad_scale, found_inf, lr_tensor, lr, beta1, beta2, eps,
                   weight_decay, maximize, proximal, seed, ordinals));
  END_HANDLE_TH_ERRORS
}

PyObject* sgd_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 22, "sgd_ takes 22 arguments, got ", n);
  Reader read;
  const auto params = read.tensors(args[0]), grads = read.tensors(args[1]), buffers = read.tensors(args[2]);
  const auto strides = read.integers(args[3]);
  const auto anchor = read.optional(args[4]), fisher = read.optional(args[5]);
  const auto offsets = read.integers(args[6]);
  const auto ewc_lambda = read.optional(args[7]), delta = read.optional(args[8]), scale = read.optional(args[9]);
  const auto constant = read.optional(args[10]), grad_scale = read.optional(args[11]);
  const auto found_inf = read.optional(args[12]), lr_tensor = read.optional(args[13]);
  const double lr = read.number(args[14]), momentum = read.number(args[15]), dampening = read.number(args[16]);
  const double weight_decay = read.number(args[17]);
  const bool nesterov = read.boolean(args[18]), maximize = read.boolean(args[19]), first = read.boolean(args[20]);
  const bool proximal = read.boolean(args[21]);
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call()) Py_RETURN_NONE;
  static const auto op = find<SgdSignature>("ewc_fast::sgd_");
  return wrap(call(op, params, grads, buffers, strides, anchor, fisher, offsets, ewc_lambda, delta, scale, constant,
                   grad_scale, found_inf, lr_tensor, lr, momentum, dampening, weight_decay, nesterov, maximize, first,
                   proximal));
  END_HANDLE_TH_ERRORS
}

PyObject* proximal_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 13, "proximal_ takes 13 arguments, got ", n);
  Reader read;
  const auto params = read.tensors(args[0]), moments = read.tensors(args[1]);
  const auto strides = read.integers(args[2]);
  const at::Tensor anchor = read.tensor(args[3]), fisher = read.tensor(args[4]);
  const auto offsets = read.integers(args[5]);
  const at::Tensor ewc_lambda = read.tensor(args[6]), delta = read.tensor(args[7]);
  const auto scale = read.optional(args[8]), constant = read.optional(args[9]), found_inf = read.optional(args[10]);
  const at::Tensor rates = PyTuple_CheckExact(args[11]) ? read.rows(args[11], params.size()) : read.tensor(args[11]);
  const bool root = read.boolean(args[12]);
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call()) Py_RETURN_NONE;
  static const auto op = find<ProximalSignature>("ewc_fast::proximal_");
  return wrap(call(op, params, moments, strides, anchor, fisher, offsets, ewc_lambda, delta, scale, constant, found_inf,
                   rates, root));
  END_HANDLE_TH_ERRORS
}

PyObject* fisher_accumulate_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 3, "fisher_accumulate_ takes 3 arguments, got ", n);
  Reader read;
  const auto fisher = read.tensors(args[0]), grads = read.tensors(args[1]);
  const double weight = read.number(args[2]);
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call()) Py_RETURN_NONE;
  static const auto op = find<FisherSignature>("ewc_fast::fisher_accumulate_");
  call(op, fisher, grads, weight);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* tap_vectors(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 9, "tap_vectors takes 9 arguments, got ", n);
  Reader read;
  const at::Tensor y = read.tensor(args[0]), x = read.tensor(args[1]);
  const Sums sums{read.or_undefined(args[2]), read.or_undefined(args[3])};
  const VectorsRule rule{read.boolean(args[4]), read.integer(args[5]), read.integer(args[6])};
  const Several several{read.or_undefined(args[7]), read.or_undefined(args[8])};
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call() || !at::GradMode::is_enabled()) Py_RETURN_NONE;
  return THPVariable_Wrap(tap_vectors(y, x, sums, rule, several));
  END_HANDLE_TH_ERRORS
}

PyObject* tap_linear(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 10, "tap_linear takes 10 arguments, got ", n);
  Reader read;
  const at::Tensor x = read.tensor(args[0]), weight = read.tensor(args[1]), bias = read.or_undefined(args[2]);
  const Sums sums{read.tensor(args[3]), read.or_undefined(args[4])};
  const int64_t samples = read.integer(args[5]);
  const VectorsRule rule{true, read.integer(args[6]), read.integer(args[7])};
  const Several several{read.or_undefined(args[8]), read.or_undefined(args[9])};
  if (PyErr_Occurred()) return nullptr;
  if (!read.may_call() || x.dim() != 2 || x.size(0) != samples || !at::GradMode::is_enabled()) Py_RETURN_NONE;
  at::Tensor tapped;
  {
    const pybind11::gil_scoped_release no_gil;
    const at::Tensor y = at::linear(x, weight.detach(), bias.defined() ? bias.detach() : bias);
    tapped = tap_vectors(y, x, sums, rule, several);
  }
  return THPVariable_Wrap(tapped);
  END_HANDLE_TH_ERRORS
}

PyObject* conv_squares_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 6, "conv_squares_ takes 6 arguments, got ", n);
  Reader read;
  const at::Tensor total = read.tensor(args[0]), x = read.tensor(args[1]), g = read.tensor(args[2]);
  const std::vector<int64_t> padding = read.integers(args[3]), dilation = read.integers(args[4]);
  const int64_t groups = read.integer(args[5]);
  if (PyErr_Occurred()) return nullptr;
  // It reads memory, which modes that see every op do not.
  if (!read.may_call() || c10::impl::dispatch_mode_enabled()) Py_RETURN_NONE;
  if (padding.size() != 4 || dilation.size() != 2 || groups < 1) Py_RETURN_NONE;
  const ConvolutionShape shape{{padding[2], padding[0]}, {padding[3], padding[1]}, {dilation[0], dilation[1]}, groups};
  if (!can_square_convolution(total, x, g, shape)) Py_RETURN_NONE;
  {
    const pybind11::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView no_graph;
    add_conv_squares_(total, x, g, shape);
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// ---- what Python asks before every pass ----

bool is_same(const at::Tensor& tensor, bool requires_grad, PyObject* shape, PyObject* dtype) {
  const auto sizes = tensor.sizes();
  bool same = tensor.requires_grad() == requires_grad && reinterpret_cast<THPDtype*>(dtype)->scalar_type ==
                                                             tensor.scalar_type() &&
              PyTuple_GET_SIZE(shape) == static_cast<Py_ssize_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i)) == sizes[i];
  return same;
}

// The entries of a tuple in a list.
PyObject** entries_of(PyObject* known, Py_ssize_t n) {
  TORCH_CHECK_TYPE(PyTuple_CheckExact(known) && PyTuple_GET_SIZE(known) == n, "expected a tuple of ", n);
  return &PyTuple_GET_ITEM(known, 0);
}

// Dicts are (dict, key, value), None for no value; lists (list, its items in a tuple); tensors (tensor, requires_grad,
// shape, dtype).
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 3, "unchanged takes three lists");
  for (int i = 0; i < 3; ++i) TORCH_CHECK_TYPE(PyList_CheckExact(args[i]), "unchanged takes three lists");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); ++i) {
    PyObject** known = entries_of(PyList_GET_ITEM(args[0], i), 3);
    TORCH_CHECK_TYPE(PyDict_Check(known[0]), "expected a dict");
    PyObject* value = PyDict_GetItemWithError(known[0], known[1]);
    if (PyErr_Occurred()) return nullptr;
    if ((value == nullptr ? Py_None : value) != known[2]) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[1]); ++i) {
    PyObject** known = entries_of(PyList_GET_ITEM(args[1], i), 2);
    TORCH_CHECK_TYPE(PyTuple_CheckExact(known[1]), "expected a tuple of items");
    if (!PyList_Check(known[0])) Py_RETURN_NONE;
    const Py_ssize_t size = PyTuple_GET_SIZE(known[1]);
    if (PyList_GET_SIZE(known[0]) != size) Py_RETURN_FALSE;
    for (Py_ssize_t j = 0; j < size; ++j) {
      if (PyList_GET_ITEM(known[0], j) != PyTuple_GET_ITEM(known[1], j)) Py_RETURN_FALSE;
    }
  }
  Reader read;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[2]); ++i) {
    PyObject** known = entries_of(PyList_GET_ITEM(args[2], i), 4);
    TORCH_CHECK_TYPE(PyTuple_Check(known[2]) && THPDtype_Check(known[3]), "expected a shape and a dtype");
    if (!read.is_tensor(known[0])) Py_RETURN_NONE;
    const bool same = is_same(THPVariable_Unpack(known[0]), known[1] == Py_True, known[2], known[3]);
    if (PyErr_Occurred()) return nullptr;
    if (!same) Py_RETURN_FALSE;
  }
  if (!read.may_call()) Py_RETURN_NONE;
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// The one argument of a function of a list; nothing where only Python can tell what is in it.
std::optional<std::vector<at::Tensor>> list_of(PyObject* const* args, Py_ssize_t n) {
  TORCH_CHECK_TYPE(n == 1, "expected one list of tensors");
  Reader read;
  auto tensors = read.tensors(args[0]);
  return read.may_call() ? std::optional(std::move(tensors)) : std::nullopt;
}

PyObject* all_have_grads(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  const auto params = list_of(args, n);
  if (!params.has_value()) Py_RETURN_NONE;
  for (const at::Tensor& param : *params) {
    if (!param.grad().defined()) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* common_value(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  const auto tensors = list_of(args, n);
  if (!tensors.has_value() || tensors->empty()) Py_RETURN_NONE;
  double value = 0.0;
  for (size_t i = 0; i < tensors->size(); ++i) {
    const at::Tensor& t = (*tensors)[i];
    if (!t.is_cpu() || t.numel() != 1 || !t.has_storage()) Py_RETURN_NONE;
    if (t.scalar_type() != at::kFloat && t.scalar_type() != at::kDouble) Py_RETURN_NONE;
    const double here =
        t.scalar_type() == at::kFloat ? *t.const_data_ptr<float>() : *t.const_data_ptr<double>();
    if (i > 0 && here != value) Py_RETURN_NONE;
    value = here;
  }
  return PyFloat_FromDouble(value);
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMethodDef direct_ops[] = {
    {"penalty_accumulate_", fastcall<penalty_accumulate_>(), METH_FASTCALL,
     "torch.ops.ewc_fast.penalty_accumulate_, all arguments positional, without a graph; None, with nothing done, for "
     "arguments that only torch.ops can take. Without gradients (None): into the parameters' own, where all have one."},
    {"fisher_accumulate_", fastcall<fisher_accumulate_>(), METH_FASTCALL,
     "torch.ops.ewc_fast.fisher_accumulate_, likewise; True when it is done."},
    {"adamw_", fastcall<adamw_>(), METH_FASTCALL, "torch.ops.ewc_fast.adamw_, likewise; its results."},
    {"sgd_", fastcall<sgd_>(), METH_FASTCALL, "torch.ops.ewc_fast.sgd_, likewise; its results."},
    {"proximal_", fastcall<proximal_>(), METH_FASTCALL,
     "torch.ops.ewc_fast.proximal_, likewise; its results. On the CPU a tuple of four numbers may stand for the rates."},
    {"tap_vectors", fastcall<tap_vectors>(), METH_FASTCALL,
     "The tap of ewc_fast.fisher.capture for one vector per sample: output, input, sums of the weight's squares and "
     "of the bias's (None for none), whether the weight is (out, in), the rules' numbers, and for several backwards where "
     "to sum the output's squares and whether another follows (else None). None where only Python can."},
    {"tap_linear", fastcall<tap_linear>(), METH_FASTCALL,
     "torch.nn.functional.linear of detached parameters, tapped: input, weight, bias, sums as above, how many "
     "samples the input must have, the rest as above. None where it may not be one vector per sample, or as above."},
    {"conv_squares_", fastcall<conv_squares_>(), METH_FASTCALL,
     "Adds the squares of a convolution's per-sample weight gradients over two dimensions, stride 1: sums, input, output "
     "gradient, padding as torch.nn.functional.pad takes it, dilation, groups. None, with nothing done, where the rules' "
     "own way is the one."},
    {"unchanged", fastcall<unchanged>(), METH_FASTCALL,
     "Whether dicts and lists still hold the same objects, and tensors are still the same, as listed; None where only "
     "Python can tell."},
    {"all_have_grads", fastcall<all_have_grads>(), METH_FASTCALL,
     "Whether each tensor of a list has a gradient; None where only Python can tell."},
    {"common_value", fastcall<common_value>(), METH_FASTCALL,
     "The number that all tensors of a list hold, which have one element each and are on the CPU; None where they differ, or "
     "only Python can tell."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace ewc
