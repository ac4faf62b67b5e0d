"""EWCAdamW and EWCSGD: torch's optimizers without a penalty, the penalised loss or the pull with one."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCSGD, EWCAdamW, EWCLoss

LAMBDA = 3.0
Make = Callable[..., torch.optim.Optimizer]

# Ours, torch's, and hyper-parameters away from their defaults.
PAIRS: dict[str, tuple[Make, Make, dict[str, Any]]] = {
    "adamw": (EWCAdamW, torch.optim.AdamW, dict(lr=0.02, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1)),
    "amsgrad": (EWCAdamW, torch.optim.AdamW, dict(lr=0.02, betas=(0.8, 0.95), eps=1e-5, amsgrad=True)),
    "adamw-maximize": (EWCAdamW, torch.optim.AdamW, dict(lr=0.02, maximize=True, weight_decay=0.3)),
    "adamw-tensor-lr": (EWCAdamW, torch.optim.AdamW, dict(lr=torch.tensor(0.02), capturable=True)),
    "sgd": (EWCSGD, torch.optim.SGD, dict(lr=0.05, weight_decay=0.1)),
    "momentum": (EWCSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.1)),
    "nesterov": (EWCSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.8, nesterov=True, maximize=True)),
}
pairs = pytest.mark.parametrize("pair", PAIRS)
couplings = pytest.mark.parametrize("coupling", ["coupled", "proximal"])


class Net(nn.Module):
    """Odd sizes, a scalar, an empty tensor, a column-major matrix, a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 33)
        self.b = nn.Linear(33, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(5))
        self.b.weight = nn.Parameter(self.b.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * self.scale + self.empty.sum()


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Net, EWCLoss]:
    model = Net().to(dtype)
    ewc = EWCLoss(model, LAMBDA, **options)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model, ewc


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], sign: float = 1.0) -> None:
    (sign * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 7, dtype=dtype), torch.randint(3, (6,))) for _ in range(count)]


def penalised(model: nn.Module, ewc: EWCLoss) -> Tensor:
    """By the formula, in plain PyTorch."""
    total: Any = 0.0
    for n, p in model.named_parameters():
        if n in ewc.fisher:
            delta = ewc.damping * ewc._mean_fisher
            d = p[: len(ewc.anchor[n])] if p.dim() and p.shape != ewc.anchor[n].shape else p
            weights = ewc.fisher[n].to(p.dtype) + delta
            total = total + ewc.ewc_lambda / 2 * (weights * (d - ewc.anchor[n].to(p.dtype)) ** 2).sum()
    return total


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer, **tolerance: float) -> None:
    states_a, states_b = a.state_dict()["state"], b.state_dict()["state"]
    for n in states_a.keys() | states_b.keys():
        found = {k: v for k, v in states_a.get(n, {}).items() if v is not None}
        wanted = {k: v for k, v in states_b.get(n, {}).items() if v is not None}
        assert found.keys() == wanted.keys()
        for k in found:
            torch.testing.assert_close(torch.as_tensor(found[k]), torch.as_tensor(wanted[k]), **tolerance)


def same_params(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, n=n: f"{n}: {m}", **tolerance)


def torch_form(options: dict[str, Any]) -> dict[str, Any]:
    """Its tensor lr is not for the fused form alone; capturable is refused off CUDA there."""
    return {k: v for k, v in options.items() if k != "capturable"} | (
        {"fused": True} if isinstance(options["lr"], Tensor) else {}
    )


@pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torch_over_200_steps_with_a_save_and_load_in_the_middle(pair: str, dtype: torch.dtype) -> None:
    ours, theirs, options = PAIRS[pair]
    model, _ = make(dtype)
    plain = copy.deepcopy(model)
    optimizer, reference = ours(model.parameters(), **options), theirs(plain.parameters(), **torch_form(options))
    tolerance = dict(rtol=1e-9, atol=1e-11) if dtype == torch.float64 else dict(rtol=2e-3, atol=2e-4)
    for step, batch in enumerate(batches(200, dtype)):
        if step == 71:  # into a fresh one of its own, through a file
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = ours(model.parameters(), **options)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        if step == 130:  # and both change places
            ours_state, theirs_state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(reference.state_dict())
            optimizer = ours(model.parameters(), **options)
            reference = theirs(plain.parameters(), **torch_form(options))
            optimizer.load_state_dict(theirs_state)
            reference.load_state_dict(ours_state)
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            backward(m, batch, -1.0 if options.get("maximize") else 1.0)
            o.step()
        if step in (0, 1, 70, 131):
            same_params(model, plain, **tolerance)
    same_params(model, plain, **tolerance)
    same_state(optimizer, reference, **tolerance)
    assert torch.equal(model.unused, plain.unused) and model.unused.grad is None


