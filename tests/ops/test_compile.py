"""Registration of the native ops, and torch.compile: what eager gives, compiled code gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from ewc_fast import ewc_penalty
from ewc_fast.ops import autograd
from ewc_fast.ops import penalty as ops
from ewc_fast.ops.autograd import GradientBuffer
from tests.ops import exact as ex

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(dtype: torch.dtype, state: torch.dtype, *, optional: bool) -> ex.Inputs:
    params = [torch.randn(33, 5).to(dtype), torch.randn(0).to(dtype), torch.randn(4, 6).t().to(dtype), torch.randn(())]
    params[3] = params[3].to(dtype)
    scalars = {"scale": torch.rand(4), "constant": torch.rand(4, dtype=torch.float64)} if optional else {}
    inputs = ex.make_inputs(params, state, state, **scalars)
    inputs.q = inputs.q._replace(anchor=inputs.q.anchor.nan_to_num(0.0), fisher=inputs.q.fisher.nan_to_num(0.0))
    return inputs


CASES = {
    "fp32": (torch.float32, torch.float32, False),
    "bf16 with all arguments": (torch.bfloat16, torch.float32, True),
    "fp64": (torch.float64, torch.float64, True),
}


def arguments(op: str, case: str) -> tuple[Any, ...]:
    dtype, state, optional = CASES[case]
    inputs = make(dtype, state, optional=optional)
    amp = (torch.tensor(2.0), torch.tensor(0.0)) if optional else ()
    if op == "penalty":
        return (inputs.params, *inputs.q)
    if op == "penalty_grad":
        return (inputs.params, torch.zeros(inputs.q.anchor.shape, dtype=dtype), *inputs.q, *amp)
    return (inputs.params, [torch.randn_like(p) for p in inputs.params], *inputs.q, *amp, *([True] if amp else []))


@pytest.mark.parametrize("op", ["penalty", "penalty_grad", "penalty_accumulate_"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(op: str, case: str) -> None:
    opcheck(getattr(torch.ops.ewc_fast, op).default, arguments(op, case))


def test_opcheck_of_nothing() -> None:
    q = ex.make_inputs([]).q
    opcheck(torch.ops.ewc_fast.penalty.default, ([], *q))
    opcheck(torch.ops.ewc_fast.penalty_accumulate_.default, ([], [], *q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_scale(dtype: torch.dtype) -> None:
    opcheck(torch.ops.ewc_fast.scale_.default, (torch.randn(70).to(dtype), torch.tensor(0.5)))


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_op_compiled(dtype: torch.dtype) -> None:
    inputs = make(dtype, torch.float32, optional=True)

    def step(params: list[Tensor], grads: list[Tensor], flat: Tensor, factor: Tensor) -> list[Tensor]:
        first = ops.penalty(params, inputs.q, backend="native")
        second = ops.penalty_grad(params, flat, inputs.q, backend="native")
        ops.scale_(flat, factor, backend="native")
        third = ops.penalty_accumulate_(params, grads, inputs.q, maximize=True, backend="native")
        return [*first, *second, *third]

    written: list[list[Tensor]] = []
    results: list[list[Tensor]] = []
    before = [torch.randn_like(p) for p in inputs.params]
    for run in (step, compiled(step)):
        grads, flat = [g.clone() for g in before], torch.zeros(inputs.q.anchor.shape, dtype=dtype)
        results.append(run(inputs.params, grads, flat, torch.tensor(0.25)))
        written.append([*grads, flat])
    ex.assert_same_bits(results[0], results[1])
    ex.assert_same_bits(written[0], written[1])
    assert not torch.equal(written[0][0], before[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_ewc_penalty_compiled(backend: str) -> None:
    layer = nn.Linear(7, 5)
    params = list(layer.parameters())
    fisher, anchor = [torch.rand_like(p) for p in params], [torch.randn_like(p) for p in params]
    x = torch.randn(3, 7)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().mean() + 2 * ewc_penalty(params, fisher, anchor, 3.0)

    run = compiled(loss, backend)
    for _ in range(2):
        expected, actual = loss(x), run(x)
        wanted, got = torch.autograd.grad(expected, params), torch.autograd.grad(actual, params)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(got, wanted)
        with torch.no_grad():
            params[0].mul_(0.5)  # the second round runs the code that is there


def test_the_flat_penalty_compiled() -> None:
    inputs = make(torch.float32, torch.float32, optional=False)
    params = [nn.Parameter(p) for p in inputs.params]
    buffer = GradientBuffer()

    def loss(*params: Tensor) -> Tensor:
        return 1.5 * autograd.penalty(params, inputs.q, buffer, [None] * 4, backend="native").penalty

    run = compiled(loss)
    for _ in range(2):
        expected, actual = loss(*params), run(*params)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, params), torch.autograd.grad(expected, params))
