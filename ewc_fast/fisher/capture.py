"""Sees every operation that a model does with its parameters, and takes per-sample gradients as backward passes by.

A parameter enters an operation that has a rule without a graph; the operation's output passes through a tap, whose
backward has input and output gradient and adds the squares at once. So no weight gradient is computed, and nothing the
size of the batch times the parameters is kept. What no rule covers is found out and left to others, never missed: a
parameter that is used out of sight still gets an ordinary gradient, and that is looked for.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ewc_fast.fisher.rules import (
    SMALL,
    VECTORS,
    Broadcast,
    Convolution,
    OfTable,
    OfVectors,
    Product,
    Rows,
    Rule,
    SharedRows,
    add_squares_,
)
from ewc_fast.ops.fisher import fisher_accumulate_
from ewc_fast.ops.native import direct

_tap_vectors, _tap_linear = direct("tap_vectors"), direct("tap_linear")

UNCOVERED = "uncovered"
SILENT = "silent"  # no gradient so far: out of the output's reach, or zero; whether that stays so is listened for
SINGLE, SHARED = "one for each sample", "shared by all samples"
# Where the samples lie: in dimension 0 or 1, or in blocks or steps of a flattened dimension 0.
LAYOUTS = ("rows", "columns", "blocks", "steps")

Maker = Callable[..., Any]
_makers: dict[Any, Maker] = {}


class StatusChanged(Exception):
    """A parameter was used in a way not seen before: look again, then run the batch anew."""


def _makes(*functions: Any) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        _makers.update(dict.fromkeys(functions, maker))
        return maker

    return register


# Each maker runs an operation on detached parameters and says, by role, how their gradients follow: the parameter, its
# rule, and the x that the rule wants. `p` detaches a parameter, `is_p` tells whether a tensor is one.


@_makes(F.linear, torch._C._nn.linear)
def _linear(is_p: Any, p: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if is_p(input) or weight.dim() != 2 or input.dim() < 2:
        return None
    return F.linear(input, p(weight), p(bias)), {
        "weight": (weight, Product(left_is_g=True), input),
        "bias": (bias, None if bias is None else Broadcast(bias.shape), None),
    }


@_makes(torch.addmm)
def _addmm(is_p: Any, p: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Any:
    if scales or is_p(mat1) or input.dim() != 1:
        return None
    return torch.addmm(p(input), mat1, p(mat2)), {
        "bias": (input, Broadcast(input.shape), None),
        "weight": (mat2, Product(left_is_g=False), mat1),
    }


@_makes(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(is_p: Any, p: Any, input: Tensor, other: Tensor) -> Any:
    if is_p(input) or other.dim() != 2 or input.dim() < 2:
        return None
    return input @ p(other), {"weight": (other, Product(left_is_g=False), input)}


def _conv(function: Any, dims: int) -> Maker:
    def pair(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)

    def maker(
        is_p: Any,
        p: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if is_p(input) or input.dim() != dims + 2:
            return None
        spread = pair(dilation)
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
            pads = [side for w in reversed(whole) for side in (w // 2, w - w // 2)]
        else:
            pads = [n for n in reversed(pair(0 if padding == "valid" else padding)) for _ in range(2)]
        rule = Convolution(weight.shape, pair(stride), pads, spread, groups)
        return function(input, p(weight), p(bias), stride, padding, dilation, groups), {
            "weight": (weight, rule, input),
            "bias": (bias, None if bias is None else Broadcast(bias.shape, channels=True), None),
        }

    return maker


for _function, _dims in ((torch.conv1d, 1), (torch.conv2d, 2), (torch.conv3d, 3)):
    _makers[_function] = _conv(_function, _dims)
for _name, _dims in (("conv1d", 1), ("conv2d", 2), ("conv3d", 3)):
    _makers[getattr(F, _name)] = _makers[getattr(torch, _name)]


@_makes(F.embedding)
def _embedding(
    is_p: Any,
    p: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not is_p(weight) or max_norm is not None or scale_grad_by_freq:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return F.embedding(input, p(weight), padding_idx), {"weight": (weight, Rows(weight.shape, padding_idx), input)}


def _affine(
    input: Tensor, normed: Callable[[Tensor], Tensor], weight: Any, bias: Any, channels: bool
) -> dict[str, Any]:
    """``normed`` gives the input of weight and bias again: keeping it would be a second copy of the activations."""
    return {
        "weight": (weight, None if weight is None else Broadcast(weight.shape, True, channels, of=normed), input),
        "bias": (bias, None if bias is None else Broadcast(bias.shape, False, channels), None),
    }


@_makes(F.layer_norm, torch.layer_norm)
def _layer_norm(is_p: Any, p: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
                eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    if is_p(input):
        return None
    y = F.layer_norm(input, normalized_shape, p(weight), p(bias), eps)
    return y, _affine(input, lambda x: F.layer_norm(x, normalized_shape, None, None, eps), weight, bias, False)


@_makes(F.rms_norm, torch.rms_norm)
def _rms_norm(is_p: Any, p: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    if is_p(input):
        return None
    y = F.rms_norm(input, normalized_shape, p(weight), eps)
    return y, _affine(input, lambda x: F.rms_norm(x, normalized_shape, None, eps), weight, None, False)


@_makes(F.group_norm)
def _group_norm(is_p: Any, p: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None,
                eps: float = 1e-5) -> Any:  # fmt: skip
    if is_p(input):
        return None
    y = F.group_norm(input, num_groups, p(weight), p(bias), eps)
    return y, _affine(input, lambda x: F.group_norm(x, num_groups, None, None, eps), weight, bias, True)


@_makes(F.batch_norm)
def _batch_norm(is_p: Any, p: Any, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None,
                bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Any:  # fmt: skip
    if is_p(input) or training or running_mean is None or input.dim() < 2:
        return None
    y = F.batch_norm(input, running_mean, running_var, p(weight), p(bias), False, momentum, eps)
    mean, variance = running_mean.clone(), running_var.clone()  # a later use may have others
    normed = lambda x: F.batch_norm(x, mean, variance, None, None, False, momentum, eps)  # noqa: E731
    return y, _affine(input, normed, weight, bias, True)


def _elementwise(function: Any, times: bool, minus: bool) -> Maker:
    def maker(is_p: Any, p: Any, input: Any, other: Any, **alpha: Any) -> Any:
        param, x = (input, other) if is_p(input) else (other, input)
        if alpha or not isinstance(x, Tensor) or is_p(x):
            return None
        fits = param.dim() < x.dim() or (param.dim() == x.dim() and param.shape[0] == 1)
        if not fits or torch.broadcast_shapes(param.shape, x.shape) != x.shape:
            return None
        y = function(p(param) if param is input else input, p(param) if param is other else other)
        rule = Broadcast(param.shape, times, negative=minus and param is other)
        return y, {"other": (param, rule, x if times else None)}

    return maker


for _operation in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
    _makers[_operation] = _elementwise(_operation, times=True, minus=False)
for _operation in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__):
    _makers[_operation] = _elementwise(_operation, times=False, minus=False)
for _operation in (torch.sub, Tensor.sub, Tensor.__sub__):
    _makers[_operation] = _elementwise(_operation, times=False, minus=True)


@_makes(Tensor.expand)
def _expand(is_p: Any, p: Any, input: Tensor, *sizes: Any) -> Any:
    y = p(input).expand(*sizes)
    if y.dim() != input.dim() or not y.dim() or input.shape[0] != 1:
        return None
    return y.contiguous(), {"other": (input, Broadcast(input.shape), None)}


# Where a first dimension of 1 becomes that of the other tensors.
_BROADCASTING = frozenset({F.scaled_dot_product_attention, torch.where, Tensor.where})
_BROADCASTING |= {torch.masked_fill, Tensor.masked_fill}
for _name in ("add", "sub", "mul"):
    _BROADCASTING |= {getattr(torch, _name), getattr(Tensor, _name), getattr(Tensor, _name + "_")}
    _BROADCASTING |= {getattr(Tensor, f"__{_which}{_name}__") for _which in ("", "r", "i")}


@dataclass
class _Shared:
    """What an embedding gives to all samples, or what is made of that or of another parameter alone."""

    tensor: Tensor  # kept: another one might get its id
    table: Tensor  # the parameter, with a graph from here to the tensor
    rows: Rows | None = None  # of the embedding itself
    ids: Tensor | None = None
    alone: bool = False  # not of an embedding

    def __post_init__(self) -> None:
        self.version = self.tensor._version

    def rule(self, of: Broadcast) -> Broadcast:
        given = of.shape, of.times_x, of.channels, of.negative, of.of
        if self.rows is not None:
            return SharedRows(*given, self.rows, self.ids)
        return OfTable(*given, self.tensor, self.table)


def _own_graph() -> Any:
    """A graph that keeps copies: nothing that is changed later, nor what a checkpoint frees."""
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)


def _are_relative(ids: Tensor) -> bool:
    """Whether an embedding's numbers tell how far two positions are apart, and in which order: so not of one sample."""
    if ids.dim() != 2 or ids.shape[0] != ids.shape[1] or len(ids) < 2:
        return False
    return bool((ids[1:, 1:] == ids[:-1, :-1]).all() & (ids[0, 1] != ids[1, 0]))