@pairs
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_coupled_equals_torch_on_the_penalised_loss(pair: str, damping: float, backend: str) -> None:
    ours, theirs, options = PAIRS[pair]
    model, ewc = make(damping=damping, backend=backend)
    plain = copy.deepcopy(model)
    optimizer = ours(model.parameters(), **options, ewc=ewc, coupling="coupled")
    reference = theirs(plain.parameters(), **torch_form(options))
    sign = -1.0 if options.get("maximize") else 1.0
    for batch in batches(25):
        optimizer.zero_grad()
        backward(model, batch, sign)
        optimizer.step()
        reference.zero_grad()
        backward(plain, batch, sign)
        penalty = penalised(plain, ewc)
        (sign * penalty).backward()
        reference.step()
        assert ewc.last_penalty.item() == pytest.approx(penalty.item(), rel=1e-9)
        by_name = ewc.penalty_by_parameter()
        assert by_name.keys() == dict(model.named_parameters()).keys()
        assert sum(v.item() for v in by_name.values()) == pytest.approx(penalty.item(), rel=1e-9)
    same_params(model, plain, rtol=1e-8, atol=1e-10)
    same_state(optimizer, reference, rtol=1e-8, atol=1e-10)


@pairs
def test_proximal_equals_torch_with_an_attached_pull(pair: str, backend: str) -> None:
    ours, theirs, options = PAIRS[pair]
    model, ewc = make(damping=0.1, backend=backend)
    plain = copy.deepcopy(model)
    other = EWCLoss(plain, LAMBDA, damping=0.1, backend=backend)
    other.load_state_dict(ewc.state_dict())
    optimizer = ours(model.parameters(), **options, ewc=ewc, coupling="proximal")
    other.attach(reference := theirs(plain.parameters(), **torch_form(options)), coupling="proximal")
    for batch in batches(25):
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            backward(m, batch)
            o.step()
        assert ewc.last_penalty.item() == pytest.approx(other.last_penalty.item(), rel=1e-9)
        assert ewc.predicted_forgetting.item() == pytest.approx(other.predicted_forgetting.item(), rel=1e-9)
    same_params(model, plain, rtol=1e-8, atol=1e-10)
    same_state(optimizer, reference, rtol=1e-8, atol=1e-10)
    assert ewc.penalty_by_parameter().keys() == dict(model.named_parameters()).keys()  # the skipped one too


@couplings
def test_a_checkpoint_with_the_penalty_resumes(coupling: str) -> None:
    model, ewc = make()
    optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc, coupling=coupling, amsgrad=True)
    data = batches(12)

    def run(m: nn.Module, o: torch.optim.Optimizer, some: list[Any]) -> None:
        for batch in some:
            o.zero_grad()
            backward(m, batch)
            o.step()

    run(model, optimizer, data[:5])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ewc": ewc.state_dict()}, file)
    file.seek(0)
    run(model, optimizer, data[5:])
    saved = torch.load(file, weights_only=True)
    again = Net().double()
    again.load_state_dict(saved["model"])
    other = EWCLoss(again, LAMBDA)
    other.load_state_dict(saved["ewc"])
    resumed = EWCAdamW(again.parameters(), lr=0.5, ewc=other, coupling=coupling)
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, data[5:])
    same_params(again, model, rtol=0, atol=0)
    assert other.last_penalty.item() == ewc.last_penalty.item()


