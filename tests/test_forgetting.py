"""``ForgettingProbe``: its values, its expectation and standard error, what is left alone, what bad input gets."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_fast.forgetting import ForgettingProbe
from ewc_fast.sequences import sample_sequences
from tests.test_sequences import Causal, causal_lm

Z = 5  # standard deviations: a false alarm in 3 million


class Masked(Causal):
    """As Hugging Face's: called by keyword, with a mask, which padding makes irrelevant here."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids))


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 4))


@torch.no_grad()
def move(model: nn.Module, by: float = 0.3) -> nn.Module:
    for p in model.parameters():
        p += by * torch.randn_like(p)
    return model


@torch.no_grad()
def log_probs(model: nn.Module, *inputs: Tensor) -> Tensor:
    """By the definition, in fp64; the model's own mode is not kept."""
    output = model.eval()(*inputs)
    z = (output if isinstance(output, Tensor) else output.logits).double()
    return z - z.exp().sum(-1, keepdim=True).log()


def of_tokens(model: nn.Module, tokens: Tensor) -> list[list[float]]:
    """log p of each token given those before it, from the second on."""
    table = log_probs(model, tokens)
    return [[float(table[n, t - 1, row[t]]) for t in range(1, len(row))] for n, row in enumerate(tokens.tolist())]


def assert_probe(probe: ForgettingProbe, sums: list[float], counts: list[int], tolerance: float = 1e-6) -> None:
    """Value and standard error, from each sample's sum and number of terms."""
    value = probe()
    used = [(d, n) for d, n in zip(sums, counts, strict=True) if n]
    terms, size = sum(n for _, n in used), len(used)
    mean = sum(d for d, _ in used) / terms
    variance = sum((d - mean * n) ** 2 for d, n in used) * size / (size - 1) / terms**2
    assert value.dtype == torch.float64 and value.shape == () and value.device.type == "cpu"
    assert value.item() == pytest.approx(mean, abs=tolerance)
    assert probe.standard_error.item() == pytest.approx(variance**0.5, abs=tolerance)
    assert probe.num_terms == terms


# fp32: log-probabilities of a few nats carry an error of about 2^-22 each.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_language_model(dtype: torch.dtype, prompt: int, batch_size: int) -> None:
    model = Causal(vocabulary=7).to(dtype)
    tokens = torch.randint(7, (9, 6))
    then = of_tokens(model, tokens)
    probe = ForgettingProbe(model, tokens, batch_size=batch_size, num_prompt_tokens=prompt)
    move(model)
    now = of_tokens(model, tokens)
    sums = [sum(a - b for a, b in list(zip(x, y, strict=True))[prompt - 1 :]) for x, y in zip(then, now, strict=True)]
    assert_probe(probe, sums, [6 - prompt] * 9, 1e-5 if dtype == torch.float32 else 1e-12)
    assert probe.unit == "token" and probe.num_samples == 9


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", ["dict", "list", "loader"])
@pytest.mark.parametrize("prompt", [1, 2])
def test_padding_labels_and_prompts_do_not_count(padding: str, form: str, prompt: int) -> None:
    n, length = 10, 7
    model = Masked(vocabulary=8).double()
    tokens = torch.randint(8, (n, length))
    lengths = torch.randint(1, length + 1, (n,))
    lengths[:2] = torch.tensor([1, length])
    position = torch.arange(length)
    mask = position < lengths[:, None] if padding == "right" else position >= length - lengths[:, None]
    ignored = torch.rand(n, length) < 0.2
    ignored[1, -1] = False
    labels = torch.where(ignored | ~mask, -100, tokens)
    batch = {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
    samples: Any = batch
    if form == "list":
        samples = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]
    elif form == "loader":
        samples = DataLoader([{k: v[i] for k, v in batch.items()} for i in range(n)], batch_size=3)

    then = of_tokens(model, tokens)
    probe = ForgettingProbe(model, samples, batch_size=3, num_prompt_tokens=prompt)
    move(model)
    now = of_tokens(model, tokens)
    sums, counts = [], []
    for i in range(n):
        own = [t for t in range(length) if mask[i, t]][prompt:]  # written by the model
        counted = [t for t in own if not ignored[i, t]]
        sums.append(sum(then[i][t - 1] - now[i][t - 1] for t in counted))
        counts.append(len(counted))
    assert_probe(probe, sums, counts, 1e-12)


def test_rise_of_the_loss_on_any_text() -> None:
    """Transformers' own loss is the mean over the same tokens."""
    model = causal_lm(vocabulary=30).eval()
    tokens = torch.randint(30, (6, 12))
    with torch.no_grad():
        then = model(tokens, labels=tokens).loss
        probe = ForgettingProbe(model, tokens, batch_size=4)
        move(model, 0.1)
        now = model(tokens, labels=tokens).loss
    assert probe().item() == pytest.approx(float(now - then), abs=1e-5)
    assert abs(float(now - then)) > 1e-3