_without_override: dict[Any, Any] = {}


def _body(function: types.FunctionType) -> Any:
    """A copy of one of torch's Python functions that runs its body instead of asking the mode again."""
    if function not in _without_override:
        names = dict(function.__globals__)
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            if name in names:
                names[name] = lambda *_: False
        copied = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        _without_override[function] = copied
    return _without_override[function]


_MASKED = frozenset({torch.masked_select, Tensor.masked_select})
_TAKES = frozenset({torch.take_along_dim, Tensor.take_along_dim})
_ALONG = _TAKES | {
    getattr(holder, name)
    for name in ("index_select", "gather", "index_add", "index_copy", "scatter", "scatter_add")
    for holder in (torch, Tensor)
}
_ALONG |= {getattr(Tensor, name) for name in ("index_add_", "index_copy_", "scatter_", "scatter_add_")}
_INDEXED = frozenset(
    {Tensor.__getitem__, Tensor.__setitem__, torch.index_put, Tensor.index_put, Tensor.index_put_, torch.index_put_}
)
_INNER = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})
_SELECTS = _MASKED | _ALONG | _INDEXED
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate, torch.vstack, torch.row_stack, torch.hstack})


def _first_tensor_index(index: Any) -> tuple[int, Tensor | None]:
    """The first index that is a tensor or a list of numbers, and the dimension that it picks from."""
    dim = 0
    for part in index if isinstance(index, tuple) or _holds_tensors(index) else (index,):
        if isinstance(part, Tensor) and part.dim():
            return dim, part
        if isinstance(part, list) or (hasattr(part, "__array__") and not isinstance(part, Tensor)):
            return dim, torch.as_tensor(part)
        if part is Ellipsis:
            return -1, None  # what follows are the last dimensions
        if part is not None and not isinstance(part, bool):
            dim += 1
    return -1, None


