"""One epoch of ``train`` against a loop written out by hand."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_fast import EWCLoss
from ewc_fast.training import EpochResult, train


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def make_batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]


def distance(model: nn.Module, anchor: list[Tensor]) -> Tensor:
    return sum(((p - a) ** 2).sum() for p, a in zip(model.parameters(), anchor, strict=True))


class Attachable:
    """A penalty that acts in the step of the optimizers that it is attached to, as EWCLoss does."""

    def __init__(self, model: nn.Module, anchor: list[Tensor]) -> None:
        self.model, self.anchor = model, anchor
        self.calls = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.last_penalty = torch.zeros(())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(self._accumulate)

    def is_attached(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer is self.optimizer

    def _accumulate(self, *_: Any) -> None:
        penalty = distance(self.model, self.anchor)
        penalty.backward()
        self.last_penalty = penalty.detach()

    def __call__(self) -> Tensor:
        self.calls += 1
        return distance(self.model, self.anchor)


def by_hand(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], anchor: list[Tensor] | None, lr: float
) -> EpochResult:
    """SGD written out; losses weighted by the samples of a batch, penalties by steps."""
    losses, penalties, count = [], [], 0
    for inputs, targets in batches:
        log_probs = model(inputs).log_softmax(-1)
        loss = -sum(log_probs[i, t] for i, t in enumerate(targets.tolist())) / len(inputs)
        penalty = distance(model, anchor) if anchor is not None else torch.zeros((), dtype=torch.float64)
        gradients = torch.autograd.grad(loss + penalty, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= lr * g
        losses.append(loss.item() * len(inputs))
        penalties.append(penalty.item())
        count += len(inputs)
    return EpochResult(sum(losses) / count, sum(penalties) / len(penalties), count)


@pytest.mark.parametrize("how", ["none", "callable", "unattached", "attached", "attached elsewhere"])
def test_matches_a_loop_by_hand(how: str) -> None:
    model, batches = make_model(), make_batches(5, 5, 2)
    anchor = [p.detach() + 0.3 for p in model.parameters()]
    expected_model = copy.deepcopy(model)
    expected = by_hand(expected_model, batches, None if how == "none" else anchor, lr=0.05)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ewc = Attachable(model, anchor)
    if how == "attached":
        ewc.attach(optimizer)
    elif how == "attached elsewhere":
        ewc.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    penalty = {"none": None, "callable": lambda: distance(model, anchor)}.get(how, ewc)
    result = train(model, batches, optimizer, nn.CrossEntropyLoss(), "cpu", penalty)

    assert isinstance(result, EpochResult) and result.num_samples == 12
    assert result == pytest.approx(expected, rel=1e-10)
    for p, q in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert ewc.calls == (3 if "un" in how or "elsewhere" in how else 0)


def test_ewc_loss_in_the_loss_and_attached_agree() -> None:
    start, batches = make_model(), make_batches(5, 5, 2)
    results, weights = [], []
    for attach in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ewc = EWCLoss(model, ewc_lambda=100.0)
        ewc.consolidate(batches, kind="exact")
        if attach:
            ewc.attach(optimizer)
        results.append([train(model, batches, optimizer, nn.CrossEntropyLoss(), "cpu", ewc) for _ in range(2)])
        weights.append([p.detach() for p in model.parameters()])
    assert results[0][1].penalty > 0
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


def test_old_gradients_are_dropped() -> None:
    model, batches = make_model(), make_batches(5)
    expected_model = copy.deepcopy(model)
    by_hand(expected_model, batches, None, lr=0.05)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    train(model, batches, torch.optim.SGD(model.parameters(), lr=0.05), nn.CrossEntropyLoss(), torch.device("cpu"))
    for p, q in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_penalty_may_be_a_number() -> None:
    """As a caller's function returns it before there is an old task."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result = train(model, make_batches(3, 3), optimizer, nn.CrossEntropyLoss(), "cpu", lambda: 0.25)
    assert result.penalty == 0.25


def test_regression_and_a_data_loader() -> None:
    """A criterion whose targets are no labels; fp32; a loss that falls."""
    inputs = torch.randn(32, 4)
    data = DataLoader(TensorDataset(inputs, inputs @ torch.randn(4, 2)), batch_size=8, shuffle=True)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = [train(model, data, optimizer, nn.MSELoss(), "cpu").loss for _ in range(20)]
    assert losses[-1] < 0.1 * losses[0]


def test_mode_is_training_meanwhile_and_restored() -> None:
    class Spy(nn.Module):
        seen: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.training)
            return x

    model = nn.Sequential(Spy(), make_model(), nn.Dropout(0.1))
    model.eval()
    model[2].train()
    before = [m.training for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, make_batches(3, 3), optimizer, nn.CrossEntropyLoss(), "cpu")
    assert Spy.seen == [True, True]
    assert [m.training for m in model.modules()] == before

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from make_batches(3)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train(model, broken(), optimizer, nn.CrossEntropyLoss(), "cpu")
    assert [m.training for m in model.modules()] == before


def test_loss_that_is_not_finite_is_reported_not_raised() -> None:
    model = make_model()
    ((inputs, targets),) = make_batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result = train(model, [(inputs * torch.nan, targets)], optimizer, nn.CrossEntropyLoss(), "cpu")
    assert math.isnan(result.loss)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataloader": []}, ValueError, "dataloader is empty"),
        ({"ewc_loss": 0.5}, TypeError, "ewc_loss must be callable without arguments, got float"),
        ({"ewc_loss": torch.zeros(())}, TypeError, "ewc_loss must be callable without arguments, got Tensor"),
        ({"dataloader": [torch.zeros(2, 4)]}, TypeError, "batch 0 must be a pair of tensors.*got Tensor"),
        ({"dataloader": [{"x": 1, "y": 2}]}, TypeError, "batch 0 must be a pair of tensors.*got dict"),
        ({"dataloader": [(torch.zeros(2, 4),)]}, TypeError, "batch 0 must be a pair"),
        ({"dataloader": [(torch.zeros(2, 4), 3)]}, TypeError, "batch 0 must be a pair"),
        ({"criterion": nn.CrossEntropyLoss(reduction="none")}, ValueError, r"mean loss as a scalar, got shape \(3,\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_model().eval()
    before = copy.deepcopy(model.state_dict())
    given = {
        "dataloader": make_batches(3),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "criterion": nn.CrossEntropyLoss(),
        "device": "cpu",
    }
    with pytest.raises(error, match=message):
        train(model, **{**given, **arguments})
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_batchnorm_keeps_its_statistics_and_its_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    data = [(torch.randn(8, 3) + 5, torch.randint(2, (8,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for frozen in (True, False):
        before = model[1].running_mean.clone()
        train(model, data, optimizer, nn.CrossEntropyLoss(), "cpu", freeze_batchnorm=frozen)
        assert torch.equal(model[1].running_mean, before) is frozen
        assert all(module.training for module in model.modules())


def test_an_optimizer_in_another_place_is_named() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got CrossEntropyLoss"):
        train(model, [], nn.CrossEntropyLoss(), optimizer, "cpu")  # type: ignore[arg-type]
