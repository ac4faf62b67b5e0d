"""What an estimate leaves alone, what it accepts and records, and what bad input gets."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from ewc_fast.fisher import FisherDiagonal, FisherEstimator, FisherInfo, estimate_fisher, fallback
from tests.fisher import brute_force, models

KINDS = ["exact", "sampled", "empirical", "batch"]


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5), torch.randint(models.NUM_CLASSES, (size,))


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
        "values": [t.detach().clone() for t in (*model.parameters(), *model.buffers())],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for what in ("training", "requires_grad", "identity"):
        assert after[what] == before[what], what
    assert all(torch.equal(a, b) for a, b in zip(after["values"], before["values"], strict=True))
    for a, b in zip(after["grads"], before["grads"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a[0] == b[0] and torch.equal(a[1], b[1]))


def mixed_mode_model() -> nn.Module:
    """Training mode but for one submodule, one frozen parameter, one parameter that has a gradient."""
    model = models.conv_net().train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.randn_like(model[5].weight)
    return model


def image_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, *models.IMAGE), torch.randint(models.NUM_CLASSES, (4,))


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_left_as_found(kind: str) -> None:
    model = mixed_mode_model()
    before = snapshot(model)
    fisher = estimate_fisher(model, [image_batch()], kind=kind)
    assert_untouched(model, before)
    assert not any(f.requires_grad for f in fisher.values())


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_left_as_found_when_the_loader_raises(kind: str) -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield image_batch()
        raise OSError("disk gone")

    model = mixed_mode_model()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(OSError, match="^disk gone$"):
        estimate_fisher(model, loader(), kind=kind, generator=torch.Generator())
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:CountsCalls cannot run under torch.vmap")
@pytest.mark.parametrize("kind", ["exact", "batch"])
def test_buffers_changed_in_forward_are_restored(kind: str) -> None:
    """Every forward of an estimate, of which there are several for a batch, begins with them as they are."""

    class Grows(models.CountsCalls):
        def __init__(self) -> None:
            super().__init__()
            self.scale = models.Scale(models.NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(super().forward(x) * self.calls)

    model = Grows()
    before = snapshot(model)
    data = batch(7)
    fisher = estimate_fisher(model, [data, data], kind=kind)
    assert_untouched(model, before)
    rows = [tuple(t[i : i + 1] for t in data) for i in range(7)]
    if kind == "exact":
        for name, expected in estimate_fisher(model, rows, kind=kind).items():
            torch.testing.assert_close(fisher[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["exact", "batch"])
def test_works_without_grad_mode(guard: Callable[[], Any], kind: str) -> None:
    model, data = models.mlp(), [batch()]
    expected = estimate_fisher(model, data, kind=kind)
    with guard():
        actual = estimate_fisher(model, data, kind=kind)
    assert all(torch.equal(actual[name], f) and f.any() for name, f in expected.items())


def test_loop_works_without_grad_mode() -> None:
    model = models.Branching()
    with torch.no_grad(), pytest.warns(UserWarning, match="torch.vmap"):
        assert any(f.any() for f in estimate_fisher(model, [batch()], kind="exact").values())


def test_generator_repeats_and_leaves_the_global_state() -> None:
    """The loader shuffles, which draws from the global state too."""
    model, data = models.mlp(), TensorDataset(*batch(20))
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    state, own_state = torch.get_rng_state(), generator.get_state()
    first = estimate_fisher(model, DataLoader(data, batch_size=6, shuffle=True), generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generator.get_state(), own_state)
    other = estimate_fisher(model, DataLoader(data, batch_size=6, shuffle=True), generator=generator)
    again = estimate_fisher(model, DataLoader(data, batch_size=6, shuffle=True), generator=generator.manual_seed(1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_labels_come_from_the_global_state_without_a_generator() -> None:
    model, data = models.mlp(), [batch(20)]
    torch.manual_seed(5)
    first, second = estimate_fisher(model, data), estimate_fisher(model, data)
    torch.manual_seed(5)
    again = estimate_fisher(model, data)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_labels_are_optional_where_not_needed(kind: str) -> None:
    model, (inputs, _) = models.mlp(), batch(9)
    useless = torch.full((9,), -100)
    expected = estimate_fisher(model, [(inputs, useless)], kind=kind, generator=torch.Generator().manual_seed(1))
    for loader in ([inputs], [[inputs]], DataLoader(TensorDataset(inputs), batch_size=9)):
        actual = estimate_fisher(model, loader, kind=kind, generator=torch.Generator().manual_seed(1))
        assert all(torch.equal(actual[name], f) for name, f in expected.items())


def test_small_integer_labels_and_empty_batches() -> None:
    model, (inputs, labels) = models.mlp(), batch()
    expected = estimate_fisher(model, [(inputs, labels)], kind="empirical")
    data = [(inputs[:0], labels[:0]), (inputs, labels.to(torch.uint8))]
    actual = estimate_fisher(model, data, kind="empirical")
    assert all(torch.equal(actual[name], f) for name, f in expected.items())


def test_result_is_a_read_only_mapping() -> None:
    model = models.mlp()
    fisher = estimate_fisher(model, [batch(4), batch(2)], kind="empirical")
    assert isinstance(fisher, FisherDiagonal)
    assert list(fisher) == [name for name, _ in model.named_parameters()]
    assert len(fisher) == 4 and "0.weight" in fisher and "nope" not in fisher
    with pytest.raises(TypeError):
        fisher["0.weight"] = torch.zeros(7, 5)  # type: ignore[index]
    with pytest.raises(AttributeError):
        fisher.info = None  # type: ignore[misc]
    assert repr(fisher).startswith("FisherDiagonal(4 tensors, 74 values, info=FisherInfo(kind='empirical'")
    assert fisher.info == FisherInfo(
        "empirical", "cross_entropy", "sample", num_samples=6, num_terms=6, batch_size=4, method="hooks"
    )


def test_diagonal_made_by_hand() -> None:
    source = {"w": torch.ones(2)}
    fisher = FisherDiagonal(source)
    source["other"] = torch.ones(1)
    assert list(fisher) == ["w"] and fisher.info is None


def test_info_survives_json() -> None:
    info = FisherInfo(
        "batch", "cross_entropy", "sample", num_samples=6, num_terms=6, batch_size=4, method="batch", is_fisher=False
    )
    assert FisherInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    values = info.to_dict()
    del values["is_fisher"]
    assert FisherInfo.from_dict(values).is_fisher
    for wrong in ({**values, "num_samples": "6"}, {**values, "more": 1}, {"kind": "batch"}):
        with pytest.raises(ValueError, match="Fisher info"):
            FisherInfo.from_dict(wrong)


def test_a_model_that_takes_whole_batches_only() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.mlp()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 6:
                raise ValueError(f"six samples, not {x.shape[0]}")
            return self.inner(x)

    model = Whole()
    batches = [batch(6) for _ in range(3)]
    fisher = estimate_fisher(model, batches, kind="empirical")
    assert fisher.info is not None and fisher.info.method == "hooks"
    expected = estimate_fisher(model.inner, batches, kind="empirical")
    for name, values in expected.items():
        torch.testing.assert_close(fisher[f"inner.{name}"], values, rtol=1e-5, atol=1e-8)


def test_a_model_that_cannot_be_watched_is_said_once() -> None:
    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, models.NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if "Tap" in type(hidden.grad_fn).__name__:
                raise RuntimeError("strangers")
            return self.last(hidden.tanh())

    model, batches = Shy(), [batch(6) for _ in range(3)]
    with pytest.warns(UserWarning, match=r"Shy cannot run in sight of the layers' rules \(strangers\)") as said:
        fisher = estimate_fisher(model, batches, kind="empirical")
    assert len(said) == 1 and fisher.info is not None and fisher.info.method == "vmap"
    brute_force.assert_fisher(fisher, brute_force.fisher(model, batches))


def test_a_compiled_forward_is_not_compiled_anew() -> None:
    """What watches a model would be compiled with it, function by function."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    plain = models.mlp()
    inner, whole, forward = (copy.deepcopy(plain) for _ in range(3))
    inner[0].compile(backend=backend)
    whole.compile(backend=backend)
    forward.forward = torch.compile(forward.forward, backend=backend)
    batches = [batch(6) for _ in range(3)]
    expected = brute_force.fisher(plain, batches)
    for model in (inner, whole, forward):
        model(batches[0][0]).sum().backward()
        model.zero_grad()
        before = len(graphs)
        fisher = estimate_fisher(model, batches, kind="empirical")
        assert fisher.info is not None and fisher.info.method == "hooks"
        brute_force.assert_fisher(fisher, expected)
        model(batches[0][0])
        assert len(graphs) == before
    assert graphs


