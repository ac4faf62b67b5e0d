"""``sample_sequences``: the distribution of what is written, the cache, what is left alone, what bad input gets."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import ForgettingProbe, estimate_fisher
from ewc_fast.sequences import draw, sample_sequences

Z = 5  # standard deviations: a false alarm in 3 million


class Causal(nn.Module):
    """Logits that depend on the whole prefix, sharply."""

    def __init__(self, vocabulary: int = 4, width: int = 6, readable: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(readable or vocabulary, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        state = (self.embedding(tokens) * weights).cumsum(1).tanh()
        return self.head(self.norm(state.transpose(1, 2)).transpose(1, 2))


class Raises(Causal):
    """Fails once sequences have three tokens, after it has used the global random state."""

    def forward(self, tokens: Tensor) -> Tensor:
        torch.rand(3)
        if tokens.shape[1] > 2:
            raise OSError("disk gone")
        return super().forward(tokens)


class Readable(Causal):
    """A model that has more logits than embeddings, as a padded head has."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def causal_lm(family: str = "llama", vocabulary: int = 4) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": vocabulary, "initializer_range": 0.25, "bos_token_id": 0, "eos_token_id": 1}
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **sizes)
        )
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
    if family == "mistral":  # its cache keeps a window
        return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=4, **config, **sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, **sizes))


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model.eval()(tokens)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def probabilities(model: nn.Module, length: int, vocabulary: int, temperature: float, prompt: Tensor | None) -> Tensor:
    """Of every sequence, in the order of ``itertools.product``, fp64."""
    model = model.double()
    result = []
    for sequence in itertools.product(range(vocabulary), repeat=length):
        tokens = torch.tensor(sequence)
        p, known = (torch.tensor(1 / vocabulary, dtype=torch.float64), 1)
        if prompt is not None:
            p, known = (tokens[: len(prompt)] == prompt).all().double(), len(prompt)
        for t in range(known, length):
            z = logits_of(model, tokens[None, :t])[0, -1] / temperature
            p = p * z.exp()[tokens[t]] / z.exp().sum()
        result.append(p)
    return torch.stack(result)


def assert_distributed(counts: Tensor, probs: Tensor) -> None:
    """Pearson's chi-square test; cells below 5 expected are merged. The bound is Wilson and Hilferty's, at Z."""
    n = counts.sum()
    assert counts[probs == 0].sum() == 0
    rare = n * probs < 5
    expected = torch.cat([n * probs[~rare], (n * probs[rare]).sum()[None]])
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected, seen = expected[expected > 0], seen[expected > 0]
    dof = len(expected) - 1
    assert dof
    chi_square = ((seen - expected) ** 2 / expected).sum()
    bound = dof * (1 - 2 / (9 * dof) + Z * (2 / (9 * dof)) ** 0.5) ** 3
    assert chi_square < bound, (chi_square, bound)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("prompt", [None, [2], [1, 3]])
@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_sequences_are_drawn_from_the_model(kind: str, prompt: list[int] | None, temperature: float) -> None:
    model = Causal() if kind == "plain" else causal_lm()
    given = None if prompt is None else torch.tensor(prompt)
    length, n = 4, 6000
    tokens = sample_sequences(model, n, length, prompts=given, temperature=temperature, batch_size=1000)
    assert tokens.shape == (n, length) and tokens.dtype == torch.int64
    cells = (tokens * 4 ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=4**length)
    assert_distributed(counts, probabilities(model, length, 4, temperature, given))


