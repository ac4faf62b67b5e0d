"""What a step costs beside the kernels, counted: bytes allocated, and calls made from Python."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_fast import EWCLoss, ewc_loss

pytestmark = pytest.mark.native

KIB, MIB = 1 << 10, 1 << 20
SIZES = (1 * MIB, 8 * MIB)  # parameters

# Of accumulate_grad_() with 20 tensors, as counted with Python 3.11 and torch 2.13.
PYTHON_CALLS = 68
HEAD_ROOM = 1.15  # for other versions of Python and torch


def make(numel: int, tensors: int = 2, fisher_dtype: torch.dtype | None = None) -> tuple[nn.Module, EWCLoss]:
    """A model of equal parameters that has moved away from its anchor, its gradients allocated."""
    model = nn.Module()
    for i in range(tensors):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(numel // tensors)))
    ewc = EWCLoss(model, 3.0, fisher_dtype=fisher_dtype, backend="native")
    ewc.consolidate(fisher={name: torch.rand(p.shape) for name, p in model.named_parameters()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        with torch.no_grad():
            p.add_(0.1)
    return model, ewc


def allocated(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch allocates for tensors in a step: all of them, and the most at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = present = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += max(event.nbytes(), 0)
        present += event.nbytes()
        peak = max(peak, present)
    return total, peak


def test_allocations_are_seen() -> None:
    """Else the tests below could not fail."""
    x = torch.ones(MIB)
    total, peak = allocated(lambda: x.clone().add_(x.clone()).sum())
    assert 8 * MIB <= total < 9 * MIB and 8 * MIB <= peak <= total
    assert allocated(lambda: [x.clone().sum() for _ in range(2)])[1] < 5 * MIB


def by_hand(model: nn.Module, ewc: EWCLoss) -> Callable[[], object]:
    return ewc.accumulate_grad_


def attached(model: nn.Module, ewc: EWCLoss) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    ewc.attach(optimizer)
    return optimizer.step


def value_only(model: nn.Module, ewc: EWCLoss) -> Callable[[], object]:
    return torch.no_grad()(ewc)


def in_the_loss(model: nn.Module, ewc: EWCLoss) -> Callable[[], object]:
    def step() -> None:
        ewc().backward()
        model.zero_grad()

    model.zero_grad()
    return step


def scaled_in_the_loss(model: nn.Module, ewc: EWCLoss) -> Callable[[], object]:
    def step() -> None:
        (0.5 * ewc()).backward()
        model.zero_grad()

    model.zero_grad()
    return step


def as_a_function(model: nn.Module, ewc: EWCLoss) -> Callable[[], object]:
    def step() -> None:
        ewc_loss(model, ewc.fisher, ewc.anchor, 3.0).backward()
        model.zero_grad()

    model.zero_grad()
    return step


STEPS = (by_hand, attached, value_only, in_the_loss, scaled_in_the_loss, as_a_function)


@pytest.mark.parametrize("make_step", STEPS)
@pytest.mark.parametrize("fisher_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_allocates_nothing_the_size_of_the_model(
    make_step: Callable[[nn.Module, EWCLoss], Callable[[], object]], fisher_dtype: torch.dtype
) -> None:
    """From the second step on: level 1's gradient is allocated in the first."""
    totals = []
    for size in SIZES:
        model, ewc = make(size, fisher_dtype=fisher_dtype)
        step = make_step(model, ewc)
        step()
        totals.append(allocated(step)[0])
    print(f"{totals} bytes for {SIZES} parameters")
    assert totals[0] == totals[1] < 2 * KIB


@pytest.mark.parametrize("make_step", [in_the_loss, scaled_in_the_loss, as_a_function])
def test_the_first_step_allocates_one_gradient(
    make_step: Callable[[nn.Module, EWCLoss], Callable[[], object]],
) -> None:
    model, ewc = make(SIZES[0])
    total, _ = allocated(make_step(model, ewc))
    assert 4 * SIZES[0] <= total < 4 * SIZES[0] + 16 * KIB


def test_a_missing_gradient_is_all_that_is_allocated() -> None:
    model, ewc = make(SIZES[0])
    ewc.accumulate_grad_()
    model.zero_grad()
    total, _ = allocated(ewc.accumulate_grad_)
    assert 4 * SIZES[0] <= total < 4 * SIZES[0] + 2 * KIB


def growth_of_process(step: Callable[[], object]) -> int:
    """By how much the peak of all memory that the process has resident rises in a step, in bytes."""

    def peak() -> int:
        (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * KIB

    ctypes.CDLL(None).malloc_trim(0)  # what was freed, and could be used unseen, goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak()
    step()
    return peak() - before


def test_peak_memory_of_the_process() -> None:
    """All memory, the kernels' own partial sums too: less than 1 MiB beyond anchor, Fisher and gradients."""
    try:
        assert 15 * MIB < growth_of_process(lambda: torch.ones(4 * MIB)) < 17 * MIB
    except (OSError, AttributeError) as error:
        pytest.skip(f"the memory of this process cannot be measured: {error}")
    _, ewc = make(8 * MIB)
    ewc.accumulate_grad_()
    # What else happens in the process may add to it, but not every time.
    growth = [growth_of_process(ewc.accumulate_grad_) for _ in range(3)]
    print(f"the peak grew by {growth} bytes")
    assert min(growth) < MIB


class Operators(TorchDispatchMode):
    """Counts what goes through torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def python_calls(function: Callable[[], object]) -> int:
    """How many functions, in Python and in C, a function calls."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        calls[event] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"] - 2  # the function itself, and the last line but one


def test_calls_from_python() -> None:
    """Launch overhead is what small models pay for."""
    _, ewc = make(20 * 100, tensors=20)
    ewc.accumulate_grad_()
    with Operators() as operators:
        ewc.accumulate_grad_()
    calls = python_calls(ewc.accumulate_grad_)
    print(f"{calls} calls, operators {dict(operators.counts)}")
    assert operators.counts == {"ewc_fast::penalty_accumulate_": 1}
    assert calls <= HEAD_ROOM * PYTHON_CALLS
