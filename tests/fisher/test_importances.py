"""Each importance against its paper's formula, transcribed in fp64 from the recorded path or sample by sample."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss, FisherDiagonal
from ewc_fast.fisher.importances import PathImportance, mas_importance, uniform_importance
from tests.fisher import models as zoo

XI = 0.03


def assert_importance(found: FisherDiagonal, kind: str, method: str) -> None:
    assert found.info is not None and not found.info.is_fisher
    assert (found.info.kind, found.info.method, found.info.unit) == (kind, method, "none")


# ---- L2-SP ----


def test_uniform_importance_is_one_for_each_trained_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4).double(), nn.Linear(4, 2).bfloat16())
    model[0].weight.requires_grad_(False)
    model.add_module("tied", nn.Linear(4, 4))
    model.tied.weight = model[1].weight
    found = uniform_importance(nn.DataParallel(model))
    assert list(found) == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "tied.bias"]
    for name, tensor in found.items():
        parameter = model.get_parameter(name)
        assert tensor.shape == parameter.shape and (tensor == 1).all() and not tensor.requires_grad
        assert tensor.dtype == (torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    assert_importance(found, "l2sp", "constant")
    with pytest.raises(ValueError, match="requires grad"):
        uniform_importance(nn.Linear(2, 2).requires_grad_(False))


def test_uniform_importance_gives_the_l2_penalty() -> None:
    model = nn.Linear(3, 2)
    ewc = EWCLoss(model, 3.0)
    ewc.consolidate(fisher=uniform_importance(model))
    with torch.no_grad():
        model.weight += 0.5
    torch.testing.assert_close(ewc().item(), 3.0 / 2 * 6 * 0.25)


# ---- SI and RWalk: the formulas ----


class Step(NamedTuple):
    """One step of one parameter, as the test saw it: the task's gradient, the weight before and after."""

    gradient: Any
    before: Any
    after: Any


def si_of(path: list[Step], xi: float) -> Any:
    """Zenke et al. 2017, eqs. 3 to 5: omega = -sum g dtheta; Omega = omega / (Delta^2 + xi), not below 0."""
    omega = -sum(step.gradient * (step.after - step.before) for step in path)
    return np.maximum(0, omega / ((path[-1].after - path[0].before) ** 2 + xi))


def rwalk_of(paths: dict[str, list[Step]], xi: float, alpha: float, interval: int) -> dict[str, Any]:
    """Chaudhry et al. 2018, section 4: EWC++'s moving average, the score, the sum of both brought to [0, 1]."""
    scores, fishers = {}, {}
    for name, path in paths.items():
        fisher = path[0].gradient ** 2
        score = np.zeros_like(fisher)
        for start in range(0, len(path), interval):
            part = path[start : start + interval]
            delta_loss = -sum(step.gradient * (step.after - step.before) for step in part)
            distance = 0.5 * fisher * (part[-1].after - part[0].before) ** 2
            score += np.maximum(0, delta_loss / (distance + xi))
            fisher = alpha * np.mean([step.gradient**2 for step in part], axis=0) + (1 - alpha) * fisher
        scores[name], fishers[name] = score, fisher
    top_score = max(score.max() for score in scores.values())
    top_fisher = max(fisher.max() for fisher in fishers.values())
    return {name: fishers[name] / top_fisher + scores[name] / top_score for name in paths}


