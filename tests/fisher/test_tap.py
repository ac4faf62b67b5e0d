"""Layers with one vector for each sample, whose squares C++ adds: against the definition, also without it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ewc_fast.fisher import FisherEstimator, capture, estimate_fisher, rules
from tests.fisher import brute_force, models
from tests.fisher.brute_force import assert_fisher

CLASSES = 3
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}


class Net(nn.Module):
    """Two linear layers and what lies between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6, bias), nn.Linear(6, CLASSES, bias)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class UsedTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.middle(self.first(x))))))


class UsedTwiceLater(UsedTwice):
    """Once in the first batches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x[0, 0] == 0 else self.last(torch.tanh(self.middle(self.first(x))))


class SharedBias(nn.Module):
    """Two weights, of which only the bias is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Tied(nn.Module):
    """A weight that is used again transposed, in another operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) @ self.first.weight)


class Operations(nn.Module):
    """The same by other names: matmul, addmm, and a bias that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6, CLASSES))
        self.bias, self.shift = nn.Parameter(torch.randn(CLASSES)), nn.Parameter(torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, torch.tanh(x @ self.one + self.shift), self.two)


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.middle = reentrant, nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if len(x) == 1 or not torch.is_grad_enabled():  # the reference: autograd.grad() refuses reentrant ones
            return self.last(self.middle(h))
        return self.last(checkpoint(self.middle, h, use_reentrant=self.reentrant))


