"""Parameters without a gradient: out of the output's reach, or zero, in some batches or in all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ewc_fast.fisher import FisherEstimator, estimate_fisher
from ewc_fast.fisher.capture import Capture
from tests.fisher import brute_force, models
from tests.fisher.brute_force import assert_fisher, one_thread  # noqa: F401

CLASSES = 3


class OutOfSight(models.Scale):
    """Nor does the estimator see that it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return models.Times.apply(x, self.scale)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=self.reentrant) if len(x) > 1 else self.layer(x)


POOLERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "no bias": lambda: nn.Linear(6, 6, bias=False),
    "norm": lambda: nn.LayerNorm(6),
    "several": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), models.Scale(6), nn.Linear(6, 6)),
    "used twice": UsedTwice,
    "no rule": lambda: models.Scale(6),
    "out of sight": lambda: OutOfSight(6),
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
}


class Encoder(nn.Module):
    """Its pooler always runs, and has a part in the output of samples that say so: all of a batch, or none."""

    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.first, self.pooler, self.last = nn.Linear(5, 6), pooler, nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, pools: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        pooled = self.pooler(h)
        return self.last(h + pooled if pools[0] else h)


def make_batches(*pools: bool, size: int = 6) -> list[Any]:
    return [((torch.randn(size, 5), torch.full((size,), pooled)), torch.randint(CLASSES, (size,))) for pooled in pools]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The parameters of each call of what is slow."""
    made: list[set[str]] = []
    original = FisherEstimator._add_rest

    def add(self: FisherEstimator, weights: dict[str, Tensor], *args: Any) -> None:
        made.append(set(weights))
        original(self, weights, *args)

    monkeypatch.setattr(FisherEstimator, "_add_rest", add)
    return made


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", POOLERS)
def test_never_reached(name: str, kind: str, slow: list[set[str]]) -> None:
    model, batches = Encoder(POOLERS[name]()), make_batches(False, False, False)
    fisher = estimate_fisher(model, batches, kind=kind)  # a warning would be an error
    assert_fisher(fisher, brute_force.fisher(model, batches, kind))
    assert not any(fisher[name].any() for name in fisher if name.startswith("pooler."))
    assert fisher.info.method == "hooks"
    assert not slow


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", POOLERS)
def test_reached_in_some_batches(name: str, kind: str, saved: bool) -> None:
    model, batches = Encoder(POOLERS[name]()), make_batches(False, True, False, True, True)
    estimator = FisherEstimator(model, kind)
    for batch in batches:
        estimator.update(batch)
        if saved:
            state = copy.deepcopy(estimator.state_dict())
            estimator = FisherEstimator(model, kind)
            estimator.load_state_dict(state)
    assert_fisher(estimator.result(), brute_force.fisher(model, batches, kind))


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
def test_is_covered_from_the_next_batch_on(slow: list[set[str]]) -> None:
    model, batches = Encoder(nn.Linear(6, 6)), make_batches(False, False, True, True, False, True)
    fisher = estimate_fisher(model, batches, kind="empirical")
    assert_fisher(fisher, brute_force.fisher(model, batches, "empirical"))
    assert slow == [{"pooler.weight", "pooler.bias"}]


def test_stays_silent_where_few_samples_do_not_show_it(slow: list[set[str]]) -> None:
    """Only the last of many samples reaches the layer: four batches, and no more than three further looks."""

    class Last(Encoder):
        def forward(self, x: Tensor, pools: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            pooled = self.pooler(h)
            if len(x) in (1, 20):
                h = torch.where(pools[:, None], h + pooled, h)
            return self.last(h)

    model, batches = Last(nn.Linear(6, 6)), make_batches(*[False] * 5, size=20)
    for (_, pools), _ in batches:
        pools[-1] = True
    looks = []
    estimator = FisherEstimator(model, "empirical")
    look = estimator._look
    estimator._look = lambda *args: looks.append(look(*args))  # type: ignore[method-assign]
    for batch in batches:
        estimator.update(batch)
    assert_fisher(estimator.result(), brute_force.fisher(model, batches, "empirical"))
    assert slow == [{"pooler.weight", "pooler.bias"}] * 5
    assert len(looks) == 1 + 3


class Dead(nn.Module):
    """Layers without a gradient where the inputs are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6, bias=False), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.rand(6))
        with torch.no_grad():
            self.first.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.scale)


def signed(*batches: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Inputs of these signs, by batch and sample."""
    return [
        (torch.rand(len(signs), 5) * torch.tensor(signs)[:, None], torch.randint(CLASSES, (len(signs),)))
        for signs in batches
    ]


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_zero_in_the_first_batch(kind: str, slow: list[set[str]]) -> None:
    model, batches = Dead(), signed([-1] * 6, [-1] * 6, [-1] * 5 + [1], [1] * 6, [-1, 1] * 3)
    fisher = estimate_fisher(model, batches, kind=kind)
    assert_fisher(fisher, brute_force.fisher(model, batches, kind))
    assert len(slow) == (CLASSES - 1 if kind == "exact" else 1)


def test_zero_in_all_batches(slow: list[set[str]]) -> None:
    model, batches = Dead(), signed([-1] * 6, [-1] * 3)
    fisher = estimate_fisher(model, batches, kind="exact")
    assert_fisher(fisher, brute_force.fisher(model, batches, "exact"))
    assert not fisher["first.weight"].any()
    assert not slow


def test_costs_nothing_where_all_have_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Capture) -> list[str]:
        raise AssertionError

    monkeypatch.setattr(Capture, "awake", fail)
    batches = [(torch.randn(6, 5), torch.randint(CLASSES, (6,))) for _ in range(2)]
    estimate_fisher(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)), batches)
