"""Level 2 with every optimizer of torch, in both couplings, and where the proximal pull leads."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCSGD, EWCAdamW, EWCLoss
from ewc_fast.optim import metrics

LAMBDA = 4.0
O = torch.optim  # noqa: E741
Make = Callable[[Any], torch.optim.Optimizer]

# Every optimizer of this torch, by name, with options away from the defaults; with its metric where it is known.
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: O.SGD(p, 0.05, momentum=0.9),
    "SGD-plain": lambda p: O.SGD(p, 0.05, foreach=True),
    "SGD-dampened": lambda p: O.SGD(p, 0.05, momentum=0.9, dampening=0.5, fused=True),
    "SGD-nesterov": lambda p: O.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: O.Adam(p, 0.05, betas=(0.8, 0.95)),
    "Adam-amsgrad": lambda p: O.Adam(p, 0.05, amsgrad=True, foreach=True),
    "AdamW": lambda p: O.AdamW(p, 0.05, weight_decay=0.0, fused=True),
    "NAdam": lambda p: O.NAdam(p, 0.05),
    "RAdam": lambda p: O.RAdam(p, 0.05),
    "Adamax": lambda p: O.Adamax(p, 0.05),
    "RMSprop": lambda p: O.RMSprop(p, 0.02, momentum=0.5),
    "RMSprop-centered": lambda p: O.RMSprop(p, 0.02, centered=True, momentum=0.5),
    "Adagrad": lambda p: O.Adagrad(p, 0.5, lr_decay=1e-3),
    "Adadelta": lambda p: O.Adadelta(p, 0.5),
    "Rprop": lambda p: O.Rprop(p, 0.01),
    "ASGD": lambda p: O.ASGD(p, 0.05),
    "Adafactor": lambda p: O.Adafactor(p, 0.01),
}
if hasattr(O, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: O.Muon([q for q in p if q.dim() == 2], 0.01)
UNKNOWN = {"Adadelta", "Rprop", "ASGD", "Adafactor", "Muon", "LBFGS"}
ELSEWHERE = {"LBFGS", "SparseAdam", "Optimizer"}  # with a closure, with sparse gradients: tests of their own


def test_every_optimizer_of_torch_is_here() -> None:
    there = {n for n, c in vars(O).items() if isinstance(c, type) and issubclass(c, O.Optimizer)}
    assert there - ELSEWHERE <= {name.partition("-")[0] for name in OPTIMIZERS}


def attach(ewc: EWCLoss, optimizer: torch.optim.Optimizer, coupling: str, **options: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = ewc.attach(optimizer, coupling=coupling, **options)
    said = [str(w.message) for w in caught]
    unknown = coupling == "proximal" and type(optimizer).__name__ in UNKNOWN
    assert len(said) == unknown and all("is not known: the proximal pull takes D = 1" in m for m in said), said
    return handle


class Quadratic(nn.Module):
    """A convex loss, ``sum H (w - B)^2 / 2``, and a quadratic penalty of another centre."""

    def __init__(self, n: int = 12) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.curvature, self.centre = torch.rand(n).double() * 2 + 0.2, torch.randn(n).double()
        self.fisher, self.anchor = {"w": torch.rand(n).double() * 3}, {"w": torch.randn(n).double()}

    def loss(self) -> Tensor:
        return 0.5 * (self.curvature * (self.w - self.centre) ** 2).sum()

    def off(self) -> float:
        """From the optimum of the penalised loss."""
        weights = LAMBDA * self.fisher["w"]
        best = (self.curvature * self.centre + weights * self.anchor["w"]) / (self.curvature + weights)
        return float((self.w.detach() - best).abs().max())

    def descend(self, optimizer: torch.optim.Optimizer, steps: int = 3000) -> float:
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(steps):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return self.off()


# NAdam's step tends to lr g / D, as its momentum's schedule runs out.
LANDS = {name: 1e-3 if name == "NAdam" else 1e-9 for name in OPTIMIZERS if name.partition("-")[0] not in UNKNOWN}
del LANDS["RMSprop-centered"]  # without noise in the gradient its second moment is 0, whatever the coupling


@pytest.mark.parametrize("name", LANDS)
def test_proximal_lands_on_the_optimum_of_the_penalised_loss(name: str) -> None:
    problem = Quadratic()
    ewc = EWCLoss(problem, LAMBDA)
    ewc.consolidate(fisher=problem.fisher, anchor=problem.anchor)
    attach(ewc, optimizer := OPTIMIZERS[name]([problem.w]), "proximal")
    assert problem.descend(optimizer) < LANDS[name]


@pytest.mark.parametrize(
    ("fused", "plain"),
    [
        (lambda p, **o: EWCAdamW(p, 0.05, weight_decay=0.0, **o), lambda p: O.AdamW(p, 0.05, weight_decay=0.0)),
        (lambda p, **o: EWCSGD(p, 0.05, momentum=0.9, **o), lambda p: O.SGD(p, 0.05, momentum=0.9)),
        (
            lambda p, **o: EWCSGD(p, 0.05, momentum=0.9, dampening=0.5, **o),
            lambda p: O.SGD(p, 0.05, momentum=0.9, dampening=0.5),
        ),
        (
            lambda p, **o: EWCSGD(p, 0.05, momentum=0.9, nesterov=True, **o),
            lambda p: O.SGD(p, 0.05, momentum=0.9, nesterov=True),
        ),
        (lambda p, **o: EWCSGD(p, 0.05, **o), lambda p: O.SGD(p, 0.05)),
        (
            lambda p, **o: EWCAdamW(p, 0.05, weight_decay=0.0, amsgrad=True, **o),
            lambda p: O.AdamW(p, 0.05, weight_decay=0.0, amsgrad=True),
        ),
    ],
    ids=["adamw", "momentum", "dampened", "nesterov", "plain", "amsgrad"],
)
def test_the_fused_optimizers_land_there_too_and_agree_step_by_step(fused: Any, plain: Make) -> None:
    problem = Quadratic()
    other = copy.deepcopy(problem)
    losses = []
    for p in (problem, other):
        ewc = EWCLoss(p, LAMBDA)
        ewc.consolidate(fisher=p.fisher, anchor=p.anchor)
        losses.append(ewc)
    ours = fused([problem.w], ewc=losses[0], coupling="proximal")
    attach(losses[1], theirs := plain([other.w]), "proximal")
    for _ in range(50):
        for p, o in ((problem, ours), (other, theirs)):
            o.zero_grad()
            p.loss().backward()
            o.step()
        torch.testing.assert_close(problem.w, other.w, rtol=1e-10, atol=1e-12)
    assert problem.descend(ours) < 1e-9


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Sequential, EWCLoss]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    ewc = EWCLoss(model, LAMBDA, **options)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, ewc


def task_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 6, dtype=dtype), torch.randint(3, (4,))


def metric_by_hand(optimizer: torch.optim.Optimizer, group: Any, state: Any, p: Tensor) -> Tensor:
    """D by its definition in the contract, element by element."""
    kind, t = type(optimizer).__name__, float(state.get("step", 0))
    one = torch.ones_like(p)
    if kind == "SGD":
        return one * ((1 - group["momentum"]) / (1 - group["dampening"]) if group["momentum"] else 1.0)
    if kind in ("Adam", "AdamW", "NAdam"):
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        return (v / (1 - group["betas"][1] ** t)).sqrt() + group["eps"]
    if kind == "RAdam":
        beta2 = group["betas"][1]
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length <= 5:
            return one
        r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        return (state["exp_avg_sq"].sqrt() + group["eps"]) / (r * math.sqrt(1 - beta2**t))
    if kind == "Adamax":
        return state["exp_inf"]
    if kind == "RMSprop":
        v = state["square_avg"] - state["grad_avg"] ** 2 if group["centered"] else state["square_avg"]
        return (1 - group["momentum"]) * (v.sqrt() + group["eps"])
    if kind == "Adagrad":
        return (state["sum"].sqrt() + group["eps"]) * (1 + (t - 1) * group["lr_decay"])
    return one


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_proximal_step_by_step(name: str, damping: float) -> None:
    model, ewc = make(damping=damping)
    plain = copy.deepcopy(model)
    optimizer, reference = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    attach(ewc, optimizer, "proximal")
    names = dict(plain.named_parameters())
    for _ in range(8):
        data = batch()
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            task_loss(m, data).backward()
            o.step()
        penalty = 0.0
        for group in reference.param_groups:
            for p in group["params"]:
                n = next(n for n, q in names.items() if q is p)
                weights = ewc.fisher[n] + damping * ewc._mean_fisher
                d = p.detach() - ewc.anchor[n]
                penalty += LAMBDA / 2 * float((weights * d * d).sum())
                metric = metric_by_hand(reference, group, reference.state[p], p.detach())
                c = group["lr"] * LAMBDA * weights
                with torch.no_grad():
                    p.copy_((metric * p + c * ewc.anchor[n]) / (metric + c))
        assert ewc.last_penalty.item() == pytest.approx(penalty, rel=1e-8)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_coupled_equals_the_penalty_in_the_loss(name: str) -> None:
    model, ewc = make()
    plain = copy.deepcopy(model)
    optimizer, reference = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    attach(ewc, optimizer, "coupled")
    protected = [
        n for n, p in plain.named_parameters() if any(p is q for g in reference.param_groups for q in g["params"])
    ]
    for _ in range(5):
        data = batch()
        optimizer.zero_grad()
        task_loss(model, data).backward()
        optimizer.step()
        reference.zero_grad()
        params = dict(plain.named_parameters())
        terms = [(ewc.fisher[n] * (params[n] - ewc.anchor[n]) ** 2).sum() for n in protected]
        (task_loss(plain, data) + LAMBDA / 2 * torch.stack(terms).sum()).backward()
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_capturable_step_counts_are_read_where_they_are() -> None:
    group = {"betas": (0.9, 0.95), "lr": torch.tensor(0.1), "eps": 1e-3, "amsgrad": False}
    states = [{"step": torch.tensor(float(t)), "exp_avg_sq": torch.rand(3)} for t in (1, 7)]
    metric = metrics._adam(group, lambda: states)
    rates = metrics.rates_of(metric, 2, torch.device("cpu"))
    assert rates[:, 0].tolist() == pytest.approx([0.1, 0.1])
    assert rates[:, 2].tolist() == pytest.approx([1 / (1 - 0.95**t) for t in (1, 7)])


STEP_COUNTS: dict[str, tuple[Tensor, ...]] = {
    "equal": (torch.tensor(3.0), torch.tensor(3.0)),
    "equal in fp64": (torch.tensor(3.0, dtype=torch.float64), torch.tensor(3.0)),
    "one each": (torch.tensor([3.0]), torch.tensor([[3.0]])),
    "different": (torch.tensor(3.0), torch.tensor(4.0)),
    "integers": (torch.tensor(3), torch.tensor(3)),
}


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("counts", STEP_COUNTS)
@pytest.mark.parametrize(
    "name", ["Adam", "Adam-amsgrad", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "SparseAdam"]
)
def test_rates_are_the_same_however_they_are_had(
    name: str, counts: str, quickly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quickly:
        monkeypatch.setattr(metrics, "_common_value", lambda *_: None)
    optimizer = {**OPTIMIZERS, "SparseAdam": lambda p: O.SparseAdam(p, 0.05)}[name](
        [nn.Parameter(torch.ones(2)) for _ in range(2)]
    )
    group = optimizer.param_groups[0]
    states = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "grad_avg")
    for p, count in zip(group["params"], STEP_COUNTS[counts], strict=True):
        optimizer.state[p] = {"step": count, **{state: torch.rand(2) for state in states}}
    metric = metrics.step_metric(optimizer, group, group["params"])
    rates = metrics.rates_of(metric, 2, torch.device("cpu"))
    assert rates.shape == (2, 4) and rates.dtype == torch.float64
    for row, count in zip(rates, STEP_COUNTS[counts], strict=True):
        lr, factor, inner, eps = row.tolist()
        assert lr == group["lr"]
        t = count.item()
        if name in ("Adam", "Adam-amsgrad", "NAdam"):
            beta2 = group["betas"][1]
            assert (factor, inner, eps) == pytest.approx((1, 1 / (1 - beta2**t), group["eps"]), rel=1e-12)
        elif name == "SparseAdam":
            assert (factor, inner) == pytest.approx(((1 - group["betas"][1] ** t) ** -0.5, 1), rel=1e-12)
        elif name == "Adagrad":
            assert factor == pytest.approx(1 + (t - 1) * group["lr_decay"], rel=1e-12)
        elif name == "RAdam":
            assert (factor, inner, eps) == (1, 0, 1)  # its first steps are not adaptive
        elif name == "RMSprop":
            assert factor == pytest.approx(1 - group["momentum"], rel=1e-12)


# ---- what is skipped, refused or served ----


def test_a_parameter_that_the_step_skipped_is_skipped() -> None:
    model, ewc = make()
    attach(ewc, optimizer := O.AdamW(model.parameters(), 0.1), "proximal")
    model[0].weight.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n != "2.weight")
    assert ewc.penalty_by_parameter().keys() == before.keys()  # their values are read
    d = {n: before[n] - ewc.anchor[n] for n in before}
    d["2.weight"] = before["2.weight"] * (1 - 0.1 * 0.01) - ewc.anchor["2.weight"]
    wanted = sum(LAMBDA / 2 * float((ewc.fisher[n] * x * x).sum()) for n, x in d.items())
    assert ewc.last_penalty.item() == pytest.approx(wanted, rel=1e-8)
    optimizer.zero_grad()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()  # no gradient at all
    assert all(torch.equal(p, after[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_lambda_zero_only_predicts(coupling: str) -> None:
    model, ewc = make()
    ewc.ewc_lambda = 0.0
    plain = copy.deepcopy(model)
    attach(ewc, optimizer := O.AdamW(model.parameters(), 0.1), coupling)
    reference = O.AdamW(plain.parameters(), 0.1)
    data = batch()
    for m, o in ((model, optimizer), (plain, reference)):
        task_loss(m, data).backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert ewc.last_penalty.item() == 0.0 < ewc.predicted_forgetting.item()


def test_sparse_gradients_are_served_by_proximal() -> None:
    # fp64: a row pulled to its anchor has a gradient of rounding errors, of which Adam makes full steps
    model = nn.Embedding(6, 3, sparse=True, dtype=torch.float64)
    ewc = EWCLoss(model, LAMBDA)
    fisher, anchor = torch.rand(6, 3, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64)
    ewc.consolidate(fisher={"weight": fisher}, anchor={"weight": anchor})
    attach(ewc, optimizer := O.SparseAdam(model.parameters(), lr=0.1), "proximal")
    plain = copy.deepcopy(model)
    reference = O.SparseAdam(plain.parameters(), lr=0.1)
    for _ in range(4):
        ids = torch.randint(6, (3,))
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            m(ids).square().sum().backward()
            o.step()
        (state,) = reference.state.values()
        metric = (state["exp_avg_sq"].sqrt() + 1e-8) / math.sqrt(1 - 0.999 ** int(state["step"]))
        with torch.no_grad():
            plain.weight.mul_(metric / (metric + 0.1 * LAMBDA * ewc.fisher["weight"]))
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-5, atol=1e-6)
    coupled, ewc2 = copy.deepcopy(model), None
    ewc2 = EWCLoss(coupled, LAMBDA)
    ewc2.consolidate(fisher={"weight": torch.rand(6, 3)})
    attach(ewc2, optimizer := O.SparseAdam(coupled.parameters(), lr=0.1), "coupled")
    coupled(ids).sum().backward()
    with pytest.raises(ValueError, match="weight has a torch.sparse_coo gradient"):
        optimizer.step()


def test_a_sparse_gradient_beside_other_dtypes_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64), nn.Embedding(5, 3, sparse=True))
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        model[0].weight += 1
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(ewc, optimizer, "coupled")
    model[1](torch.tensor([1, 2])).sum().backward()
    model[0].bias.grad = torch.ones_like(model[0].bias)
    with pytest.raises(ValueError, match="1.weight has a torch.sparse_coo gradient"):
        optimizer.step()
    assert model[0].weight.grad is None and torch.equal(model[0].bias.grad, torch.ones_like(model[0].bias))


def test_a_closure_is_served_by_proximal() -> None:
    problem = Quadratic()
    ewc = EWCLoss(problem, LAMBDA)
    ewc.consolidate(fisher=problem.fisher, anchor=problem.anchor)
    optimizer = O.LBFGS([problem.w], lr=0.2)
    attach(ewc, optimizer, "proximal")
    before = problem.w.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(problem.w, before) and ewc.last_penalty.item() > 0
    plain = copy.deepcopy(problem)
    plain.w.data.copy_(before)
    reference = O.LBFGS([plain.w], lr=0.2)

    def other() -> Tensor:
        reference.zero_grad()
        loss = plain.loss()
        loss.backward()
        return loss

    reference.step(other)
    attach(other_ewc := EWCLoss(plain, LAMBDA), reference, "coupled")
    other_ewc.consolidate(fisher=problem.fisher)
    with pytest.raises(RuntimeError, match="with a closure, whose zero_grad would erase the penalty's gradient"):
        reference.step(other)
    c = 0.2 * LAMBDA * problem.fisher["w"]
    torch.testing.assert_close(problem.w.detach(), (plain.w.detach() + c * problem.anchor["w"]) / (1 + c))


def test_an_optimizer_in_the_backward_is_attached_like_any_other() -> None:
    model, ewc = make()
    optimizers = {p: O.SGD([p], 0.1) for p in model.parameters()}
    for o in optimizers.values():
        attach(ewc, o, "proximal")

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    plain = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    data = batch()
    loss = task_loss(model, data)
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    for (n, p), g in zip(model.named_parameters(), grads, strict=True):
        c = 0.1 * LAMBDA * ewc.fisher[n]
        torch.testing.assert_close(p.detach(), (plain[n] - 0.1 * g + c * ewc.anchor[n]) / (1 + c))
    assert ewc.penalty_by_parameter().keys() == plain.keys()


@pytest.mark.parametrize("overflow", [False, True])
def test_proximal_under_a_gradient_scaler(overflow: bool) -> None:
    model, ewc = make(torch.float32)
    plain = copy.deepcopy(model)
    attach(ewc, optimizer := O.SGD(model.parameters(), 0.1, fused=True), "proximal")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(torch.float32)
    scaler.scale(task_loss(model, data)).backward()
    if overflow:
        model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    task_loss(plain, data).backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        c = 0.1 * LAMBDA * ewc.fisher[n]
        stepped = (q.detach() - 0.1 * q.grad + c * ewc.anchor[n]) / (1 + c)
        torch.testing.assert_close(p.detach(), q.detach() if overflow else stepped, rtol=1e-5, atol=1e-6)


# ---- lambda of groups and modules ----


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_factors_of_lambda_multiply(coupling: str) -> None:
    model, ewc = make(lambda_by={"2.*": 0.1, "*.bias": 0.5})
    factors = {"0.weight": 3.0, "0.bias": 0.5 * 3.0, "2.weight": 0.1, "2.bias": 0.1}  # the first that fits counts
    groups = [{"params": model[0].parameters(), "ewc_lambda_scale": 3.0}, {"params": model[2].parameters()}]
    attach(ewc, optimizer := O.SGD(groups, lr=0.1), coupling)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    total = 0.0
    for n, p in model.named_parameters():
        c, d = 0.1 * LAMBDA * factors[n] * ewc.fisher[n], before[n] - ewc.anchor[n]
        wanted = before[n] - c * d if coupling == "coupled" else (before[n] + c * ewc.anchor[n]) / (1 + c)
        torch.testing.assert_close(p.detach(), wanted)
        total += factors[n] * LAMBDA / 2 * float((ewc.fisher[n] * d * d).sum())
    assert ewc.last_penalty.item() == pytest.approx(total, rel=1e-9)
    optimizer.param_groups[0]["ewc_lambda_scale"] = 0.0  # may be changed
    optimizer.step()
    assert ewc.penalty_by_parameter()["0.weight"].item() == 0.0


def test_level_1_has_the_factors_too() -> None:
    model, ewc = make(lambda_by={"2.*": 0.0})
    ewc().backward()
    assert not model[2].weight.grad.any() and model[0].weight.grad.any()


def test_bad_factors() -> None:
    model, _ = make()
    with pytest.raises(ValueError, match="lambda_by: 'classifier.*' is no protected parameter; names look like"):
        EWCLoss(model, lambda_by={"classifier.*": 0.1})
    with pytest.raises(ValueError, match=r"lambda_by\['0.*'\]"):
        EWCLoss(model, lambda_by={"0.*": -1.0})
    _, ewc = make()
    for bad in (-1.0, math.nan, "1"):
        optimizer = O.SGD([{"params": ewc.model.parameters(), "ewc_lambda_scale": bad}], lr=0.1)
        handle = ewc.attach(optimizer)
        with pytest.raises(ValueError, match="ewc_lambda_scale of a parameter group must be"):
            optimizer.step()
        handle.remove()


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_every_k_steps_with_k_times_the_weight(coupling: str) -> None:
    model, ewc = make()
    attach(ewc, optimizer := O.SGD(model.parameters(), lr=0.01), coupling, every=3)
    values = []
    for step in range(7):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        d = {n: b - ewc.anchor[n] for n, b in before.items()}
        for n, p in model.named_parameters():
            c = (0.01 * 3 * LAMBDA if step % 3 == 0 else 0.0) * ewc.fisher[n]
            wanted = before[n] - c * d[n] if coupling == "coupled" else (before[n] + c * ewc.anchor[n]) / (1 + c)
            torch.testing.assert_close(p.detach(), wanted)
        if step % 3 == 0:
            values.append(sum(LAMBDA / 2 * float((ewc.fisher[n] * x * x).sum()) for n, x in d.items()))
        assert ewc.last_penalty.item() == pytest.approx(values[-1], rel=1e-9)  # of the penalty itself, not k times it


def test_clipping_the_sum_or_the_tasks_gradient_alone() -> None:
    for together in (True, False):
        model, ewc = make()
        attach(ewc, optimizer := O.SGD(model.parameters(), lr=1.0), "coupled")
        for _ in range(2):  # a step after it adds again
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            task = {n: p.grad.clone() for n, p in model.named_parameters()}
            penalty = {n: LAMBDA * ewc.fisher[n] * (b - ewc.anchor[n]) for n, b in before.items()}
            if together:
                norm = ewc.clip_grad_norm_(model.parameters(), 0.3)
                grads = {n: task[n] + penalty[n] for n in task}
            else:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                grads = task
            length = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            torch.testing.assert_close(norm, length)
            optimizer.step()
            for n, p in model.named_parameters():
                clipped = grads[n] * min(1.0, 0.3 / (float(length) + 1e-6))
                total = clipped if together else clipped + penalty[n]
                torch.testing.assert_close(p.detach(), before[n] - total)


class CallsSuper(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class CallsItTwice(CallsSuper):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


@pytest.mark.parametrize("kind", [CallsSuper, CallsItTwice])
@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_a_step_within_a_step_is_none_of_its_own(kind: Any, coupling: str) -> None:
    """torch runs the hooks of both, once the base class has been used."""
    O.SGD([nn.Parameter(torch.ones(1))])
    CallsSuper([nn.Parameter(torch.ones(1))])
    model, ewc = make()
    optimizer = kind(model.parameters(), lr=0.1)
    attach(ewc, optimizer, coupling, every=2)
    for number in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        (0 * task_loss(model, batch())).backward()
        with pytest.raises(ZeroDivisionError):  # one that fails is not in the next one's way
            optimizer.step(lambda: 1 / 0) if coupling == "proximal" else 1 / 0
        optimizer.step()
        acts = number != 1
        for n, p in model.named_parameters():
            d, w = before[n] - ewc.anchor[n], 0.1 * 2 * LAMBDA * ewc.fisher[n]
            times = 2 if kind is CallsItTwice else 1
            wanted = before[n] - times * w * d if coupling == "coupled" else ewc.anchor[n] + d / (1 + w)
            torch.testing.assert_close(p.detach(), wanted if acts else before[n], msg=n)


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_a_wrong_scale_is_an_error_before_the_step(coupling: str) -> None:
    model, ewc = make()
    attach(ewc, optimizer := O.SGD(model.parameters(), lr=0.1), coupling)
    task_loss(model, batch()).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["ewc_lambda_scale"] = "much"
    with pytest.raises(ValueError, match="ewc_lambda_scale of a parameter group must be"):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_overflow_in_the_first_step() -> None:
    model, ewc = make(torch.float32)
    attach(ewc, optimizer := O.AdamW(model.parameters(), lr=0.1, fused=True), "proximal")
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    for bad in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(task_loss(model, batch(torch.float32)) * bad).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) == (bad == math.inf)
        assert all(p.isfinite().all() for p in model.parameters())


def test_two_optimizers_in_turn_clip_their_own() -> None:
    """As a GAN's do."""
    for in_place in (True, False):
        model, ewc = make()
        optimizers = [O.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
        for optimizer in optimizers:
            attach(ewc, optimizer, "coupled")
        for _ in range(3):
            for i, optimizer in zip((0, 2), optimizers, strict=True):
                optimizer.zero_grad(set_to_none=not in_place)
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                (0 * task_loss(model, batch())).backward()
                ewc.clip_grad_norm_(model[i].parameters(), 1e9)
                optimizer.step()
                for n, p in model.named_parameters():
                    wanted = before[n] - 0.1 * LAMBDA * ewc.fisher[n] * (before[n] - ewc.anchor[n])
                    torch.testing.assert_close(p.detach(), wanted if n.startswith(f"{i}.") else before[n], msg=n)


@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_groups_that_hold_no_list(coupling: str) -> None:
    model, ewc = make()
    attach(ewc, optimizer := O.SGD(model.parameters(), lr=0.1), coupling)
    for held in (tuple, nn.ParameterList, list):
        optimizer.param_groups[0]["params"] = held(model.parameters())
        for _ in range(2):
            before = ewc.last_penalty.item()
            task_loss(model, batch()).backward()
            optimizer.step()
            assert ewc.last_penalty.item() not in (0.0, before)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_clipped_step_that_was_skipped_is_not_the_next_one(in_place: bool) -> None:
    """What ``clip_grad_norm_`` added went with the gradients: the next step adds its own, once."""
    model, ewc = make()
    attach(ewc, optimizer := O.SGD(model.parameters(), lr=1.0), "coupled")
    for skipped in (True, False, True, False):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad(set_to_none=not in_place)
        task_loss(model, batch()).backward()
        task = {n: p.grad.clone() for n, p in model.named_parameters()}
        if skipped or in_place:  # in place the gradients are the same tensors: only another call can tell
            for part in (model[0], model[2]):
                ewc.clip_grad_norm_(part.parameters(), 1e9)
        if not skipped:
            model[0].weight.grad = model[0].weight.grad * 1.0  # as a hook of the user's might
            optimizer.step()
            for n, p in model.named_parameters():
                penalty = LAMBDA * ewc.fisher[n] * (before[n] - ewc.anchor[n])
                torch.testing.assert_close(p.detach(), before[n] - task[n] - penalty, msg=n)


@pytest.mark.native
def test_one_call_of_the_kernel_for_each_group() -> None:
    model, ewc = make(torch.float32)
    attach(ewc, optimizer := O.AdamW([{"params": m.parameters()} for m in (model[0], model[2])]), "proximal")
    data = batch(torch.float32)
    with torch.profiler.profile() as profile:
        for _ in range(3):
            task_loss(model, data).backward()
            optimizer.step()
    calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("ewc_fast::")}
    assert calls == {"ewc_fast::proximal_": 6}