def frozen(name: str) -> Net:
    model = Net()
    model.get_parameter(name).requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bias": Net,
    "no bias": lambda: Net(bias=False),
    "used twice": UsedTwice,
    "used twice in a later batch": UsedTwiceLater,
    "shared bias": SharedBias,
    "tied": Tied,
    "other operations": Operations,
    "relu in place": lambda: Net(lambda y: F.relu(y, inplace=True)),
    "output changed in place": lambda: Net(lambda y: y.mul_(2).add_(1)),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "checkpoint": lambda: Checkpointed(False),
    "frozen first weight": lambda: frozen("first.weight"),
    "frozen first bias": lambda: frozen("first.bias"),
    "frozen last weight": lambda: frozen("last.weight"),
    "frozen last bias": lambda: frozen("last.bias"),
}


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "python"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each tap was made in C++; both ways in which it is."""
    made: list[bool] = []

    def watched(native: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def tap(*arguments: object) -> Tensor | None:
            tapped = native(*arguments) if request.param == "native" else None
            made.append(tapped is not None)
            return tapped

        return tap

    for name in ("_tap_vectors", "_tap_linear"):
        monkeypatch.setattr(capture, name, watched(getattr(capture, name)))
    for module in (capture, rules):  # of the three weights, two are large; a batch is up to three blocks
        monkeypatch.setattr(module, "SMALL", 20)
        monkeypatch.setattr(module, "VECTORS", 4)
    return made


def make_batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    batches = [(torch.randn(n, 5, dtype=dtype), torch.randint(CLASSES, (n,))) for n in (6, 6, 10, 4)]
    batches[2][0][:, 0] = 0
    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["exact", "empirical", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_matches_definition(name: str, kind: str, dtype: torch.dtype, calls: list[bool]) -> None:
    model = MODELS[name]().to(dtype)
    batches = make_batches(dtype)
    expected = brute_force.expected(model, batches, kind, generator=torch.Generator().manual_seed(3))
    fisher = estimate_fisher(model, batches, kind=kind, generator=torch.Generator().manual_seed(3))
    assert_fisher(fisher, expected, TOLERANCE[dtype])
    assert fisher.info.method == "hooks"
    assert calls


@pytest.mark.parametrize("name", ["bias", "used twice", "checkpoint", "reentrant checkpoint"])
def test_several_labels_for_each_sample(name: str, calls: list[bool]) -> None:
    model, batches = MODELS[name](), make_batches()
    draws, generator = 3, torch.Generator().manual_seed(3)
    labels = brute_force.draw(model, batches, num_label_samples=draws, generator=generator)
    fisher = estimate_fisher(
        model, batches, kind="sampled", num_label_samples=draws, generator=torch.Generator().manual_seed(3)
    )
    assert_fisher(fisher, brute_force.fisher(model, batches, "sampled", drawn=labels), TOLERANCE[torch.float32])
    assert calls


class BeforeCheckpoint(nn.Module):
    """What comes before a reentrant checkpoint decides whether its layers get a gradient."""

    def __init__(self, before: nn.Module, plain_size: int = 0) -> None:
        super().__init__()
        self.before, self.last, self.plain, self.plain_size = before, nn.Linear(6, CLASSES), False, plain_size
        self.middle = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.plain or len(x) == self.plain_size:
            return self.last(self.middle(h))
        return self.last(checkpoint(self.middle, h, use_reentrant=True))


def without_checkpoint(model: BeforeCheckpoint) -> BeforeCheckpoint:
    model = copy.deepcopy(model)
    model.plain = True
    return model


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
@pytest.mark.parametrize("draws", [1, 3])
def test_uncovered_before_a_reentrant_checkpoint(draws: int, calls: list[bool]) -> None:
    model, batches = BeforeCheckpoint(models.Scale(5)), make_batches()
    plain = without_checkpoint(model)
    labels = brute_force.draw(plain, batches, num_label_samples=draws, generator=torch.Generator().manual_seed(3))
    fisher = estimate_fisher(
        model, batches, kind="sampled", num_label_samples=draws, generator=torch.Generator().manual_seed(3)
    )
    assert_fisher(fisher, brute_force.fisher(plain, batches, "sampled", drawn=labels), TOLERANCE[torch.float32])
    assert fisher.info.method == "loop"
    assert calls  # the checkpoint's layers are covered


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # until the estimator has seen why
@pytest.mark.parametrize("kind", ["empirical", "batch"])
@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("before", [lambda: nn.Linear(5, 5), lambda: models.Scale(5)], ids=["covered", "uncovered"])
def test_not_estimated_before_a_reentrant_checkpoint(before: Callable[[], nn.Module], size: int, kind: str) -> None:
    model = BeforeCheckpoint(before())
    batches = [(torch.randn(size, 5), torch.randint(CLASSES, (size,))) for _ in range(3)]
    expected = brute_force.fisher(without_checkpoint(model), batches, kind)
    fisher = estimate_fisher(model, batches, kind=kind, params=["middle.*", "last.*"])
    assert_fisher(fisher, {name: expected[name] for name in fisher}, TOLERANCE[torch.float32])
    assert len(fisher) == 6
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("params", [None, ["middle.*", "last.*"]], ids=["all", "some"])
def test_reentrant_checkpoint_only_later(params: list[str] | None, calls: list[bool]) -> None:
    model, batches = BeforeCheckpoint(models.Scale(5), plain_size=6), make_batches()
    expected = brute_force.fisher(without_checkpoint(model), batches, "empirical")
    fisher = estimate_fisher(model, batches, kind="empirical", params=params)
    assert_fisher(fisher, {name: expected[name] for name in fisher}, TOLERANCE[torch.float32])
    assert calls


def test_zero_gradient_in_the_first_samples(calls: list[bool]) -> None:
    """Others of the batch tell where the samples lie."""
    model, (x, labels) = Net(torch.relu, bias=False), (torch.rand(6, 5), torch.randint(CLASSES, (6,)))
    with torch.no_grad():
        model.first.weight.abs_()
    x[:4].neg_()
    fisher = estimate_fisher(model, [(x, labels)], kind="empirical")
    assert_fisher(fisher, brute_force.fisher(model, [(x, labels)], "empirical"), TOLERANCE[torch.float32])
    assert fisher.info.method == "hooks"
    assert calls


def test_one_sample_more_than_a_block() -> None:
    model = Net().double()
    batch = torch.randn(rules.VECTORS + 1, 5, dtype=torch.float64), torch.randint(CLASSES, (rules.VECTORS + 1,))
    fisher = estimate_fisher(model, [batch], kind="empirical")
    assert_fisher(fisher, brute_force.fisher(model, [batch], "empirical"), TOLERANCE[torch.float64])


@pytest.mark.native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_do_not_depend_on_the_number_of_threads(bias: bool, dtype: torch.dtype) -> None:
    """Of blocks of several tasks (3 and 2, 1 in the last, which is shorter), which do not divide them evenly."""
    model = nn.Sequential(nn.Linear(95, 101, bias), nn.Tanh(), nn.Linear(101, 67, bias)).to(dtype)
    batches = [(torch.randn(2 * rules.VECTORS + 77, 95, dtype=dtype), torch.randn(2 * rules.VECTORS + 77, 67))]
    expected = reference_of_two_layers(model, *batches[0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            estimator = FisherEstimator(model, "empirical", "gaussian")
            for batch in batches * 2:
                estimator.update(batch)
            assert len(estimator._native) == 2  # tapped in C++
            found.append(estimator.result())
    finally:
        torch.set_num_threads(before)
    for fisher in found:
        assert fisher.info.method == "hooks"
        assert_fisher(fisher, expected, TOLERANCE[dtype])
        if bias:  # the products are BLAS's affair
            assert all(torch.equal(fisher[name], found[0][name]) for name in ("0.bias", "2.bias"))


def test_a_head_of_more_columns_than_are_worth_a_thread() -> None:
    model, (x, y) = nn.Linear(3, 20_000).double(), torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    target = y.sum(1, keepdim=True).expand(5, 20_000)
    fisher = estimate_fisher(model, [(x, target)] * 2, kind="empirical", loss="gaussian")
    g = model(x).detach() - target
    torch.testing.assert_close(fisher["bias"], g.square().mean(0))
    torch.testing.assert_close(fisher["weight"], g.square().t() @ x.square() / 5)


@pytest.mark.parametrize("strided", ["sums", "input"])
def test_sums_and_inputs_with_gaps_in_memory(strided: str, calls: list[bool]) -> None:
    model = nn.Linear(6, 3)
    x, labels = torch.randn(12, 6), torch.randint(3, (12,))
    out = {"weight": torch.zeros(3, 6), "bias": torch.zeros(3)}
    if strided == "sums":
        out = {"weight": torch.full((3, 12), 7.0)[:, ::2], "bias": torch.full((6,), 7.0)[::2]}
    else:
        x = torch.randn(6, 12).t()
    fisher = estimate_fisher(model, [(x[:5], labels[:5]), (x[5:], labels[5:])], kind="empirical", out=out)
    assert_fisher(fisher, brute_force.fisher(model, [(x, labels)], "empirical"), TOLERANCE[torch.float32])
    assert calls
    if strided == "sums":  # what lies between is not touched
        assert (out["bias"].as_strided((3,), (2,), 1) == 7).all()
        assert (out["weight"].as_strided((3, 6), (12, 2), 1) == 7).all()


def reference_of_two_layers(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The mean of the squares of each sample's gradients by hand, in fp64."""
    w1, w2 = (model[i].weight.detach().double() for i in (0, 2))
    b1, b2 = (0 if model[i].bias is None else model[i].bias.detach().double() for i in (0, 2))
    x, y = x.double(), y.double()
    h = torch.tanh(x @ w1.t() + b1)
    g2 = h @ w2.t() + b2 - y
    g1 = (g2 @ w2) * (1 - h * h)
    found = {}
    for i, g, a in ((0, g1, x), (2, g2, h)):
        found[f"{i}.weight"] = torch.einsum("no,ni->oi", g * g, a * a) / len(x)
        if model[i].bias is not None:
            found[f"{i}.bias"] = (g * g).mean(0)
    return found


