"""Objectives other than one class per sample against the brute force, their units, and what each refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast.fisher import FisherEstimator, estimate_fisher, objectives
from ewc_fast.fisher.objectives import draw_classes
from tests.fisher import brute_force, models
from tests.fisher.brute_force import assert_fisher, one_thread  # noqa: F401

ALL = ("exact", "sampled", "empirical", "predicted", "reversed", "batch")
GIVEN = ("empirical", "predicted", "reversed", "batch")
GAUSSIAN = ("exact", "sampled", "empirical", "batch")
ROWS, TOKENS, TAGS = 6, 4, 3

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning")


class Tagger(nn.Module):
    """Logits (B, T, C) that depend on the neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(ROWS, 5), nn.LayerNorm(5)
        self.mixing, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, TAGS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.norm(self.embedding(input_ids))
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return {"logits": self.head(self.mixing(hidden)[0])}


def tags(size: int, ignored: int = -100) -> dict[str, Tensor]:
    """Some labels do not count; of the last sample none, unless it is alone."""
    labels = torch.randint(TAGS, (size, TOKENS))
    labels[torch.rand(size, TOKENS) < 0.3] = ignored
    labels[0, 1] = 1
    if size > 1:
        labels[-1] = ignored
    ids = torch.randint(ROWS, (size, TOKENS))
    ids[0, 1] = ROWS - 1  # no tag: nothing that could pass for the labels of a language model
    return {"input_ids": ids, "labels": labels}


def tags_and_mask(size: int) -> dict[str, Tensor]:
    return {**tags(size), "attention_mask": torch.randint(2, (size, TOKENS))}


def segmentation() -> nn.Module:
    """Classes come last; labels (B, H, W)."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, TAGS, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).movedim(1, -1)

    return Last()


def vectors(label: Callable[[int], Tensor]) -> Callable[[int], Any]:
    return lambda size: (torch.randn(size, 5), label(size))


def squeezed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def outputs(n: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, n))


def hinge(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return F.multi_margin_loss(model(inputs), labels, reduction="none")


def contrast(model: nn.Module, batch: Any) -> Tensor:
    """Two forward passes for a loss; no labels; a dict."""
    return (model(batch["left"]) - model(batch["right"]).tanh()).square().sum(-1)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Any
    kinds: tuple[str, ...]
    unit: str = "sample"


CASES = {
    "labels_ignored": Case(
        outputs(4),
        vectors(lambda n: torch.tensor([2, -100, 1, 3])[:n]),
        "cross_entropy",
        ("empirical", "reversed", "batch"),
    ),
    "labels_ignored_by_index": Case(
        outputs(4),
        vectors(lambda n: torch.tensor([2, 1, 1, 3])[:n]),
        nn.CrossEntropyLoss(ignore_index=1),
        ("empirical", "reversed", "batch"),
    ),
    "tokens": Case(Tagger, tags, "cross_entropy", ALL, "label"),
    "tokens_and_mask": Case(Tagger, tags_and_mask, "cross_entropy", ("empirical", "sampled"), "label"),
    "tokens_ignored_by_index": Case(
        Tagger, lambda n: tags(n, ignored=2), nn.CrossEntropyLoss(ignore_index=2), ALL, "label"
    ),
    "tokens_smoothed": Case(Tagger, tags, nn.CrossEntropyLoss(label_smoothing=0.2), GIVEN, "label"),
    "pixels": Case(
        segmentation,
        lambda n: (torch.randn(n, 2, 3, 4), torch.randint(TAGS, (n, 2, 3))),
        "cross_entropy",
        ("exact", "sampled", "empirical", "batch"),
        "label",
    ),
    "smoothed": Case(
        models.mlp, vectors(lambda n: torch.randint(4, (n,))), nn.CrossEntropyLoss(label_smoothing=0.1), GIVEN
    ),
    "binary_scalar": Case(squeezed, vectors(lambda n: torch.randint(2, (n,))), "binary_cross_entropy", ALL),
    "binary_column": Case(
        outputs(1), vectors(lambda n: torch.randint(2, (n, 1)).double()), nn.BCEWithLogitsLoss(), ALL
    ),
    "binary_labels": Case(outputs(3), vectors(lambda n: torch.randint(2, (n, 3)).bool()), "binary_cross_entropy", ALL),
    "binary_soft": Case(
        outputs(3), vectors(lambda n: torch.rand(n, 3).double()), "binary_cross_entropy", ("empirical", "batch")
    ),
    "gaussian_scalar": Case(squeezed, vectors(lambda n: torch.randn(n).double()), "gaussian", GAUSSIAN),
    "gaussian": Case(outputs(3), vectors(lambda n: torch.randn(n, 3)), "gaussian", GAUSSIAN),
    "gaussian_tokens": Case(
        lambda: nn.Linear(5, 3), lambda n: (torch.randn(n, 2, 5), torch.randn(n, 2, 3)), "gaussian", GAUSSIAN
    ),
    "callable": Case(models.mlp, vectors(lambda n: torch.randint(4, (n,))), hinge, ("empirical", "batch")),
    "callable_without_labels": Case(
        models.mlp, lambda n: {"left": torch.randn(n, 5), "right": torch.randn(n, 5)}, contrast, ("empirical", "batch")
    ),
}


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Inputs of the model's dtype; labels keep theirs."""
    if isinstance(batch, dict):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return batch[0].to(dtype), batch[1]


