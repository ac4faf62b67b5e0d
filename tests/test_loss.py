"""EWCLoss against the formula in fp64, and everything it promises about models that change."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ewc_fast.loss
from ewc_fast import EWCLoss, estimate_fisher


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(45, 7), nn.LayerNorm(7)).to(dtype)


def random_fisher(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.rand(p.shape, dtype=torch.float32) for n, p in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@torch.no_grad()
def move(model: nn.Module, by: float = 0.1) -> None:
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=by)


def expected(
    model: nn.Module, tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]], lam: float, damping: float = 0.0
) -> tuple[float, float, dict[str, Tensor]]:
    """Penalty, predicted forgetting and gradients by the formula, in fp64: the sum of one quadratic per task.

    With damping, one task only.
    """
    params = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    forgetting = sum(
        (
            (fisher[n].double() * (p - anchor[n].double()) ** 2).sum() / 2
            for fisher, anchor in tasks
            for n, p in params.items()
        ),
        torch.zeros((), dtype=torch.float64),
    )
    penalty = lam * forgetting
    if damping:
        ((fisher, anchor),) = tasks
        mean = sum(f.double().sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        penalty = penalty + lam / 2 * damping * mean * sum(
            ((p - anchor[n].double()) ** 2).sum() for n, p in params.items()
        )
    penalty.backward()
    return penalty.item(), forgetting.item(), {n: p.grad for n, p in params.items()}


def assert_gradients(model: nn.Module, wanted: dict[str, Tensor], extra: dict[str, Tensor] | None = None) -> None:
    for name, p in model.named_parameters():
        want = wanted[name] + (0 if extra is None else extra[name].double())
        # One rounding of each of d, F + delta, their product and lambda's, relative to the largest term.
        torch.testing.assert_close(p.grad.double(), want, rtol=1e-5, atol=2e-6 * float(want.abs().max()))


# ---- the value and its gradient ----


def test_the_formula_at_both_levels(backend: str) -> None:
    model = make_model()
    task = (random_fisher(model), weights(model))
    ewc = EWCLoss(model, ewc_lambda=37.0, damping=0.3, backend=backend)
    ewc.consolidate(fisher=task[0])
    move(model)
    value, forgetting, gradients = expected(model, [task], 37.0, 0.3)

    loss = ewc()
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert_gradients(model, gradients)
    assert ewc.last_penalty.item() == loss.item() and not ewc.last_penalty.requires_grad
    assert ewc.predicted_forgetting.item() == pytest.approx(forgetting, rel=1e-6)
    parts = ewc.penalty_by_parameter()
    assert list(parts) == [n for n, _ in model.named_parameters()]
    assert sum(v.item() for v in parts.values()) == pytest.approx(value, rel=1e-6)

    noise = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = noise[n].clone()
    assert ewc.accumulate_grad_().item() == loss.item()
    assert_gradients(model, gradients, noise)

    with torch.no_grad():
        assert ewc().item() == loss.item() and not ewc().requires_grad


@pytest.mark.native
def test_native_and_reference_agree() -> None:
    model = make_model()
    fisher = random_fisher(model)
    both = [EWCLoss(model, 5.0, damping=0.1, backend=b) for b in ("native", "reference")]
    for ewc in both:
        ewc.consolidate(fisher=fisher)
    move(model)
    with torch.profiler.profile() as profile:
        values = [ewc().item() for ewc in both]
    calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("ewc_fast::")}
    assert calls == {"ewc_fast::penalty_grad": 1}  # by the native one alone
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_grad_output_scales_the_gradient(backend: str) -> None:
    model = make_model()
    task = (random_fisher(model), weights(model))
    ewc = EWCLoss(model, 3.0, backend=backend)
    ewc.consolidate(fisher=task[0])
    move(model)
    (-2.5 * ewc()).backward()
    _, _, gradients = expected(model, [task], 3.0)
    assert_gradients(model, {n: -2.5 * g for n, g in gradients.items()})


def test_zero_before_the_first_consolidate(backend: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, backend=backend)
    loss = ewc()
    assert loss.item() == 0.0 and loss.shape == () and loss.dtype == torch.float32
    (model(torch.randn(1, 2, 5, 5)).sum() + loss).backward()
    assert ewc.last_penalty.item() == ewc.predicted_forgetting.item() == ewc.accumulate_grad_().item() == 0.0
    assert ewc.penalty_by_parameter() == {}
    assert EWCLoss(make_model(torch.float64))().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_parameter_dtypes(backend: str, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    ewc = EWCLoss(model, 2.0, backend=backend)
    ewc.consolidate(fisher=random_fisher(model))
    task = ({n: f.clone() for n, f in ewc.fisher.items()}, {n: a.clone() for n, a in ewc.anchor.items()})
    move(model)
    value, _, gradients = expected(model, [task], 2.0)
    loss = ewc()
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(value, rel=1e-12 if dtype == torch.float64 else 1e-6)
    half_ulp = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for n, p in model.named_parameters():
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad.double(), gradients[n], rtol=half_ulp * 1.01, atol=1e-7)


def test_parameters_of_several_dtypes(backend: str) -> None:
    model = make_model()
    model[3].to(torch.bfloat16)
    model[4].to(torch.float64)
    ewc = EWCLoss(model, 4.0, backend=backend)
    ewc.consolidate(fisher=random_fisher(model))
    task = ({n: f.clone() for n, f in ewc.fisher.items()}, {n: a.clone() for n, a in ewc.anchor.items()})
    move(model)
    value, forgetting, gradients = expected(model, [task], 4.0)
    loss = ewc()
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert ewc.predicted_forgetting.item() == pytest.approx(forgetting, rel=1e-6)
    assert set(ewc.penalty_by_parameter()) == set(gradients)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), gradients[n], rtol=2**-8 * 1.01, atol=1e-6)


# ---- hyper-parameters ----


def test_lambda_and_damping_may_change_at_any_time(backend: str) -> None:
    model = make_model()
    task = (random_fisher(model), weights(model))
    ewc = EWCLoss(model, 1.0, backend=backend)
    ewc.consolidate(fisher=task[0])
    move(model)
    for lam, damping in ((5.0, 0.0), (0.5, 2.0)):
        ewc.ewc_lambda, ewc.damping = lam, damping
        assert ewc().item() == pytest.approx(expected(model, [task], lam, damping)[0], rel=1e-6)
    assert (ewc.ewc_lambda, ewc.damping) == (0.5, 2.0)


def test_lambda_zero_only_predicts(backend: str) -> None:
    model = make_model()
    task = (random_fisher(model), weights(model))
    ewc = EWCLoss(model, 0.0, damping=0.5, backend=backend)
    ewc.consolidate(fisher=task[0])
    move(model)
    forgetting = expected(model, [task], 1.0)[0]
    assert ewc.accumulate_grad_().item() == 0.0
    assert all(p.grad is None for p in model.parameters())
    assert ewc.predicted_forgetting.item() == pytest.approx(forgetting, rel=1e-6)
    loss = ewc()
    loss.backward()
    assert loss.item() == 0.0
    assert all(bool((p.grad == 0).all()) for p in model.parameters())
    assert ewc.predicted_forgetting.item() == pytest.approx(forgetting, rel=1e-6)


# ---- modes ----


def test_separate_is_the_sum_over_tasks(backend: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, 8.0, backend=backend)
    tasks = []
    for _ in range(4):
        move(model)
        fisher = random_fisher(model)
        for f in fisher.values():
            f[torch.rand(f.shape) < 0.3] = 0.0
            f.view(-1)[0] = 0.0  # in every task: chance alone leaves none such in some seeds
        ewc.consolidate(fisher=fisher)
        tasks.append((fisher, weights(model)))
    move(model)
    value, forgetting, gradients = expected(model, tasks, 8.0)
    loss = ewc()
    loss.backward()
    assert ewc.num_tasks == 4
    untouched = {n: sum(f[n] for f, _ in tasks) == 0 for n in ewc.anchor}
    assert all(torch.equal(a[untouched[n]], tasks[-1][1][n][untouched[n]]) for n, a in ewc.anchor.items())
    assert any(bool(u.any()) for u in untouched.values())
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert ewc.predicted_forgetting.item() == pytest.approx(forgetting, rel=1e-5)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), gradients[n], rtol=1e-4, atol=1e-4)


def test_online_and_latest(backend: str) -> None:
    model = make_model()
    online = EWCLoss(model, 2.0, mode="online", gamma=0.7, backend=backend)
    latest = EWCLoss(model, 2.0, mode="latest", backend=backend)
    first, second = random_fisher(model), random_fisher(model)
    for fisher in (first, second):
        move(model)
        online.consolidate(fisher=fisher)
        latest.consolidate(fisher=fisher)
    anchor = weights(model)
    move(model)
    mixed = {n: 0.7 * first[n].double() + second[n].double() for n in first}
    assert online().item() == pytest.approx(expected(model, [(mixed, anchor)], 2.0)[0], rel=1e-6)
    assert latest().item() == pytest.approx(expected(model, [(second, anchor)], 2.0)[0], rel=1e-6)


@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
def test_what_is_known_of_a_frozen_layer_stays(backend: str, mode: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, 2.0, mode=mode, gamma=0.5 if mode == "online" else 1.0, backend=backend)
    first, second = random_fisher(model), random_fisher(model)
    ewc.consolidate(fisher=first)
    anchor = weights(model)
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[3].weight.add_(0.1)
    ewc.consolidate(fisher={n: f for n, f in second.items() if not n.startswith("0.")})
    restored = EWCLoss(model, 2.0, mode=mode, gamma=ewc.gamma, backend=backend)
    restored.load_state_dict(ewc.state_dict())
    model[0].requires_grad_(True)
    kept = {"separate": 1.0, "online": 0.5}.get(mode)
    for loss in (ewc, restored):
        assert ("0.weight" in loss.fisher) == (kept is not None)
        if kept is not None:
            assert torch.equal(loss.fisher["0.weight"], kept * first["0.weight"])
            assert torch.equal(loss.anchor["0.weight"], anchor["0.weight"])
            with torch.no_grad():
                model[0].weight.copy_(anchor["0.weight"] + 1)
            loss()
            by_name = loss.penalty_by_parameter()["0.weight"].item()
            assert by_name == pytest.approx(kept * first["0.weight"].sum().item(), rel=1e-5)


def test_bf16_anchor_is_widened_once_tasks_merge(backend: str) -> None:
    model = make_model(torch.bfloat16)
    ewc = EWCLoss(model, 2.0, fisher_dtype=torch.float32, backend=backend)
    tasks = []
    for i in range(2):
        move(model)
        fisher = random_fisher(model)
        ewc.consolidate(fisher=fisher)
        tasks.append((fisher, weights(model)))
        assert {a.dtype for a in ewc.anchor.values()} == {torch.bfloat16 if i == 0 else torch.float32}
    move(model)
    assert ewc().item() == pytest.approx(expected(model, tasks, 2.0)[0], rel=1e-5)


def test_state_dtypes(backend: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, fisher_dtype=torch.bfloat16, anchor_dtype=torch.bfloat16, backend=backend)
    ewc.consolidate(fisher=random_fisher(model))
    assert {t.dtype for t in (*ewc.fisher.values(), *ewc.anchor.values())} == {torch.bfloat16}
    half = EWCLoss(make_model(torch.float16), backend=backend)
    half.consolidate(fisher=random_fisher(model))
    assert {t.dtype for t in (*half.fisher.values(), *half.anchor.values())} == {torch.float32}


def test_fisher_and_anchor_are_read_only_views(backend: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, backend=backend)
    assert dict(ewc.fisher) == {} and len(ewc.anchor) == 0
    fisher = random_fisher(model)
    ewc.consolidate(fisher=fisher)
    for n, p in model.named_parameters():
        assert torch.equal(ewc.fisher[n], fisher[n]) and torch.equal(ewc.anchor[n], p.detach())
        assert ewc.anchor[n].data_ptr() % 64 == 0
    assert "0.weight" in repr(ewc.fisher)
    with pytest.raises(TypeError):
        ewc.fisher["0.weight"] = torch.zeros(())  # type: ignore[index]


# ---- autograd, exactly ----


def ready(backend: str, lam: float = 2.0) -> tuple[nn.Sequential, EWCLoss, dict[str, Tensor]]:
    model = make_model()
    task = (random_fisher(model), weights(model))
    ewc = EWCLoss(model, lam, backend=backend)
    ewc.consolidate(fisher=task[0])
    move(model)
    return model, ewc, expected(model, [task], lam)[2]


def test_two_penalties_alive_at_once(backend: str) -> None:
    model, ewc, gradients = ready(backend)
    first = ewc()
    move(model)
    second = ewc()
    second.backward()
    model.zero_grad()
    first.backward()  # after the weights moved: the gradient is that of its own forward
    assert_gradients(model, gradients)


def test_two_backwards_through_one_graph(backend: str) -> None:
    model, ewc, gradients = ready(backend)
    loss = ewc()
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    assert_gradients(model, {n: 4 * g for n, g in gradients.items()})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_that_autograd_took_over_stay_what_they_are(backend: str) -> None:
    model, ewc, first = ready(backend)
    task = (dict(ewc.fisher), dict(ewc.anchor))
    ewc().backward()
    taken = {n: p.grad for n, p in model.named_parameters()}
    move(model)
    second = expected(model, [task], 2.0)[2]
    unused = ewc()  # writes a gradient of its own
    assert_gradients(model, first)
    ewc().backward()  # accumulates into the ones taken over
    assert all(p.grad is taken[n] for n, p in model.named_parameters())
    assert_gradients(model, first, second)
    model.zero_grad(set_to_none=True)
    kept = {n: g.clone() for n, g in taken.items()}
    ewc().backward()
    assert_gradients(model, second)
    assert all(torch.equal(g, kept[n]) for n, g in taken.items())
    model.zero_grad(set_to_none=False)
    ewc().backward()
    unused.backward()
    assert_gradients(model, second, second)


def test_the_buffer_is_allocated_once(backend: str) -> None:
    model, ewc, _ = ready(backend)
    pointers = set()
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        loss = ewc()
        loss.backward()
        pointers.add(model[0].weight.grad.data_ptr())
        del loss
    assert len(pointers) == 1


def test_double_backward_raises(backend: str) -> None:
    model, ewc, _ = ready(backend)
    (gradient,) = torch.autograd.grad(ewc(), model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_a_frozen_parameter_gets_no_gradient(backend: str) -> None:
    model, ewc, gradients = ready(backend)
    model[0].requires_grad_(False)
    ewc().backward()
    ewc.accumulate_grad_()
    assert model[0].weight.grad is None and "0.weight" not in ewc.penalty_by_parameter()
    model[0].requires_grad_(True)
    model.zero_grad()
    ewc().backward()
    assert_gradients(model, gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole(backend: str) -> None:
    model, ewc, gradients = ready(backend)
    compiled = torch.compile(lambda: 2 * ewc(), fullgraph=True, backend="aot_eager")
    loss = compiled()
    loss.backward()
    assert loss.item() == pytest.approx(2 * ewc().item(), rel=1e-6)
    assert_gradients(model, {n: 2 * g for n, g in gradients.items()})
    with torch._dynamo.config.patch(error_on_recompile=True):
        ewc.ewc_lambda = 4.0  # lives in a tensor: no recompilation
        ewc.damping = 0.5
        assert compiled().item() == pytest.approx(2 * ewc().item(), rel=1e-6)
    for _ in range(2):
        model[3] = nn.Linear(45, 7)  # a stale parameter must not be penalised in silence
        assert compiled().item() == pytest.approx(2 * ewc().item(), rel=1e-6)
    model.to(torch.bfloat16)
    assert compiled().item() == pytest.approx(2 * ewc().item(), rel=1e-6)


# ---- following the model ----


def test_a_replaced_layer_is_noticed(backend: str) -> None:
    model, ewc, _ = ready(backend)
    task = (dict(ewc.fisher), dict(ewc.anchor))
    model[3] = nn.Linear(45, 7)
    assert ewc().item() == pytest.approx(expected(model, [task], 2.0)[0], rel=1e-6)
    model[3].weight = nn.Parameter(torch.randn(7, 45))
    loss = ewc()
    loss.backward()
    assert loss.item() == pytest.approx(expected(model, [task], 2.0)[0], rel=1e-6)
    assert model[3].weight.grad is not None


@pytest.mark.parametrize("change", ["double", "bfloat16", "channels_last", "data", "transposed", "one"])
@pytest.mark.parametrize("level", [1, 2])
def test_the_state_follows(backend: str, change: str, level: int) -> None:
    model, ewc, _ = ready(backend)
    fisher, anchor = ({n: t.clone() for n, t in m.items()} for m in (ewc.fisher, ewc.anchor))
    ewc()
    if change == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif change == "data":
        model[3].weight.data = torch.randn(7, 45)
    elif change == "transposed":
        model[3].weight.data = torch.randn(45, 7).t()
    elif change == "one":  # one of several in a group
        model[4].to(torch.float64)
    else:
        model.to(getattr(torch, change))
    value, _, gradients = expected(model, [(fisher, anchor)], 2.0)
    if level == 1:
        loss = ewc()
        loss.backward()
    else:
        loss = ewc.accumulate_grad_()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert loss.dtype == (torch.float64 if change in ("double", "one") else torch.float32)
    for n, p in model.named_parameters():
        assert p.grad.dtype == p.dtype and p.grad.stride() == p.stride()
        rtol = 2**-8 * 1.01 if change == "bfloat16" else 1e-5
        torch.testing.assert_close(p.grad.double(), gradients[n], rtol=rtol, atol=1e-6)
    for n in fisher:
        assert torch.equal(ewc.fisher[n], fisher[n].to(ewc.fisher[n].dtype))
    if change == "double":
        assert {t.dtype for t in (*ewc.fisher.values(), *ewc.anchor.values())} == {torch.float64}
    if change == "bfloat16":  # widening back loses nothing, for the state kept its dtype
        model.float()
        ewc()
        assert all(torch.equal(ewc.anchor[n], anchor[n]) for n in anchor)


@pytest.mark.parametrize("level", [1, 2])
def test_what_ran_before_the_state_followed_counts_once(backend: str, level: int) -> None:
    model = make_model()
    model[3].to(torch.float64)
    task = (random_fisher(model), weights(model))
    ewc = EWCLoss(model, 2.0, backend=backend)
    ewc.consolidate(fisher=task[0])
    move(model)
    model[3].weight.data = torch.randn(45, 7, dtype=torch.float64).t()  # the second group's; the first runs before
    value, _, gradients = expected(model, [task], 2.0)
    loss = ewc() if level == 1 else ewc.accumulate_grad_()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert sum(v.item() for v in ewc.penalty_by_parameter().values()) == pytest.approx(value, rel=1e-6)
    if level == 1:
        loss.backward()
    assert_gradients(model, gradients)


def test_the_constant_of_parameters_that_are_left(backend: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, 2.0, backend=backend)
    tasks = []
    for _ in range(2):
        move(model)
        tasks.append((random_fisher(model), weights(model)))
        ewc.consolidate(fisher=tasks[-1][0])
    model[0].requires_grad_(False)
    without = [({n: f * (not n.startswith("0.")) for n, f in fisher.items()}, anchor) for fisher, anchor in tasks]
    assert ewc().item() == pytest.approx(expected(model, without, 2.0)[0], rel=1e-5)


def test_new_rows_and_new_layers_are_free(backend: str) -> None:
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 4))
    fisher, anchor = random_fisher(model), weights(model)
    ewc = EWCLoss(model, 2.0, damping=0.5, backend=backend)
    ewc.consolidate(fisher=fisher)
    move(model)
    before = expected(model, [(fisher, anchor)], 2.0, 0.5)[0]
    with torch.no_grad():
        model[0].weight = nn.Parameter(torch.cat([model[0].weight, torch.randn(2, 3)]))
        model[1].weight = nn.Parameter(torch.cat([model[1].weight, torch.randn(1, 3)]))
        model[1].bias = nn.Parameter(torch.cat([model[1].bias, torch.randn(1)]))
    model.append(nn.Linear(5, 2))
    loss = ewc()
    loss.backward()
    assert loss.item() == pytest.approx(before, rel=1e-6)
    assert torch.equal(model[0].weight.grad[6:], torch.zeros(2, 3)) and model[2].weight.grad is None
    level1 = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ewc.accumulate_grad_()
    for n, g in level1.items():
        torch.testing.assert_close(model.get_parameter(n).grad, g)
    # The next task protects them.
    new_fisher = random_fisher(model)
    ewc.consolidate(fisher=new_fisher)
    assert ewc.fisher["2.weight"].shape == (2, 5) and ewc.fisher["0.weight"].shape == (8, 3)
    torch.testing.assert_close(ewc.fisher["0.weight"][:6], fisher["0.weight"] + new_fisher["0.weight"][:6])
    assert torch.equal(ewc.fisher["0.weight"][6:], new_fisher["0.weight"][6:])


def test_data_of_another_shape_is_noticed(backend: str) -> None:
    model = nn.ModuleDict({"e": nn.Embedding(10, 3), "l": nn.Linear(3, 10)})
    ewc = EWCLoss(model, 2.0, backend=backend)
    ewc.consolidate(fisher=random_fisher(model))
    old = model["e"].weight.detach().clone()
    ewc()
    model["e"].weight.data = torch.cat([old, torch.full((4, 3), 5.0)])
    assert ewc().item() == ewc.accumulate_grad_().item() == 0.0
    assert model["e"].weight.grad.shape == (14, 3) and bool((model["e"].weight.grad == 0).all())
    model["e"].weight.data = old[:5]
    with pytest.raises(ValueError, match=r"e\.weight has shape \(5, 3\), its anchor \(10, 3\)"):
        ewc()


def test_weights_tied_after_the_task_are_penalised_by_both_anchors(backend: str) -> None:
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    fisher, anchor = random_fisher(model), weights(model)
    ewc = EWCLoss(model, 2.0, backend=backend)
    ewc.consolidate(fisher=fisher)
    model[1].weight = model[0].weight
    p = model[0].weight.detach().double()
    wanted = sum(2.0 * fisher[n].double() * (p - anchor[n].double()) for n in fisher)
    for level in (1, 2):
        model.zero_grad()
        if level == 1:
            ewc().backward()
        else:
            ewc.accumulate_grad_()
        torch.testing.assert_close(model[0].weight.grad.double(), wanted, rtol=1e-5, atol=1e-7)
    with pytest.warns(UserWarning, match=r"1\.weight is no longer in the model, or tied"):
        ewc.consolidate(fisher={"0.weight": fisher["0.weight"]})


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_work_and_are_attached_to_nothing(backend: str, how: str) -> None:
    model, ewc, gradients = ready(backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc.attach(optimizer)
    together = (model, optimizer, ewc)
    copied = copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))
    model2, optimizer2, ewc2 = copied
    assert ewc2.model is model2 and not ewc2.is_attached(optimizer2) and ewc.is_attached(optimizer)
    with torch.no_grad():
        value = ewc().item()
        for p in model.parameters():
            p.zero_()  # the copy is its own
    ewc2().backward()
    assert ewc2.last_penalty.item() == value
    assert_gradients(model2, gradients)
    ewc2.ewc_lambda = 4.0
    assert ewc2().item() == pytest.approx(2 * value) and ewc.ewc_lambda == 2.0


def test_inference_mode_leaves_nothing_that_cannot_change(backend: str) -> None:
    model, ewc, _ = ready(backend)
    with torch.inference_mode():
        ewc.consolidate(fisher=random_fisher(model))
        ewc.load_state_dict(ewc.state_dict())
        ewc()
    ewc.ewc_lambda = 3.0
    ewc.consolidate(fisher=random_fisher(model))
    move(model)
    ewc().backward()
    assert model[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_before_the_first_consolidate(backend: str) -> None:
    ewc = EWCLoss(make_model(), backend=backend)
    x = torch.ones((), requires_grad=True)
    loss = torch.compile(lambda: ewc() + 2 * x, fullgraph=True, backend="aot_eager")()
    loss.backward()
    assert loss.item() == 2.0 and x.grad.item() == 2.0


def test_params_given_as_tensors_outlive_them(backend: str) -> None:
    model = make_model()
    ewc = EWCLoss(model, params=[model[3].weight], backend=backend)
    model[3].weight = nn.Parameter(torch.randn(7, 45))
    ewc.consolidate(fisher=random_fisher(model))
    assert list(ewc.fisher) == ["3.weight"]
    with pytest.raises(TypeError, match="names or parameters, got int"):
        EWCLoss(model, params=[3])


def test_another_shape_is_an_error_that_names_it(backend: str) -> None:
    model, ewc, _ = ready(backend)
    model[3] = nn.Linear(44, 7)
    with pytest.raises(ValueError, match=r"3\.weight has shape \(7, 44\), its anchor \(7, 45\)"):
        ewc()


def test_a_removed_layer_is_reported(backend: str) -> None:
    model, ewc, _ = ready(backend)
    del model[4]
    with pytest.warns(UserWarning, match=r"4\.(weight|bias) is no longer in the model"):
        ewc()
    assert "4.weight" not in ewc.penalty_by_parameter()


def test_tied_parameters_count_once(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    fisher = random_fisher(model)
    ewc = EWCLoss(model, 2.0, backend=backend)
    ewc.consolidate(fisher={**fisher, "1.weight": fisher["0.weight"]}, anchor=model.state_dict())
    anchor = weights(model)
    move(model)
    assert ewc().item() == pytest.approx(expected(model, [(fisher, anchor)], 2.0)[0], rel=1e-6)
    assert list(ewc.fisher) == ["0.weight", "0.bias", "1.bias"]


def test_wrapped_models_have_their_own_names(backend: str) -> None:
    model = make_model()
    plain = EWCLoss(model, backend=backend)
    plain.consolidate(fisher=random_fisher(model))
    wrapped = EWCLoss(nn.DataParallel(torch.compile(model)), backend=backend)
    wrapped.load_state_dict(plain.state_dict())
    move(model)
    assert wrapped().item() == plain().item()
    wrapped.consolidate(fisher={f"module._orig_mod.{n}": f for n, f in random_fisher(model).items()})
    assert list(wrapped.fisher) == list(plain.fisher)


def test_params_selects(backend: str) -> None:
    model = make_model()
    fisher, anchor = random_fisher(model), weights(model)
    ewc = EWCLoss(model, 2.0, params=["0.*", model[4].bias], backend=backend)
    ewc.consolidate(fisher=fisher)
    move(model)
    chosen = {n: f if n.startswith("0.") or n == "4.bias" else torch.zeros_like(f) for n, f in fisher.items()}
    assert ewc().item() == pytest.approx(expected(model, [(chosen, anchor)], 2.0)[0], rel=1e-6)
    with pytest.raises(ValueError, match="'9.weight' is no parameter"):
        EWCLoss(model, params=["9.weight"])
    with pytest.raises(ValueError, match="wrap it in a list"):
        EWCLoss(model, params="0.*")


# ---- saving ----


def test_a_saved_state_is_the_same_state(backend: str, tmp_path) -> None:
    model, ewc, _ = ready(backend)
    ewc.consolidate(fisher=random_fisher(model))
    move(model)
    value = ewc().item()
    ewc.save(tmp_path / "state.safetensors")
    torch.save(ewc.state_dict(), tmp_path / "state.pt")
    for source in ("load", "load_state_dict"):
        other = EWCLoss(model, 2.0, backend=backend)
        if source == "load":
            other.load(tmp_path / "state.safetensors")
        else:
            other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other().item() == value and other.num_tasks == 2
        assert other.predicted_forgetting.item() == ewc.predicted_forgetting.item()
    with pytest.raises(ValueError, match="mode='separate'.*'online'"):
        EWCLoss(model, mode="online").load(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="protects '0.*', which is not among the parameters"):
        EWCLoss(nn.Linear(2, 2)).load(tmp_path / "state.safetensors")


def layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))


def saved_of(model: nn.Module) -> EWCLoss:
    ewc = EWCLoss(model)
    ewc.consolidate(fisher=random_fisher(model))
    return ewc


def test_loading_says_what_the_state_does_not_cover(tmp_path: Path) -> None:
    saved_of(layers(2)).save(tmp_path / "ewc.safetensors")
    ewc = EWCLoss(layers(4))
    with pytest.warns(UserWarning, match=r"does not cover 4 of 8 parameters to protect, such as 2.weight: they are fr"):
        ewc.load(tmp_path / "ewc.safetensors")
    assert ewc.num_tasks == 1 and len(ewc.fisher) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc.load(tmp_path / "ewc.safetensors")  # once


def test_loading_a_tied_state_into_an_untied_model_is_said() -> None:
    tied = layers(2)
    tied[1].weight = tied[0].weight
    state = saved_of(tied).state_dict()
    with pytest.warns(UserWarning, match=r"does not cover 1 of 4 parameters to protect, such as 1.weight"):
        EWCLoss(layers(2)).load_state_dict(state)


def test_loading_is_silent_where_nothing_to_protect_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = saved_of(layers(2)).state_dict()
        EWCLoss(layers(2)).load_state_dict(state)
        EWCLoss(layers(3), params=["0.*", "1.*"]).load_state_dict(state)
        larger = layers(3)
        larger[2].requires_grad_(False)
        EWCLoss(larger).load_state_dict(state)
        EWCLoss(layers(3)).load_state_dict(EWCLoss(layers(2)).state_dict())  # no task yet


def test_consolidate_from_a_loader(backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    loader = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(3)]
    ewc = EWCLoss(model, backend=backend)
    ewc.consolidate(loader, kind="empirical", num_samples=10)
    by_hand = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    samples = [(x, y) for xs, ys in loader for x, y in zip(xs, ys, strict=True)][:10]
    for x, y in samples:
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        for f, g in zip(by_hand.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            f += g.square() / 10
    for n, f in by_hand.items():
        torch.testing.assert_close(ewc.fisher[n], f)
    assert ewc.info["kind"] == "empirical" and ewc.info["num_samples"] == 10


# ---- said, not left silent ----


def test_bad_arguments() -> None:
    model = make_model()
    for arguments, message in (
        ({"ewc_lambda": -1.0}, "ewc_lambda must be"),
        ({"ewc_lambda": float("nan")}, "ewc_lambda must be"),
        ({"damping": -0.1}, "damping must be"),
        ({"mode": "both"}, "mode must be one of separate, online, latest"),
        ({"mode": "online", "gamma": 1.1}, "gamma must lie in"),
        ({"gamma": 0.5}, "mode='online' only"),
        ({"fisher_dtype": torch.float16}, "fisher_dtype=torch.float16"),
        ({"anchor_dtype": torch.int32}, "anchor_dtype must be"),
        ({"backend": "cuda"}, "backend must be one of auto, native, reference"),
    ):
        with pytest.raises(ValueError, match=message):
            EWCLoss(model, **arguments)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        EWCLoss(model.parameters())
    ewc = EWCLoss(model)
    with pytest.raises(ValueError, match="ewc_lambda must be"):
        ewc.ewc_lambda = float("inf")
    assert ewc.ewc_lambda == 100.0


def test_bad_consolidates_leave_the_state_alone(backend: str) -> None:
    model, ewc, _ = ready(backend)
    good = random_fisher(model)
    value = ewc().item()

    def with_entry(value: float) -> dict[str, Tensor]:
        bad = {n: f.clone() for n, f in good.items()}
        bad["4.bias"][2] = value
        return bad

    for arguments, message in (
        ({"fisher": {}}, "fisher has no entry for 0.weight"),
        ({"fisher": {**good, "head.weight": torch.ones(2)}}, "fisher has entries for head.weight"),
        ({"fisher": with_entry(-1e-9)}, "Fisher of '4.bias' has negative entries"),
        ({"fisher": with_entry(float("nan"))}, "Fisher of '4.bias' has NaN or infinite"),
        ({"fisher": with_entry(float("inf"))}, "Fisher of '4.bias' has NaN or infinite"),
        ({"fisher": {**good, "4.bias": torch.ones(3)}}, r"Fisher of '4.bias' has shape \(3,\)"),
        ({"fisher": good, "anchor": with_entry(float("nan"))}, "anchor of '4.bias' has NaN"),
        ({"fisher": good, "anchor": {}}, "anchor has no entry"),
        ({"fisher": good, "kind": "exact"}, "kind: only with a loader"),
        ({"fisher": {n: f.half() for n, f in good.items()}}, "Fisher of '0.weight' is float16"),
        ({"fisher": {n: f.double() * 1e300 for n, f in good.items()}}, r"Fisher of '0.weight' reaches .*float32 holds"),
        ({"fisher": good, "anchor": {n: f.double() * 1e300 + 1e299 for n, f in good.items()}}, "anchor of .* reaches"),
        ({}, "either a loader or fisher="),
        ({"loader": [], "fisher": good}, "either a loader or fisher="),
        ({"loader": [], "params": ["0.weight"]}, r"params: .*call estimate_fisher\(params="),
        ({"loader": [], "out": good}, r"out: .*call estimate_fisher\(out="),
    ):
        with pytest.raises(ValueError, match=message):
            ewc.consolidate(**arguments)
        assert ewc().item() == value and ewc.num_tasks == 1
    with pytest.raises(ValueError, match="(?i)empty|no batch"):
        ewc.consolidate([])
    with pytest.raises(TypeError, match="fisher must map parameter names to tensors"):
        ewc.consolidate(fisher=[1])
    with pytest.raises(TypeError, match=r"consolidate\(fisher=...\)"):
        ewc.consolidate(good)
    with pytest.raises(TypeError, match="ewc_lambda must be a number, got 'big'"):
        EWCLoss(model, "big")
    wrapped = EWCLoss(nn.DataParallel(nn.Linear(2, 2)), backend=backend)
    twice = {"weight": torch.ones(2, 2), "module.weight": torch.ones(2, 2), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match="two entries for 'weight'"):
        wrapped.consolidate(fisher=twice)


def test_a_parameter_that_has_no_penalty_is_named() -> None:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="phase has dtype torch.complex64.*params="):
        EWCLoss(model)
    model.to("meta")
    with pytest.raises(ValueError, match="weight is on the meta device"):
        EWCLoss(model, params=["weight"]).consolidate([torch.zeros(1, 2)])


@pytest.fixture
def warned() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_penalties_that_cannot_act_are_reported_once(warned: list[warnings.WarningMessage]) -> None:
    model = make_model()
    ewc = EWCLoss(model)
    for _ in range(2):
        ewc.consolidate(fisher={n: torch.zeros_like(p) for n, p in model.named_parameters()})
    assert [str(w.message) for w in warned] == ["the Fisher is zero everywhere: the penalty has no effect"]
    ewc.consolidate(fisher=random_fisher(model))
    model.requires_grad_(False)
    assert ewc().item() == ewc().item() == 0.0
    assert "no protected parameter requires grad any more" in str(warned[-1].message) and len(warned) == 2
    EWCLoss(model)
    assert "no parameter to protect requires grad" in str(warned[-1].message) and len(warned) == 3


def test_a_gradient_that_never_arrives_is_reported_once(warned: list[warnings.WarningMessage], backend: str) -> None:
    model, ewc, _ = ready(backend)
    for _ in range(2 * ewc_fast.loss._GRAPHS_WITHOUT_BACKWARD):
        ewc().detach()
    assert len(warned) == 1 and "never reached a parameter" in str(warned[0].message)
    model, ewc, _ = ready(backend)
    ewc().backward()
    for _ in range(2 * ewc_fast.loss._GRAPHS_WITHOUT_BACKWARD):
        ewc()
    assert len(warned) == 1


def test_a_meta_model_is_refused(backend: str) -> None:
    model, ewc, _ = ready(backend)
    model.to("meta")
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        ewc()


def test_repr() -> None:
    assert repr(EWCLoss(make_model())) == (
        "EWCLoss(ewc_lambda=100.0, mode='separate', gamma=1.0, damping=0.0, num_tasks=0)"
    )


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 2, 5, 5), torch.randint(7, (4,))) for _ in range(count)]


@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
@pytest.mark.parametrize("fisher_dtype", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_first_fisher_is_estimated_in_its_place(
    mode: str,
    fisher_dtype: torch.dtype | None,
    dtype: torch.dtype,
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a copy of it beside, where the state's dtype is that of an estimate; a later one is merged."""
    model = make_model(dtype).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    tasks = [[(x.to(dtype), y) for x, y in batches()] for _ in range(2)]
    wanted = [estimate_fisher(model, task, kind="empirical") for task in tasks]
    places: list[dict[str, int] | None] = []

    def spy(*args: object, out: dict[str, Tensor] | None = None, **kwargs: object) -> object:
        places.append(None if out is None else {name: t.data_ptr() for name, t in out.items()})
        return estimate_fisher(*args, out=out, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ewc_fast.loss, "estimate_fisher", spy)
    ewc = EWCLoss(model, mode=mode, fisher_dtype=fisher_dtype)
    ewc.consolidate(tasks[0], kind="empirical")
    for name, f in ewc.fisher.items():
        torch.testing.assert_close(f, wanted[0][name].to(f.dtype), rtol=1e-5, atol=1e-9)
    kept = fisher_dtype or dtype
    if kept == (torch.float64 if dtype == torch.float64 else torch.float32):
        assert places[0] == {name: f.data_ptr() for name, f in ewc.fisher.items()}
    else:
        assert places[0] is None
    ewc.consolidate(tasks[1], kind="empirical")
    assert places[1] is None
    for name, f in ewc.fisher.items():
        both = wanted[1][name] if mode == "latest" else wanted[0][name] + wanted[1][name]
        tolerance = 0.02 if kept == torch.bfloat16 else 1e-5
        torch.testing.assert_close(f.double(), both.double(), rtol=tolerance, atol=1e-9)