def test_schedulers_closures_and_groups() -> None:
    model, ewc = make()
    plain = copy.deepcopy(model)
    groups = lambda m: [  # noqa: E731
        {"params": m.a.parameters(), "lr": 0.05},
        {"params": [*m.b.parameters(), m.scale], "weight_decay": 0.3, "ewc_lambda_scale": 0.0},
    ]
    optimizer = EWCAdamW(groups(model), lr=0.01, ewc=ewc)
    reference = torch.optim.AdamW(groups(plain), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20) for o in (optimizer, reference)]
    for batch in batches(15):

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        reference.zero_grad()
        backward(plain, batch)
        first = {f"a.{n}": p for n, p in plain.a.named_parameters()}
        penalty: Any = sum((ewc.fisher[n] * (p - ewc.anchor[n]) ** 2).sum() for n, p in first.items())
        (LAMBDA / 2 * penalty).backward()
        reference.step()
        assert loss.requires_grad and math.isfinite(loss.item())
        for scheduler in schedulers:
            scheduler.step()
    same_params(model, plain, rtol=1e-8, atol=1e-10)
    assert ewc.predicted_forgetting.item() > ewc.last_penalty.item() / LAMBDA  # counts what is not penalised, too


# ---- dtypes ----


@couplings
@pytest.mark.parametrize("moments", [None, torch.float32], ids=["bf16 moments", "fp32 moments"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_bf16_parameters(coupling: str, moments: Any, stochastic: bool) -> None:
    model, ewc = make(torch.bfloat16, fisher_dtype=torch.float32)
    options: dict[str, Any] = dict(lr=0.01, ewc=ewc, moments_dtype=moments, stochastic_rounding=stochastic, seed=7)
    optimizer = EWCAdamW(model.parameters(), coupling=coupling, **options)
    wide = copy.deepcopy(model).double()
    other = EWCLoss(wide, LAMBDA)
    other.consolidate(
        fisher={n: f.double() for n, f in ewc.fisher.items()}, anchor={n: a.double() for n, a in ewc.anchor.items()}
    )
    reference = EWCAdamW(wide.parameters(), lr=0.01, ewc=other, coupling=coupling)
    for _ in range(6):
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn(p.shape).bfloat16()
            q.grad = p.grad.double()
        optimizer.step()
        reference.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=6 * 2**-7, atol=6 * 2**-7)
    dtype = moments or torch.bfloat16
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == dtype for s in optimizer.state.values())
    state = copy.deepcopy(optimizer.state_dict())
    again = EWCAdamW(model.parameters(), coupling=coupling, **{**options, "ewc": None})
    again.load_state_dict(state)
    for a, b in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert a["exp_avg"].dtype == dtype and torch.equal(a["exp_avg"], b["exp_avg"])  # not rounded on the way


def test_stochastic_rounding_moves_what_rounding_to_nearest_loses() -> None:
    moved = []
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = EWCAdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic, seed=3)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append(1 - p.double().mean().item())
    assert moved[0] == 0.0 and moved[1] == pytest.approx(20 * 1e-4, rel=0.05)


def test_stochastic_rounding_does_not_depend_on_the_grouping() -> None:
    results = []
    for split in (False, True):
        torch.manual_seed(5)
        params = [nn.Parameter(torch.randn(n).bfloat16()) for n in (40, 3000, 7)]
        groups: Any = [{"params": [p]} for p in params] if split else params
        optimizer = EWCAdamW(groups, lr=0.01, stochastic_rounding=True, seed=11)
        for p in params:
            p.grad = torch.randn(p.shape).bfloat16()
        optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    twins = [nn.Parameter(torch.ones(3000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = EWCAdamW(twins, lr=1e-3, stochastic_rounding=True)
    for p in twins:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*twins)  # each has numbers of its own


def test_complex_parameters_without_a_penalty() -> None:
    p = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    q = nn.Parameter(p.detach().clone())
    ours, theirs = EWCAdamW([p], lr=0.05), torch.optim.AdamW([q], lr=0.05)
    for _ in range(5):
        g = torch.randn(5, dtype=torch.complex64)
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)


# ---- the model changes ----


@couplings
def test_a_parameter_that_has_grown_is_protected_in_its_old_rows(coupling: str) -> None:
    model, ewc = make()
    with torch.no_grad():
        old = model.b.bias
        model.b.bias = nn.Parameter(torch.cat([old, torch.randn(2).double()]))
        model.b.weight = nn.Parameter(torch.cat([model.b.weight, torch.randn(2, 33).double()]))
    plain = copy.deepcopy(model)
    other = EWCLoss(plain, LAMBDA)
    other.load_state_dict(ewc.state_dict())
    optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc, coupling=coupling)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02)
    other.attach(reference, coupling=coupling)
    for batch in batches(5):
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            backward(m, batch)
            o.step()
        assert ewc.last_penalty.item() == pytest.approx(other.last_penalty.item(), rel=1e-9)
    same_params(model, plain, rtol=1e-8, atol=1e-10)