def draws(kind: str) -> int:
    return 2 if kind == "sampled" else 1


def compare(model: nn.Module, batches: list[Any], kind: str, loss: Any, **options: Any) -> Any:
    """The estimate, which agrees with the brute force, drawn labels and all."""
    seed = int(torch.randint(2**31, ()))
    generator = torch.Generator().manual_seed(seed)
    options["num_label_samples"] = draws(kind)
    expected = brute_force.expected(model, batches, kind, loss, generator=generator, **options)
    again = torch.Generator().manual_seed(seed)
    actual = estimate_fisher(model, batches, kind=kind, loss=loss, generator=again, **options)
    assert_fisher(actual, expected)
    assert torch.equal(generator.get_state(), again.get_state())
    return actual


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, case in CASES.items() for kind in case.kinds])
def test_matches_brute_force(name: str, kind: str) -> None:
    case = CASES[name]
    for dtype in (torch.float32, torch.float64):
        model = case.make().to(dtype)
        batches = [cast(case.batch(size), dtype) for size in (4, 4, 1)]
        info = compare(model, batches, kind, case.loss).info
        assert (info.kind, info.unit, info.num_samples) == (kind, case.unit, 9)
        assert info.loss == {"callable": info.loss}.get(brute_force.name_of(case.loss), brute_force.name_of(case.loss))


@pytest.mark.parametrize("kind", ALL)
def test_number_of_labels_is_recorded(kind: str) -> None:
    batches = [tags(4), tags(3)]
    info = estimate_fisher(Tagger(), batches, kind=kind).info
    assert info.num_terms == sum(int((b["labels"] != -100).sum()) for b in batches)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "gaussian"])
@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical", "batch"])
def test_logits_transform(kind: str, loss: str) -> None:
    model = outputs(3)().double()
    labels = torch.rand(9, 2).double()
    batches = list(zip(torch.randn(9, 5).double().split([4, 4, 1]), labels.split([4, 4, 1]), strict=True))
    compare(model, batches, kind, loss, logits_transform=lambda z: z[:, 1:] * z[:, :1])


def test_channels_first_by_transform() -> None:
    """Convolutions put the classes second: a transform moves them last."""
    model = nn.Conv2d(2, TAGS, 2).double()
    batches = [(torch.randn(n, 2, 3, 4).double(), torch.randint(TAGS, (n, 2, 3))) for n in (4, 1)]
    for kind in ("exact", "sampled", "empirical", "batch"):
        compare(model, batches, kind, "cross_entropy", logits_transform=lambda z: z.movedim(1, -1))


