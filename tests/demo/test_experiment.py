"""One run: what acts in it, and that it depends on its seed alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sklearn")

from ewc_fast.demo import experiment  # noqa: E402
from ewc_fast.demo.data import permuted_digits  # noqa: E402
from ewc_fast.demo.settings import Settings  # noqa: E402
from ewc_fast.ops import reference  # noqa: E402

STEPS_PER_EPOCH = -(-1400 // 32)
METHODS = {
    "plain": Settings("plain", 1e-3),
    "l2sp": Settings("l2sp", 1e-3, "constant", 0.1),
    "ewc": Settings("ewc", 1e-3, "linear", 100.0, 0.1),
}


class CountOps(TorchDispatchMode):
    """Counts the ops of this package that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def few_fisher_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "FISHER_SAMPLES", 8)


@pytest.mark.native
@pytest.mark.parametrize("method", METHODS)
def test_the_native_kernel_acts_once_in_each_step_after_the_first_task(
    method: str, few_fisher_samples: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the reference ran")

    for name in ("penalty", "penalty_grad", "penalty_accumulate_"):
        monkeypatch.setattr(reference, name, refuse)
    with CountOps() as ops:
        experiment.run(METHODS[method], seed=0, num_tasks=2, epochs=1)
    expected = 0 if method == "plain" else STEPS_PER_EPOCH
    assert ops.counts["ewc_fast::penalty_accumulate_"] == expected


def test_a_run_without_a_penalty_is_plain_training(few_fisher_samples: None) -> None:
    """Against a loop written out, with Adam's own formula in fp64."""
    result = experiment.run(Settings("plain", 2e-3, "linear"), seed=3, num_tasks=2, epochs=1)

    tasks = permuted_digits(2, seed=3)
    model = experiment.make_model(3).double()
    order = torch.Generator().manual_seed(3)
    for task in tasks:
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
        samples = torch.randperm(1400, generator=order)
        for step, chosen in enumerate(samples.split(32)):
            loss = nn.functional.cross_entropy(model(task.train_inputs[chosen].double()), task.train_labels[chosen])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            lr = 2e-3 * (1 - (step + 0.5) / STEPS_PER_EPOCH)
            with torch.no_grad():
                for p, g, (m, v) in zip(model.parameters(), grads, moments, strict=True):
                    m.lerp_(g, 0.1)
                    v.lerp_(g * g, 0.001)
                    p -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    expected = [(model(t.test_inputs.double()).argmax(1) == t.test_labels).double().mean().item() for t in tasks]
    # fp32 training drifts from fp64 by rounding; 2 of 397 samples may be on the other side.
    assert result.accuracy[-1] == pytest.approx(expected, abs=2.5 / 397)


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_runs(method: str, few_fisher_samples: None) -> None:
    results = []
    for noise in range(2):
        torch.manual_seed(noise)
        results.append(experiment.run(METHODS[method], seed=1, num_tasks=2, epochs=1, follow_forgetting=True))
    assert results[0].accuracy == results[1].accuracy
    assert results[0].true_rise == results[1].true_rise and results[0].predicted_rise == results[1].predicted_rise


def test_what_is_followed(few_fisher_samples: None) -> None:
    result = experiment.run(METHODS["ewc"], seed=0, num_tasks=3, epochs=2, follow_forgetting=True)
    assert [len(row) for row in result.accuracy] == [3] * 4
    assert len(result.accuracy_by_epoch) == 1 + 3 * 2
    assert [result.accuracy_by_epoch[2 * i] for i in range(4)] == result.accuracy
    assert len(result.predicted_rise) == len(result.true_rise) == 2 * 2
    assert min(result.predicted_rise) > 0
    plain = experiment.run(METHODS["plain"], seed=0, num_tasks=3, epochs=2, follow_forgetting=True)
    assert plain.true_rise[-1] > result.true_rise[-1]
    assert plain.predicted_rise[-1] > result.predicted_rise[-1]


def test_the_true_rise_is_summed_over_the_old_tasks(few_fisher_samples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With losses of our own making: 1, 2, 3, ... in the order in which they are asked for."""
    asked = iter(range(1, 100))
    monkeypatch.setattr(experiment, "train_losses", lambda model, tasks: [float(next(asked)) for _ in tasks])
    result = experiment.run(METHODS["plain"], seed=0, num_tasks=3, epochs=1, follow_forgetting=True)
    # Task 1 ends at 1; during task 2 it is 2; task 2 ends at 3; during task 3 they are 4 and 5.
    assert result.true_rise == [2 - 1, (4 - 1) + (5 - 3)]
