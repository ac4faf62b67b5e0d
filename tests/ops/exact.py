"""Inputs of the ops laid out by hand, and what the ops should return: the formula, in fp64, tensor by tensor."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic, PenaltyResult

PARAMETER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# Unit roundoff: half the distance of two numbers, relative to them; and half the smallest subnormal.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
UNDERFLOW = {torch.float64: 2.0**-1075, torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}

CANARY = 1234.5  # a number in every dtype


def indices(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Where each element of a tensor lies, by the definition of strides; int64, shaped like the tensor."""
    if tuple(strides) == torch.empty(tuple(shape), device="meta").stride():
        return torch.arange(math.prod(shape)).reshape(tuple(shape))
    index = torch.zeros(tuple(shape), dtype=torch.int64)
    for d, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        index += (torch.arange(n) * stride).reshape([-1 if e == d else 1 for e in range(len(shape))])
    return index


def strides_of(p: Tensor) -> tuple[int, ...]:
    """In whose order a slice is laid: the tensor's own strides where they fill a stretch of memory, else row-major."""
    row_major = torch.empty(p.shape, device="meta").stride()
    if p.stride() == row_major or p.numel() == 0:
        return row_major
    dense = torch.equal(indices(p.shape, p.stride()).flatten().sort().values, torch.arange(p.numel()))
    return p.stride() if dense else row_major


def lay(tensors: Sequence[Tensor], strides: Sequence[Sequence[int]], dtype: torch.dtype, fill: float) -> Any:
    """One flat buffer, with gaps of random length that hold ``fill``; and each tensor's offset."""
    offsets, end = [], random.randrange(9)
    for t in tensors:
        offsets.append(end)
        end += t.numel() + random.randrange(70)
    flat = torch.full((end,), fill, dtype=dtype)
    for t, s, offset in zip(tensors, strides, offsets, strict=True):
        flat[offset + indices(t.shape, s).flatten()] = t.flatten().to(dtype)
    return flat, offsets