def test_bf16_autocast(calls: list[bool]) -> None:
    """The tolerance is derived in the same test of the kinds."""
    model, batches = Net(), make_batches()
    with torch.autocast("cpu", torch.bfloat16):
        fisher = estimate_fisher(model, batches, kind="empirical")
    assert_fisher(fisher, brute_force.fisher(model, batches, "empirical"), 2 * 10 * 2**-9)
    assert calls


def test_sums_are_in_full_precision_under_autocast(calls: list[bool]) -> None:
    model, (x, labels) = nn.Linear(6, 3, bias=False), (torch.randn(40, 6), torch.randint(3, (40,)))
    with torch.autocast("cpu", torch.bfloat16):
        fisher = estimate_fisher(model, [(x, labels)], kind="empirical")
        z = model(x)
    g = (z.float().softmax(-1) - F.one_hot(labels, 3)).bfloat16().double()
    expected = g.square().t() @ x.bfloat16().double().square() / 40
    torch.testing.assert_close(fisher["weight"].double(), expected, rtol=1e-5, atol=0)


def test_input_changed_after_the_layer_is_an_error(calls: list[bool]) -> None:
    class Changes(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) + 1
            y = self.last(h)
            if x[0, 0] == 0:  # not when the estimator looks whether it can take gradients in this way
                h.mul_(2)
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        estimate_fisher(Changes(), make_batches(), kind="empirical")
    assert calls


