"""convert_lambda: the penalty of each other code base, transcribed from its formula, equals ours in fp64."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast import ConvertedLambda, EWCLoss, convert_lambda
from ewc_fast.conventions import _SOURCES

BATCH = 5
CLASSES = 4
VALUE = 7.5
Vectors = list[Tensor]
Batches = list[tuple[Tensor, Tensor]]


def vector(tensors: Vectors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def weights(model: nn.Module) -> Tensor:
    return vector([p.detach() for p in model.parameters()])


def grad(model: nn.Module, loss: Tensor) -> Tensor:
    return vector(list(torch.autograd.grad(loss, list(model.parameters()))))


def batch_means_squared(model: nn.Module, data: Batches, label: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean over batches of the squared gradient of each batch's mean loss."""
    return sum(
        (grad(model, F.cross_entropy(z := model(x), label(z, y))) ** 2 for x, y in data),
        start=torch.zeros_like(weights(model)),
    ) / len(data)


def sample_squares(model: nn.Module, data: Batches, weigh: Callable[[Tensor, int], dict[int, float]]) -> Tensor:
    """Squared gradients of log-likelihoods, summed over samples: ``weigh`` says of which labels, with which weights."""
    total = torch.zeros_like(weights(model))
    for x, y in data:
        for i in range(len(x)):
            log_probs = model(x[i : i + 1]).log_softmax(1)[0]
            for label, weight in weigh(log_probs.detach().exp(), int(y[i])).items():
                total += weight * grad(model, model(x[i : i + 1]).log_softmax(1)[0, label]) ** 2
    return total


def given(logits: Tensor, labels: Tensor) -> Tensor:
    return labels


def predicted(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1)


def all_labels(probs: Tensor, y: int) -> dict[int, float]:
    return dict(enumerate(probs.tolist()))


def the_given(probs: Tensor, y: int) -> dict[int, float]:
    return {y: 1.0}


def the_likeliest(probs: Tensor, y: int) -> dict[int, float]:
    return {int(probs.argmax()): 1.0}


def the_given_by_likelihood(probs: Tensor, y: int) -> dict[int, float]:
    return {y: float(probs[y])}


class Theirs(ABC):
    """Another code base: what it keeps of each finished task, and its penalty. Subclasses are its formulas."""

    def __init__(self) -> None:
        self.importances: list[Tensor] = []  # of each task, or the newest alone
        self.anchors: list[Tensor] = []

    @abstractmethod
    def importance(self, model: nn.Module, data: Batches) -> Tensor: ...

    def merged(self, new: Tensor) -> Tensor | None:
        """The one that replaces the old; None where each task keeps its own."""
        return None

    @abstractmethod
    def factor(self) -> float: ...

    def end_task(self, model: nn.Module, data: Batches) -> None:
        new = self.importance(model, data)
        merged = self.merged(new)
        if merged is None:
            self.importances.append(new)
            self.anchors.append(weights(model))
        else:
            self.importances, self.anchors = [merged], [weights(model)]

    def penalty(self, theta: Tensor) -> Tensor:
        terms = [(i * (theta - a) ** 2).sum() for i, a in zip(self.importances, self.anchors, strict=True)]
        return self.factor() * torch.stack(terms).sum()


class Avalanche(Theirs):
    def __init__(self, decay_factor: float | None = None) -> None:
        super().__init__()
        self.decay_factor = decay_factor

    def importance(self, model, data):
        return batch_means_squared(model, data, given)

    def merged(self, new):
        if self.decay_factor is None:
            return None
        return self.decay_factor * self.importances[0] + new if self.importances else new

    def factor(self):
        return VALUE


class CapyMOA(Theirs):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def importance(self, model, data):
        return batch_means_squared(model, data, given)

    def merged(self, new):
        return self.gamma * (self.importances[0] if self.importances else torch.zeros_like(new)) + new

    def factor(self):
        return VALUE / 2


class FACIL(Theirs):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def importance(self, model, data):
        total = torch.zeros_like(weights(model))
        for x, _ in data:
            z = model(x)
            total += len(x) * grad(model, F.cross_entropy(z, z.argmax(1))) ** 2
        return total / (len(data) * BATCH)

    def merged(self, new):
        old = self.importances[0] if self.importances else torch.zeros_like(new)
        return self.alpha * old + (1 - self.alpha) * new

    def factor(self):
        return VALUE / 2


