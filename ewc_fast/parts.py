"""What one call of an op serves: parameters, and the slices of the state that are theirs."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ewc_fast.layout import Slot
from ewc_fast.ops import penalty as ops
from ewc_fast.ops import steps
from ewc_fast.ops.autograd import GradientBuffer
from ewc_fast.ops.memory import same_memory_order
from ewc_fast.ops.native import direct, never
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult, StepQuadratic

if TYPE_CHECKING:
    from ewc_fast.optim.metrics import StepMetric

_all_have_grads, _unchanged = direct("all_have_grads"), direct("unchanged")


class Watch:
    """What something was made of, and whether it still is so: asked at every step, at the cost of microseconds.

    Args:
        dicts: (dict, key, value), with None for no value; compared by identity.
        lists: Sequences whose items are compared by identity.
        tensors: Whose dtype, shape and need of a gradient are compared.
    """

    def __init__(
        self,
        dicts: Iterable[tuple[dict[str, Any], str, Any]] = (),
        lists: Iterable[Sequence[Any]] = (),
        tensors: Iterable[Tensor] = (),
    ) -> None:
        self.dicts = list(dicts)
        self.lists = [(items, tuple(items)) for items in lists if not isinstance(items, tuple)]
        self.tensors = [(t, t.requires_grad, t.shape, t.dtype) for t in tensors]

    def holds(self) -> bool:
        """Whether all is as it was. Another device or memory order is not seen: the ops see those as they read."""
        same = None if torch.compiler.is_compiling() else _unchanged(self.dicts, self.lists, self.tensors)
        if same is not None:
            return same
        return (
            all(held.get(key) is value for held, key, value in self.dicts)
            and all(len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in self.lists)
            and all(
                t.requires_grad is trainable and t.shape == shape and t.dtype is dtype
                for t, trainable, shape, dtype in self.tensors
            )
        )

    def extended(self, dicts: Iterable[tuple[dict[str, Any], str, Any]], lists: Iterable[Sequence[Any]]) -> Watch:
        """One that watches more."""
        more = Watch(dicts, lists)
        more.dicts, more.tensors = self.dicts + more.dicts, self.tensors
        more.lists = self.lists + more.lists
        return more


@dataclass(eq=False)
class Part:
    """Parameters that one call of an op serves.

    Attributes:
        params: The parameters themselves.
        rows: How many leading rows of each are protected, None for all.
        slots: Where each lies in the flat buffers.
        quadratic: The state, as the ops take it.
        buffer: Level 1's gradient buffer; shared by a part's subsets.
        backend: As the ops take it.
        maximize: Whether the optimizer that steps these parameters maximises.
        group: Which of its parameter groups they are in, where that matters.
    """

    params: list[nn.Parameter]
    rows: list[int | None]
    slots: list[Slot]
    quadratic: FlatQuadratic
    buffer: GradientBuffer
    backend: str = "auto"
    maximize: bool = False
    group: int = 0

    def __post_init__(self) -> None:
        self.dtype = self.params[0].dtype if self.params else None
        self._whole = all(n is None for n in self.rows)
        self._into_own: Callable[[], Any] | None = None  # these are made where they are first asked for
        self._pull: Callable[..., Any] | None = None

    def subset(self, chosen: list[int], *, maximize: bool = False, factors: Sequence[float] | None = None) -> Part:
        """The same state, of some of the parameters.

        Args:
            chosen: Their positions.
            maximize: See the class.
            factors: Of each one's lambda, beside those that it has.
        """
        q, slots = self.quadratic, [self.slots[i] for i in chosen]
        index = torch.tensor(chosen, dtype=torch.long, device=q.anchor.device)
        scale = None if q.scale is None else q.scale[index]
        if factors is not None and any(factor != 1.0 for factor in factors):
            scale = lambda_factors(factors, q.anchor.device) * (1.0 if scale is None else scale)
        quadratic = FlatQuadratic(  # not _replace, whose result the compiler of torch 2.11 takes apart wrongly
            q.anchor,
            q.fisher,
            [s.offset for s in slots],
            [stride for s in slots for stride in s.strides],
            q.ewc_lambda,
            q.delta,
            scale,
            None if q.constant is None else q.constant[index],
        )
        params, rows = [self.params[i] for i in chosen], [self.rows[i] for i in chosen]
        return replace(self, params=params, rows=rows, slots=slots, quadratic=quadratic, maximize=maximize)

    def without(self, names: set[str]) -> Part:
        """The same state, without some of the parameters."""
        return self.subset([i for i, s in enumerate(self.slots) if s.name not in names], maximize=self.maximize)

    @functools.cached_property
    def step_quadratic(self) -> StepQuadratic:
        """The quadratic as optimizer steps take it."""
        q = self.quadratic
        return StepQuadratic(q.strides, q.anchor, q.fisher, q.offsets, q.ewc_lambda, q.delta, q.scale, q.constant)

    def accumulate_quickly(self) -> PenaltyResult | None:
        """The penalty's gradient, added to the parameters' own in the usual case: all have one, and the op takes them.
        None, with nothing done, where it is not that."""
        if self._into_own is None:
            q = self.quadratic
            self._into_own = (
                ops.accumulator_into_own(self.params, q, self.maximize, backend=self.backend) if self._whole else never
            )
        try:
            result = self._into_own()
        except (ValueError, TypeError, RuntimeError):
            self._into_own = never
            return None  # to be met again, and dealt with
        return None if result is None else tuple.__new__(PenaltyResult, result)

    def pull_quickly(self, metric: StepMetric) -> PenaltyResult | None:
        """The proximal pull in the usual case: the metric's rates are numbers, and all is on the CPU. None, with
        nothing done, where it is not that."""
        if torch.compiler.is_compiling():
            return None
        if self._pull is None:
            self._pull = steps.puller(self.params, self.step_quadratic, backend=self.backend) if self._whole else never
        try:
            result = self._pull(metric.moments, metric.rates, metric.root)
        except (ValueError, TypeError, RuntimeError):
            self._pull = never
            return None  # to be met again, and dealt with
        return None if result is None else tuple.__new__(PenaltyResult, result)

    def have_grads(self) -> bool:
        """Whether each parameter has a gradient."""
        found = None if torch.compiler.is_compiling() else _all_have_grads(self.params)
        return all(p.grad is not None for p in self.params) if found is None else found

    def protected(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The protected rows of tensors shaped like the parameters."""
        if self._whole:
            return tensors
        return [t if n is None else t.detach()[:n] for t, n in zip(tensors, self.rows, strict=True)]