def test_rows_moved_in_a_later_batch(calls: list[bool]) -> None:
    class Moves(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 10:
                return super().forward(x)
            back = torch.arange(len(x)).flip(0)
            return self.last(torch.tanh(self.first(x))[back])[back]

    model, batches = Moves(), make_batches()
    fisher = estimate_fisher(model, batches, kind="empirical")
    assert_fisher(fisher, brute_force.fisher(model, batches, "empirical"), TOLERANCE[torch.float32])
    assert calls
    assert fisher.info.method == "vmap"


def test_goes_on_from_a_saved_state(calls: list[bool]) -> None:
    """Which parameters are used twice is in the state; how they are tapped is found out again."""
    model, batches = UsedTwice(), make_batches()
    before = FisherEstimator(model, "empirical")
    before.update(batches[0])
    after = FisherEstimator(model, "empirical")
    after.load_state_dict(before.state_dict())
    for batch in batches[1:]:
        after.update(batch)
    assert_fisher(after.result(), brute_force.fisher(model, batches, "empirical"), TOLERANCE[torch.float32])
    assert calls


@pytest.mark.native
def test_the_direct_call_refuses_what_it_cannot_read() -> None:
    direct = importlib.import_module("ewc_fast._C").tap_vectors
    y, x, weight, bias = torch.ones(4, 2), torch.ones(4, 3), torch.ones(2, 3), torch.ones(2)
    good = (y, x, weight, bias, True, rules.SMALL, rules.VECTORS, None, None)
    assert direct(*good).requires_grad
    with pytest.raises(TypeError):
        direct(*good[:-1])
    for i, bad in ((0, None), (1, [x]), (2, 1.0), (4, 1), (5, 1.0), (6, None), (7, 1.0), (8, False)):
        assert direct(*good[:i], bad, *good[i + 1 :]) is None
    with BaseTorchFunctionMode():
        assert direct(*good) is None
    with torch.no_grad():
        assert direct(*good) is None
    with pytest.raises(RuntimeError, match="must be a bool on the CPU"):
        direct(*good[:-2], torch.zeros(4, 2), torch.ones(()))
    for i, bad in ((1, torch.ones(5, 3)), (2, torch.ones(3, 2)), (3, torch.ones(3))):
        with pytest.raises(RuntimeError, match="sums do not fit"):
            direct(*good[:i], bad, *good[i + 1 :])


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, times: list[Tensor | None]) -> Tensor:
        ctx.times = times
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.times.pop(0), None


@pytest.mark.native
@pytest.mark.parametrize("last_is_none", [False, True])
def test_a_tap_without_a_gradient(last_is_none: bool) -> None:
    """What an earlier or a later backward gave still counts."""
    direct = importlib.import_module("ewc_fast._C").tap_vectors
    x, g, again = torch.randn(4, 3), torch.randn(4, 2), torch.ones((), dtype=torch.bool)
    weight, bias, squares = torch.zeros(2, 3), torch.zeros(2), torch.zeros(4, 2)
    tapped = direct(torch.ones(4, 2), x, weight, bias, True, rules.SMALL, rules.VECTORS, squares, again)
    z = NoGradient.apply(tapped, [g, None] if last_is_none else [None, g])
    z.backward(g, retain_graph=True)
    assert not weight.any()
    again.fill_(False)
    z.backward(g)
    torch.testing.assert_close(weight, g.square().t() @ x.square())
    torch.testing.assert_close(bias, g.square().sum(0))

    tapped = direct(torch.ones(4, 2), x, weight.zero_(), bias, True, rules.SMALL, rules.VECTORS, None, None)
    NoGradient.apply(tapped, [None]).sum().backward()
    assert not weight.any()


@pytest.mark.native
def test_a_tap_frees_its_input() -> None:
    direct = importlib.import_module("ewc_fast._C").tap_vectors
    x, weight = torch.randn(4, 3), torch.zeros(2, 3)
    tapped = direct(torch.ones(4, 2), x, weight, None, True, rules.SMALL, rules.VECTORS, None, None)
    tapped.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        tapped.sum().backward()


@pytest.mark.native
def test_the_direct_call_of_a_linear_layer() -> None:
    direct = importlib.import_module("ewc_fast._C").tap_linear
    x, weight, bias, total = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2), torch.zeros(2, 3)
    good = (x, weight, bias, total, None, 4, rules.SMALL, rules.VECTORS, None, None)
    y = direct(*good)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    g = torch.randn(4, 2)
    with torch.autocast("cpu", torch.bfloat16):  # which must leave the squares alone
        y.backward(g)
    torch.testing.assert_close(total, g.square().t() @ x.square())
    with pytest.raises(TypeError):
        direct(*good[:-1])
    for i, bad in (
        (0, None),
        (0, x[None]),
        (0, x[:3]),
        (1, [weight]),
        (2, 1.0),
        (3, None),
        (5, 4.0),
        (7, None),
        (9, True),
    ):
        assert direct(*good[:i], bad, *good[i + 1 :]) is None
    with torch.no_grad():
        assert direct(*good) is None
    with BaseTorchFunctionMode():
        assert direct(*good) is None