class GMvandeVen(Theirs):
    def __init__(self, gamma: float | None = None, fisher_batch: int = 1, whole_dataset: bool = False) -> None:
        super().__init__()
        self.gamma, self.fisher_batch, self.less = gamma, fisher_batch, int(whole_dataset)

    def importance(self, model, data):
        if self.fisher_batch == 1:
            samples = sum(len(x) for x, _ in data)
            return sample_squares(model, data, all_labels) / (samples - self.less)
        assert all(len(x) == self.fisher_batch for x, _ in data)
        return batch_means_squared(model, data, given) * len(data) / (len(data) - self.less)

    def merged(self, new):
        if self.gamma is None:
            return None
        return new + self.gamma * self.importances[0] if self.importances else new

    def factor(self):
        return VALUE / 2 * (1.0 if self.gamma is None else self.gamma)


class Listing(Theirs):
    def __init__(self, per_sample: bool) -> None:
        super().__init__()
        self.per_sample = per_sample

    def importance(self, model, data):
        if self.per_sample:
            return sample_squares(model, data, the_given) / sum(len(x) for x, _ in data)
        return batch_means_squared(model, data, given)

    def factor(self):
        return VALUE


class Mammoth(Theirs):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def importance(self, model, data):
        return sample_squares(model, data, the_given_by_likelihood) / (len(data) * BATCH)

    def merged(self, new):
        return self.gamma * self.importances[0] + new if self.importances else new

    def factor(self):
        return VALUE


class Moskomule(Theirs):
    def importance(self, model, data):
        return sample_squares(model, data, the_likeliest) / sum(len(x) for x, _ in data)

    def merged(self, new):
        return new

    def factor(self):
        return VALUE


class PyCIL(Theirs):
    """Every task has two classes; the network has all of them from the start."""

    known = total = 0

    def importance(self, model, data):
        return batch_means_squared(model, data, given).clamp(max=1e-4)

    def merged(self, new):
        self.known, self.total = self.total, self.total + 2
        alpha = self.known / self.total
        return alpha * self.importances[0] + (1 - alpha) * new if self.importances else new

    def factor(self):
        return VALUE / 2


SMALL = 0.05  # inputs of which the squares of some gradients are below PyCIL's bound, and of others above
PARTIAL = 3  # samples in the last batch, where it is smaller

