"""The kinds against the brute force, the brute force against closed forms; what estimating leaves as it was."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast.fisher import FisherEstimator, FisherInfo, estimate_fisher, estimator, rules
from ewc_fast.fisher.capture import Capture
from tests.fisher import brute_force, models
from tests.fisher.brute_force import assert_fisher, one_thread  # noqa: F401
from tests.fisher.resuming import assert_resumes

KINDS = ["exact", "sampled", "empirical", "predicted", "reversed", "batch"]
DTYPES = [torch.float32, torch.float64]
Batches = list[tuple[Tensor, Tensor]]

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning")


def make_batches(
    shape: tuple[int, ...], sizes: tuple[int, ...] = (4, 4, 1), dtype: torch.dtype = torch.float64
) -> Batches:
    return [(torch.randn(n, *shape, dtype=dtype), torch.randint(models.NUM_CLASSES, (n,))) for n in sizes]


def seeds() -> tuple[torch.Generator, torch.Generator]:
    """Two generators in one state."""
    seed = int(torch.randint(2**31, ()))
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


# ---- the brute force itself ----


def linear(outputs: int) -> nn.Linear:
    return nn.Linear(3, outputs).double()


def with_bias(x: Tensor) -> Tensor:
    """Inputs (B, 3) and a 1 for the bias."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def assert_closed(model: nn.Linear, actual: dict[str, Tensor], rows: Tensor) -> None:
    """``rows``: the diagonal for weight and bias, (outputs, 3 + 1)."""
    torch.testing.assert_close(actual["weight"], rows[:, :3])
    torch.testing.assert_close(actual["bias"], rows[:, 3])


def test_brute_force_of_logistic_regression() -> None:
    model, x, y = linear(1), torch.randn(5, 3).double(), torch.rand(5, 1).double()
    p, squares = model(x).sigmoid().detach(), with_bias(x).square()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    for kind, weights in {
        "exact": p * (1 - p),
        "empirical": (y - p).square(),
        "predicted": ((p > 0.5).double() - p).square(),
        "reversed": (y - (1 - p)).square(),
    }.items():
        actual = brute_force.fisher(model, batches, kind, "binary_cross_entropy")
        assert_closed(model, actual, (weights * squares).mean(0, keepdim=True))


def test_brute_force_of_softmax_regression() -> None:
    model, x, y = linear(4), torch.randn(5, 3).double(), torch.randint(4, (5,))
    p, inputs = model(x).softmax(-1).detach(), with_bias(x)
    residual = nn.functional.one_hot(y, 4) - p
    squares = inputs.square()[:, None]
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    assert_closed(model, brute_force.fisher(model, batches, "exact"), ((p * (1 - p))[..., None] * squares).mean(0))
    assert_closed(model, brute_force.fisher(model, batches), (residual.square()[..., None] * squares).mean(0))
    by_batch = sum((r.t() @ i).square() for r, i in zip(residual.split([2, 3]), inputs.split([2, 3]), strict=True)) / 5
    assert_closed(model, brute_force.fisher(model, batches, "batch"), by_batch)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)
    target = 0.8 * nn.functional.one_hot(y, 4) + 0.05
    expected = ((target - p).square()[..., None] * squares).mean(0)
    assert_closed(model, brute_force.fisher(model, batches, "empirical", smoothed), expected)


def test_brute_force_of_linear_regression() -> None:
    model, x, y = linear(2), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    squares = with_bias(x).square()[:, None]
    residual = (y - model(x).detach()).square()[..., None]
    assert_closed(model, brute_force.fisher(model, [(x, y)], "exact", "gaussian"), squares.mean(0).expand(2, -1))
    assert_closed(model, brute_force.fisher(model, [(x, y)], "empirical", "gaussian"), (residual * squares).mean(0))


