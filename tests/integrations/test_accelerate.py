"""A loop with Accelerate equals a plain PyTorch loop with the penalty in its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast import EWCAdamW, EWCLoss

pytest.importorskip("accelerate")
from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from ewc_fast.integrations.accelerate import attach  # noqa: E402

LAMBDA = 3.0
Batch = tuple[Tensor, Tensor]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, EWCLoss]:
    """A model away from its anchor."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(fisher={name: torch.rand(p.shape) for name, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, ewc


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [(torch.randn(4, 5, dtype=dtype), torch.randint(3, (4,))) for _ in range(count)]


def penalty(model: nn.Module, ewc: EWCLoss) -> Tensor:
    """The formula, in plain PyTorch."""
    terms = [(ewc.fisher[name] * (p - ewc.anchor[name]) ** 2).sum() for name, p in model.named_parameters()]
    return LAMBDA / 2 * torch.stack(terms).sum()


def plain_loop(
    model: nn.Module, optimizer: Any, ewc: EWCLoss, data: list[Batch], accumulate: int = 1, clip: str = ""
) -> None:
    """What the loop with Accelerate should do; clips the task's gradient or its sum with the penalty's."""
    for start in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for x, y in data[start : start + accumulate]:
            (F.cross_entropy(model(x), y) / accumulate).backward()
        if clip == "task":
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        penalty(model, ewc).backward()
        if clip == "sum":
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()


def accelerated_loop(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, data: list[Batch], ewc: EWCLoss, clip: str = ""
) -> None:
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients and clip == "task":
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            if accelerator.sync_gradients and clip == "sum":
                accelerator.unscale_gradients()
                ewc.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("first", ["prepare", "attach"])
@pytest.mark.parametrize("clip", ["", "task", "sum"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_penalty_in_the_loss(name: str, accumulate: int, clip: str, first: str) -> None:
    model, ewc = prepared()
    plain, data = copy.deepcopy(model), batches(8)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = OPTIMIZERS[name](model.parameters())
    if first == "attach":
        attach(ewc, optimizer, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    if first == "prepare":
        assert isinstance(optimizer, AcceleratedOptimizer)
        attach(ewc, optimizer, accelerator)
    accelerated_loop(accelerator, model, optimizer, data, ewc, clip)
    plain_loop(plain, OPTIMIZERS[name](plain.parameters()), ewc, data, accumulate, clip)
    assert_same(model, plain)


def test_proximal_pulls_once_per_step() -> None:
    model, ewc = prepared()
    plain, data = copy.deepcopy(model), batches(8)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    handle = attach(ewc, optimizer, accelerator, "proximal")
    accelerated_loop(accelerator, model, optimizer, data, ewc)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for start in range(0, len(data), 2):
        reference.zero_grad()
        for x, y in data[start : start + 2]:
            (F.cross_entropy(plain(x), y) / 2).backward()
        reference.step()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                pull = 0.1 * LAMBDA * ewc.fisher[name]
                p.copy_((p + pull * ewc.anchor[name]) / (1 + pull))
    assert_same(model, plain)
    handle.remove()
    assert not ewc._is_attached()


def test_every_acts_at_each_so_many_steps() -> None:
    model, ewc = prepared()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    attach(ewc, optimizer, accelerator, every=2)
    for expected in (2.0, 0.0):
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            grad = expected * LAMBDA * ewc.fisher[name] * (p.detach() - ewc.anchor[name])
            torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["", "task", "sum"])
def test_a_grad_scaler_scales_it_with_the_rest_and_skips_it_on_overflow(fused: bool, clip: str) -> None:
    """As with mixed_precision="fp16", which Accelerate offers on devices only: its scaler, put in by hand."""
    model, ewc = prepared(torch.float32)
    plain, data = copy.deepcopy(model), batches(6, torch.float32)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
    assert optimizer.scaler is accelerator.scaler
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # only now: the model stays in fp32
    attach(ewc, optimizer, accelerator)
    overflow = [(torch.full((4, 5), torch.inf), data[0][1])] * 2
    accelerated_loop(accelerator, model, optimizer, [*data[:2], *overflow, *data[2:]], ewc, clip)
    plain_loop(plain, torch.optim.SGD(plain.parameters(), lr=0.1), ewc, data, 2, clip)
    assert_same(model, plain, 1e-5, 1e-6)


def test_save_state_and_load_state_resume_the_run(tmp_path: Path) -> None:
    model, ewc = prepared()
    first = copy.deepcopy(model)
    data = batches(8)

    def start(model: nn.Module, ewc: EWCLoss) -> tuple[Accelerator, nn.Module, Any]:
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, OPTIMIZERS["adamw"](model.parameters()))
        attach(ewc, optimizer, accelerator).remove()
        attach(ewc, optimizer, accelerator)
        assert len(accelerator._custom_objects) == 1  # once, however often it is attached
        return accelerator, model, optimizer

    accelerator, model, optimizer = start(model, ewc)
    accelerated_loop(accelerator, model, optimizer, data, ewc)

    half = EWCLoss(first, LAMBDA)
    half.load_state_dict(ewc.state_dict())
    accelerator, first, optimizer = start(first, half)
    accelerated_loop(accelerator, first, optimizer, data[:4], half)
    accelerator.save_state(str(tmp_path / "half"))

    resumed, fresh = prepared()  # other weights, another anchor
    accelerator, resumed, optimizer = start(resumed, fresh)
    accelerator.load_state(str(tmp_path / "half"))
    accelerated_loop(accelerator, resumed, optimizer, data[4:], fresh)
    assert_same(resumed, model, 0, 0)
    assert all(torch.equal(fresh.anchor[name], ewc.anchor[name]) for name in ewc.anchor)


def test_ewc_adamw_may_be_prepared_and_is_not_doubled() -> None:
    model, ewc = prepared()
    plain, data = copy.deepcopy(model), batches(8)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, EWCAdamW(model.parameters(), lr=0.02, ewc=ewc))
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        attach(ewc, optimizer, accelerator)
    accelerated_loop(accelerator, model, optimizer, data, ewc)
    plain_loop(plain, torch.optim.AdamW(plain.parameters(), lr=0.02), ewc, data, 2)
    assert_same(model, plain)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DistributedType.DEEPSPEED, "DeepSpeed"),
        (DistributedType.MEGATRON_LM, "Megatron-LM"),
        (DistributedType.FSDP, "FSDP"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(kind: DistributedType, name: str) -> None:
    model, ewc = prepared()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.state.distributed_type = kind
    with pytest.raises(ValueError, match=name):
        attach(ewc, optimizer, accelerator)
    assert not ewc._is_attached() and not accelerator._custom_objects


def test_bad_arguments_are_named() -> None:
    model, ewc = prepared()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="accelerator must be an Accelerator"):
        attach(ewc, optimizer, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coupling must be one of"):
        attach(ewc, optimizer, accelerator, "loose")
    with pytest.raises(ValueError, match="ewc_fast.integrations.accelerate.attach"):
        ewc.attach(optimizer)
    assert not accelerator._custom_objects