def test_an_estimators_update_leaves_the_global_state_with_a_generator() -> None:
    """Also where the model draws random numbers itself; other ones in each batch."""
    drawn = []

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append(torch.randn(len(x)))
            return super().forward(x + drawn[-1][:, None])

    state = torch.get_rng_state()
    estimator = FisherEstimator(Noisy(5, 3), "empirical", generator=torch.Generator())
    for data in [batch(1), batch(1)]:
        torch.set_rng_state(state)
        estimator.update((data[0], data[1] % 3))
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*drawn)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    data = DataLoader(TensorDataset(*batch(10)), batch_size=4)
    estimate_fisher(models.mlp(), data)
    assert capsys.readouterr().err == ""
    estimate_fisher(models.mlp(), data, progress=True)
    assert "10/10" in capsys.readouterr().err
    estimate_fisher(models.mlp(), data, progress=True, num_samples=6)
    assert "6/6" in capsys.readouterr().err
    halves = [batch(4), batch(3)]
    subset = DataLoader(TensorDataset(*batch(10)), batch_size=2, sampler=SubsetRandomSampler([0, 3, 5, 7, 9]))
    dropping = DataLoader(TensorDataset(*batch(10)), batch_size=4, drop_last=True)
    for loader, total in ((halves, 7), (tuple(halves), 7), (subset, 5), (dropping, 8), (iter(halves), None)):
        estimate_fisher(models.mlp(), loader, progress=True)
        said = capsys.readouterr().err
        assert f"{total}/{total}" in said if total else ("7sample" in said and "/7" not in said), said