def exact_divergence(then: nn.Module, now: nn.Module, vocabulary: int, length: int) -> tuple[float, float]:
    """KL over sequences whose first token is uniform, from its definition; and the variance of one log ratio."""
    sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    p = torch.tensor([sum(row) for row in of_tokens(then, sequences)], dtype=torch.float64).exp() / vocabulary
    q = torch.tensor([sum(row) for row in of_tokens(now, sequences)], dtype=torch.float64).exp() / vocabulary
    assert p.sum().item() == pytest.approx(1) and q.sum().item() == pytest.approx(1)
    ratio = (p / q).log()
    mean = (p * ratio).sum()
    return mean.item(), (p * (ratio - mean) ** 2).sum().item()


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_expectation_is_the_divergence(kind: str) -> None:
    vocabulary, length, n = 4, 4, 4000
    then, now = ((Causal() if kind == "plain" else causal_lm()).double() for _ in range(2))
    probe = ForgettingProbe(then, sample_sequences(then, n, length, batch_size=n), batch_size=n)
    divergence, variance = exact_divergence(then, now, vocabulary, length)
    then.load_state_dict(now.state_dict())
    value, error = probe().item() * (length - 1), (variance / n) ** 0.5
    assert abs(value - divergence) < Z * error
    assert divergence > 2 * Z * error, "the models are too close to tell"
    assert probe.standard_error.item() * (length - 1) == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize("unequal", [False, True])
def test_standard_error_is_calibrated(unequal: bool) -> None:
    """The scatter of the result over fresh draws of the samples is what the standard error says."""
    draws, n, length = 400, 64, 5
    then, now = Masked().double(), Masked().double()
    weights = {name: p.clone() for name, p in then.state_dict().items()}
    tokens = sample_sequences(then, draws * n, length, batch_size=draws * n).view(draws, n, length)
    values, variances = [], []
    for sample in tokens:
        then.load_state_dict(weights)
        mask = torch.ones(n, length, dtype=torch.long)
        if unequal:
            mask = (torch.arange(length) < torch.randint(2, length + 1, (n, 1))).long()
        probe = ForgettingProbe(then, {"input_ids": sample, "attention_mask": mask}, batch_size=n)
        then.load_state_dict(now.state_dict())
        values.append(probe())
        variances.append(probe.standard_error**2)
    ratio = float(torch.stack(variances).mean() / torch.stack(values).var())
    # A variance from 400 nearly normal values has a relative standard deviation of sqrt(2/399); the ratio estimator's
    # variance is biased by terms of order 1/64.
    assert abs(ratio - 1) < Z * (2 / (draws - 1)) ** 0.5 + 4 / n


def divergences(then: Tensor, now: Tensor) -> list[float]:
    return [
        sum(float(p.exp() * (p - q)) for p, q in zip(a, b, strict=True) if p > -torch.inf)
        for a, b in zip(then, now, strict=True)
    ]


@pytest.mark.parametrize("form", ["tensor", "list", "pairs", "loader", "dict", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classifier(form: str, dtype: torch.dtype) -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(pixel_values)}

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.net(torch.cat([left, right], 1))

    x, y = torch.randn(11, 5, dtype=dtype), torch.randint(4, (11,))
    model: nn.Module = classifier().to(dtype)
    net, samples = model, x
    if form == "list":
        samples = [x[:4], x[4:]]
    elif form == "pairs":
        samples = [(x[:4], y[:4]), (x[4:], y[4:])]
    elif form == "loader":
        samples = DataLoader(TensorDataset(x), batch_size=4)
    elif form == "dict":
        model = ByKeyword().to(dtype)
        net, samples = model.net, {"pixel_values": x, "labels": y}
    elif form == "nested":
        model = TwoInputs().to(dtype)
        net, samples = model.net, [((x[:, :2], x[:, 2:]), y)]
    then = log_probs(net, x)
    probe = ForgettingProbe(model, samples, batch_size=4)
    move(model)
    now = log_probs(net, x)
    assert_probe(probe, divergences(then, now), [1] * 11, 1e-5 if dtype == torch.float32 else 1e-12)
    assert probe.unit == "sample" and probe.num_samples == 11 and probe() > 0


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_low_precision_is_widened(kind: str) -> None:
    """Only the model's own arithmetic is bf16; a log-probability in bf16 would be wrong in its third digit."""
    if kind == "classifier":
        model, samples = nn.Linear(5, 4).bfloat16(), torch.randn(6, 5).bfloat16()
    else:
        model, samples = Causal().bfloat16(), torch.randint(4, (6, 5))
    old, tokens = log_probs(model, samples), samples.tolist()
    probe = ForgettingProbe(model, samples)
    new = log_probs(move(model), samples)
    if kind == "classifier":
        assert_probe(probe, divergences(old, new), [1] * 6, 1e-5)
    else:
        sums = [sum(float((old - new)[n, t - 1, row[t]]) for t in range(1, 5)) for n, row in enumerate(tokens)]
        assert_probe(probe, sums, [4] * 6, 1e-5)


def test_text_classifier_takes_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 3)).double()
    tokens = torch.randint(9, (7, 4))
    then = log_probs(model, tokens)
    probe = ForgettingProbe(model, tokens)
    move(model)
    assert_probe(probe, divergences(then, log_probs(model, tokens)), [1] * 7, 1e-12)