def test_a_failed_first_consolidate_leaves_no_state() -> None:
    model = make_model()
    ewc = EWCLoss(model)
    good, bad = batches(1), [(torch.full((4, 2, 5, 5), torch.nan), torch.randint(7, (4,)))]
    with pytest.raises(ValueError, match="batch 1: the loss is not finite"):
        ewc.consolidate(good + bad, kind="empirical")
    with pytest.raises(ValueError, match="anchor"):
        ewc.consolidate(good, kind="empirical", anchor={n: p.detach() / 0 for n, p in model.named_parameters()})
    assert ewc.num_tasks == 0 and not ewc.fisher and not ewc.anchor and ewc().item() == 0.0
    ewc.consolidate(good, kind="empirical")
    assert ewc.num_tasks == 1


def test_the_first_fisher_may_be_as_large_as_its_dtype_holds() -> None:
    """It lies in the state while it is checked, and is not to be counted twice."""
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1.6e19]])
    nn.init.zeros_(model.weight)
    ewc = EWCLoss(model)
    ewc.consolidate([(x, torch.ones(1, 1))], kind="empirical", loss="gaussian")
    assert ewc.fisher["weight"].item() == pytest.approx(2.56e38)


def test_a_transposed_view_of_the_state_is_a_new_fisher() -> None:
    model = nn.Linear(3, 3, bias=False)
    fisher = torch.rand(3, 3)
    ewc = EWCLoss(model, mode="latest")
    ewc.consolidate(fisher={"weight": fisher})
    ewc.consolidate(fisher={"weight": ewc.fisher["weight"].t()})
    assert torch.equal(ewc.fisher["weight"], fisher.t())