def unlay(flat: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    """One tensor of a flat buffer."""
    return flat[offset + indices(shape, strides).flatten()].reshape(tuple(shape))


@dataclass
class Inputs:
    """Parameters and the state around them. Gaps in the state hold NaN: whoever reads them returns NaN."""

    params: list[Tensor]
    anchors: list[Tensor]  # as stored
    fishers: list[Tensor]
    q: FlatQuadratic
    strides: list[tuple[int, ...]] = field(default_factory=list)

    def gradients_in(self, flat: Tensor) -> list[Tensor]:
        places = zip(self.params, self.strides, self.q.offsets, strict=True)
        return [unlay(flat, p.shape, s, offset) for p, s, offset in places]


def make_inputs(
    params: Sequence[Tensor],
    anchor_dtype: torch.dtype = torch.float32,
    fisher_dtype: torch.dtype = torch.float32,
    *,
    ewc_lambda: float = 3.7,
    delta: float = 0.3,
    drift: float = 0.5,
    **scalars: Tensor | None,
) -> Inputs:
    """A random state around the parameters; a quarter of the Fisher is zero."""
    params = list(params)
    anchors = [
        (p.detach().double() + drift * torch.randn(p.shape, dtype=torch.float64)).to(anchor_dtype) for p in params
    ]
    fishers = [(torch.randn(p.shape).square() * (torch.rand(p.shape) < 0.75)).to(fisher_dtype) for p in params]
    strides = [strides_of(p) for p in params]
    state = random.getstate()
    anchor, offsets = lay(anchors, strides, anchor_dtype, float("nan"))
    random.setstate(state)  # the same gaps
    fisher, _ = lay(fishers, strides, fisher_dtype, float("nan"))
    q = FlatQuadratic(
        anchor,
        fisher,
        offsets,
        list(itertools.chain(*strides)),
        torch.tensor(ewc_lambda, dtype=torch.float64),
        torch.tensor(delta, dtype=torch.float64),
        **scalars,
    )
    return Inputs(params, anchors, fishers, q, strides)


@dataclass
class Exact:
    """What an op should return, in fp64."""

    penalties: np.ndarray
    predicted: np.ndarray
    gradients: list[Tensor]  # of the penalty, times grad_scale
    penalty_slack: np.ndarray  # what rounding an anchor that is wider than the arithmetic may change
    predicted_slack: np.ndarray


def exact(inputs: Inputs, grad_scale: float = 1.0) -> Exact:
    """``lambda/2 scale (sum F d^2 + C + delta sum d^2)``, ``(sum F d^2 + C)/2``, ``lambda scale (F + delta) d``."""
    q = inputs.q
    ewc_lambda, delta = float(q.ewc_lambda), float(q.delta)
    penalties, predicted, gradients = [], [], []
    penalty_slack, predicted_slack = [], []
    for i, (p, a, f) in enumerate(zip(inputs.params, inputs.anchors, inputs.fishers, strict=True)):
        scale = 1.0 if q.scale is None else float(q.scale[i])
        constant = 0.0 if q.constant is None else float(q.constant[i])
        d, f = p.detach().double() - a.double(), f.double()
        weighted = float((f * d.square()).sum()) + constant
        penalties.append(0.5 * ewc_lambda * scale * (weighted + delta * float(d.square().sum())))
        predicted.append(0.5 * weighted)
        gradients.append(ewc_lambda * scale * grad_scale * (f + delta) * d)
        rounds = a.dtype == torch.float64 and p.dtype != torch.float64
        error = ROUNDOFF[torch.float32] * a.double().abs() * rounds  # of d; of d^2 it is 2 |d| error + error^2
        penalty_slack.append(0.5 * ewc_lambda * scale * float(((f + delta) * (2 * d.abs() + error) * error).sum()))
        predicted_slack.append(0.5 * float((f * (2 * d.abs() + error) * error).sum()))
    slack = np.array(penalty_slack), np.array(predicted_slack)
    return Exact(np.array(penalties), np.array(predicted), gradients, *slack)


def assert_values(result: PenaltyResult, inputs: Inputs, expected: Exact, what: object = "") -> None:
    """The three values.

    Tolerance: an element's term is rounded five times (anchor, d, and three products); their sum runs in the math type
    over at most 2048 elements. All terms are positive, so that all errors are relative; those of a sum are random, and
    sqrt(2048) u is a bound that 2048 u only reaches if they conspire: 64 u in all. The anchor's rounding, where it has
    one, is in proportion to the anchor, not to d, and comes on top. The totals are rounded once more.
    """
    dtype = torch.float64 if inputs.params and inputs.params[0].dtype == torch.float64 else torch.float32
    tolerance = 64 * ROUNDOFF[dtype]
    assert result.by_tensor.dtype == torch.float64 and result.by_tensor.shape == (2, len(inputs.params)), what
    for found, wanted, slack in (
        (result.by_tensor[0].numpy(), expected.penalties, expected.penalty_slack),
        (result.by_tensor[1].numpy(), expected.predicted, expected.predicted_slack),
    ):
        beyond = np.abs(found - wanted) - tolerance * np.abs(wanted) - slack
        assert (beyond <= 0).all(), f"{what}: {found} for {wanted}, {beyond.max()} beyond the tolerance"
    for total, parts in ((result.penalty, result.by_tensor[0]), (result.predicted, result.by_tensor[1])):
        assert total.dtype == dtype and total.shape == () and not total.requires_grad, what
        exactly = float(parts.sum())
        order = len(inputs.params) * ROUNDOFF[torch.float64]  # of the sum over tensors
        assert abs(float(total) - exactly) <= (2 * ROUNDOFF[dtype] + order) * abs(exactly), what


def assert_gradient(actual: Tensor, expected: Tensor, inputs: Inputs, i: int, before: Tensor | None = None) -> None:
    """One tensor's gradient, or ``before`` plus it.

    Tolerance: eight roundings in the math type (anchor, Fisher, delta, factor, d, F + delta and two products), of which
    the anchor's counts in proportion to the anchor, not to d; a ninth of the sum with ``before``; then one to the
    gradient's dtype.
    """
    p, a = inputs.params[i], inputs.anchors[i].double()
    compute = torch.float64 if p.dtype == torch.float64 else torch.float32
    d = (p.detach().double() - a).abs()
    slope = torch.where(d > 0, expected.abs() / d.clamp_min(1e-300), torch.zeros_like(d))
    error = 8 * ROUNDOFF[compute] * (expected.abs() + slope * a.abs() * (inputs.anchors[i].dtype == torch.float64))
    total = expected if before is None else before.double() + expected
    error = error + ROUNDOFF[compute] * total.abs()
    error = error + ROUNDOFF[actual.dtype] * (total.abs() + error) + UNDERFLOW[actual.dtype] + UNDERFLOW[compute]
    worst = ((actual.double() - total).abs() - error).max() if actual.numel() else torch.zeros(())
    assert worst <= 0, f"tensor {i}, {p.dtype} -> {actual.dtype}: {float(worst)} beyond the tolerance"


def run_penalty(inputs: Inputs, backend: str) -> PenaltyResult:
    return ops.penalty(inputs.params, inputs.q, backend=backend)


def check_penalty(inputs: Inputs, backend: str, what: object = "") -> None:
    assert_values(run_penalty(inputs, backend), inputs, exact(inputs), what)


def check_penalty_grad(inputs: Inputs, backend: str, grad_dtype: torch.dtype | None = None, what: object = "") -> None:
    """The op, against the formula, and that it leaves the gaps alone."""
    dtype = grad_dtype or (inputs.params[0].dtype if inputs.params else torch.float32)
    grad = torch.full(inputs.q.anchor.shape, CANARY, dtype=dtype)
    expected = exact(inputs)
    assert_values(ops.penalty_grad(inputs.params, grad, inputs.q, backend=backend), inputs, expected, what)
    for i, g in enumerate(inputs.gradients_in(grad)):
        assert_gradient(g, expected.gradients[i], inputs, i)
    for p, s, offset in zip(inputs.params, inputs.strides, inputs.q.offsets, strict=True):
        grad[offset + indices(p.shape, s).flatten()] = CANARY
    assert bool((grad == CANARY).all()), f"{what}: the gaps were written"


def check_accumulate(inputs: Inputs, grads: Sequence[Tensor], backend: str, what: object = "") -> None:
    """The op, against the formula."""
    before = [g.clone() for g in grads]
    expected = exact(inputs)
    assert_values(ops.penalty_accumulate_(inputs.params, grads, inputs.q, backend=backend), inputs, expected, what)
    for i, g in enumerate(grads):
        assert_gradient(g, expected.gradients[i], inputs, i, before[i])


def bits(t: Tensor) -> Tensor:
    """The bit patterns, for comparisons in which NaN equals NaN and -0 is not 0."""
    return t.resolve_neg().contiguous().view(BITS[t.dtype])


def assert_same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def assert_squares_added(fisher: Tensor, before: Tensor, grads: Tensor, weight: float) -> None:
    """``fisher`` is ``before + weight * sum of squares of grads``, over the first dimension where there is one more.

    Tolerance: a square has three roundings (a gradient that is wider than the Fisher counts twice); the additions of n
    rows at most n, the weight and its product two; the sum with the Fisher is rounded for every four rows at most. What
    is expected of an fp64 Fisher is rounded as often. Squares may underflow.
    """
    squares = grads.double().square()
    rows = 1
    if grads.dim() > fisher.dim():
        rows, squares = grads.shape[0], squares.sum(dim=0)
    unit = ROUNDOFF[fisher.dtype] * (2 if fisher.dtype == torch.float64 else 1)
    expected = before.double() + weight * squares
    largest = before.double().abs() + abs(weight) * squares
    error = unit * ((rows + 5) * abs(weight) * squares + (rows // 4 + 1) * largest)
    error = error + (rows * abs(weight) + 1) * 2 * UNDERFLOW[fisher.dtype]
    beyond = (fisher.double() - expected).abs() - error
    assert fisher.numel() == 0 or float(beyond.max()) <= 0, f"{tuple(grads.shape)}: {float(beyond.max())} beyond"


class Loud(torch.Tensor):
    """A subclass that wants to be asked."""

    asked: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})
