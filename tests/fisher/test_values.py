"""Every kind against the definition, computed one sample at a time in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ewc_fast.fisher import estimate_fisher, fallback
from ewc_fast.fisher.objectives import CrossEntropy, Target
from tests.fisher import brute_force, models
from tests.fisher.brute_force import assert_fisher

Batches = list[tuple[Tensor, Tensor]]
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}


def make_batches(sizes: tuple[int, ...], shape: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float32) -> Batches:
    return [(torch.randn(n, *shape, dtype=dtype), torch.randint(models.NUM_CLASSES, (n,))) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["exact", "empirical", "batch", "sampled"])
@pytest.mark.parametrize(
    ("make_model", "shape"),
    [(models.mlp, (5,)), (models.conv_net, models.IMAGE), (models.Tied, (5,)), (models.ShiftsInputInPlace, (5,))],
)
def test_matches_definition(
    make_model: Callable[[], nn.Module], shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    model = make_model().to(dtype)
    batches = make_batches((6, 6, 3), shape, dtype)
    originals = [x.clone() for x, _ in batches]
    expected = brute_force.expected(model, batches, kind, generator=torch.Generator().manual_seed(3))
    actual = estimate_fisher(model, batches, kind=kind, generator=torch.Generator().manual_seed(3))
    assert_fisher(actual, expected, TOLERANCE[dtype])
    assert {f.dtype for f in actual.values()} == {dtype}
    assert all(torch.equal(x, original) for (x, _), original in zip(batches, originals, strict=True))
    assert actual.info.method == ("batch" if kind == "batch" else "hooks")


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("gradients_per_chunk", [0, 1, 3, 5, 9])
def test_chunk_size_has_no_influence(monkeypatch: pytest.MonkeyPatch, kind: str, gradients_per_chunk: int) -> None:
    """Chunks smaller than one sample's classes, that do not divide the batch, and smaller than one gradient."""
    model = models.mlp().double()
    bytes_per_gradient = sum(p.numel() * 8 for p in model.parameters())
    monkeypatch.setitem(fallback._CHUNK_BYTES, "cpu", gradients_per_chunk * bytes_per_gradient)
    batches = make_batches((7, 2), dtype=torch.float64)
    assert_fisher(estimate_fisher(model, batches, kind=kind), brute_force.fisher(model, batches, kind), 1e-9)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_model_that_cannot_be_vectorised(kind: str) -> None:
    model = models.Branching().double()
    batches = make_batches((6, 5), dtype=torch.float64)
    with pytest.warns(UserWarning, match="Branching cannot run under torch.vmap.*loop over samples") as caught:
        actual = estimate_fisher(model, batches, kind=kind)
    assert len(caught) == 1
    assert actual.info.method == "loop"
    assert_fisher(actual, brute_force.fisher(model, batches, kind), 1e-9)


@pytest.mark.filterwarnings("ignore:Recurrent cannot run under torch.vmap")
def test_recurrent_model_with_integer_inputs() -> None:
    model = models.Recurrent().double()
    batches = [(torch.randint(9, (n, 4)), torch.randint(models.NUM_CLASSES, (n,))) for n in (5, 2)]
    actual = estimate_fisher(model, batches, kind="exact")
    assert_fisher(actual, brute_force.fisher(model, batches, "exact"), 1e-9)


def test_batches_of_one_make_batch_empirical() -> None:
    model = models.mlp().double()
    singles = make_batches((1,) * 8, dtype=torch.float64)
    merged = [(torch.cat([x for x, _ in singles]), torch.cat([y for _, y in singles]))]
    expected = estimate_fisher(model, merged, kind="empirical")
    assert_fisher(estimate_fisher(model, singles, kind="batch"), expected, 1e-12)
    merged_fisher = estimate_fisher(model, merged, kind="batch")
    assert not torch.allclose(merged_fisher["2.bias"], expected["2.bias"], rtol=1e-3)


def test_certain_model_keeps_precision() -> None:
    """Where the model is sure to 1e-8, 1 - p is 0 in fp32, yet the Fisher is not."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    batches = [(torch.ones(1, 2), torch.tensor([0]))]
    for kind in ("exact", "empirical"):
        actual, expected = estimate_fisher(model, batches, kind=kind), brute_force.fisher(model, batches, kind)
        torch.testing.assert_close(actual["bias"].double(), expected["bias"], rtol=1e-5, atol=0)


def test_impossible_class_counts_for_nothing() -> None:
    """A class masked with -inf has probability 0: it takes no part, and the rest is the Fisher without it."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)

    masked, plain = Masked().double(), nn.Linear(5, 2).double()
    plain.load_state_dict({name: p[:2] for name, p in masked.head.state_dict().items()})
    batches = make_batches((6,), dtype=torch.float64)
    actual = estimate_fisher(masked, batches, kind="exact")
    for name, expected in brute_force.fisher(plain, batches, "exact").items():
        torch.testing.assert_close(actual[f"head.{name}"][:2], expected)
        assert not actual[f"head.{name}"][2].any()