PartResult = tuple[Part, PenaltyResult]


def lambda_factors(factors: Sequence[float], device: torch.device) -> Tensor:
    """Factors of lambda as the ops take them."""
    return torch.tensor(factors, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def check_strided(part: Part) -> None:
    """Raises where a parameter has a sparse gradient."""
    for p, slot in zip(part.params, part.slots, strict=True):
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(
                f"{slot.name} has a {p.grad.layout} gradient, which a penalty on every entry does not fit: build the "
                "layer with sparse=False"
            ) from None


def split_by_grad_dtype(part: Part, error: Exception) -> list[Part]:
    """A part that the op refused, cut where its gradients' dtypes differ. Raises ``error`` if that was no reason."""
    device = part.quadratic.anchor.device
    protected = zip(part.protected(part.params), part.slots, strict=True)
    if not all(p.dtype is part.dtype and p.device == device and same_memory_order(p, s.strides) for p, s in protected):
        raise error  # no half of it may run before the state has followed
    check_strided(part)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(part.params):
        assert p.grad is not None
        by_dtype.setdefault(p.grad.dtype, []).append(i)
    if len(by_dtype) == 1:
        raise error
    return [part.subset(chosen, maximize=part.maximize) for chosen in by_dtype.values()]


_STATE = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffers"}  # what an optimizer keeps
_NUMBERED = re.compile(rf"\b(params|grads|{'|'.join(sorted(_STATE))})\[(\d+)\]")


def raise_with_names(error: Exception, part: Part) -> NoReturn:
    """Raises an op's error again, with parameters' names where the op knew only their index.

    After the part's own parameters an optimizer's op may have been given others, which EWC does not protect.
    """

    def name(match: re.Match[str]) -> str:
        number = int(match[2])
        of = part.slots[number].name if number < len(part.slots) else "a parameter that EWC does not protect"
        return of if match[1] == "params" else f"{'the gradient' if match[1] == 'grads' else match[1]} of {of}"

    message = _NUMBERED.sub(name, str(error))
    if message == str(error):
        raise error
    found = _NUMBERED.search(str(error))
    if found is not None and found[1] in _STATE and "has shape" in message:
        message += ": the optimizer's state is of other parameters; load its own, or delete it for this one"
    raise type(error)(message) from error