class Constant(nn.Module):
    """Returns what it was given, whatever the inputs."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "exakt"}, ValueError, "kind='exakt'.*'exact', 'sampled', 'empirical', 'predicted', 'reversed'"),
        ({"kind": "reversed", "loss": "gaussian"}, ValueError, "kind='reversed' has no meaning for loss='gaussian'"),
        ({"kind": "predicted", "loss": "gaussian"}, ValueError, "kind='predicted' has no meaning for loss='gaussian'"),
        ({"num_label_samples": 0}, ValueError, "num_label_samples must be a positive integer, got 0"),
        (
            {"num_label_samples": 2, "kind": "exact"},
            ValueError,
            "num_label_samples=2 has a meaning for kind='sampled' only",
        ),
        ({"loss": "crossentropy"}, ValueError, "loss='crossentropy'.*'cross_entropy'"),
        ({"loss": "causal_lm"}, ValueError, "batch 0: loss='causal_lm' needs logits"),
        ({"loss": lambda model, batch: None}, ValueError, "kind='sampled' is unknown to a callable loss"),
        ({"loss": nn.MSELoss()}, ValueError, "loss=MSELoss is a criterion of"),
        ({"loss": nn.functional.mse_loss, "kind": "empirical"}, ValueError, "loss=mse_loss is a criterion of"),
        ({"loss": nn.functional.cross_entropy}, ValueError, "loss=cross_entropy is a criterion of"),
        ({"model": nn.Linear(5, 4, dtype=torch.complex64)}, TypeError, "weight has dtype torch.complex64.*freeze it"),
        ({"loader": [{"input_ids": [[1, 2], [3, 4]]}]}, TypeError, "batch 0: .*return_tensors='pt'"),
        ({"num_samples": 0}, ValueError, "num_samples must be a positive integer or None, got 0"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be a positive integer"),
        ({"num_samples": True}, ValueError, "num_samples must be a positive integer"),
        ({"generator": 7}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"loader": 7}, TypeError, "loader must be an iterable of batches, got int"),
        ({"loader": []}, ValueError, "loader is empty"),
        ({"loader": [torch.zeros(0, 5)]}, ValueError, "loader is empty"),
        ({"loader": [{"x": "text"}]}, TypeError, "batch 0: .*a pair .*got dict without any"),
        ({"loader": [batch(), (1, 2)]}, TypeError, "batch 1: .*got tuple without any"),
        ({"loader": [(*batch(), torch.zeros(4))]}, TypeError, "batch 0: .*got tuple of Tensor, Tensor, Tensor"),
        ({"loader": [()]}, TypeError, "batch 0: .*got tuple without any"),
        ({"loader": [torch.tensor(1.0)]}, ValueError, "batch 0: inputs must have a batch dimension"),
        ({"loader": [torch.zeros(2, 5)], "kind": "empirical"}, ValueError, "batch 0: kind='empirical' needs labels"),
        ({"loader": [[torch.zeros(2, 5)]], "kind": "batch"}, ValueError, "batch 0: kind='batch' needs labels"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = models.mlp()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        estimate_fisher(**{"model": model, "loader": [batch()], **arguments})
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["empirical", "batch"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "batch 1: label 4 is out of range: the model's logits have 4 classes"),
        (torch.tensor([-1, 0]), "batch 1: label -1 is out of range"),
        (torch.tensor([0.0, 1.0]), "batch 1: labels must be integers.*float32$"),
        (torch.eye(4)[:2], r"batch 1: labels must be integers.*labels.argmax\(-1\)"),
        (torch.tensor([True, False]), "batch 1: labels must be integers.*bool"),
        (
            torch.tensor([[0], [1]]),
            r"batch 1: labels must have shape \(batch,\) = \(2,\), got \(2, 1\); labels.reshape\(-1\)",
        ),
        (torch.tensor([0, 1, 2]), r"batch 1: labels must have shape \(batch,\) = \(2,\), got \(3,\)"),
        (torch.tensor(0), r"batch 1: labels must have shape \(batch,\) = \(2,\), got \(\)"),
    ],
)
def test_bad_labels(labels: Tensor, message: str, kind: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_fisher(models.mlp(), [batch(), (torch.zeros(2, 5), labels)], kind=kind)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.zeros(2, 3, 7), ValueError, r"\(2, 3, 7\), so labels .* are needed.*loss='causal_lm'"),
        (torch.zeros(3), ValueError, r"shape \(batch, classes\) = \(2, C\), got \(3,\)"),
        (torch.zeros(3, 4), ValueError, r"shape \(batch, classes\) = \(2, C\), got \(3, 4\)"),
        (torch.zeros(2, 1), ValueError, "two classes or more"),
        (torch.zeros(2, 3, dtype=torch.long), ValueError, "floating point logits, got torch.int64"),
        ({"scores": torch.zeros(2, 3)}, TypeError, "logits as a tensor or as .logits, got dict; wrap the model"),
    ],
)
def test_bad_logits(output: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="batch 0: .*" + message):
        estimate_fisher(Constant(output), [torch.zeros(2, 5)])


def test_no_trainable_parameter() -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        estimate_fisher(models.mlp().requires_grad_(False), [batch()])
    for params in ([], ["0.weight"]):
        with pytest.raises(ValueError, match="params selects no parameter that requires grad: name one that does"):
            estimate_fisher(models.mlp().requires_grad_(False), [batch()], params=params)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_not_finite_names_the_batch(kind: str, value: float) -> None:
    model = nn.Linear(5, models.NUM_CLASSES)
    before = snapshot(model)
    inputs, labels = batch()
    inputs[2, 1] = value
    with pytest.raises(ValueError, match="batch 1: the loss is not finite"):
        estimate_fisher(model, [batch(), (inputs, labels)], kind=kind)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["empirical", "batch"])
def test_label_of_an_impossible_class(kind: str) -> None:
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.bias[1] = -torch.inf
    with pytest.raises(ValueError, match="batch 0: the loss is not finite"):
        estimate_fisher(model, [(torch.zeros(2, 5), torch.tensor([0, 1]))], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_negated_logits_are_marked_as_no_fisher(kind: str) -> None:
    info = estimate_fisher(nn.Linear(3, 2), [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))], kind=kind).info
    assert info is not None and info.is_fisher is (kind != "reversed")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_not_finite_names_the_parameter(kind: str) -> None:
    """sqrt at 0: a finite loss with an infinite gradient."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(models.NUM_CLASSES))
            self.head = nn.Linear(5, models.NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.scale.sqrt() * x.mean(-1, keepdim=True)

    data = [(torch.full((2, 5), 0.5), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="batch 0: the squared gradient of parameter 'scale' is not finite"):
        estimate_fisher(Root(), data, kind=kind)


@pytest.mark.parametrize(("num_batches", "prefix"), [(3, ""), (4, "batch 3: ")])
def test_square_not_finite_in_a_later_batch(num_batches: int, prefix: str) -> None:
    """Sums are looked at after batches 1, 2, 4, 8, ... and at the end."""
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    inputs = [torch.ones(2, 3)] * num_batches
    inputs[2] = inputs[2] * 1e25
    last = num_batches - 1
    since = f", since one of batches 2 to {last}" if last > 2 else "$"
    message = f"^{prefix}the squared gradient of parameter 'weight' is not finite{since}"
    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, [(x, torch.tensor([0, 1])) for x in inputs], kind="empirical")


def test_error_of_the_model_itself_is_raised() -> None:
    model = models.mlp()
    good = torch.zeros(2, next(m for m in model.modules() if isinstance(m, nn.Linear)).in_features)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        estimate_fisher(model, [good, torch.zeros(2, 6)])
    with pytest.raises(AssertionError, match="two") as other:
        estimate_fisher(AtLeastTwo(), [(torch.zeros(n, 5), torch.zeros(n).long()) for n in (2, 1)], kind="empirical")
    for error in (caught.value, other.value):
        note = error.__notes__ if hasattr(error, "add_note") else [str(error).rpartition("(")[2].rstrip(")")]
        assert note == ["in batch 1 of the loader"]


class AtLeastTwo(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) > 1, "two samples or more"
        return super().forward(x)


@pytest.mark.parametrize("core", [nn.LSTM(5, 5, batch_first=True), nn.MultiheadAttention(5, 1, batch_first=True)])
def test_a_layer_with_several_outputs_is_named(core: nn.Module) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.core, self.last = nn.Linear(5, 5), core, nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last((self.core(h) if isinstance(core, nn.LSTM) else self.core(h, h, h))[0].mean(1))

    model = Sequence()
    with torch.no_grad():
        next(core.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"batch 0: .*it begins in core, {type(core).__name__}\)"):
        estimate_fisher(model, [(torch.randn(2, 4, 5), torch.tensor([0, 1]))], kind="empirical")


def test_of_several_gradients_that_are_not_finite_the_last_is_named() -> None:
    """It is where they begin: those of all layers before follow from it."""

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last((h - h).sqrt())

    with pytest.raises(ValueError, match=r"squared gradient of parameter 'first\.weight'"):
        estimate_fisher(Root(), [(torch.randn(2, 5), torch.tensor([0, 1]))], kind="empirical")
    model = nn.Sequential(Root(), Root())
    model[0].last = nn.Linear(5, 5)
    with pytest.raises(ValueError, match=r"squared gradient of parameter '1\.first\.weight'"):
        estimate_fisher(model, [(torch.randn(2, 5), torch.tensor([0, 1]))], kind="empirical")


def test_out_of_memory_is_not_taken_for_a_model_that_cannot_be_vectorised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(fallback, "vmap", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        estimate_fisher(nn.Sequential(models.mlp(), models.Scale(models.NUM_CLASSES)), [batch()])


def test_attention_is_covered_without_a_warning() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
    batch = (torch.randn(3, 4, 8), torch.randint(3, (3,)))
    estimate = estimate_fisher(model, [batch], kind="empirical")  # a warning would be an error
    assert estimate.info.method == "hooks"
    params = dict(model.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in params.items()}
    model.eval()
    for x, y in zip(*batch, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        for total, g in zip(expected.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            total += g.square() / 3
    for n, want in expected.items():
        torch.testing.assert_close(estimate[n], want, rtol=1e-4, atol=1e-7)