def test_brute_force_of_a_bigram_model() -> None:
    """Token by token: one table row of logits for the last token; the second ends in padding."""

    class Bigrams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4).double())

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.table[input_ids]

    model = Bigrams()
    ids, mask = torch.randint(4, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    p = model.table.softmax(-1).detach()
    total, exact = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for row, tokens in zip(ids.tolist(), (4, 1), strict=True):
        gradient = torch.zeros(4, 4).double()
        for now, following in zip(row[:tokens], row[1:], strict=False):
            gradient[now, following] += 1
            gradient[now] -= p[now]
            exact[now] += p[now] * (1 - p[now])
        total += gradient.square()
    batches = [{"input_ids": ids, "attention_mask": mask}]
    torch.testing.assert_close(brute_force.fisher(model, batches, "empirical", "causal_lm")["table"], total / 5)
    torch.testing.assert_close(brute_force.fisher(model, batches, "exact", "causal_lm")["table"], exact / 5)


# ---- every kind ----


class GroupedConvolutions(nn.Module):
    """Groups, stride, dilation; a frozen bias; BatchNorm with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2, dilation=2),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 2, stride=2, groups=8),
            nn.BatchNorm2d(8),
            nn.Dropout2d(0.5),
            nn.Flatten(),
            nn.Linear(8 * 4, models.NUM_CLASSES),
        )
        for _ in range(3):
            self(torch.randn(6, 4, 6, 6))
        self.body[3].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Attention(nn.Module):
    """Two encoder layers with dropout in both layouts, a class token, positions, a head of the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))
        self.first = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.4, batch_first=True)
        self.second = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.4, norm_first=True)
        self.head = nn.Linear(4, models.NUM_CLASSES)
        self.head.weight = self.first.linear1.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.second(self.first(x).transpose(0, 1))[0])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (models.mlp, (5,)),
    "grouped_convolutions": (GroupedConvolutions, (4, 6, 6)),
    "attention": (Attention, (3, 4)),
    "tied": (models.Tied, (5,)),
    "in_a_loop": (models.Branching, (5,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_matches_brute_force(net: str, kind: str, dtype: torch.dtype) -> None:
    make, shape = NETS[net]
    model, batches = make().to(dtype), make_batches(shape, dtype=dtype)
    mine, theirs = seeds()
    expected = brute_force.expected(model, batches, kind, generator=mine)
    assert_fisher(estimate_fisher(model, batches, kind=kind, generator=theirs), expected)
    assert torch.equal(mine.get_state(), theirs.get_state())


@pytest.mark.parametrize("net", ["mlp", "attention", "in_a_loop"])
def test_several_draws(net: str) -> None:
    make, shape = NETS[net]
    model, batches = make().double(), make_batches(shape)
    mine, theirs = seeds()
    expected = brute_force.expected(model, batches, "sampled", generator=mine, num_label_samples=3)
    assert_fisher(estimate_fisher(model, batches, generator=theirs, num_label_samples=3), expected)
    assert torch.equal(mine.get_state(), theirs.get_state())


@pytest.mark.parametrize("sizes", [(3, 6), (1, 5, 2), (6,), (1,)])
@pytest.mark.parametrize("kind", ["empirical", "batch"])
def test_batches_of_any_size(kind: str, sizes: tuple[int, ...]) -> None:
    model, batches = Attention().double(), make_batches((3, 4), sizes)
    actual = estimate_fisher(model, batches, kind=kind)
    assert_fisher(actual, brute_force.fisher(model, batches, kind))
    assert (actual.info.num_samples, actual.info.num_terms, actual.info.batch_size) == (
        sum(sizes),
        sum(sizes),
        max(sizes),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_num_samples_cuts_a_batch(kind: str) -> None:
    model, batches = models.mlp().double(), make_batches((5,), (4, 4, 4))
    cut = [batches[0], (batches[1][0][:2], batches[1][1][:2])]
    mine, theirs = seeds()
    expected = brute_force.expected(model, cut, kind, generator=mine)
    actual = estimate_fisher(model, batches, kind=kind, generator=theirs, num_samples=6)
    assert_fisher(actual, expected)
    assert actual.info.num_samples == 6


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "gaussian"])
def test_sampled_is_exact_in_expectation(loss: str) -> None:
    """The mean over draws lies within five standard errors of the exact value."""
    model, inputs = models.mlp().double(), torch.randn(3, 5).double()
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([1.0, 0.0, -0.5, 0.5]))
    exact = torch.cat([f.flatten() for f in brute_force.fisher(model, [inputs], "exact", loss).values()])
    draws = torch.stack(
        [
            torch.cat([f.flatten() for f in estimate_fisher(model, [inputs], loss=loss, num_label_samples=4).values()])
            for _ in range(400)
        ]
    )
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 400**0.5 + 1e-12).all()
    assert (draws.std(0) > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_differ(kind: str) -> None:
    """No kind passes for another, by more than any tolerance."""
    model, batches = models.mlp().double(), make_batches((5,))
    actual = estimate_fisher(model, batches, kind=kind)["2.weight"]
    for other in KINDS:
        if other != kind:
            difference = estimate_fisher(model, batches, kind=other)["2.weight"] - actual
            assert difference.abs().max() > 1e-3 * actual.max()


LOGITS = {
    "temperature": lambda z: z / 3,
    "subset": lambda z: z[:, :3],
    "not_linear": lambda z: torch.cat([z.square(), z.sin()], -1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", LOGITS)
def test_logits_transform(transform: str, kind: str) -> None:
    model, batches = models.Tied().double(), make_batches((5,))
    batches = [(x, y % 3) for x, y in batches]
    mine, theirs = seeds()
    change = LOGITS[transform]
    expected = brute_force.expected(model, batches, kind, generator=mine, logits_transform=change)
    assert_fisher(estimate_fisher(model, batches, kind=kind, generator=theirs, logits_transform=change), expected)


def test_reversed_is_empirical_of_negated_logits() -> None:
    model, batches = models.mlp().double(), make_batches((5,))
    expected = estimate_fisher(model, batches, kind="empirical", logits_transform=torch.neg)
    actual = estimate_fisher(model, batches, kind="reversed")
    for name, f in expected.items():
        torch.testing.assert_close(actual[name], f)


@pytest.mark.parametrize("kind", KINDS)
def test_info(kind: str) -> None:
    actual = estimate_fisher(models.mlp(), make_batches((5,), (4, 2), torch.float32), kind=kind).info
    assert isinstance(actual, FisherInfo)
    assert (actual.kind, actual.loss, actual.unit) == (kind, "cross_entropy", "sample")
    assert (actual.num_samples, actual.num_terms, actual.batch_size) == (6, 6, 4)
    assert actual.method == ("batch" if kind == "batch" else "hooks")


def test_only_the_parameters_asked_for() -> None:
    model, batches = Attention().double(), make_batches((3, 4))
    expected = brute_force.fisher(model, batches)
    actual = estimate_fisher(model, batches, kind="empirical", params=["first.*", "token"])
    assert_fisher(actual, {n: f for n, f in expected.items() if n == "token" or n.startswith("first.")})


def test_bf16_autocast() -> None:
    """Two layers, forward and backward: ten roundings at most on the way to a gradient, each of a relative 2^-9; the
    square doubles them: 4% of the largest entry."""
    model, batches = models.mlp(), make_batches((5,), (4, 4, 1), torch.float32)
    plain = estimate_fisher(model, batches, kind="empirical")
    with torch.autocast("cpu", torch.bfloat16):
        actual = estimate_fisher(model, batches, kind="empirical")
    assert_fisher(actual, brute_force.fisher(model, batches), tolerance=2 * 10 * 2**-9)
    assert all(f.dtype == torch.float32 and not torch.equal(f, plain[name]) for name, f in actual.items())


# ---- an estimator that stops and goes on ----


def nested(batches: Batches) -> list[Any]:
    return [({"pair": (x, [x.flip(-1)])}, y) for x, y in batches]


class TakesNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, models.NUM_CLASSES), nn.Linear(5, models.NUM_CLASSES)

    def forward(self, pair: tuple[Tensor, list[Tensor]]) -> Tensor:
        return self.left(pair[0]) * self.right(pair[1][0])


@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_nested_batches(kind: str) -> None:
    model, batches = TakesNested().double(), nested(make_batches((5,)))
    mine, theirs = seeds()
    expected = brute_force.expected(model, batches, kind, generator=mine)
    estimator = FisherEstimator(model, kind, generator=theirs)
    for batch in batches:
        estimator.update(batch)
    assert_fisher(estimator.result(), expected)


class Sleeping(nn.Module):
    """Layers that inputs with a negative first entry do not reach, and one that they do."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.norm = nn.Linear(5, models.NUM_CLASSES), nn.LayerNorm(5)
        self.sometimes = nn.Linear(5, models.NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        gate = x[..., :1].relu()
        return (self.always(x) + gate * self.sometimes(self.norm(x))).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", ["mlp", "attention", "in_a_loop", "sleeping"])
@pytest.mark.parametrize("own_generator", [True, False])
def test_resumed_estimate_is_the_same_bit_for_bit(net: str, kind: str, own_generator: bool) -> None:
    make, shape = NETS.get(net, (Sleeping, (40, 5)))
    model, batches = make(), make_batches(shape, (4, 3, 4, 1), torch.float32)
    if net == "sleeping":  # what the first batches show is not what the later ones do
        for (x, _), sign in zip(batches, (-1, -1, 1, 1), strict=True):
            x[..., 0] = sign * x[..., 0].abs()

    def estimator() -> FisherEstimator:
        return FisherEstimator(model, kind, generator=torch.Generator().manual_seed(3) if own_generator else None)

    torch.manual_seed(4)
    whole = estimator()
    for batch in batches:
        whole.update(batch)
    torch.manual_seed(4)
    first = estimator()
    for batch in batches[:2]:
        first.update(batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    global_state = torch.get_rng_state()  # without a generator it is the caller's to keep
    file.seek(0)
    first.update(batches[0])  # what happens after saving is not in the file
    second = estimator()
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(global_state)
    for batch in batches[2:]:
        second.update(batch)
    expected, actual = whole.result(), second.result()
    assert all(torch.equal(actual[name], f) for name, f in expected.items())
    assert actual.info == expected.info


def test_result_in_between() -> None:
    """Neither final nor a view of what goes on."""
    model, batches = models.mlp().double(), make_batches((5,))
    estimator = FisherEstimator(model, "empirical")
    estimator.update(batches[0])
    early = estimator.result()
    estimator.update(batches[1])
    assert_fisher(early, brute_force.fisher(model, batches[:1]))
    assert_fisher(estimator.result(), brute_force.fisher(model, batches[:2]))


def test_out_is_written_to() -> None:
    model, batches = models.mlp().double(), make_batches((5,))
    out = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    estimator = FisherEstimator(model, "empirical", out=out)
    for batch in batches:
        estimator.update(batch)
    assert_fisher({name: f / 9 for name, f in out.items()}, brute_force.fisher(model, batches))


def test_out_that_does_not_fit() -> None:
    """Nothing is written then, to the model's parameters least of all."""
    model = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fits = {name: torch.ones_like(p) for name, p in before.items()}
    shared = torch.ones(6)
    with torch.inference_mode():
        made_there = torch.ones(2)
    for wrong, message in (
        ({"bias": torch.ones(2).double()}, "must be a torch.float32 tensor"),
        ({"bias": torch.ones(1).expand(2)}, "each element with a place of its own"),
        ({"bias": made_there}, "inference_mode"),
        ({"weight": model.weight.detach()}, "is in the memory of parameter 'weight'"),
        ({"weight": shared.view(2, 3), "bias": shared[:2]}, r"^out\['bias'\] is in the memory of out\['weight'\]"),
        ({"weight": shared.view(2, 3), "bias": shared[3:5]}, r"^out\['bias'\] is in the memory of out\['weight'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            FisherEstimator(model, "empirical", out={**fits, **wrong})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(bool((t == 1).all()) for t in (*fits.values(), shared))


# ---- what is left as it was ----


class Restless(nn.Module):
    """Writes to a buffer at every call, in evaluation mode too; layers in different modes; a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 2, groups=2), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, models.NUM_CLASSES)
        self.register_buffer("calls", torch.zeros(()))
        self.train()
        self.norm.eval()
        self.conv.bias.requires_grad_(False)
        self.head.weight.grad = torch.randn_like(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.norm(self.conv(x))).flatten(1))


def snapshot(model: nn.Module) -> list[Any]:
    """Modes, flags and identities; values to compare bit by bit as bytes."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [
        [m.training for m in model.modules()],
        [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()],
        [(id(t), t.detach().numpy().tobytes()) for t in tensors],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [0 if p._backward_hooks is None else len(p._backward_hooks) for p in model.parameters()],
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", [None, "loader", "model", "labels", "not_finite"])
def test_everything_is_left_as_it_was(kind: str, failure: str | None) -> None:
    model = Restless()
    good = (torch.randn(4, 2, 4), torch.randint(models.NUM_CLASSES, (4,)))
    bad = {
        "model": (torch.randn(4, 3, 4), good[1]),
        "labels": (good[0], good[1][:3]),
        "not_finite": (torch.full((4, 2, 4), torch.nan), good[1]),
    }

    def loader() -> Iterator[Any]:
        yield good
        if failure == "loader":
            raise OSError("disk gone")
        yield bad.get(failure or "", good)
        yield good[0][:1], good[1][:1]

    before, state = snapshot(model), torch.get_rng_state()
    given = copy.deepcopy(good)
    needs_labels = kind in ("empirical", "reversed", "batch")
    if failure is None or (failure == "labels" and not needs_labels):
        estimate_fisher(model, loader(), kind=kind, generator=torch.Generator())
    else:
        error = OSError if failure == "loader" else RuntimeError if failure == "model" else ValueError
        with pytest.raises(error):
            estimate_fisher(model, loader(), kind=kind, generator=torch.Generator())
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(good, given, strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_does_not_depend_on_the_mode(kind: str) -> None:
    model, batches = Attention().double(), make_batches((3, 4))
    mine, theirs = seeds()
    expected = estimate_fisher(model.eval(), batches, kind=kind, generator=mine)
    actual = estimate_fisher(model.train(), batches, kind=kind, generator=theirs)
    assert all(torch.equal(actual[name], f) for name, f in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_names_batch_and_layer(kind: str) -> None:
    """NaN from the middle of the model, for one sample only."""

    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    first, last = nn.Linear(5, 5), nn.Linear(5, models.NUM_CLASSES)
    nn.init.eye_(first.weight)
    nn.init.zeros_(first.bias)
    model = nn.Sequential(first, Logarithm(), last)
    good = (torch.rand(4, 5) + 0.5, torch.randint(models.NUM_CLASSES, (4,)))
    bad = good[0].clone()
    bad[2, 3] = -1
    with pytest.raises(ValueError, match=r"batch 2\b.*not finite.*\b1, Logarithm"):
        estimate_fisher(model, [good, good, (bad, good[1])], kind=kind)


# ---- batches that exact takes in parts ----


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every batch is divided, into parts of two to four; how many samples each had is noted."""
    monkeypatch.setattr(estimator, "samples_at_once", lambda size, *_: min(size, max(2, size // 2)))
    return taken(monkeypatch)


def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    add = FisherEstimator._add_per_sample

    def note(self: FisherEstimator, batch: Any, size: int) -> int:
        seen.append(size)
        return add(self, batch, size)

    monkeypatch.setattr(FisherEstimator, "_add_per_sample", note)
    return seen


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "gaussian"])
@pytest.mark.parametrize("net", [name for name in NETS if name != "in_a_loop"])
def test_exact_in_parts(net: str, loss: str, parts: list[int]) -> None:
    make, shape = NETS[net]
    model = make()
    batches: list[Any] = [torch.randn(n, *shape) for n in (7, 6, 2, 1)]
    expected = brute_force.fisher(model, batches, "exact", loss)
    found = estimate_fisher(model, batches, kind="exact", loss=loss)
    assert_fisher(found, expected)
    assert parts == [3, 4, 3, 3, 2]  # the last batch is of one sample
    assert (found.info.num_samples, found.info.batch_size) == (16, 7)


def test_exact_in_parts_goes_on_from_a_state(parts: list[int]) -> None:
    """As without an interruption, bit for bit: in the same parts."""
    model, batches = GroupedConvolutions(), [torch.randn(n, 4, 6, 6) for n in (5, 7)]
    assert_resumes(lambda: FisherEstimator(model, "exact"), batches)
    assert parts == [2, 3, 3, 4, 2, 3, 3, 4]


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_one_backward_takes_the_whole_batch(kind: str, parts: list[int]) -> None:
    estimate_fisher(models.mlp(), [(torch.randn(6, 5), torch.zeros(6).long())], kind=kind)
    assert parts == [6]


@pytest.mark.parametrize(("hidden", "inputs", "expected"), [(256, 64, [64, 64]), (256, 300, [128]), (64, 64, [128])])
def test_which_batches_are_divided(
    hidden: int, inputs: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs beyond 256 KiB and the largest parameter; a resumed estimate divides as one without interruption."""
    seen = taken(monkeypatch)
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    model, batches = nn.Sequential(*layers), [torch.randn(128, inputs) for _ in range(2)]
    assert_resumes(lambda: FisherEstimator(model, "exact"), batches)
    assert seen == 4 * expected


@pytest.mark.parametrize(("size", "wide"), [(64, False), (64, True), (12, False)])
def test_gradients_of_convolutions_that_are_held(size: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no more than the outputs, or what these leave of the largest parameter, and one gradient."""
    held, hold = [], Capture._hold

    def note(self: Capture, name: str, rule: Any, x: Tensor, g: Tensor) -> None:
        held.append(self._held_bytes + g.nbytes)
        hold(self, name, rule, x, g)

    monkeypatch.setattr(Capture, "_hold", note)
    head = [nn.Linear(512, 768), nn.Tanh(), nn.Linear(768, 20)] if wide else [nn.Linear(512, 20)]
    model = nn.Sequential(nn.Conv2d(2, 8, 3, 2), nn.Tanh(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), *head)
    batch = torch.randn(size, 2, 33, 33)
    found = estimate_fisher(model, [batch], kind="exact")
    assert_fisher(found, brute_force.fisher(model, [batch], "exact"))
    shapes = [(8, 16, 16), (8, 8, 8)]
    outputs = sum(8 * side * side for _, side, _ in shapes) + (768 if wide else 0) + 20
    at_once = 4 * outputs * (size if wide or size < 16 else size // 2)
    largest = 4 * (512 * 768 if wide else 512 * 20)
    room = max(at_once, largest - at_once)
    one = 4 * (size if wide or size < 16 else size // 2) * 8 * 16 * 16
    assert room / 2 < max(held) <= room + one


def test_how_many_samples_at_once() -> None:
    cpu, mib = torch.device("cpu"), 1 << 20
    assert rules.samples_at_once(128, mib // 512, 0, cpu) == 128  # small: 256 KiB
    assert rules.samples_at_once(128, mib // 64, 2 * mib, cpu) == 128  # no more than the largest parameter
    assert rules.samples_at_once(128, mib // 64, mib, cpu) == 64
    assert rules.samples_at_once(6, mib, 0, cpu) == 6
    assert rules.samples_at_once(15, mib, 0, cpu) == 8
    assert rules.samples_at_once(20, mib, 0, cpu) == 10
    assert rules.samples_at_once(128, mib, mib, cpu) == 64
    assert rules.samples_at_once(128, mib, mib, torch.device("cuda")) == 128


def test_how_many_bytes_are_held() -> None:
    cpu, mib = torch.device("cpu"), 1 << 20
    assert rules.held_bytes(3 * mib, mib, cpu) == 3 * mib
    assert rules.held_bytes(3 * mib, 10 * mib, cpu) == 7 * mib
    assert rules.held_bytes(3 * mib, 1 << 30, cpu) == rules.held_bytes(0, mib, cpu) == 64 * mib
    assert rules.held_bytes(3 * mib, mib, torch.device("cuda")) == 512 * mib