@couplings
def test_before_the_first_consolidate_and_after_a_cast(coupling: str) -> None:
    model = Net()
    ewc = EWCLoss(model, LAMBDA)
    optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc, coupling=coupling)
    reference = copy.deepcopy(model)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.02)
    for batch in batches(3, torch.float32):
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            backward(m, batch)
            o.step()
    same_params(model, reference, rtol=1e-5, atol=1e-6)
    assert ewc.last_penalty.item() == 0.0
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    model.double()
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].double()
    anchors = {n: a.clone() for n, a in ewc.anchor.items()}
    for batch in batches(2):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert ewc.last_penalty.dtype == torch.float64 and ewc.last_penalty.item() > 0
    assert all(torch.equal(ewc.anchor[n].float(), a.float()) for n, a in anchors.items())


@pytest.mark.parametrize("penalised", [True, False])
def test_a_memory_order_that_changes_is_followed(penalised: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc if penalised else None)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        model.to(memory_format=torch.channels_last)
    assert (ewc.last_penalty.item() > 0) is penalised and model[0].weight.is_contiguous(
        memory_format=torch.channels_last
    )


@couplings
def test_lambda_zero_predicts_for_every_parameter(coupling: str) -> None:
    model, ewc = make()
    ewc.ewc_lambda = 0.0
    plain = copy.deepcopy(model)
    optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc, coupling=coupling)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for batch in batches(2):
        wanted = penalised_by_one(model if coupling == "coupled" else plain, ewc)
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            backward(m, batch)
            o.step()
        wanted = wanted if coupling == "coupled" else penalised_by_one(plain, ewc)
        assert ewc.predicted_forgetting.item() == pytest.approx(wanted, rel=1e-8)
    same_params(model, plain, rtol=1e-9, atol=1e-11)
    assert model.unused.grad is None and ewc.last_penalty.item() == 0.0


def penalised_by_one(model: nn.Module, ewc: EWCLoss) -> float:
    """The prediction, by the formula."""
    terms = [(ewc.fisher[n] * (p.detach() - ewc.anchor[n]) ** 2).sum() for n, p in model.named_parameters()]
    return float(torch.stack(terms).sum() / 2)


# ---- automatic mixed precision ----


@couplings
@pytest.mark.parametrize("kind", [EWCAdamW, EWCSGD])
@pytest.mark.parametrize("overflow", [False, True])
def test_under_a_gradient_scaler(coupling: str, kind: Any, overflow: bool) -> None:
    model, ewc = make(torch.float32)
    plain = copy.deepcopy(model)
    other = EWCLoss(plain, LAMBDA)
    other.load_state_dict(ewc.state_dict())
    optimizer = kind(model.parameters(), lr=0.02, ewc=ewc, coupling=coupling)
    reference = kind(plain.parameters(), lr=0.02, ewc=other, coupling=coupling)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for batch in batches(3, torch.float32):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        backward(plain, batch)
        reference.step()
    same_params(model, plain, rtol=1e-5, atol=1e-6)
    if overflow:
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        here = LAMBDA * penalised_by_one(model, ewc)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
        model.a.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        for a, b in zip(before[0].values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for n, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(before[1][n][key])), key
        assert ewc.last_penalty.item() == pytest.approx(here, rel=1e-5)


