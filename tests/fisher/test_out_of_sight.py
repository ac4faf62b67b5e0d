"""What models do beside their modules' own parameters and tensors: closures, inner gradients, strings, threads."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast import EWCLoss
from ewc_fast.fisher import FisherEstimator, estimate_fisher, mas_importance
from tests.fisher import brute_force
from tests.fisher.brute_force import assert_fisher, one_thread  # noqa: F401
from tests.fisher.models import Scale
from tests.fisher.resuming import assert_resumes

CLASSES = 3


def doubled(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in fisher.items()}


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        weight = self.last.weight
        self.head = lambda h: F.linear(h, weight, self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("kind", ["exact", "batch"])
def test_a_parameter_in_a_closure_is_refused(kind: str, size: int) -> None:
    """Its Fisher would be zero; gradients are left as they were, the parameter's own among them."""
    model, batch = Closure(), (torch.randn(size, 6), torch.randint(CLASSES, (size,)))
    grads = {name: torch.randn_like(p) if name == "last.weight" else None for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name]
    values = {name: None if g is None else g.clone() for name, g in grads.items()}
    with pytest.raises(ValueError, match=r"batch 0: last\.weight is used through a reference"):
        estimate_fisher(model, [batch], kind=kind)
    with pytest.raises(ValueError, match=r"last\.weight is used through a reference"):
        EWCLoss(model).consolidate([batch], kind=kind)
    with pytest.raises(ValueError, match=r"batch 0: last\.weight is used through a reference"):
        mas_importance(model, [batch])
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, values[name])


class Forces(nn.Module):
    """The gradient of an energy, and a head on it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return self.head(torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0])


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning")
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_gradient_inside_the_model(kind: str) -> None:
    model = Forces()
    batches = [(torch.randn(n, 6), torch.randint(CLASSES, (n,))) for n in (7, 5, 6)]
    assert_fisher(estimate_fisher(model, batches, kind=kind), brute_force.fisher(model, batches, kind))


class LaterForces(nn.Module):
    """In some batches only."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.head, self.create_graph = nn.Linear(6, CLASSES), create_graph

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] < 5:
            return self.head(x * self.energy(x))
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            force = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.create_graph)[0]
        return self.head(force * self.energy(x))


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_gradient_inside_the_model_from_a_later_batch_on(kind: str, create_graph: bool) -> None:
    model = LaterForces(create_graph)
    batches = [(torch.randn(n, 6), torch.randint(CLASSES, (n,))) for n in (7, 6, 6, 5)]
    for x, _ in batches[2:]:
        x[:, 0] = 9
    found = estimate_fisher(model, batches, kind=kind)
    assert not any(f.requires_grad for f in found.values())
    assert_fisher(found, brute_force.fisher(model, batches, kind))


class ComputedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.bias = nn.Linear(6, CLASSES, bias=False), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.main.weight, self.bias(x).tanh())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_bias_that_is_computed(kind: str) -> None:
    model = ComputedBias()
    batches = [(torch.randn(7, 6), torch.randint(CLASSES, (7,))) for _ in range(3)]
    assert_fisher(estimate_fisher(model, batches, kind=kind), brute_force.fisher(model, batches, kind))