def test_num_samples_cuts_the_last_batch() -> None:
    model = models.mlp().double()
    batches = make_batches((4, 4, 4), dtype=torch.float64)
    cut = [batches[0], (batches[1][0][:2], batches[1][1][:2])]
    for kind in ("exact", "empirical", "batch"):
        actual = estimate_fisher(model, batches, kind=kind, num_samples=6)
        assert actual.info.num_samples == 6
        assert_fisher(actual, brute_force.fisher(model, cut, kind), 1e-9)


def test_num_samples_takes_no_batch_too_many() -> None:
    taken = []

    def loader():
        for batch in make_batches((4, 4, 4)):
            taken.append(len(batch[0]))
            yield batch

    estimate_fisher(models.mlp(), loader(), num_samples=8)
    assert taken == [4, 4]


def test_too_few_samples_warn() -> None:
    model = models.mlp().double()
    batches = make_batches((4, 3), dtype=torch.float64)
    with pytest.warns(UserWarning, match="num_samples is 100, but the loader has only 7 samples"):
        actual = estimate_fisher(model, batches, kind="exact", num_samples=100)
    assert actual.info.num_samples == 7
    assert_fisher(actual, brute_force.fisher(model, batches, "exact"), 1e-9)


def test_frozen_parameters_are_left_out() -> None:
    model = models.conv_net().double()
    for name in ("0.weight", "1.bias"):
        model.get_parameter(name).requires_grad_(False)
    batches = make_batches((5, 2), models.IMAGE, torch.float64)
    actual = estimate_fisher(model, batches, kind="exact")
    assert not {"0.weight", "1.bias"} & set(actual)
    assert_fisher(actual, brute_force.fisher(model, batches, "exact"), 1e-9)


def test_unused_parameter_counts_as_zero() -> None:
    for kind in ("exact", "batch"):
        actual = estimate_fisher(models.Unused(), make_batches((4,)), kind=kind)
        assert torch.equal(actual["spare"], torch.zeros(3))
        assert actual["head.weight"].any()


def test_inputs_that_reach_no_parameter_count_as_zero() -> None:
    class Sometimes(models.Branching):
        def forward(self, x: Tensor) -> Tensor:
            rows = [self.left(row) if row.sum() > 0 else row[: models.NUM_CLASSES] for row in x]
            return torch.stack(rows)

    inputs = torch.ones(2, 5, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]])
    model = Sometimes().double()
    with pytest.warns(UserWarning, match="torch.vmap"):
        actual = estimate_fisher(model, [inputs], kind="exact")
    expected = brute_force.fisher(model.left, [(inputs[:1], torch.tensor([0]))], "exact")
    torch.testing.assert_close(actual["left.weight"], expected["weight"] / 2)
    assert not actual["right.weight"].any()


def test_half_precision_parameters_are_summed_in_fp32() -> None:
    """Thousands of equal squares: a bf16 sum would stop growing at 256 of them."""
    model = nn.Linear(3, 2).bfloat16()
    sample = torch.randn(1, 3).bfloat16()
    one = estimate_fisher(model, [sample.expand(64, -1)], kind="exact")
    many = estimate_fisher(model, [sample.expand(64, -1)] * 40, kind="exact")
    assert {f.dtype for f in many.values()} == {torch.float32}
    assert_fisher(many, {name: f.double() for name, f in one.items()}, 1e-5)
    expected = brute_force.fisher(model, [(sample, torch.tensor([0]))], "exact")
    assert_fisher(one, expected, 3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_half_precision_logits_are_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(5, models.NUM_CLASSES).to(dtype)
    rows = list(CrossEntropy("exact", None, 1).cotangents(logits, Target(None, None, 5), None))
    assert {row.dtype for row in rows} == {torch.float32}
    factor, p = torch.stack(rows, -1).double(), logits.double().softmax(-1)
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(factor @ factor.mT, covariance, rtol=1e-5, atol=1e-6)


def test_mixed_parameter_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 6), nn.Linear(6, models.NUM_CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.to(self.body.weight.dtype)).tanh().double())

    model, batches = Mixed(), make_batches((5,))
    actual = estimate_fisher(model, batches, kind="exact")
    assert (actual["body.weight"].dtype, actual["head.weight"].dtype) == (torch.float32, torch.float64)
    assert_fisher(actual, brute_force.fisher(model, batches, "exact"), 2e-4)


def test_wrapped_model_gives_the_models_own_names() -> None:
    model, batches = models.mlp().double(), make_batches((5,), dtype=torch.float64)
    wrapped = nn.DataParallel(model)
    assert_fisher(estimate_fisher(wrapped, batches, kind="exact"), brute_force.fisher(model, batches, "exact"), 1e-9)