def test_a_momentum_begins_undamped_after_an_overflow_in_the_first_step() -> None:
    model, _ = make(torch.float32)
    plain = copy.deepcopy(model)
    options = {"lr": 0.02, "momentum": 0.9, "dampening": 0.5}
    optimizer, reference = EWCSGD(model.parameters(), **options), torch.optim.SGD(plain.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for step, batch in enumerate(batches(4, torch.float32)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
        if step == 0:
            model.a.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step > 0:
            reference.zero_grad()
            backward(plain, batch)
            reference.step()
    same_params(model, plain, rtol=1e-5, atol=1e-6)


@pairs
@pytest.mark.parametrize("penalised_by", [None, "coupled"])
def test_nan_and_infinite_gradients_leave_what_torch_leaves(pair: str, penalised_by: str | None) -> None:
    kind, torch_kind, options = PAIRS[pair]
    options = {k: v for k, v in options.items() if k != "weight_decay"}  # SGD's is 0: times infinity it would be NaN
    model, ewc = make(torch.float32)
    plain = copy.deepcopy(model)
    extra = {} if penalised_by is None else {"ewc": ewc, "coupling": penalised_by}
    ours, theirs = kind(model.parameters(), **options, **extra), torch_kind(plain.parameters(), **torch_form(options))
    for bad in (math.nan, math.inf, -math.inf, 0.0, 1.0):
        for m, o in ((model, ours), (plain, theirs)):
            for i, p in enumerate(m.parameters()):
                p.grad = torch.full_like(p, 1.0 + i)
            m.a.bias.grad[3] = bad
            m.b.bias.grad[1] = math.inf if bad == math.inf else 1.0
            if penalised_by is not None and m is plain:
                for n, p in m.named_parameters():
                    sign = -1 if options.get("maximize") else 1
                    p.grad += sign * LAMBDA * ewc.fisher[n].float() * (p.detach() - ewc.anchor[n].float())
            o.step()
    same_state(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)
    same_params(model, plain, rtol=1e-4, atol=1e-5, equal_nan=True)


# ---- what is said, and what is refused ----


def test_bad_arguments() -> None:
    model, ewc = make()
    for kind in (EWCAdamW, EWCSGD):
        with pytest.raises(ValueError, match="coupling must be one of coupled, proximal"):
            kind(model.parameters(), lr=0.1, ewc=ewc, coupling="couplet")
        with pytest.raises(ValueError, match="is not differentiable: use torch.optim"):
            kind(model.parameters(), lr=0.1, differentiable=True)
        with pytest.raises(ValueError, match="none of its 1 parameters"):
            kind([nn.Parameter(torch.zeros(3))], lr=0.1, ewc=ewc)
        with pytest.raises(ValueError, match="[Ii]nvalid learning rate"):
            kind(model.parameters(), lr=-1.0)
        with pytest.raises(TypeError, match="ewc must be an EWCLoss, got Net"):
            kind(model.parameters(), lr=0.1, ewc=model)
    with pytest.raises(ValueError, match="moments_dtype must be"):
        EWCAdamW(model.parameters(), moments_dtype=torch.float16)
    with pytest.raises(ValueError, match="seed must be an integer"):
        EWCAdamW(model.parameters(), seed=-1)
    with pytest.raises(ValueError, match="betas must be numbers"):
        EWCAdamW(model.parameters(), betas=(torch.tensor(0.9), torch.tensor(0.99)))
    optimizer = EWCAdamW(model.parameters(), ewc=ewc)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        ewc.attach(optimizer)
    assert ewc.is_attached(optimizer)


def test_a_penalty_that_acts_twice_is_reported() -> None:
    model, ewc = make()
    optimizer = EWCAdamW(model.parameters(), ewc=ewc)
    with pytest.warns(UserWarning, match="called with a graph while attached"):
        ewc()
    with pytest.warns(UserWarning, match="penalised by two attached penalties"):
        ewc.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    del optimizer


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
@pytest.mark.parametrize("wrong", ["sparse", "scale", "lr"])
def test_what_a_later_group_is_refused_for_changes_nothing(wrong: str, coupling: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Embedding(5, 3, sparse=wrong == "sparse"))
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()}, anchor=model.state_dict())
    groups: list[dict[str, Any]] = [{"params": m.parameters()} for m in model]
    optimizer = EWCAdamW(groups, lr=0.1, ewc=ewc, coupling=coupling)
    if wrong == "scale":
        optimizer.param_groups[1]["ewc_lambda_scale"] = -1.0
    elif wrong == "lr":
        optimizer.param_groups[1]["lr"] = torch.tensor([0.1, 0.2])
    messages = {
        "sparse": "sparse gradients",
        "scale": "ewc_lambda_scale of a parameter group",
        "lr": "lr must be a number or a tensor of one element",
    }
    model[0].weight.grad = torch.ones(2, 3)
    model[1](torch.tensor([1, 2])).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=messages[wrong]):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not optimizer.state and model[0].bias.grad is None