@pytest.mark.parametrize("kind", ALL)
def test_nothing_counts(kind: str) -> None:
    empty = {**tags(4), "labels": torch.full((4, TOKENS), -100)}
    with pytest.raises(ValueError, match="batch 1: no label counts"):
        estimate_fisher(Tagger(), [tags(3), empty], kind=kind)


@pytest.mark.parametrize("counted", [1, TOKENS])
def test_tags_that_are_equal_to_the_ids(counted: int) -> None:
    """As may happen: what has fewer classes than ids is no language model."""
    model, ids = Tagger().double(), torch.tensor([[1, 2, 0, 1], [5, 3, 4, 5]])
    labels = torch.full_like(ids, -100)
    labels[0, :counted] = ids[0, :counted]
    batches = [tags(2), {"input_ids": ids, "labels": labels}]
    compare(model, batches, "empirical", "cross_entropy")


def binary_batch(labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(len(labels), 5), labels


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "subclass": ({"loss": type("Focal", (nn.CrossEntropyLoss,), {"forward": lambda *_: None})()}, None, "loss=Focal"),
    "class_weights": ({"loss": nn.CrossEntropyLoss(weight=torch.ones(4))}, None, "class weights"),
    "pos_weight": ({"loss": nn.BCEWithLogitsLoss(pos_weight=torch.ones(4))}, None, "pos_weight"),
    "smoothed_exact": ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "kind": "exact"}, None, "smoothing"),
    "smoothed_sampled": ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "kind": "sampled"}, None, "smoothing"),
    "gaussian_predicted": ({"loss": "gaussian", "kind": "predicted"}, None, "gaussian"),
    "gaussian_reversed": ({"loss": "gaussian", "kind": "reversed"}, None, "gaussian"),
    "callable_exact": ({"loss": hinge, "kind": "exact"}, None, "empirical"),
    "callable_sampled": ({"loss": hinge, "kind": "sampled"}, None, "empirical"),
    "callable_predicted": ({"loss": hinge, "kind": "predicted"}, None, "empirical"),
    "callable_reversed": ({"loss": hinge, "kind": "reversed"}, None, "empirical"),
    "draws_of_empirical": ({"num_label_samples": 2}, None, "num_label_samples"),
    "no_draws": ({"kind": "sampled", "num_label_samples": 0}, None, "num_label_samples"),
    "no_such_kind": ({"kind": "exakt"}, None, "'exact'.*'sampled'.*'empirical'.*'predicted'.*'reversed'.*'batch'"),
    "no_such_loss": ({"loss": "mse"}, None, "'cross_entropy'.*'binary_cross_entropy'.*'gaussian'.*'causal_lm'"),
    "criterion": ({"loss": nn.MSELoss(reduction="none")}, None, "MSELoss"),
    "label_too_large": ({}, (torch.randn(2, 5), torch.tensor([0, 4])), "batch 0: label 4 is out of range.*4 classes"),
    "label_negative": ({}, (torch.randn(2, 5), torch.tensor([0, -1])), "batch 0: label -1 is out of range"),
    "labels_floating": ({}, (torch.randn(2, 5), torch.ones(2)), "batch 0: labels must be integers"),
    "labels_missing": ({}, torch.randn(2, 5), "batch 0: .*needs labels"),
    "labels_too_few": ({}, (torch.randn(2, 5), torch.tensor([1])), "batch 0: labels must have shape"),
    "binary_too_large": (
        {"loss": "binary_cross_entropy"},
        binary_batch(torch.full((2, 4), 1.5)),
        r"batch 0: .*\[0, 1\]",
    ),
    "binary_shape": (
        {"loss": "binary_cross_entropy"},
        binary_batch(torch.ones(2)),
        r"batch 0: .*shape \(2, 4\), got \(2,\)",
    ),
    "gaussian_column": (
        {"loss": "gaussian", "logits_transform": lambda z: z[:, :1]},
        binary_batch(torch.ones(2)),
        r"batch 0: .*shape \(2, 1\), got \(2,\): logits_transform=lambda z: z\[..., 0\]",
    ),
    "gaussian_shape": ({"loss": "gaussian"}, binary_batch(torch.ones(2)), r"batch 0: .*shape \(2, 4\), got \(2,\)"),
    "mean_loss": (
        {"loss": lambda m, b: F.cross_entropy(m(b[0]), b[1])},
        None,
        "batch 0: .*each sample.*reduction='none'",
    ),
    "loss_per_output": (
        {"loss": lambda m, b: m(b[0]).square()},
        None,
        r"batch 0: .*each sample, shape \(2,\), got \(2, 4\)",
    ),
    "loss_no_tensor": ({"loss": lambda m, b: 0.5}, None, "batch 0: .*each sample.*float"),
    "loss_not_finite": ({"loss": lambda m, b: m(b[0]).sum(1) * torch.nan}, None, "batch 0: the loss is not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    arguments, batch, message = REFUSED[name]
    if batch is None:
        batch = (torch.randn(2, 5), torch.randint(4, (2,)))
    with pytest.raises(ValueError, match=message):
        estimate_fisher(models.mlp(), [batch], **{"kind": "empirical", **arguments})


@pytest.mark.parametrize("kind", ["exact", "predicted", "sampled"])
def test_an_index_to_ignore_is_not_looked_past(kind: str) -> None:
    """With -100, torch's own, whatever stands for a missing label may be there."""
    model, x, y = models.mlp().double(), torch.randn(6, 5).double(), torch.tensor([1, 0, 1, 3, 2, 1])
    loss = nn.CrossEntropyLoss(ignore_index=1)

    def estimate(x: Tensor, y: Tensor | None, loss: Any) -> Any:
        batch = x if y is None else (x, y)
        return estimate_fisher(model, [batch], kind, loss, generator=torch.Generator().manual_seed(1))

    found = estimate(x, y, loss)
    assert found.info.num_terms == 3 and found.info.num_samples == 6
    assert_fisher(found, {name: f.double() for name, f in estimate(x[y != 1], None, "cross_entropy").items()})
    assert estimate(x, None, loss).info.num_terms == 6
    assert estimate(x, torch.full_like(y, -100), "cross_entropy").info.num_terms == 6
    with pytest.raises(ValueError, match="batch 0: no label counts"):
        estimate(x, torch.ones_like(y), loss)


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_positions_without_labels(kind: str) -> None:
    """Which positions count is not known."""
    with pytest.raises(ValueError, match="batch 0: .*labels.*causal_lm"):
        estimate_fisher(Tagger(), [torch.randint(ROWS, (2, TOKENS))], kind=kind)


def test_units_do_not_mix() -> None:
    class Both(nn.Module):
        """Logits for each row, or for each of several positions."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    one = torch.randn(5, 4), torch.randint(3, (5,))
    several = torch.randn(5, 2, 4), torch.randint(3, (5, 2))
    for batches, message in (
        (
            [one, several],
            "batch 1: this batch's labels are one per position, those before one per sample: estimate them apart",
        ),
        (
            [several, one],
            "batch 1: this batch's labels are one per sample, those before one per position: estimate them apart",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_fisher(Both(), batches, kind="empirical")
        first = FisherEstimator(Both(), "empirical")
        first.update(batches[0])
        resumed = FisherEstimator(Both(), "empirical")
        resumed.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match="estimate them apart"):
            resumed.update(batches[1])


@pytest.mark.parametrize("classes", [2, 3, 10, 33])
@pytest.mark.parametrize("at_once", [1, 200, 1 << 14])
def test_factor_of_the_covariance(classes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """diag(p) - p p^T, to rounding; also where a class is certain, or nearly, and with what does not count."""
    monkeypatch.setattr(objectives, "_EXACT_NUMBERS", at_once)
    logits = 4 * torch.randn(6, classes, dtype=torch.float64)
    logits[0, 0], logits[1, -1] = 60.0, 60.0
    probs = logits.softmax(-1).float()
    probs[2] = torch.nn.functional.one_hot(torch.tensor(classes // 2), classes)
    probs[3] = 0  # what does not count
    columns = list(objectives.factor_of_covariance(probs))
    assert len(columns) == classes - 1
    factor = torch.stack(columns, -1).double()
    p = probs.double()
    others = (p[:, None] * (1 - torch.eye(classes, dtype=torch.float64))).sum(-1)  # 1 - p would cancel
    expected = (-p[:, :, None] * p[:, None]).diagonal_scatter(p * others, dim1=1, dim2=2)
    size = expected.diagonal(dim1=1, dim2=2).sqrt()
    off = (factor @ factor.mT - expected).abs()
    assert (off <= 1e-6 * size[:, :, None] * size[:, None]).all()
    assert not factor[2:4].any()


def test_exact_of_too_many() -> None:
    model = nn.Linear(2, 500)
    batch = (torch.randn(2, 10, 2), torch.zeros(2, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="batch 0: .*4990 backward passes.*10 positions of 500 classes.*'sampled'"):
        estimate_fisher(model, [batch], kind="exact")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["gaussian", "binary_cross_entropy"])
def test_labels_are_not_rounded_to_the_outputs(dtype: torch.dtype, loss: str) -> None:
    layer = nn.Linear(3, 1).to(dtype)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 100.0 if loss == "gaussian" else 0.0)
    label = 100.2 if loss == "gaussian" else 0.50001
    found = estimate_fisher(layer, [(torch.ones(4, 3, dtype=dtype), torch.full((4, 1), label))], "empirical", loss)
    expected = (label - (100.0 if loss == "gaussian" else 0.5)) ** 2
    # The gradient goes backward in 16 bits.
    assert found["bias"].item() == pytest.approx(expected, rel=0.02 if dtype == torch.bfloat16 else 0.01)


def test_large_fp16_logits_are_finite() -> None:
    layer = nn.Linear(2, 3).half()
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor([40000.0, 39990.0, 0.0]).half()
    fisher = estimate_fisher(layer, [(torch.ones(2, 2).half(), torch.tensor([0, 0]))], kind="empirical")
    assert all(f.isfinite().all() for f in fisher.values())


NOT_FINITE: dict[str, tuple[Any, Any, Any]] = {
    "label": (torch.ones(2, 3), torch.tensor([[1.0], [torch.nan]]), "gaussian"),
    "infinite_label": (torch.ones(2, 3), torch.tensor([[1.0], [torch.inf]]), "gaussian"),
    "smoothed": (torch.ones(2, 3), torch.tensor([1, 1]), nn.CrossEntropyLoss(label_smoothing=0.1)),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_loss_that_is_not_finite_is_named(case: str) -> None:
    x, y, loss = NOT_FINITE[case]
    model: nn.Module = nn.Linear(3, 1)
    if case == "smoothed":
        model = nn.Linear(3, 2)
        model.bias.data[0] = -torch.inf
    good = [(x, torch.ones(2, 1))] * 4 if loss == "gaussian" else []
    with pytest.raises(ValueError, match=f"batch {len(good)}: the loss is not finite"):
        estimate_fisher(model, [*good, (x, y)], "empirical", loss)


def test_bytes_as_tokens() -> None:
    """uint8 holds no -100."""

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 256)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.table(input_ids.long())

    ids, mask = torch.randint(256, (4, 6), dtype=torch.uint8), torch.ones(4, 6)
    mask[:, 4:] = 0
    model = Bytes()
    found = estimate_fisher(model, [{"input_ids": ids, "attention_mask": mask}], "empirical", "causal_lm")
    wide = estimate_fisher(model, [{"input_ids": ids.long(), "attention_mask": mask}], "empirical", "causal_lm")
    assert found.info.num_terms == 12 and torch.equal(found["table.weight"], wide["table.weight"])


def test_only_labels_that_would_have_to_be_shifted_are_refused() -> None:
    class TinyForCausalLM(Tagger):
        pass

    class TinyForMaskedLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Embedding(6, 5), nn.Linear(5, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.body(input_ids))

    ids = torch.randint(6, (5, 7))
    estimate_fisher(TinyForMaskedLM(), [{"input_ids": ids, "labels": ids}], "empirical")
    causal = TinyForCausalLM()
    words = {**tags(4), "labels": torch.randint(2, (4,))}
    estimate_fisher(causal, [words], "exact", logits_transform=lambda z: z[:, -1, :2])
    plain = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 6))
    almost = ids.clone()
    almost[0, 0] = (almost[0, 0] + 1) % 6
    for labels in (ids, almost):
        with pytest.raises(ValueError, match="causal_lm"):
            estimate_fisher(plain, [(ids, labels)], "empirical")
        with pytest.raises(ValueError, match="causal_lm"):
            estimate_fisher(Named(), [{"words": ids, "labels": labels}], "empirical")
    estimate_fisher(plain, [(ids, ids.flip(0, 1))], "empirical")
    mask = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    for labels in mask.values():  # which are as tags may be
        estimate_fisher(Named(), [{**mask, "words": ids, "labels": labels}], "empirical")
    for kind in ("empirical", "sampled"):  # nor are labels missing
        with pytest.raises(ValueError, match="use loss='causal_lm'"):
            estimate_fisher(causal, [{k: v for k, v in tags(4).items() if k != "labels"}], kind)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 6))

    def forward(self, words: Tensor, **_: Any) -> Tensor:
        return self.layers(words)


# ---- drawing from a vocabulary ----


@pytest.mark.parametrize("classes", [10, 1024, 1300, 49_152])
def test_classes_are_drawn_as_often_as_they_are_probable(classes: int) -> None:
    """A few classes share nearly everything, first, last and next to a block's end among them; most cannot be."""
    draws, rows = 4000, 3
    likely = torch.tensor([0, 1, 255, 256, 511, classes - 2, classes - 1]).clamp_max(classes - 1).unique()
    logits = torch.full((rows, classes), -torch.inf)
    logits[:, likely] = torch.randn(rows, len(likely))
    logits[:, classes // 2] = -30.0  # never, in so few draws
    logits[:, likely[1]] = -torch.inf
    probs = logits.softmax(-1)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    drawn = draw_classes(probs.expand(draws, rows, classes), generator)
    assert drawn.shape == (draws, rows) and drawn.dtype == torch.int64
    counts = torch.stack([(drawn == c).sum(0) for c in likely], 1).double()
    assert counts.sum() == draws * rows  # nothing that cannot be
    wanted = probs.double()[:, likely] * draws
    possible = wanted > 0
    chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    freedom = int(possible.sum()) - rows
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("classes", [1024, 1300])
def test_the_ends_of_the_distribution_are_never_passed(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number drawn and however sums round: the class has a probability."""
    probs = torch.rand(64, classes) * (torch.rand(64, classes) < 0.02)
    probs[:, 700] = 1e-30
    probs[::2, 800:] = 0
    probs[1::4, 600:] = 0
    probs[1::4, 3] = 1
    probs /= probs.sum(1, keepdim=True)
    for number in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53):
        monkeypatch.setattr(
            torch,
            "rand",
            lambda *size, number=number, **options: torch.full(
                size, number, **{key: value for key, value in options.items() if key != "generator"}
            ),
        )
        classes_drawn = draw_classes(probs, None)
        assert (probs.gather(1, classes_drawn[:, None]) > 0).all()


def test_a_vocabulary_is_drawn_from_with_the_generator_alone() -> None:
    probs = torch.randn(5, 2000).softmax(-1)
    before = torch.random.get_rng_state()
    same = [draw_classes(probs, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*same) and torch.equal(torch.random.get_rng_state(), before)
    generator = torch.Generator().manual_seed(7)
    assert not torch.equal(draw_classes(probs, generator), draw_classes(probs, generator))
    torch.manual_seed(3)
    from_global = draw_classes(probs, None)
    torch.manual_seed(3)
    assert torch.equal(draw_classes(probs, None), from_global)