def arrays(model: nn.Module) -> dict[str, Any]:
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def zero_or(gradient: Tensor | None, p: Tensor) -> Any:
    return np.zeros(p.shape) if gradient is None else gradient.double().to_dense().numpy().copy()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, loss: Callable[[], Tensor]
) -> dict[str, list[Step]]:
    """Trains and records every step from outside, between backward and step, and after it."""
    paths: dict[str, list[Step]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        gradients = {name: zero_or(p.grad, p) for name, p in model.named_parameters()}
        before = arrays(model)
        optimizer.step()
        for name, after in arrays(model).items():
            paths[name].append(Step(gradients[name], before[name], after))
    return paths


def regression(model: nn.Module, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        x = torch.randn(16, 5, dtype=dtype)
        return (model(x) - x[:, :3].sin()).square().mean()

    return loss


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def expected_of(kind: str, paths: dict[str, list[Step]]) -> dict[str, Any]:
    if kind == "si":
        return {name: si_of(path, XI) for name, path in paths.items()}
    return rwalk_of(paths, XI, alpha=0.7, interval=4)


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> PathImportance:
    options: dict[str, Any] = {"alpha": 0.7, "interval": 4} if kind == "rwalk" else {}
    return PathImportance(model, optimizer, kind, xi=XI, **options)


def assert_close(found: FisherDiagonal, expected: dict[str, Any], rtol: float = 1e-10, atol: float = 1e-13) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=rtol, atol=atol, err_msg=name)
        assert expected[name].any(), f"{name}: nothing was compared"


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8),
    "AdamW in two groups": lambda model: torch.optim.AdamW(
        [{"params": model[2].parameters(), "lr": 0.03}, {"params": model[0].parameters()}], lr=0.01, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("kind", ["si", "rwalk"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("steps", [1, 3, 4, 11, 12])
def test_path_importance_is_the_papers(kind: str, make: Any, steps: int) -> None:
    model = net()
    optimizer = make(model)
    path = watch(model, optimizer, kind)
    paths = train(model, optimizer, steps, regression(model))
    found = path.result()
    assert_close(found, expected_of(kind, paths))
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    assert_importance(found, kind, "path")
    again = path.result()
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_result_midway_changes_nothing(kind: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = watch(model, optimizer, kind)
    first = train(model, optimizer, 6, regression(model))
    midway = path.result()
    assert_close(midway, expected_of(kind, first))
    kept = {name: tensor.clone() for name, tensor in midway.items()}
    second = train(model, optimizer, 7, regression(model))
    assert_close(path.result(), expected_of(kind, {name: first[name] + second[name] for name in first}))
    assert all(torch.equal(midway[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_defaults(kind: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = PathImportance(model, optimizer, kind)
    paths = train(model, optimizer, 23, regression(model))
    expected = (
        {name: si_of(steps, 0.1) for name, steps in paths.items()}
        if kind == "si"
        else rwalk_of(paths, xi=1e-3, alpha=0.9, interval=10)
    )
    assert_close(path.result(), expected)


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_single_precision_and_bf16(kind: str) -> None:
    for dtype, rtol in ((torch.float32, 1e-3), (torch.bfloat16, 1e-3)):
        model = net(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = watch(model, optimizer, kind)
        paths = train(model, optimizer, 9, regression(model, dtype))
        found = path.result()
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        # Sums of terms of both signs: relative to the largest importance.
        expected = expected_of(kind, paths)
        assert_close(found, expected, rtol=rtol, atol=1e-5 * max(e.max() for e in expected.values()))


@pytest.mark.parametrize("kind", ["si", "rwalk"])
@pytest.mark.parametrize("order", ["path first", "penalty first"])
def test_an_attached_penalty_is_not_in_the_gradient(kind: str, order: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ewc = EWCLoss(model, 20.0)
    ewc.consolidate(fisher=uniform_importance(model))
    if order == "path first":
        path = watch(model, optimizer, kind)
        ewc.attach(optimizer)
    else:
        ewc.attach(optimizer)
        path = watch(model, optimizer, kind)
    paths = train(model, optimizer, 10, regression(model))
    assert ewc.last_penalty.item() > 0
    plain_step = sum(np.abs(s.after - s.before + 0.05 * s.gradient).max() for s in paths["0.weight"])
    assert plain_step > 1e-6, "the penalty must have acted, or this shows nothing"
    assert_close(path.result(), expected_of(kind, paths))


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_other_hooks_do_after_the_update_is_part_of_the_movement(when: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.no_grad()
    def pull(*_: object) -> None:
        for p in model.parameters():
            p *= 0.9

    if when == "before":
        optimizer.register_step_post_hook(pull)
    path = watch(model, optimizer, "si")
    if when == "after":
        optimizer.register_step_post_hook(pull)
    paths = train(model, optimizer, 5, regression(model))
    assert_close(path.result(), expected_of("si", paths))


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_parameters_without_gradient_frozen_tied_sparse_and_outside(kind: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4, sparse=True)
            self.unused = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.mix = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.mix.weight
            self.outside = nn.Linear(4, 1)
            self.late = nn.Parameter(torch.ones(4))
            self.use_late = False

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tied(self.mix(self.frozen(self.table(ids))).tanh())
            return self.outside(x * self.late if self.use_late else x)

    model = Mixed().double()
    stepped = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("outside")]
    optimizer = torch.optim.SGD(stepped, lr=0.1)
    path = watch(nn.DataParallel(model), optimizer, kind)

    def loss() -> Tensor:
        return (model(torch.randint(7, (5,))) - 1).square().mean()

    first = train(model, optimizer, 3, loss)
    model.use_late = True  # its first gradient comes after the path's first step
    second = train(model, optimizer, 3, loss)
    paths = {name: first[name] + second[name] for name in first if not name.startswith("frozen")}
    for name in ("outside.weight", "outside.bias"):  # it has gradients, but this optimizer does not step it
        paths[name] = [Step(0 * s.gradient, s.before, s.after) for s in paths[name]]
    expected = expected_of(kind, paths)
    found = path.result()
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-10, atol=1e-13, err_msg=name)
    assert not found["unused.weight"].any() and not found["outside.weight"].any()
    assert found["late"].any() and found["table.weight"].any()


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_maximize(kind: str) -> None:
    model = net()
    twin = copy.deepcopy(model)
    data = [torch.randn(16, 5, dtype=torch.float64) for _ in range(6)]
    results = []
    for sign, m in ((1, model), (-1, twin)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, maximize=sign < 0)
        path = watch(m, optimizer, kind)
        for x in data:
            optimizer.zero_grad()
            (sign * (m(x) - x[:, :3]).square().mean()).backward()
            optimizer.step()
        results.append(path.result())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_scaled_gradients_of_a_fused_optimizer(kind: str) -> None:
    """The optimizer unscales inside the step; a step whose gradients overflowed is none."""
    model = net(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    path = watch(model, optimizer, kind)
    paths: dict[str, list[Step]] = {name: [] for name, _ in model.named_parameters()}
    for step in range(9):
        loss = regression(model, torch.float32)()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        optimizer.zero_grad()
        scaler.scale(loss * (math.inf if step in (0, 5) else 1)).backward()
        before = arrays(model)
        scaler.step(optimizer)
        scaler.update()
        if step not in (0, 5):
            for (name, after), g in zip(arrays(model).items(), gradients, strict=True):
                paths[name].append(Step(g.double().numpy(), before[name], after))
    expected = expected_of(kind, paths)
    assert_close(path.result(), expected, rtol=1e-3, atol=1e-5 * max(e.max() for e in expected.values()))


def test_a_step_that_raised_is_not_taken_for_one_that_overflowed() -> None:
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    path = watch(model, optimizer, "si")

    def fail(*_: Any) -> None:
        raise RuntimeError("not this one")

    regression(model, torch.float32)().backward()
    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="not this one"):
        optimizer.step()
    hook.remove()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    with pytest.raises(RuntimeError, match="no step since the path began"):
        path.result()


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_reset_begins_a_new_path(kind: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = watch(model, optimizer, kind)
    train(model, optimizer, 6, regression(model))
    path.reset()
    with pytest.raises(RuntimeError, match="no step since the path began"):
        path.result()
    paths = train(model, optimizer, 6, regression(model))
    assert_close(path.result(), expected_of(kind, paths))


def test_remove_and_context_manager() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, "si") as path:
        paths = train(model, optimizer, 3, regression(model))
        found = path.result()
    assert_close(found, expected_of("si", paths))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    path.remove()
    with pytest.raises(KeyError), watch(model, optimizer, "si"):
        raise KeyError
    assert not optimizer._optimizer_step_pre_hooks


def test_training_is_not_changed() -> None:
    model, inputs = net(), torch.randn(8, 5, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for m, watched in ((model, True), (twin, False)):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
        paths = [watch(m, optimizer, kind) for kind in ("si", "rwalk")] if watched else []
        for _ in range(6):
            optimizer.zero_grad()
            m(inputs).square().mean().backward()
            optimizer.step()
        for path in paths:
            path.result()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_path_importance_consolidates() -> None:
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc = EWCLoss(model, 1.0)
    path = PathImportance(model, optimizer)
    train(model, optimizer, 3, regression(model, torch.float32))
    importance = path.result()
    ewc.consolidate(fisher=importance)
    with torch.no_grad():
        model[0].bias += 1
    torch.testing.assert_close(ewc(), importance["0.bias"].sum() / 2)


def test_a_step_with_a_closure_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model, optimizer, "si")
    before = arrays(model)
    for call in (lambda: optimizer.step(regression(model)), lambda: optimizer.step(closure=regression(model))):
        with pytest.raises(RuntimeError, match="closure"):
            call()
    assert all((before[name] == after).all() for name, after in arrays(model).items())


def test_bad_paths() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kind": "ewc"}, "'si', 'rwalk'"),
        *(({"xi": xi}, "xi") for xi in (0, -1.0, math.inf, math.nan)),
        *(({"alpha": alpha}, "alpha") for alpha in (0, 1.1, math.nan)),
        *(({"interval": interval}, "interval") for interval in (0, -3, 2.5, True)),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            PathImportance(model, optimizer, **options)
    with pytest.raises(TypeError, match="optimizer"):
        PathImportance(model, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in the optimizer"):
        PathImportance(net(), optimizer)
    with pytest.raises(ValueError, match="requires grad"):
        PathImportance(net().requires_grad_(False), optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks

    path = PathImportance(model, optimizer)
    with pytest.raises(RuntimeError, match="no step"):
        path.result()
    train(model, optimizer, 1, regression(model))
    model[2] = nn.Linear(6, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="2.weight was added or replaced.*reset"):
        path.result()


def test_a_diverged_path_is_named() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = watch(model, optimizer, "si")
    model(torch.full((2, 5), math.nan, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the importance of 0.weight is not finite"):
        path.result()


# ---- MAS ----


def mas_of(model: nn.Module, samples: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, Tensor]:
    """Aljundi et al. 2018, section 4.1: the mean over samples of |d ||F(x)||^2 / d theta|."""
    model = copy.deepcopy(model).double().eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    totals = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for args, kwargs in samples:
        out = model(*(a.double() if a.is_floating_point() else a.clone() for a in args), **kwargs)
        out = out if isinstance(out, Tensor) else out.logits
        if "attention_mask" in kwargs:
            out = out[kwargs["attention_mask"].bool()]
        (out**2).sum().backward()
        for name in names:
            gradient = model.get_parameter(name).grad
            totals[name] += 0 if gradient is None else gradient.abs()
        model.zero_grad()
    return {name: total / len(samples) for name, total in totals.items()}


def singles(inputs: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [((row[None],), {}) for row in inputs]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (zoo.mlp, lambda: torch.randn(7, 5)),
    "convolution, BatchNorm, dropout": (zoo.conv_net, lambda: torch.randn(7, *zoo.IMAGE)),
    "tied": (zoo.Tied, lambda: torch.randn(7, 5)),
    "changes its input": (zoo.ShiftsInputInPlace, lambda: torch.randn(7, 5)),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 2)),
        lambda: torch.randn(7, 3, 4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mas_is_the_papers(name: str, dtype: torch.dtype) -> None:
    make, data = MODELS[name]
    model, inputs = make().to(dtype), data().to(dtype)
    next(model.parameters()).requires_grad_(False)
    kept = inputs.clone()
    found = mas_importance(model, [inputs[:4], (inputs[4:],)])
    assert torch.equal(inputs, kept)
    expected = mas_of(model, singles(inputs))
    assert list(found) == list(expected)
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        scale = expected[key].max().item()
        rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (2e-4, 2e-6)
        torch.testing.assert_close(tensor.double(), expected[key], rtol=rtol, atol=atol * scale)
    assert_importance(found, "mas", "vmap")
    assert found.info is not None
    assert (found.info.loss, found.info.num_samples, found.info.batch_size) == ("squared_norm", 7, 4)


def test_mas_in_chunks_and_of_a_wrapped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.mlp().double(), torch.randn(7, 5).double()
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("ewc_fast.fisher.fallback._CHUNK_BYTES", {"cpu": 3 * 8 * weights})
    found = mas_importance(nn.DataParallel(model), [inputs])
    for name, expected in mas_of(model, singles(inputs)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


def test_mas_without_vmap() -> None:
    model, inputs = zoo.Branching().double(), torch.randn(9, 5).double()
    with pytest.warns(UserWarning, match="Branching cannot run under torch.vmap.*loop") as caught:
        found = mas_importance(model, [inputs[:4], inputs[4:]])
    assert len(caught) == 1
    assert_importance(found, "mas", "loop")
    for name, expected in mas_of(model, singles(inputs)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


class Two(nn.Module):
    """Two arguments; outputs in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor | None = None, *, flip: bool = False) -> Any:
        out = self.left(a).tanh() * (1 if b is None else self.right(b))
        return SimpleNamespace(logits=-out.cos() if flip else out)


class Dictionary(Two):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {"logits": super().forward(*args, **kwargs).logits, "hidden": None}


@pytest.mark.parametrize("make", [Two, Dictionary])
def test_mas_takes_every_form_of_batch(make: Callable[[], nn.Module]) -> None:
    model, plain = make().double(), Two().double()
    plain.load_state_dict(model.state_dict())
    a, b = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    labels = torch.zeros(5, dtype=torch.int64)
    both = [((x[None], y[None]), {}) for x, y in zip(a, b, strict=True)]
    flipped = [(args, {"flip": True}) for args, _ in both]
    forms: list[tuple[Any, list[Any]]] = [
        (a, singles(a)),
        ((a, labels), singles(a)),
        ([a, labels], singles(a)),
        (((a, b), labels), both),
        (([a, b], labels), both),
        (({"a": a, "b": b}, labels), both),
        ({"a": a, "b": b, "labels": labels}, both),
        ({"a": a, "b": b, "flip": True}, flipped),
    ]
    for batch, samples in forms:
        found = mas_importance(model, [batch])
        for name, expected in mas_of(plain, samples).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


def test_mas_leaves_padding_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(logits=self.head(self.table(input_ids)))

    model = Tokens().double()
    ids = torch.randint(9, (4, 6))
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]).long()
    found = mas_importance(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    samples = [((), {"input_ids": i[None], "attention_mask": m[None]}) for i, m in zip(ids, mask, strict=True)]
    for name, expected in mas_of(model, samples).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


def test_mas_num_samples_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = zoo.mlp().double(), torch.randn(9, 5).double()

    def loader() -> Iterator[Tensor]:
        yield inputs[:4]
        yield inputs[4:8]
        raise AssertionError("the loader was read further than needed")

    found = mas_importance(model, loader(), num_samples=6, progress=True)
    assert "MAS" in capsys.readouterr().err
    assert found.info is not None and found.info.num_samples == found.info.num_terms == 6
    for name, expected in mas_of(model, singles(inputs[:6])).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    with pytest.warns(UserWarning, match="only 9 samples"):
        mas_importance(model, [inputs], num_samples=10)


@pytest.mark.parametrize("fails", [False, True])
def test_mas_leaves_the_model_as_it_was(fails: bool) -> None:
    model = nn.Sequential(zoo.CountsCalls(), nn.BatchNorm1d(zoo.NUM_CLASSES), nn.Dropout(0.5))
    model[1].eval()
    model.train()
    model[2].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = copy.deepcopy(model)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random_state = torch.get_rng_state()
    batches: list[Any] = [torch.randn(4, 5), torch.full((4, 5), math.nan) if fails else torch.randn(4, 5)]
    torch.set_rng_state(random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if fails:
            with pytest.raises(ValueError, match=r"batch 1: the output is not finite \(it begins in 0.head, Linear\)"):
                mas_importance(model, batches)
        else:
            mas_importance(model, batches)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, value), (_, kept) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, kept), name
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


class ByLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.en, self.de = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, language: list[str]) -> Tensor:
        assert len(language) == len(x)
        return torch.stack([getattr(self, of)(row) for of, row in zip(language, x, strict=True)])


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
def test_mas_of_a_string_for_each_sample() -> None:
    model, x, languages = ByLanguage().double(), torch.randn(4, 5).double(), ["en", "de", "de", "en"]
    found = mas_importance(model, [{"x": x, "language": languages}])
    samples = [((), {"x": row[None], "language": [of]}) for row, of in zip(x, languages, strict=True)]
    for name, expected in mas_of(model, samples).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
def test_mas_of_a_buffer_that_changes() -> None:
    class Grows(zoo.CountsCalls):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.calls

    model, x = Grows().double(), torch.randn(4, 5).double()
    found = mas_importance(model, [x])
    assert model.calls == 0
    for name, expected in mas_of(model.head, singles(x)).items():
        torch.testing.assert_close(found[f"head.{name}"], expected, rtol=1e-10, atol=1e-12)


def test_mas_in_batches_of_one_and_of_none() -> None:
    model, x = zoo.mlp().double(), torch.randn(4, 5).double()
    found = mas_importance(model, [x[:1], x[1:1], x[1:2], x[2:]])
    assert found.info is not None and (found.info.num_samples, found.info.batch_size) == (4, 2)
    for name, expected in mas_of(model, singles(x)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


def test_importances_made_in_inference_mode_can_be_changed() -> None:
    model = zoo.mlp()
    with torch.inference_mode():
        found = uniform_importance(model)
    assert not any(tensor.is_inference() for tensor in found.values())


def test_mas_under_no_grad_and_inference_mode() -> None:
    model, inputs = zoo.mlp(), torch.randn(4, 5)
    expected = mas_importance(model, [inputs])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = mas_importance(model, [inputs])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in found.values())


def test_mas_refuses_bad_input() -> None:
    model, inputs = zoo.mlp(), torch.randn(4, 5)
    with pytest.raises(ValueError, match="loader is empty"):
        mas_importance(model, [])
    with pytest.raises(TypeError, match="loader"):
        mas_importance(model, 3)  # type: ignore[arg-type]
    for number in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="num_samples"):
            mas_importance(model, [inputs], num_samples=number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="requires grad"):
        mas_importance(zoo.mlp().requires_grad_(False), [inputs])
    for batch in ("text", (inputs, inputs, inputs), torch.tensor(1.0)):
        with pytest.raises((TypeError, ValueError), match="batch 0: "):
            mas_importance(model, [batch])

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(x), None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="batch 0: .*got tuple"):
            mas_importance(Pair(), [inputs])