@couplings
@pytest.mark.parametrize("kind", [EWCAdamW, EWCSGD])
def test_the_state_follows_a_parameter_that_is_not_stepped(kind: Any, coupling: str) -> None:
    """Its value is read, in another memory order than the state was laid in."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Conv2d(3, 3, 3)})
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        model["unused"].weight += 1
    optimizer = kind(model["used"].parameters(), lr=0.1, ewc=ewc, coupling=coupling)
    optimizer.add_param_group({"params": list(model["unused"].parameters())})
    model["unused"].requires_grad_(True)
    model.to(memory_format=torch.channels_last)
    for step in range(2):
        model["used"](torch.ones(1, 2)).sum().backward()
        if coupling == "coupled" and step == 0:
            ewc.ewc_lambda = 0.0  # or what has no gradient would get the penalty's
        optimizer.step()
        assert ewc.predicted_forgetting.item() >= 81 / 2


@pytest.mark.parametrize("kind", [EWCAdamW, EWCSGD])
def test_a_layer_replaced_in_the_model_alone_is_said(kind: Any) -> None:
    model, ewc = make()
    optimizer = kind(model.parameters(), lr=0.02, ewc=ewc)
    (batch,) = batches(1)
    backward(model, batch)
    optimizer.step()
    model.b = nn.Linear(33, 3, dtype=torch.float64)
    backward(model, batch)
    with pytest.warns(UserWarning, match=r"b\.(bias|weight) was replaced in the model but not in"):
        optimizer.step()


@pytest.mark.parametrize("kind", [EWCAdamW, EWCSGD])
def test_a_clipped_step_that_was_skipped_is_not_the_next_one(kind: Any) -> None:
    model, ewc = make()
    plain = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=0.02, ewc=ewc, coupling="coupled")
    reference = {EWCAdamW: torch.optim.AdamW, EWCSGD: torch.optim.SGD}[kind](plain.parameters(), lr=0.02)
    for step, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        backward(model, batch)
        if step % 2 == 0:
            ewc.clip_grad_norm_(model.parameters(), 0.7)
            continue  # as a GradScaler does on overflow
        optimizer.step()
        reference.zero_grad()
        (nn.functional.cross_entropy(plain(batch[0]), batch[1]) + penalised(plain, ewc)).backward()
        reference.step()
    same_params(model, plain, rtol=1e-8, atol=1e-10)


def test_a_sparse_gradient_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Embedding(5, 3, sparse=True))
    optimizer = EWCAdamW(model.parameters(), lr=0.1)
    model[0](model[1](torch.tensor([1]))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"EWCAdamW does not support sparse gradients, and a parameter of shape"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@couplings
def test_an_error_about_a_parameter_that_is_not_protected_is_that_error(coupling: str) -> None:
    """It comes after the protected ones in the op's lists, and has no name there."""
    model = nn.Module()
    model.a, model.w = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(1, 5).expand(4, 5))
    ewc = EWCLoss(model, params=["a"])
    ewc.consolidate(fisher={"a": torch.ones(5)})
    optimizer = EWCAdamW(model.parameters(), ewc=ewc, coupling=coupling)
    model.a.grad, model.w.grad = torch.ones(5), torch.ones(4, 5)
    with pytest.raises(ValueError, match="a parameter that EWC does not protect.*share memory"):
        optimizer.step()
    assert not model.a.any()


def test_state_of_another_model_is_named() -> None:
    for make, name in ((partial(EWCAdamW), "exp_avgs"), (partial(EWCSGD, momentum=0.9), "momentum_buffers")):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))
        before = copy.deepcopy(model.state_dict())
        ewc = EWCLoss(model)
        ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
        other = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        optimizer, foreign = make(model.parameters(), lr=0.1, ewc=ewc), make(other.parameters(), lr=0.1)
        for p in (*model.parameters(), *other.parameters()):
            p.grad = torch.ones_like(p)
        foreign.step()
        optimizer.load_state_dict(foreign.state_dict())
        with pytest.raises(ValueError, match=rf"{name} of 1.weight has shape .3, 7., .*load its own, or delete"):
            optimizer.step()
        assert all(torch.equal(now, before[n]) for n, now in model.state_dict().items())


def test_an_error_names_the_parameter_and_leaves_the_step_count() -> None:
    model, ewc = make()
    optimizer = EWCAdamW(model.parameters(), ewc=ewc)
    backward(model, batches(1)[0])
    optimizer.step()
    steps = [s["step"].clone() for s in optimizer.state.values()]
    optimizer.state[model.a.weight]["exp_avg"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="a.weight|exp_avgs"):
        optimizer.step()
    assert all(torch.equal(s, t["step"]) for s, t in zip(steps, optimizer.state.values(), strict=True))