def test_first_token_is_uniform_and_readable() -> None:
    model = Readable(vocabulary=9, readable=6)
    tokens = sample_sequences(model, 3000, 2, batch_size=3000)
    assert tokens.max() < 6
    counts = torch.bincount(tokens[:, 0], minlength=6)
    assert_distributed(counts, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_vocabulary_is_no_larger_than_the_configuration_says() -> None:
    model = Causal(vocabulary=9)
    model.config = SimpleNamespace(vocab_size=7)
    assert sample_sequences(model, 500, 3).max() == 6


def test_rows_have_prompts_of_their_own() -> None:
    prompts = torch.randint(4, (5, 3), dtype=torch.int32)
    tokens = sample_sequences(Causal(), 5, 6, prompts=prompts, batch_size=2)
    assert torch.equal(tokens[:, :3], prompts.long())


@pytest.mark.parametrize("prompt_length", [None, 1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_cache_changes_nothing_but_what_is_read(family: str, prompt_length: int | None) -> None:
    class Uncached(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Any:
            return self.model(tokens, use_cache=False)

    model = causal_lm(family, vocabulary=20).double()
    prompts = None if prompt_length is None else torch.randint(20, (7, prompt_length))
    read = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    n, length, known = 7, 12, prompt_length or 1
    cached = sample_sequences(model, n, length, torch.Generator().manual_seed(3), prompts=prompts, batch_size=7)
    assert read == [1, known] + [1] * (length - known - 1)
    handle.remove()
    plain = sample_sequences(
        Uncached(model), n, length, torch.Generator().manual_seed(3), prompts=prompts, batch_size=3
    )
    assert torch.equal(cached, plain)
    assert len(cached.unique()) > 5


def test_only_the_last_position_of_a_prompt_gets_logits() -> None:
    model = causal_lm(vocabulary=20)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    sample_sequences(model, 2, 8, prompts=torch.randint(20, (5,)))
    assert seen == [1, 1, 1, 1]


def test_batch_size_changes_nothing() -> None:
    model = Causal().double()
    one, other = (sample_sequences(model, 11, 9, torch.Generator().manual_seed(5), batch_size=b) for b in (1, 4))
    assert torch.equal(one, other)


def test_generator_is_the_only_source() -> None:
    class Noisy(Causal):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + 0 * torch.rand(())

    model, generator = Noisy(), torch.Generator().manual_seed(1)
    before, global_state = generator.get_state(), torch.get_rng_state()
    first = sample_sequences(model, 4, 30, generator)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(generator.get_state(), before)
    assert not torch.equal(sample_sequences(model, 4, 30, generator), first)
    assert torch.equal(sample_sequences(model, 4, 30, torch.Generator().manual_seed(1)), first)

    torch.manual_seed(1)
    assert torch.equal(sample_sequences(model, 4, 30), first)
    assert not torch.equal(sample_sequences(model, 4, 30), first)


@pytest.mark.parametrize("raises", [False, True])
def test_model_is_left_as_found(raises: bool) -> None:
    model = (Raises if raises else Causal)()
    model.train()
    model.head.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    if raises:
        with pytest.raises(OSError, match="disk gone"):
            sample_sequences(model, 3, 5, torch.Generator())
    else:
        sample_sequences(model, 3, 5, torch.Generator())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()] == [n != "head.weight" for n, _ in model.named_parameters()]
    assert torch.equal(torch.get_rng_state(), rng)


def test_model_writes_in_evaluation_mode() -> None:
    class Dropped(Causal):
        def forward(self, tokens: Tensor) -> Tensor:
            assert not any(m.training for m in self.modules()) and not torch.is_grad_enabled()
            return super().forward(tokens)

    with torch.inference_mode():
        tokens = sample_sequences(Dropped(), 2, 4)
    assert not tokens.is_inference()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision(how: str) -> None:
    model = causal_lm(vocabulary=20)
    if how == "bfloat16":
        tokens = sample_sequences(model.bfloat16(), 8, 16)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = sample_sequences(model, 8, 16)
            assert logits_of(model, tokens).dtype == torch.bfloat16
    assert tokens.min() >= 0 and tokens.max() < 20 and len(tokens.unique()) > 5


def test_gradients_under_the_same_autocast_reach_every_weight() -> None:
    model = Causal()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = sample_sequences(model, 4, 5)
        loss = model(tokens).float().square().mean()
    loss.backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


def test_wrapped_models_are_called_without_their_wrapper() -> None:
    model = Causal().double()
    wrapped = nn.DataParallel(model)
    a, b = (sample_sequences(m, 4, 9, torch.Generator().manual_seed(1)) for m in (model, wrapped))
    assert torch.equal(a, b)


def test_draw_inverts_the_distribution_function() -> None:
    logits = torch.randn(200, 30, dtype=torch.float64) * 3
    logits[torch.rand(200, 30) < 0.3] = -torch.inf
    logits[:, 17] = 0.0
    uniform = 1 - torch.rand(200, dtype=torch.float64)
    uniform[:3], uniform[3:6] = 2.0**-53, 1.0
    drawn = draw(logits, uniform, 0.7, 0)
    for row, u, k in zip(logits.tolist(), uniform.tolist(), drawn.tolist(), strict=True):
        weights = [torch.tensor(z / 0.7, dtype=torch.float64).exp().item() for z in row]
        total = sum(weights)
        slack = 64 * 2.0**-52  # each probability is rounded to 2^-52, and so are the 30 sums of the reference
        assert sum(weights[:k]) / total - slack < u <= sum(weights[: k + 1]) / total + slack
        assert weights[k] > 0


def test_draw_reaches_rare_tokens() -> None:
    """fp32 variates end at 2^-24; a large vocabulary's tail lies below."""
    logits = torch.zeros(1, 2)
    logits[0, 0] = -25.0  # p = e^-25 = 1.4e-11
    p = torch.tensor(-25.0, dtype=torch.float64).exp().item()
    drawn = [draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 0).item() for u in (0.99 * p, 1.01 * p)]
    assert drawn == [0, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_sequences": 0}, ValueError, "num_sequences must be an integer of 1 or more, got 0"),
        ({"num_sequences": 2.0}, ValueError, "num_sequences"),
        ({"length": 1}, ValueError, "length must be an integer of 2 or more, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": True}, ValueError, "batch_size"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive, finite number"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"prompts": [1, 2]}, TypeError, "prompts must be a tensor of tokens"),
        ({"prompts": torch.zeros(2)}, ValueError, "prompts must be integers"),
        (
            {"prompts": torch.zeros(2, 1, dtype=torch.long)},
            ValueError,
            r"\(num_sequences, P\) = \(3, P\), got \(2, 1\)",
        ),
        ({"prompts": torch.tensor(1)}, ValueError, r"prompts must have shape \(P,\)"),
        ({"prompts": torch.zeros(6, dtype=torch.long)}, ValueError, "1 to 5 tokens, .*length=6, got 6"),
        ({"prompts": torch.zeros(0, dtype=torch.long)}, ValueError, "1 to 5 tokens"),
        ({"prompts": torch.tensor([1, 4])}, ValueError, "vocabulary, 0 to 3, got 1 to 4"),
        ({"prompts": torch.tensor([-1, 2])}, ValueError, "vocabulary, 0 to 3, got -1 to 2"),
        ({"model": nn.Sequential(nn.Embedding(4, 4), nn.Flatten(0))}, ValueError, r"\(batch, tokens, vocabulary\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": Causal(), "num_sequences": 3, "length": 6} | change
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        sample_sequences(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


def test_model_without_logits() -> None:
    class NoLogits(Causal):
        def forward(self, tokens: Tensor) -> Any:
            return SimpleNamespace(hidden=super().forward(tokens))

    with pytest.raises(TypeError, match="must return the logits as a tensor or as .logits, got SimpleNamespace"):
        sample_sequences(NoLogits(), 2, 4)


def test_models_on_the_meta_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embedding.weight is on the meta device.*materialise"):
        sample_sequences(Causal().to("meta"), 2, 4)
    with pytest.raises(ValueError, match=r"embedding.weight is on the meta device.*materialise"):
        ForgettingProbe(Causal().to("meta"), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^weight is on the meta device.*materialise"):
        estimate_fisher(nn.Linear(2, 2, device="meta"), [(torch.randn(3, 2), torch.zeros(3, dtype=torch.long))])


def test_length_beyond_the_positions() -> None:
    with pytest.raises(ValueError, match="length is 33, but the model has only 32 positions"):
        sample_sequences(causal_lm("gpt2"), 2, 33)
    assert sample_sequences(causal_lm("gpt2"), 2, 32).shape == (2, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    model = Causal()
    model.head.bias.data[2] = value
    with pytest.raises(ValueError, match="logits for token 1 are not finite"):
        sample_sequences(model, 2, 4)


def test_masked_tokens_are_never_drawn() -> None:
    model = Causal(vocabulary=6)
    model.head.bias.data[::2] = -torch.inf
    tokens = sample_sequences(model, 200, 6, prompts=torch.tensor([0]))
    assert set(tokens[:, 1:].unique().tolist()) <= {1, 3, 5}
