// penalty_accumulate_ for Python, past torch.ops, which turns every argument into an IValue and back: for a small model
// that takes twice as long as the op. The dispatcher is called as ever, so that profilers and modes see the op.
#include "direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ewc {
namespace {

using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    at::TensorList, at::TensorList, const at::Tensor&, const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool);

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
  std::vector<int64_t> integers(PyObject* object) {
    return list<int64_t>(object, [this](PyObject* item) {
      if (!PyLong_CheckExact(item)) usual = false;
      return usual ? static_cast<int64_t>(PyLong_AsLongLong(item)) : 0;
    });
  }
};

PyObject* penalty_accumulate_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 13, "penalty_accumulate_ takes 13 arguments, got ", n);
  Reader read;
  const auto params = read.tensors(args[0]), grads = read.tensors(args[1]);
  const at::Tensor anchor = read.tensor(args[2]), fisher = read.tensor(args[3]);
  const auto offsets = read.integers(args[4]), strides = read.integers(args[5]);
  const at::Tensor ewc_lambda = read.tensor(args[6]), delta = read.tensor(args[7]);
  const auto scale = read.optional(args[8]), constant = read.optional(args[9]);
  const auto grad_scale = read.optional(args[10]), found_inf = read.optional(args[11]);
  if (!PyBool_Check(args[12])) read.usual = false;
  if (PyErr_Occurred()) return nullptr;  // an integer beyond 64 bits
  if (!read.usual || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result;
  {
    const pybind11::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView no_graph;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ewc_fast::penalty_accumulate_", "")
                               .typed<Signature>();
    result = op.call(params, grads, anchor, fisher, offsets, strides, ewc_lambda, delta, scale, constant, grad_scale,
                     found_inf, args[12] == Py_True);
  }
  const THPObjectPtr penalty(THPVariable_Wrap(std::get<0>(result))), predicted(THPVariable_Wrap(std::get<1>(result))),
      by_tensor(THPVariable_Wrap(std::get<2>(result)));
  return PyTuple_Pack(3, penalty.get(), predicted.get(), by_tensor.get());
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef direct_penalty_accumulate = {
    "penalty_accumulate_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(penalty_accumulate_)),
    METH_FASTCALL,
    "torch.ops.ewc_fast.penalty_accumulate_, all arguments positional, without a graph; None, with nothing done, for "
    "arguments that only torch.ops can take."};

}  // namespace ewc