def test_a_copy_has_no_penalty() -> None:
    model, ewc = make()
    optimizer = EWCAdamW(model.parameters(), ewc=ewc)
    backward(model, batches(1)[0])
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    assert not ewc.is_attached(copied) and ewc.is_attached(optimizer)
    copied.step()


@pytest.mark.parametrize("kind", [EWCAdamW, EWCSGD])
def test_a_fresh_optimizer_for_every_task_leaves_nothing_behind(kind: Any) -> None:
    model, ewc = make()
    for batch in batches(3):
        optimizer = kind(model.parameters(), lr=0.01, ewc=ewc)  # a warning would be an error
        backward(model, batch)
        optimizer.step()
        del optimizer
    ewc().backward()  # attached to nothing any more


def test_hooks_run_and_lambda_can_change_between_steps() -> None:
    model, ewc = make()
    optimizer = EWCSGD(model.parameters(), lr=0.0, ewc=ewc)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("post"))
    backward(model, batches(1)[0])
    for value in (5.0, 0.0, 1e8):
        ewc.ewc_lambda = value
        optimizer.step()
        assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-9)
    assert calls == ["pre", "post"] * 3


def test_clipping_the_sum() -> None:
    model, ewc = make()
    plain = copy.deepcopy(model)
    optimizer = EWCAdamW(model.parameters(), lr=0.02, ewc=ewc)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for batch in batches(4):
        optimizer.zero_grad()
        backward(model, batch)
        norm = ewc.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
        reference.zero_grad()
        backward(plain, batch)
        penalised(plain, ewc).backward()
        wanted = nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
        reference.step()
        torch.testing.assert_close(norm, wanted)
        assert ewc.last_penalty.item() > 0
    same_params(model, plain, rtol=1e-8, atol=1e-10)


def attached_adamw(params: Any, lr: float, ewc: EWCLoss, coupling: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params, lr)
    ewc.attach(optimizer, coupling)
    return optimizer


@couplings
@pytest.mark.parametrize("kind", [EWCAdamW, EWCSGD, attached_adamw])
def test_torch_compile_of_the_step(kind: Any, coupling: str) -> None:
    model, ewc = make()
    plain = copy.deepcopy(model)
    other = EWCLoss(plain, LAMBDA)
    other.load_state_dict(ewc.state_dict())
    optimizer = kind(model.parameters(), lr=0.02, ewc=ewc, coupling=coupling)
    reference = kind(plain.parameters(), lr=0.02, ewc=other, coupling=coupling)
    compiled = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches(3):
            for m, o, step in ((model, optimizer, compiled), (plain, reference, reference.step)):
                o.zero_grad()
                backward(m, batch)
                step()
    same_params(model, plain, rtol=1e-6, atol=1e-6)  # compiled, torch's AdamW has its step count in fp32
    assert ewc.last_penalty.item() == pytest.approx(other.last_penalty.item(), rel=1e-5)


@pytest.mark.native
def test_one_call_of_the_kernel_per_step() -> None:
    model, ewc = make(torch.float32)
    optimizer = EWCAdamW(model.parameters(), ewc=ewc)
    data = batches(3, torch.float32)
    with torch.profiler.profile() as profile:
        for batch in data:
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("ewc_fast::")}
    assert calls == {"ewc_fast::adamw_": 3}


def test_who_is_stepped_by_which_call_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ewc = make()
    optimizer = EWCAdamW([{"params": model.a.parameters()}, {"params": model.b.parameters()}], ewc=ewc)
    made = []
    real = optimizer._fused._make
    monkeypatch.setattr(optimizer._fused, "_make", lambda *args: made.append(1) or real(*args))
    for batch in batches(3):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert len(made) == 2


def test_many_small_groups_and_several_optimizers() -> None:
    model, ewc = make()
    halves = [[*model.a.parameters()], [*model.b.parameters(), model.scale, model.unused, model.empty]]
    optimizers = [EWCSGD(params, lr=0.0, ewc=ewc) for params in halves]
    backward(model, batches(1)[0])
    for optimizer in optimizers:
        optimizer.step()
    assert ewc.last_penalty.item() == pytest.approx(penalised(model, ewc).item(), rel=1e-9)
    assert len(list(itertools.chain(*halves))) == len(ewc.penalty_by_parameter())