def test_impossible_classes() -> None:
    """p log p is 0 at p = 0; what was possible and no longer is, is infinitely far."""
    model = nn.Linear(5, 4).double()
    model.bias.data[1] = -torch.inf
    x = torch.randn(6, 5, dtype=torch.float64)
    then = log_probs(model, x)
    probe = ForgettingProbe(model, x)
    assert probe() == 0
    model.weight.data += 0.3 * torch.randn(4, 5)
    assert_probe(probe, divergences(then, log_probs(model, x)), [1] * 6, 1e-12)
    model.bias.data[2] = -torch.inf
    assert probe() == torch.inf


@pytest.mark.parametrize("kind", ["plain", "llama", "classifier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchanged_weights_give_exactly_zero(kind: str, dtype: torch.dtype) -> None:
    if kind == "classifier":
        model, samples = classifier().to(dtype), torch.randn(9, 5, dtype=dtype)
    else:
        model = (Causal(vocabulary=20) if kind == "plain" else causal_lm(vocabulary=20)).to(dtype)
        samples = torch.randint(20, (9, 6))
    probe = ForgettingProbe(model, samples)
    assert probe() == 0 and probe.standard_error == 0
    move(model)
    assert probe() != 0


def test_follows_the_model_to_another_dtype() -> None:
    model = Causal(vocabulary=20)
    probe = ForgettingProbe(model, torch.randint(20, (8, 6)))
    model.double()
    assert abs(probe().item()) < 1e-5
    model.bfloat16()
    assert 0 < abs(probe().item()) < 0.1


@pytest.mark.gpu
def test_follows_the_model_to_another_device() -> None:
    model = Causal(vocabulary=20)
    probe = ForgettingProbe(model, torch.randint(20, (8, 6)))
    model.cuda()
    assert abs(probe().item()) < 1e-5
    on_device = ForgettingProbe(model, sample_sequences(model, 4, 6, torch.Generator("cuda")))
    assert on_device() == 0 and on_device.standard_error.device.type == "cpu"


def test_samples_are_copied_and_read_once() -> None:
    class ShiftsInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.net(x)

    x = torch.randn(6, 5)
    kept, model = x.clone(), ShiftsInput()
    probe = ForgettingProbe(model, (part for part in x.split(2)))
    assert torch.equal(x, kept)
    x.zero_()
    assert probe() == 0 and probe() == 0


class Watched(Causal):
    """Uses the global random state, and fails when told to."""

    failing = False

    def forward(self, tokens: Tensor) -> Tensor:
        assert not any(m.training for m in self.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        if self.failing and len(tokens) < 4:  # the last batch
            raise OSError("disk gone")
        return super().forward(tokens)


@pytest.mark.parametrize("raises", ["never", "first", "later"])
def test_model_is_left_as_found(raises: str) -> None:
    model = Watched()
    model.train()
    model.head.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.embedding.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    tokens = torch.tensor(list(itertools.product(range(4), repeat=2)))[:11]

    def check() -> None:
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert [p.grad is None for p in model.parameters()] == [n != "head.weight" for n, _ in model.named_parameters()]
        assert [p.requires_grad for p in model.parameters()] == flags
        assert torch.equal(torch.get_rng_state(), rng)

    model.failing = raises == "first"
    if raises == "first":
        with pytest.raises(OSError, match="disk gone"):
            ForgettingProbe(model, tokens, batch_size=4)
        check()
        return
    probe = ForgettingProbe(model, tokens, batch_size=4)
    check()
    model.failing = raises == "later"
    if raises == "later":
        with pytest.raises(OSError, match="disk gone"):
            probe()
    else:
        assert not probe().requires_grad
    check()


def test_error_in_the_data_restores_the_modes() -> None:
    model = nn.Sequential(nn.Linear(5, 1)).train()
    with pytest.raises(ValueError, match="C >= 2"):
        ForgettingProbe(model, torch.randn(3, 5))
    assert model.training and model[0].training and torch.is_grad_enabled()


def test_gradients_under_the_same_autocast_reach_every_weight() -> None:
    model = Causal()
    tokens = torch.randint(4, (5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        probe = ForgettingProbe(model, tokens)
        assert probe() == 0
        loss = model(tokens).float().square().mean()
    loss.backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


def test_single_sample_has_no_standard_error() -> None:
    probe = ForgettingProbe(Causal(), torch.randint(4, (1, 6)))
    with pytest.raises(RuntimeError, match="call the probe first"):
        probe.standard_error  # noqa: B018
    assert probe() == 0 and probe.standard_error.isnan()


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        (torch.randn(0, 5), {}, ValueError, "samples are empty"),
        ([], {}, ValueError, "samples are empty"),
        ([torch.randn(0, 5)], {}, ValueError, "samples are empty"),
        (3, {}, TypeError, "samples must be a tensor, a dict of tensors, or a list or loader of batches, got int"),
        ((torch.randn(2, 5), torch.randn(2, 5)), {}, TypeError, "samples must be .* got tuple"),
        ("text", {}, TypeError, "samples must be .* got str"),
        ([torch.randn(2, 5), "text"], {}, TypeError, "batch 1 of the samples: a batch must be"),
        (torch.randn(2, 5), {"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        (torch.randn(2, 5), {"num_prompt_tokens": 0}, ValueError, "num_prompt_tokens must be a positive integer"),
        (torch.randn(2, 5), {"num_prompt_tokens": 2}, ValueError, "num_prompt_tokens is for language models"),
        (torch.full((2, 5), torch.nan), {}, ValueError, "batch 0 of the samples: .*log-probabilities are NaN"),
        (torch.randn(2, 3, 5), {}, ValueError, r"got logits of shape \(2, 3, 4\) for 2 samples. Wrap the model"),
    ],
)
def test_bad_samples_of_a_classifier(
    samples: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ForgettingProbe(nn.Linear(5, 4), samples, **options)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.tensor([[1], [2]]), {}, "no token counts: sequences need two tokens or more"),
        (torch.tensor([[1, 2]]), {"num_prompt_tokens": 2}, r"no token counts: .*num_prompt_tokens \(2\)"),
        ([(torch.tensor([[1, 2]]), torch.tensor([[-100, -100]]))], {}, "no token counts"),
        ([(torch.tensor([[1, 2]]), torch.tensor([1]))], {}, r"labels must have the tokens' shape \(1, 2\), got \(1,\)"),
        ([(torch.tensor([[1, 2]]), torch.tensor([[1, 4]]))], {}, "token 4 is out of range: the logits have 4 classes"),
        ([(torch.tensor([[1, 2]]), torch.tensor([[1, -1]]))], {}, "token -1 is out of range"),
    ],
)
def test_bad_samples_of_a_language_model(samples: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgettingProbe(Causal(), samples, **options)


def test_tagger_is_no_language_model() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3))
    with pytest.raises(
        ValueError, match="token 49 is out of range: the logits have 3 classes, which must be the vocab"
    ):
        ForgettingProbe(model, torch.full((2, 6), 49))


def test_text_that_cannot_be_the_models() -> None:
    model = Causal()
    model.head.bias.data[2] = -torch.inf
    with pytest.raises(ValueError, match="batch 1 of the samples: the model gives probability 0 to a token"):
        ForgettingProbe(model, torch.tensor([[1, 3], [1, 2]]), batch_size=1)


def test_nan_later_names_the_batch() -> None:
    model = Causal()
    probe = ForgettingProbe(model, torch.tensor([[0, 1], [3, 1]]), batch_size=1)
    model.embedding.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="batch 1 of the samples: the model's log-probabilities are NaN"):
        probe()


def test_more_classes_than_then() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    probe = ForgettingProbe(model, torch.randn(3, 5))
    model[0] = nn.Linear(5, 6)
    with pytest.raises(ValueError, match="has 6 classes now, and had 4 when the probe was made: make a new probe"):
        probe()


def test_mixed_outputs() -> None:
    class Mixed(Causal):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens)[:, -1] if tokens.shape[1] == 3 else super().forward(tokens)

    with pytest.raises(ValueError, match="mix a language model's with a classifier's"):
        ForgettingProbe(Mixed(), [torch.randint(4, (2, 3)), torch.randint(4, (2, 4))])


def test_model_without_logits() -> None:
    with pytest.raises(TypeError, match="batch 0 of the samples: .*as a tensor or as .logits, got tuple"):
        ForgettingProbe(nn.LSTM(5, 4), torch.randn(3, 2, 5))