CASES: dict[str, tuple[Theirs, Callable[[int], ConvertedLambda], int]] = {  # last: samples in the last batch
    "avalanche separate": (Avalanche(), lambda t: convert_lambda("avalanche", VALUE, BATCH), BATCH),
    "avalanche online": (Avalanche(0.7), lambda t: convert_lambda("Avalanche", VALUE, BATCH, gamma=0.7), BATCH),
    "capymoa": (CapyMOA(0.7), lambda t: convert_lambda("CapyMOA", VALUE, BATCH, gamma=0.7), BATCH),
    "capymoa, default": (CapyMOA(1.0), lambda t: convert_lambda("capymoa", VALUE, BATCH), BATCH),
    "facil": (FACIL(0.3), lambda t: convert_lambda("facil", VALUE, BATCH, gamma=0.3), BATCH),
    "facil, default": (FACIL(0.5), lambda t: convert_lambda("FACIL", VALUE, BATCH), BATCH),
    "gmvandeven offline": (GMvandeVen(), lambda t: convert_lambda("GMvandeVen", VALUE), PARTIAL),
    "gmvandeven online": (GMvandeVen(0.7), lambda t: convert_lambda("gmvandeven", VALUE, gamma=0.7), PARTIAL),
    "gmvandeven, whole dataset": (
        GMvandeVen(whole_dataset=True),
        lambda t: convert_lambda("gmvandeven", VALUE, num_samples=3 * BATCH + PARTIAL),
        PARTIAL,
    ),
    "gmvandeven in batches": (
        GMvandeVen(0.7, fisher_batch=BATCH, whole_dataset=True),
        lambda t: convert_lambda("gmvandeven", VALUE, BATCH, gamma=0.7, num_samples=4 * BATCH),
        BATCH,
    ),
    "listing": (Listing(True), lambda t: convert_lambda("listing", VALUE), PARTIAL),
    "listing in batches": (Listing(False), lambda t: convert_lambda("listing", VALUE, BATCH), BATCH),
    "mammoth": (Mammoth(0.7), lambda t: convert_lambda("mammoth", VALUE, BATCH, gamma=0.7), BATCH),
    "mammoth, default": (Mammoth(1.0), lambda t: convert_lambda("Mammoth", VALUE, BATCH), BATCH),
    "mammoth, partial batch": (
        Mammoth(0.7),
        lambda t: convert_lambda("mammoth", VALUE, BATCH, gamma=0.7, num_samples=3 * BATCH + PARTIAL),
        PARTIAL,
    ),
    "moskomule": (Moskomule(), lambda t: convert_lambda("moskomule", VALUE), PARTIAL),
    "pycil": (PyCIL(), lambda t: convert_lambda("PyCIL", VALUE, BATCH, num_tasks=t), BATCH),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def batches(last: int, scale: float = 1.0) -> Batches:
    sizes = [BATCH, BATCH, BATCH, last]
    return [(scale * torch.randn(n, 6, dtype=torch.float64), torch.randint(CLASSES, (n,))) for n in sizes]


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("name", CASES)
def test_penalty_and_gradient_are_theirs(name: str) -> None:
    theirs, convert, last = CASES[name]
    theirs = copy.deepcopy(theirs)
    model = network()
    first = convert(1)
    ewc = EWCLoss(model, first.ewc_lambda, first.mode, first.gamma)
    for task in (1, 2, 3):
        data = batches(last, SMALL if name == "pycil" else 1.0)
        theirs.end_task(model, data)
        found = convert(task)
        assert found[1:] == first[1:]
        ewc.consolidate(fisher=found.estimate_fisher(model, data))
        ewc.ewc_lambda = found.ewc_lambda
        move(model)
        theta = weights(model).requires_grad_()
        expected = theirs.penalty(theta)
        expected.backward()
        model.zero_grad()
        penalty = ewc()
        penalty.backward()
        assert expected > 1e-6 and theta.grad is not None
        torch.testing.assert_close(penalty.detach(), expected.detach(), rtol=1e-10, atol=0)
        ours = vector([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(ours, theta.grad, rtol=1e-9, atol=1e-12)


def test_every_source_has_a_case() -> None:
    assert {name.split(",")[0].split()[0] for name in CASES} == set(_SOURCES)


def test_pycils_bound_acts_in_its_test() -> None:
    found = convert_lambda("pycil", VALUE, BATCH)
    fisher = vector(list(found.estimate_fisher(network(), batches(BATCH, SMALL)).values()))
    assert fisher.max() == pytest.approx(1e-4 * BATCH) and (fisher < 0.9e-4 * BATCH).any()


def test_what_is_no_likelihood_predicts_nothing() -> None:
    for source, is_fisher in (("mammoth", False), ("facil", False), ("avalanche", True), ("gmvandeven", True)):
        info = convert_lambda(source, 1.0, BATCH).estimate_fisher(network(), batches(BATCH)).info
        assert info is not None and info.is_fisher is is_fisher


def test_options_go_before_what_was_converted() -> None:
    info = convert_lambda("gmvandeven", 1.0).estimate_fisher(network(), batches(BATCH), kind="sampled").info
    assert info is not None and info.kind == "sampled"


def test_unlabelled_batches() -> None:
    inputs = [x for x, _ in batches(BATCH)]
    assert len(convert_lambda("facil", 1.0, BATCH).estimate_fisher(network(), inputs)) == 4
    with pytest.raises(ValueError, match="no labels"):
        convert_lambda("mammoth", 1.0).estimate_fisher(network(), inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keras", 1.0), "'keras' is not known; known are 'avalanche', 'capymoa'"),
        (("avalanche", 1.0), "'avalanche' squares gradients of batch means: batch_size"),
        (("pycil", 1.0), "'pycil' squares gradients"),
        (("avalanche", -1.0, 4), "value must be a finite number"),
        (("avalanche", math.nan, 4), "value must be a finite number"),
        (("avalanche", 1.0, 0), "batch_size must be a positive integer, got 0"),
        (("avalanche", 1.0, True), "batch_size must be a positive integer"),
        (("avalanche", 1.0, 4.0), "batch_size must be a positive integer"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        convert_lambda(*arguments)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("pycil", {"gamma": 0.5}, "'pycil' has no use for gamma"),
        ("avalanche", {"num_samples": 5}, "'avalanche' has no use for num_samples"),
        ("avalanche", {"num_tasks": 5}, "'avalanche' has no use for num_tasks"),
        ("avalanche", {"gamma": 1.1}, r"gamma must be in \[0, 1\]"),
        ("avalanche", {"gamma": -0.1}, "gamma must be a finite number of at least 0"),
        ("mammoth", {"num_samples": 0}, "num_samples must be a positive integer"),
        ("mammoth", {"num_samples": 10, "batch_size": None}, "needs batch_size too"),
        ("pycil", {"num_tasks": 0}, "num_tasks must be a positive integer"),
        ("gmvandeven", {"num_samples": 3}, "divides by 0"),
    ],
)
def test_bad_options(source, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        convert_lambda(source, 1.0, **({"batch_size": 4} | options))


def test_types() -> None:
    with pytest.raises(TypeError, match="source must be a name, got int; known are"):
        convert_lambda(3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="value must be a number"):
        convert_lambda("mammoth", "a")  # type: ignore[arg-type]