class Keeps(nn.Module):
    """What it makes of a parameter, from one forward to the next."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.main, self.scale, self.of, self.kept = nn.Linear(6, CLASSES), nn.Parameter(torch.rand(CLASSES)), of, None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.of(self.scale)
        return self.main(x) * self.kept


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("of", [lambda w: 1 + w, torch.exp, lambda w: torch.stack(w.unbind())])
def test_a_tensor_that_the_model_keeps(of: Any, size: int) -> None:
    model, batches = Keeps(of), [(torch.randn(size, 6), torch.randint(CLASSES, (size,))) for _ in range(2)]
    found = estimate_fisher(model, batches, kind="empirical")
    importance = mas_importance(model, [x for x, _ in batches])
    assert model.kept is None
    plain = Keeps(of)
    plain.load_state_dict(model.state_dict())
    ones = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(size)]
    totals = dict.fromkeys(found, 0.0)
    absolutes = dict.fromkeys(found, 0.0)
    for x, y in ones:
        for sums, loss, add in (
            (totals, lambda z, y: nn.functional.cross_entropy(z, y), Tensor.square),
            (absolutes, lambda z, _: z.square().sum(), Tensor.abs),
        ):
            plain.kept = None
            gradients = torch.autograd.grad(loss(plain(x), y), list(plain.parameters()))
            for (name, _), g in zip(plain.named_parameters(), gradients, strict=True):
                sums[name] = sums[name] + add(g) / len(ones)
    for name in found:
        torch.testing.assert_close(found[name], totals[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(importance[name], absolutes[name], rtol=1e-4, atol=1e-6)


class ReachedLater(nn.Module):
    """A parameter with no part in what one position gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.scale = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        rest = (self.late(x) / self.scale.exp())[:, 1:]
        return self.first(x).mean(1) + (rest.sum(1) if rest.shape[1] else 0)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_what_is_made_of_a_parameter_and_reached_later(kind: str) -> None:
    model = ReachedLater()
    batches = [(torch.randn(7, length, 6), torch.randint(CLASSES, (7,))) for length in (1, 3, 2)]
    assert_fisher(estimate_fisher(model, batches, kind=kind), brute_force.fisher(model, batches, kind))


def test_a_first_sample_without_an_output_is_no_sign() -> None:
    """Its rounding is measured by the batch's outputs."""
    model = nn.Sequential(nn.Linear(64, 64), Scale(64), nn.Linear(64, 1)).double()
    x = torch.randn(8, 64).double()
    with torch.no_grad():
        model[2].bias -= model(x)[0]
    estimate_fisher(model, [(x, torch.randn(8, 1).double())], kind="empirical", loss="gaussian")


class TwoLayouts(nn.Module):
    """One layer on flattened rows, first those of the steps, then those of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).transpose(0, 1)
        h = torch.tanh(self.twice(h.flatten(0, 1))).view_as(h).transpose(0, 1)
        return self.head(torch.tanh(self.twice(h.flatten(0, 1))).view_as(h)[:, 0])


@pytest.mark.parametrize("length", [4, 5, 16, 17])
def test_a_layer_that_is_used_in_two_layouts(length: int) -> None:
    """With 5 and 17 positions one use alone fits both, for its gradients are zero but at the first position."""
    model, batches = TwoLayouts(), [(torch.randn(n, length, 3), torch.randint(CLASSES, (n,))) for n in (7, 4)]
    assert_fisher(estimate_fisher(model, batches, kind="empirical"), brute_force.fisher(model, batches))


class Masked(nn.Module):
    """Attention with a mask that belongs to all samples, given with them."""

    def __init__(self, uncovered: bool) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.scale = Scale(CLASSES) if uncovered else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2) + mask).softmax(-1)
        return self.scale(self.head((weights @ x).mean(1)))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("length", [4, 8, 9])
def test_a_tensor_of_all_samples_that_is_as_long_as_the_batch(length: int, kind: str) -> None:
    mask = torch.full((length, length), -1e9).triu(1)
    data, labels = torch.randn(length, length, 5), torch.randint(CLASSES, (length,))
    model, uncovered = Masked(False), Masked(True)
    batches = [((data, mask), labels), ((data[:3], mask), labels[:3])]
    found = estimate_fisher(model, batches, kind=kind)
    assert found.info.method == "hooks"
    ones = [((data[i : i + 1], mask), labels[i : i + 1]) for i in (*range(length), 0, 1, 2)]
    assert_fisher(found, doubled(estimate_fisher(model, ones, kind=kind)), floor=1024)
    with pytest.warns(UserWarning, match="Masked gives another output for a sample alone") as said:
        estimate_fisher(uncovered, batches, kind=kind)
    assert len(said) == 1


class Languages(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.en, self.de = nn.Linear(6, width), nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, language: list[str]) -> Tensor:
        assert len(language) == len(x)
        return torch.stack([getattr(self, of)(h) for of, h in zip(language, self.first(x).tanh(), strict=True)])


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning")
@pytest.mark.parametrize(("size", "width"), [(9, 8), (32, 4000)])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_string_for_each_sample(kind: str, size: int, width: int) -> None:
    """As loaders' collators give them; also where a batch is divided."""
    model, x = Languages(width), torch.randn(size, 6)
    languages = ["en" if i % 3 else "de" for i in range(size)]
    labels = torch.randint(CLASSES, (size,))
    found = estimate_fisher(model, [{"x": x, "language": languages, "labels": labels}], kind=kind)
    ones = [{"x": x[i : i + 1], "language": [languages[i]], "labels": labels[i : i + 1]} for i in range(size)]
    assert_fisher(found, doubled(estimate_fisher(model, ones, kind=kind)))