def _holds_tensors(index: Any) -> bool:
    return isinstance(index, list) and any(isinstance(part, (Tensor, slice)) or part is None for part in index)


class _Tap(torch.autograd.Function):
    """The identity; its backward hands on what it saved and the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor | None, take: Any, *saved: Tensor | None) -> Tensor:
        ctx.take = take
        ctx.save_for_backward(*saved)
        return y.detach()  # which the model may change; y itself marked as changed would have to be no view

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint runs the model again here, in sight
        with torch._C.DisableTorchFunction():
            ctx.take(saved, g)
        return (g, *[None] * (2 + len(saved)))


class Capture(TorchFunctionMode):
    """Watches one forward and its backwards.

    Args:
        leaves: The parameters by name, as the model holds them meanwhile.
        sums: Where the squares go, by name.
        status: What is known of each parameter: a layout, ``UNCOVERED`` or ``SILENT``; changed.
        embedded: Of embeddings of a list of numbers, whether those were one for each sample or shared by all; changed.
        often: Parameters that have been used several times in one forward; grows.
        native: Sums of the squares of linear layers that have been tapped in C++, by weight and bias; changed.
        size: Samples in the batch.
        once: There will be one backward, not several.
        hold: Bytes of gradients of several cotangents to hold at once.
        looking: Find out the status instead of adding squares.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        status: dict[str, str],
        embedded: dict[str, str],
        often: set[str],
        native: dict[tuple[str | None, str | None], tuple[Tensor, Tensor | None]],
        size: int,
        once: bool,
        hold: int,
        looking: bool,
    ) -> None:
        super().__init__()
        self._leaves, self._names = leaves, {id(t): name for name, t in leaves.items()}
        self._sums, self.status, self._embedded = sums, status, embedded
        self._often, self._native = often, native
        self._size, self._once, self._hold_bytes, self._looking = size, once, hold, looking
        self._lengths: set[int] = set()
        self._count: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Rule, Tensor, Tensor]]] = {}
        self._shared: dict[int, _Shared] = {}
        self._tables: dict[str, Tensor] = {}  # parameters of which something is made alone
        self._squares: dict[tuple[str | None, ...], Tensor] = {}
        # _again, where native taps read it.
        self._more = None if once else torch.zeros((), dtype=torch.bool, device="cpu")
        self._held: dict[str, list[Tensor]] = {}
        self._held_bytes = 0
        self._backward = self._again = False
        self._moved = False
        self.without_graph = False  # in the forward, a parameter was used with grad disabled: a reentrant checkpoint
        self._heard: list[tuple[list[str], Tensor]] = []
        self.reached: set[str] = set()
        self.verified: set[str] = set()
        self.output_bytes = 0  # looking: of operations with parameters
        self.factors: Tensor | None = None  # looking: of each sample's cotangent, against the backward before
        self.candidates: dict[str, set[str]] = {}
        self.ambiguous: set[str] = set()  # used several times, and once where several layouts fit
        self._earlier: dict[tuple[str, ...], list[Tensor]] = {}
        self._anchor = next(iter(leaves.values()), None)  # any tensor that requires grad

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is F.linear
            and not self._looking
            and (result := self._linear_again(*args, **(kwargs or {}))) is not None
        ):
            return result
        kwargs = kwargs or {}
        if func in _INNER and not self._backward and not self._looking:
            self._uncover(list(self._leaves))  # the taps would take it for the backward of the estimate
        found = self._found(args, kwargs)
        if not found:
            if func in _SELECTS and not self._moved:
                self._moved = self._moves_samples(func, args, kwargs)
            elif func in _JOINS and not self._moved:
                self._moved = self._joins_samples(*args, **kwargs)
            return func(*args, **kwargs)
        maker, made = _makers.get(func), None
        if maker is not None:
            # A TypeError: arguments that the maker does not know, or a mistake that the operation itself will name.
            with contextlib.suppress(TypeError):
                made = maker(self._is_mine, self._detached, *args, **kwargs)
            if made is not None and (result := self._tapped(*made)) is not None:
                return result
        elif isinstance(func, types.FunctionType) and func.__module__ == "torch.nn.functional":
            with self:
                return _body(func)(*args, **kwargs)
        if any(id(t) in self._shared for t in _tensors(args, kwargs)):
            return self._of_shared(func, args, kwargs, found)
        if len(found) == 1 and (made := self._made_of_parameter(func, args, kwargs, found[0])) is not None:
            return made
        result = func(*args, **kwargs)
        if self._is_unknown(result, args):
            self._uncover(found)
        return result

    def _is_unknown(self, result: Any, args: Any) -> bool:
        """Whether an operation without a rule lets an ordinary gradient through."""
        if not torch.is_grad_enabled():
            self.without_graph |= not self._backward and isinstance(result, Tensor)
            return False
        return _needs_grad(result) and not any(result is a for a in args)

    def _linear_again(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """F.linear of parameters that were tapped natively before: what the rest comes to, in a third of the time."""
        names = self._names.get(id(weight)), self._names.get(id(bias))
        sums = self._native.get(names)
        if sums is None or self._moved or self._shared or id(input) in self._names:
            return None
        if bias is not None and names[1] is None and bias.requires_grad:
            return None  # it is made of parameters, to which the native tap lets no gradient through
        several = self._several(names, (self._size, len(weight)), sums[0])
        tapped = _tap_linear(input, weight, bias, *sums, self._size, SMALL, VECTORS, *several)
        if tapped is not None and not self._backward:
            self._count_uses(names)
        return tapped

    def _found(self, args: Any, kwargs: Any) -> list[str]:
        return [name for name in _named(self._names, args, kwargs) if self.status.get(name) != UNCOVERED]

    def _moves_samples(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether rows are picked or put by what the data say, so that a row's number no longer is its sample's."""
        if func in _MASKED:
            return True
        source, *where = args if args else (kwargs.get("input"),)
        if not isinstance(source, Tensor) or not source.is_floating_point() or not source.dim():
            return False
        if func in _ALONG:
            dim, index = (*where, None, None)[:2]
            dim, index = kwargs.get("dim", dim), kwargs.get("index", kwargs.get("indices", index))
            if func in _TAKES and len(where) == 1:
                dim, index = kwargs.get("dim"), where[0]
            if dim is None:
                return True
            dim %= source.dim()
        else:
            dim, index = _first_tensor_index(where[0] if where else kwargs.get("indices"))
        if not isinstance(index, Tensor) or not (
            (dim == 0 and source.shape[0] % self._size == 0) or (dim == 1 and source.shape[1] == self._size)
        ):
            return False
        if index.dtype == torch.bool:
            return not bool(index.all())
        numbers = torch.arange(source.shape[dim], device=index.device)
        if index.dim() > 1 and func in _ALONG:
            numbers = numbers.view(*[-1 if d == dim else 1 for d in range(index.dim())])
            return index.shape[dim] != source.shape[dim] or not bool((index == numbers).all())
        return index.numel() != source.shape[dim] or not bool((index.flatten() == numbers).all())

    def _joins_samples(self, tensors: Any, dim: Any = 0, **_: Any) -> bool:
        """Whether pieces of several lengths are put one after the other: samples then differ in their rows."""
        if dim != 0 or not all(isinstance(t, Tensor) and t.dim() and t.is_floating_point() for t in tensors):
            return False
        rows = [t.shape[0] for t in tensors]
        return sum(rows) > self._size and sum(rows) % self._size == 0 and any(n % self._size for n in rows)

    def _is_mine(self, t: Any) -> bool:
        return id(t) in self._names

    def _detached(self, t: Any) -> Any:
        name = self._names.get(id(t))
        return t if name is None or self.status.get(name) == UNCOVERED else t.detach()

    def _uncover(self, names: list[str]) -> None:
        if not self._looking:
            names = [name for name in names if self.status.get(name) != SILENT]  # an ordinary gradient will tell
            if not names:
                return
        for name in names:
            self.status[name] = UNCOVERED
            self.candidates.pop(name, None)
        if not self._looking:
            self._look_again()

    def _look_again(self) -> None:
        if self._backward:  # what a checkpoint runs again; squares have been added
            raise RuntimeError(
                "the model uses its parameters in a way that the first batches did not show: give it batches of one "
                "sample"
            )
        raise StatusChanged

    def _tapped(self, y: Tensor, uses: Mapping[str, Any]) -> Tensor | None:
        names, rules, xs, silent = [], [], [], []
        for t, rule, x in uses.values():
            name = self._names.get(id(t))
            status = None if name is None else self.status.get(name)
            if name is None or status == UNCOVERED:
                continue
            if status == SILENT and not self._looking:
                silent.append(name)
                continue
            if id(t) in self._shared:
                if type(rule) is not Broadcast or not self._leads_back(self._shared[id(t)]):
                    return None
                rule = self._shared[id(t)].rule(rule)
            names.append(name)
            rules.append(rule)
            xs.append(x)
        graph = torch.is_grad_enabled()
        self.without_graph |= not graph and not self._backward
        if silent:
            y = self._listen(y, silent) if graph else y
            if not names:
                return y
        if self._moved or not names:
            return None
        if len(names) == 1 and isinstance(rules[0], Rows) and self._size > 1:
            name, ids = names[0], xs[0]
            if ids.dim() == 1:
                use = self._embedded.setdefault(name, SINGLE if len(ids) == self._size else SHARED)
                if use == SINGLE and len(ids) != self._size:
                    return None  # used in both ways
            if (
                not ids.dim()
                or ids.shape[0] == 1
                or (ids.dim() == 1 and self._embedded[name] == SHARED)
                or _are_relative(ids)
            ):
                return self._share(y, name, rules[0], ids)
        layouts: set[str] = set()
        if self._looking:
            layouts = {layout for layout in LAYOUTS if self._may_be(layout, y, rules)}
            for name in names:
                self.candidates[name] = self.candidates.get(name, set(LAYOUTS)) & layouts
                if not self.candidates[name]:
                    return None
        else:
            layouts = {self.status.get(name, "") for name in names}
            if "" in layouts:
                self._look_again()
            if not all(self._may_be(layout, y, rules) for layout in layouts):
                if not graph and not self._backward:
                    self._uncover(names)  # what a checkpoint runs again in the backward is too late to look at
                return None
        if y.dim() > 2 and not isinstance(rules[0], Convolution):
            self._lengths.update(y.shape[:-1])
        if not self._backward:  # also without a graph: reentrant checkpoints make theirs in the backward
            self._count_uses(names)
        if not graph:
            return y
        self.output_bytes += y.numel() * y.element_size() if self._looking else 0
        of_vectors = [rule for rule in rules if isinstance(rule, OfVectors) and rule.is_of_vectors(y)]
        only_vectors = len(of_vectors) == len(rules)
        if only_vectors and not self._looking and layouts == {"rows"} and self._often.isdisjoint(names):
            tapped = self._tapped_natively(y, names, rules, xs)
            if tapped is not None:
                return tapped
        saved = [None if x is None else x.detach() for x in xs]
        if y.dtype in (torch.bfloat16, torch.float16):
            saved = [x.to(y.dtype) if x is not None and x.is_floating_point() else x for x in saved]

        def take(tensors: Any, g: Tensor) -> None:
            if self._looking:
                self._compare(tuple(names), layouts, g)
                return
            xs = [g if x is None else x for x in tensors]
            if only_vectors and self._are_vectors(names):
                squares = self._add_to_squares(tuple(names), g)
                if not self._again:
                    for name, of_vector, x in zip(names, of_vectors, xs, strict=True):
                        of_vector.add_vectors_(self._sums[name], x, squares)
                    del self._squares[tuple(names)]
                return
            for name, rule, x in zip(names, rules, xs, strict=True):
                self._take(name, rule, x, g)

        return _Tap.apply(y, self._anchor, take, *saved)

    def _listen(self, y: Tensor, names: list[str]) -> Tensor:
        """Where no gradient comes to an operation's output, or a zero one, none comes to its parameters."""

        def hear(_: Any, g: Tensor) -> None:
            self._heard.append((names, g.any()))

        return _Tap.apply(y, self._anchor, hear)

    def awake(self) -> list[str]:
        """After a backward: the silent parameters that it may have given a gradient; their squares are not added."""
        found = {name for names, sound in self._heard if sound for name in names}
        self._heard.clear()
        for name, leaf in self._leaves.items():
            if leaf.grad is not None and self.status.get(name) == SILENT:
                leaf.grad = None
                found.add(name)
        return [name for name in self._leaves if name in found]

    def _count_uses(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is None:
                continue
            self._count[name] = self._count.get(name, 0) + 1
            if self._count[name] > 1 and name not in self._often:
                self._often.add(name)
                if not self._looking:  # the first use may have been tapped as the only one
                    self._look_again()

    def _tapped_natively(self, y: Tensor, names: list[str], rules: list[Rule], xs: list[Any]) -> Tensor | None:
        """The tap in C++ of a matrix, a vector that is added, or both; None where only Python can."""
        weight = bias = None
        x, left_is_g = y, True
        for name, rule, t in zip(names, rules, xs, strict=True):
            if isinstance(rule, Product):
                weight, x, left_is_g = self._sums[name], t, rule.left_is_g
            else:
                bias = self._sums[name]
        if weight is not None and bias is not None and weight.dtype != bias.dtype:
            return None
        several = self._several(tuple(names), y.shape, self._sums[names[0]])
        tapped = _tap_vectors(y, x, weight, bias, left_is_g, SMALL, VECTORS, *several)
        if tapped is not None and weight is not None and left_is_g:
            self._native[names[0], names[1] if bias is not None else None] = weight, bias
        return tapped

    def _several(self, names: tuple[str | None, ...], shape: Sequence[int], like: Tensor) -> Sequence[Tensor | None]:
        """Where a native tap sums the squares of several backwards, and whether another one follows."""
        if self._once:
            return None, None
        if names not in self._squares:
            self._squares[names] = like.new_zeros(shape)
        return self._squares[names], self._more

    def _share(self, y: Tensor, name: str, rows: Rows, ids: Tensor) -> Tensor:
        """What an embedding gives to all samples is seen like a parameter, in whose gradient the samples are apart."""
        table = self._leaves[name].detach()
        if len(table) <= ids.numel():  # a row's gradients may be many, which half precision cannot sum
            table = table.to(torch.promote_types(y.dtype, torch.float32))
        with _own_graph():
            y = F.embedding(ids, table.requires_grad_(), rows.padding).to(y.dtype)
        self._names[id(y)] = name
        self._shared[id(y)] = _Shared(y, table, rows, ids)
        return y

    def _made_of_parameter(self, func: Any, args: Any, kwargs: Any, name: str) -> Tensor | None:
        """What an operation without a rule makes of one parameter alone, as ``1 + weight``, seen in its place then.

        None where it takes more than that or makes something else.
        """
        if self.status.get(name) == SILENT and not self._looking:
            return None  # an ordinary gradient will tell
        leaf, called = self._leaves[name], getattr(func, "__name__", "")
        if called.startswith(("__get__", "__i")) or (called.endswith("_") and not called.endswith("__")):
            return None  # an attribute; a change in place
        others = [t for t in _tensors(args, kwargs) if t is not leaf]
        if any(t.requires_grad or t.shape[:1] == (self._size,) for t in others):
            return None
        if not any(a is leaf for a in (*args, *kwargs.values())):
            return None  # it is in a list
        table = self._tables.setdefault(name, leaf.detach().requires_grad_())
        with _own_graph():
            result = func(
                *(table if a is leaf else a for a in args),
                **{key: table if a is leaf else a for key, a in kwargs.items()},
            )
        if not isinstance(result, Tensor) or result.requires_grad != torch.is_grad_enabled():
            return None
        self._shared[id(result)], self._names[id(result)] = _Shared(result, table, alone=True), name
        return result

    def _of_shared(self, func: Any, args: Any, kwargs: Any, found: list[str]) -> Any:
        """An operation without a rule on what all samples share, and perhaps on more."""
        if func in _BROADCASTING:
            args, kwargs = self._given_to_each(args, kwargs)
            if not self._found(args, kwargs):
                return func(*args, **kwargs)
        with _own_graph():
            result = func(*args, **kwargs)
        unknown = self._is_unknown(result, args)
        made = self._made_of_shared(func, result, args, kwargs)
        if made is not None:
            self._shared[id(result)], self._names[id(result)] = made, found[0]
        elif unknown or self._is_changed(args, kwargs):
            self._uncover(found)
        return result

    def _made_of_shared(self, func: Any, result: Any, args: Any, kwargs: Any) -> _Shared | None:
        """What an operation has made of what all samples share, if of that alone: they share it as well."""
        if not isinstance(result, Tensor) or not result.is_floating_point() or id(result) in self._names:
            return None
        if torch.is_grad_enabled() and not result.requires_grad:
            return None
        table: Tensor | None = None
        tensors = list(_tensors(args, kwargs))
        alone = any(id(t) in self._shared and self._shared[id(t)].alone for t in tensors)
        for t in tensors:
            of = self._shared.get(id(t))
            if of is None and (t.requires_grad or (alone and t.shape[:1] == (self._size,))):
                return None
            if of is not None and func in _BROADCASTING and t.shape[:1] == (1,) != result.shape[:1]:
                return None  # another batch may have as many samples as this has become
            if of is not None and table is not None and of.table is not table:
                return None
            table = table if of is None else of.table
        return None if table is None else _Shared(result, table, alone=alone)

    def _given_to_each(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """An operation's arguments: where some have every sample, what all share is repeated for each, and tapped."""
        tensors = list(_tensors(args, kwargs))
        given: dict[int, Tensor] = {}
        for t in tensors:
            parted = any(other.dim() == t.dim() and other.shape[:1] == (self._size,) for other in tensors)
            if id(t) in self._shared and parted and t.shape[0] == 1:
                each = t.detach().expand(self._size, *t.shape[1:])
                tapped = self._tapped(each, {"other": (t, Broadcast(t.shape), None)})
                given.update({} if tapped is None else {id(t): tapped})
        return [given.get(id(a), a) for a in args], {key: given.get(id(a), a) for key, a in kwargs.items()}

    def _leads_back(self, shared: _Shared) -> bool:
        """Whether gradients of several samples at once find their way to the table; tried while nothing is lost."""
        y = shared.tensor
        if not (self._looking and torch.is_grad_enabled() and y.requires_grad):
            return y.requires_grad or not torch.is_grad_enabled()
        try:
            shared.rule(Broadcast(y.shape)).per_sample(y, y.new_zeros(2, *y.shape))
        except RuntimeError:
            return False
        return True

    def _is_changed(self, args: Any, kwargs: Any) -> bool:
        """Whether an operation changed what all samples share: taps before it would take the graph after it."""
        shared = [self._shared[id(t)] for t in _tensors(args, kwargs) if id(t) in self._shared]
        return any(s.tensor._version != s.version for s in shared)

    def out_of_sight(self) -> list[str]:
        """After the backward: parameters that got an ordinary gradient, or whose shared rows did."""
        seen = [name for name, leaf in self._leaves.items() if leaf.grad is not None]
        return seen + [self._names[i] for i, shared in self._shared.items() if shared.table.grad is not None]

    def _may_be(self, layout: str, y: Tensor, rules: list[Rule]) -> bool:
        """Whether an operation's output may have its samples there."""
        n = self._size
        if layout == "rows":
            return y.shape[0] == n
        if layout == "columns":
            return y.dim() > 2 and y.shape[1] == n and all(
                isinstance(rule, (Product, Rows))
                or (isinstance(rule, Broadcast) and not rule.channels and len(rule.shape) <= y.dim() - 2)
                for rule in rules
            )  # fmt: skip
        length = y.shape[0] // n
        return y.dim() == 2 and y.shape[0] == length * n and length > 1 and length in self._lengths and all(
            isinstance(rule, Product) or (isinstance(rule, Broadcast) and len(rule.shape) == 1) for rule in rules
        )  # fmt: skip

    def _by_sample(self, t: Tensor, layout: str) -> Tensor:
        if layout == "columns":
            return t.transpose(0, 1)
        if layout == "blocks":
            return t.reshape(self._size, -1, *t.shape[1:])
        if layout == "steps":
            return t.reshape(-1, self._size, *t.shape[1:]).transpose(0, 1)
        return t

    def _compare(self, names: tuple[str, ...], layouts: set[str], g: Tensor) -> None:
        """A gradient is linear in the cotangents: where a sample lies, it is multiplied by that sample's factor."""
        earlier = self._earlier.setdefault(names, [])  # in the order of the backward, the same in both
        if self.factors is None:
            self.reached.update(names)
            earlier.append(g)
            return
        if not earlier:
            raise StatusChanged
        before = earlier.pop(0)
        if not before.any():
            return
        fits = set()
        for layout in layouts:
            now, then = self._by_sample(g, layout), self._by_sample(before, layout)
            expected = then * self.factors.to(then.dtype).view(-1, *[1] * (then.dim() - 1))
            rtol = 0.1 if g.dtype in (torch.bfloat16, torch.float16) else 0.01
            near = (now - expected).abs() <= rtol * expected.abs()  # a tenth of allclose's time, which knows NaN
            if near.all() or torch.allclose(now, expected, rtol=rtol, atol=0.0, equal_nan=True):
                fits.add(layout)
        for name in names:
            if len(fits) > 1 and self._count.get(name, 0) > 1:
                self.ambiguous.add(name)  # another use may have the one layout, and this the other
            self.candidates[name] = self.candidates.get(name, set()) & fits
            self.verified.add(name)

    def _take(self, name: str, rule: Rule, x: Tensor, g: Tensor) -> None:
        layout = self.status[name]
        if layout in ("blocks", "steps") and isinstance(rule, Broadcast):
            rule, x = rule.of_rows(x)
        x, g = self._by_sample(x, layout), self._by_sample(g, layout)
        total = self._sums[name]
        if self._count[name] == 1:
            if isinstance(rule, Convolution) and (self._again or name in self._held):
                if not rule.add_directly_(total, x, g, shared=True):
                    self._hold(name, rule, x, g)
            else:
                rule.add_squares_(total, x, g)
            return
        if isinstance(rule, OfTable) and len(g) * total.numel() < g.numel():  # there are less of these to keep
            x = g = rule.per_sample(x, g)
            rule = Broadcast(total.shape)
        waiting = self._waiting.setdefault(name, [])
        waiting.append((rule, x, g))
        if len(waiting) == self._count[name]:
            self._add_waiting(name)

    def _add_to_squares(self, names: tuple[str, ...], g: Tensor) -> Tensor:
        """The squares of an operation's g, summed over the cotangents so far."""
        g = g.to(self._sums[names[0]].dtype)
        if names in self._squares:
            fisher_accumulate_([self._squares[names]], [g])
        else:
            self._squares[names] = g.square()
        return self._squares[names]

    def _are_vectors(self, names: list[str]) -> bool:
        """Whether parameters are used once, with one vector per sample, and summed in one dtype."""
        return (
            all(self._count[name] == 1 and self.status[name] == "rows" for name in names)
            and len({self._sums[name].dtype for name in names}) == 1
        )

    def _hold(self, name: str, rule: Convolution, x: Tensor, g: Tensor) -> None:
        """Several cotangents: as many of their g as memory allows are taken at once."""
        held = self._held.setdefault(name, [])
        held.append(g)
        self._held_bytes += g.numel() * g.element_size()
        if not self._again or self._held_bytes > self._hold_bytes:
            rule.add_many_(self._sums[name], x, held)
            self._held_bytes -= sum(g.numel() * g.element_size() for g in held)
            held.clear()

    def _add_waiting(self, name: str) -> None:
        """Several uses: their gradients are summed, sample by sample, before they are squared."""
        waiting = self._waiting.pop(name)
        one = torch.zeros_like(self._sums[name])
        for i in range(self._size):
            one.zero_()
            for rule, x, g in waiting:
                rule.add_one_(one, x[i : i + 1], g[i : i + 1])
            add_squares_(self._sums[name], one[None])

    def backward(self, z: Tensor, cotangent: Tensor, *, again: bool) -> None:
        """Runs one backward from the output, with everything that it leads to; ``again``: another one follows."""
        assert not (again and self._once)
        if self._more is not None and self._again != again:
            self._more.fill_(again)
        self._backward, self._again = True, again
        if z.requires_grad:
            cotangents = (cotangent.to(z.dtype),)
            # Autocast would take the products in half precision. The mode is for what checkpoints run again, which
            # restore autocast; torch.autograd.backward() would be taken for an operation itself.
            device = z.device.type
            with (
                torch.autocast(device, enabled=False)
                if torch.is_autocast_enabled(device)
                else contextlib.nullcontext(),
                self,
            ):
                torch.autograd.Variable._execution_engine.run_backward(
                    (z,), cotangents, again, False, (), allow_unreachable=True, accumulate_grad=True
                )
        for name in list(self._waiting):
            self._add_waiting(name)


class Uses(TorchFunctionMode):
    """Counts the operations that take a parameter, by name; not those inside scripts and autograd functions."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(t): name for name, t in leaves.items()}
        self.count = dict.fromkeys(leaves, 0)
        self.without_graph = False  # one was used with grad disabled: a reentrant checkpoint

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = _named(self._names, args, kwargs)
        if used and next(_tensors((result,), {}), None) is not None:  # not a shape, say
            for name in used:
                self.count[name] += 1
            self.without_graph |= not torch.is_grad_enabled()
        return result


def _named(names: Mapping[int, str], args: Any, kwargs: Any) -> list[str]:
    """The names, by id, of what an operation is given, alone or in a list."""
    found = []
    for a in (*args, *kwargs.values()):
        if isinstance(a, (list, tuple)):
            found += [names[id(t)] for t in a if id(t) in names]
        elif id(a) in names:
            found.append(names[id(a)])
    return found


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """An operation's, of which it may have lists."""
    for a in (*args, *kwargs.values()):
        for t in a if isinstance(a, (list, tuple)) else (a,):
            if isinstance(t, Tensor):
                yield t


def _needs_grad(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.requires_grad
    return isinstance(result, (list, tuple)) and any(_needs_grad(r) for r in result)