class Scaled(nn.Module):
    """A tensor of all samples, and a parameter in an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4096), nn.Linear(8, CLASSES)
        self.weight = nn.Parameter(torch.randn(4096, 8) * 0.05)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last((torch.einsum("bd,dk->bk", self.first(x).tanh(), self.weight) * scale).tanh())


@pytest.mark.parametrize("size", [15, 16, 17])
def test_a_tensor_as_long_as_a_part(size: int) -> None:
    model, x, scale = Scaled(), torch.randn(size, 4), torch.arange(8.0) + 0.5
    found = estimate_fisher(model, [{"x": x, "scale": scale}], kind="exact")
    ones = [{"x": row[None], "scale": scale} for row in x]
    assert_fisher(found, doubled(estimate_fisher(model, ones, kind="exact")))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = (self.i(x[:, t]) + self.h(h)).tanh()
        return self.last(h)


def test_a_resumed_estimate_knows_what_is_used_often() -> None:
    model = Recurrent()
    assert_resumes(lambda: FisherEstimator(model, "exact"), [torch.randn(5, 3, 6), torch.randn(6, 1, 6)])


def test_under_another_default_device() -> None:
    model, batch = nn.Linear(6, CLASSES), torch.randn(7, 6)
    with torch.device("meta"):
        found = estimate_fisher(model, [batch], kind="exact")
    assert found.info.method == "hooks"
    assert_fisher(found, brute_force.fisher(model, [batch], "exact"))


def test_two_threads_on_one_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    batches = [torch.randn(7, 6) for _ in range(20)]
    expected = estimate_fisher(model, batches, kind="exact")
    before, fastpath = list(model.parameters()), torch.backends.mha.get_fastpath_enabled()
    model.train()
    state = torch.get_rng_state()
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(estimate_fisher(model, batches, "exact", generator=torch.Generator()))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == len(threads)
    for fisher in found:
        assert_fisher(fisher, doubled(expected))


def test_a_lazy_layer_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(CLASSES))
    with pytest.raises(ValueError, match=r"0\.(weight|bias) of a lazy layer has no shape yet: run the model"):
        estimate_fisher(model, [torch.randn(2, 4)])


@pytest.mark.parametrize("call", ["estimate_fisher", "update", "consolidate"])
def test_a_warning_is_about_the_callers_line(call: str) -> None:
    model, x = Languages(8), torch.randn(6, 6)
    batch = {"x": x, "language": ["en"] * 6, "labels": torch.zeros(6, dtype=torch.long)}
    with pytest.warns(UserWarning, match="cannot run under torch.vmap") as caught:
        if call == "estimate_fisher":
            estimate_fisher(model, [batch], kind="exact")
        elif call == "update":
            FisherEstimator(model, "exact").update(batch)
        else:
            EWCLoss(model).consolidate([batch], kind="exact")
    assert [w.filename for w in caught] == [__file__]
