"""Whole architectures against a loop over samples in fp64: the empirical Fisher, in the unit of its loss."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast.fisher import FisherEstimator, estimate_fisher
from ewc_fast.fisher import estimator as estimator_module
from tests.fisher.resuming import assert_resumes

transformers = pytest.importorskip("transformers")

NUM_CLASSES = 4


def brute_force(model: nn.Module, batches: list[Any], log_likelihood: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double().eval()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for _, p in named]
    terms = 0
    for batch in batches:
        parts = batch.values() if isinstance(batch, dict) else batch
        for rows in zip(*(t.split(1) for t in parts), strict=True):
            value, count = log_likelihood(
                model, dict(zip(batch, rows, strict=True)) if isinstance(batch, dict) else rows
            )
            terms += count
            grads = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
            for total, g in zip(totals, grads, strict=True):
                total += 0 if g is None else g**2
    return {name: total / terms for (name, _), total in zip(named, totals, strict=True)}


def classifier(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    x, y = batch
    return model(x.double()).log_softmax(-1)[0, y[0]], 1


def language_model(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
    labels, mask = batch["labels"][0, 1:], batch["attention_mask"][0, 1:] * batch["attention_mask"][0, :-1]
    kept = [i for i in range(len(labels)) if labels[i] != -100 and mask[i]]
    return sum((logits[i].log_softmax(-1)[labels[i]] for i in kept), logits.sum() * 0), len(kept)


def assert_agrees(actual: Any, expected: dict[str, Tensor], method: str) -> None:
    assert actual.info.method == method
    assert list(actual) == list(expected)
    for name, value in expected.items():
        worst = (actual[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert worst < 2e-4, (name, worst)


class Encoder(nn.Module):
    """Attention with dropout, a position embedding, a class token."""

    def __init__(self, batch_first: bool, length: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, NUM_CLASSES)
        self.position = nn.Parameter(torch.randn(1, length, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x + self.position], 1)
        return self.head(self.body(x).mean(1) if self.batch_first else self.body(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [2, 5])  # with the token, 3 and 6 positions: as many as there are samples
def test_encoder(batch_first: bool, length: int) -> None:
    model = Encoder(batch_first, length)
    data = [(torch.randn(n, length, 8), torch.randint(NUM_CLASSES, (n,))) for n in (6, 3, 1)]
    assert_agrees(estimate_fisher(model, data, "empirical"), brute_force(model, data, classifier), "hooks")


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (
            [
                nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=2, groups=2),
                nn.GroupNorm(3, 6),
                nn.ReLU(inplace=True),
                nn.Conv1d(6, 6, 4, padding="same", padding_mode="circular"),
            ],
            (4, 9),
        ),
        ([nn.Conv2d(4, 8, (2, 3), stride=(1, 2), padding=(0, 1), groups=4, bias=False), nn.BatchNorm2d(8)], (4, 5, 6)),
        ([nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), nn.BatchNorm3d(4), nn.ReLU()], (2, 4, 4, 3)),
        ([nn.Linear(6, 5), nn.LayerNorm((3, 5)), nn.Tanh(), nn.RMSNorm(5)], (3, 6)),
    ],
)
def test_convolutions_and_norms(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    body = nn.Sequential(*layers)
    for module in body.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(body.eval()(torch.zeros(2, *shape))[0].numel(), NUM_CLASSES))
    layers[0].weight.requires_grad_(len(shape) != 2)  # frozen in one of the cases
    data = [(torch.randn(n, *shape), torch.randint(NUM_CLASSES, (n,))) for n in (6, 4)]
    assert_agrees(estimate_fisher(model, data, "empirical"), brute_force(model, data, classifier), "hooks")


def language_batches() -> list[dict[str, Tensor]]:
    batches = []
    for n in (6, 4, 1):
        ids, mask = torch.randint(50, (n, 7)), torch.ones(n, 7, dtype=torch.long)
        mask[0, 5:] = 0  # padding on the right
        mask[1:2, :2] = 0  # and on the left
        labels = ids.clone()
        labels[-1, 3] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_padded_language_model(family: str, tied: bool) -> None:
    shape: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    if family == "Llama":
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape["intermediate_size"] = 24
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, **shape
    )
    model = getattr(transformers, "LlamaForCausalLM" if family == "Llama" else "GPT2LMHeadModel")(config)
    data = language_batches()
    actual = estimate_fisher(model, data, "empirical", "causal_lm")
    assert_agrees(actual, brute_force(model, data, language_model), "hooks")
    seen = [b["attention_mask"][:, 1:] * b["attention_mask"][:, :-1] for b in data]
    counted = sum(int(((b["labels"][:, 1:] != -100) & (s != 0)).sum()) for b, s in zip(data, seen, strict=True))
    assert (actual.info.unit, actual.info.num_samples, actual.info.num_terms) == ("token", 11, counted)
    with pytest.raises(ValueError, match="use loss='causal_lm'"):
        estimate_fisher(model, data, "empirical")


@pytest.mark.parametrize("kind", ["sampled", "exact", "predicted", "reversed", "batch"])
def test_an_interrupted_estimate_goes_on_exactly(kind: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))
    data = [(torch.randn(n, 5), torch.randint(NUM_CLASSES, (n,))) for n in (4, 4, 2)]
    whole = FisherEstimator(model, kind, generator=torch.Generator().manual_seed(1))
    for batch in data:
        whole.update(batch)
    first = FisherEstimator(model, kind, generator=torch.Generator().manual_seed(1))
    first.update(data[0])
    second = FisherEstimator(model, kind, generator=torch.Generator())
    second.load_state_dict(first.state_dict())
    for batch in data[1:]:
        second.update(batch)
    assert second.info == whole.info
    expected = whole.result()
    assert all(torch.equal(f, expected[name]) for name, f in second.result().items())
    with pytest.raises(ValueError, match="kind="):
        FisherEstimator(model, "empirical").load_state_dict(first.state_dict())


@pytest.mark.parametrize("given", [False, True])
def test_final_result_is_in_the_memory_of_the_sums(given: bool) -> None:
    model = nn.Linear(5, NUM_CLASSES)
    data = [(torch.randn(4, 5), torch.randint(NUM_CLASSES, (4,))) for _ in range(3)]
    out = {name: torch.full_like(p, 7.0, requires_grad=False) for name, p in model.named_parameters()}
    estimator = FisherEstimator(model, "empirical", out=out if given else None)
    for batch in data:
        estimator.update(batch)
    before = estimator.result()
    after = estimator.result(final=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.info == after.info
    assert all((after[name].data_ptr() == out[name].data_ptr()) is given for name in out)
    for call in (lambda: estimator.update(data[0]), estimator.result, estimator.state_dict):
        with pytest.raises(RuntimeError, match="was the end of this estimate"):
            call()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, NUM_CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[0](x)

        def block(h: Tensor) -> Tensor:
            return self.layers[2](self.layers[1](h).tanh()).tanh()

        if hidden.dtype == torch.float64:  # the reference: reentrant checkpoints refuse autograd.grad()
            return self.head(block(hidden))
        return self.head(torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=self.use_reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("sizes", [(6, 4), (1, 1, 1)])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_model(use_reentrant: bool, sizes: tuple[int, ...]) -> None:
    model = Checkpointed(use_reentrant)
    data = [(torch.randn(n, 5), torch.randint(NUM_CLASSES, (n,))) for n in sizes]
    assert_agrees(estimate_fisher(model, data, "empirical"), brute_force(model, data, classifier), "hooks")
    assert all(p.grad is None for p in model.parameters())


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight.t(), x.t() @ g


class UsedOutOfSight(nn.Module):
    """A weight that a layer uses, and once more an operation that no mode can see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh() + Product.apply(x, self.layer.weight))


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
def test_use_out_of_sight_is_not_missed() -> None:
    model = UsedOutOfSight()
    data = [(torch.randn(n, 5), torch.randint(NUM_CLASSES, (n,))) for n in (6, 4)]
    assert_agrees(estimate_fisher(model, data, "empirical"), brute_force(model, data, classifier), "loop")


class Experts(nn.Module):
    """Tokens routed to experts: a layer may see as many rows as there are samples, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        hidden = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            chosen = ((tokens[:, 0] > 0).long() == i).nonzero()[:, 0]
            hidden = hidden.index_add(0, chosen, expert(tokens[chosen]).tanh())
        return self.head(hidden.view(x.shape).sum(1))


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
def test_routed_tokens_are_not_taken_for_samples() -> None:
    model = Experts()
    data = [(torch.randn(n, 2, 5), torch.randint(NUM_CLASSES, (n,))) for n in (6, 3, 4, 6, 6, 6, 6)]
    assert_agrees(estimate_fisher(model, data, "empirical"), brute_force(model, data, classifier), "loop")


def against_single_samples(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **options: Any) -> Any:
    """Whole batches against batches of one sample, which take no rule. Returns how the former were made."""
    model = model.double().eval()
    fisher = estimate_fisher(model, batches, "empirical", **options)
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    assert_agrees(fisher, dict(estimate_fisher(model, singles, "empirical", **options)), fisher.info.method)
    return fisher.info.method


def token_batches(*shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(20, shape), torch.randint(NUM_CLASSES, shape[:1])) for shape in shapes]


class Embedded(nn.Module):
    """Token and position embeddings, the latter shared by all samples."""

    def __init__(self, combine: Any) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 5), nn.Embedding(9, 5)
        self.head, self.combine = nn.Linear(5, NUM_CLASSES), combine

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.combine(self.tokens(ids), self.positions, ids.shape[1])).mean(1))


def cut(t: Tensor) -> Tensor:
    return t / t.detach().norm()


def without_graph(function: Any) -> Tensor:
    with torch.no_grad():
        return function()


COMBINATIONS: dict[str, tuple[Any, str]] = {
    "one_row": (lambda x, p, n: x + p(torch.arange(n)[None]), "hooks"),
    "no_row": (lambda x, p, n: x + p(torch.arange(n)), "hooks"),
    "first": (lambda x, p, n: p(torch.arange(n)) + x, "hooks"),
    "moved": (lambda x, p, n: x + p(torch.arange(n)[None]).to(x.device), "hooks"),
    "subtracted": (lambda x, p, n: x - p(torch.arange(n)), "hooks"),
    "times": (lambda x, p, n: x * p(torch.arange(n)[None]), "hooks"),
    "repeated": (lambda x, p, n: x + p(torch.arange(n) // 2), "hooks"),
    "twice": (lambda x, p, n: (x + p(torch.arange(n))).sin() - p(torch.arange(n) // 3), "hooks"),
    "one_twice": (lambda x, p, n: (lambda q: (x + q).sin() - q)(p(torch.arange(n))), "hooks"),
    "normed": (lambda x, p, n: x + cut(p(torch.arange(n)[None])), "hooks"),
    "its_shape": (lambda x, p, n: (lambda q: x + q / q.shape[0])(p(torch.arange(n)[None])), "hooks"),
    "moved_twice": (lambda x, p, n: (lambda q: (x + q.t().t()).sin() - q)(p(torch.arange(n))), "hooks"),
    "kept": (lambda x, p, n: x + torch.where(x > 0, p(torch.arange(n)[None]), 0.5), "hooks"),
    "no_grad": (lambda x, p, n: x + without_graph(lambda: p(torch.arange(n))) + p(torch.arange(n)), "vmap"),
    "expanded": (lambda x, p, n: x + p(torch.arange(n)[None]).expand(len(x), -1, -1), "vmap"),
    "for_each": (lambda x, p, n: x + p(torch.arange(n)[None].expand(len(x), -1)), "hooks"),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("length", [6, 8, 4, 1])
def test_shared_embeddings(combination: str, length: int) -> None:
    """Of the length of the batch, of that of the look, and of one."""
    combine, method = COMBINATIONS[combination]
    found = against_single_samples(Embedded(combine), token_batches((8, length), (3, length)))
    if length == 6 and combination != "expanded":
        assert found == method


class Negated(torch.autograd.Function):
    """Nothing that a mode could see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class RelativeBias(nn.Module):
    """Attention with a bias for each distance, (1, heads, length, length), the same for all samples and layers."""

    heads = 4  # as many as the samples that are looked at

    def __init__(self, combine: Any, layers: int, reentrant: bool | None = None) -> None:
        super().__init__()
        self.tokens, self.bias, self.head = nn.Embedding(20, 8), nn.Embedding(5, self.heads), nn.Linear(8, NUM_CLASSES)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.scale, self.other = nn.Parameter(torch.rand(()) + 0.5), nn.Embedding(5, self.heads)
        self.combine, self.reentrant = combine, reentrant

    def block(self, x: Tensor, keep: Tensor, layer: nn.Module, bias: Tensor | None) -> Tensor:
        bias = self.make_bias(x.shape[1]) if bias is None else bias
        heads = layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return x + self.combine(self, heads, bias, keep).transpose(1, 2).flatten(2)

    def make_bias(self, length: int, table: nn.Embedding | None = None) -> Tensor:
        place = torch.arange(length)
        return (table or self.bias)((place - place[:, None]).clamp(-2, 2) + 2).permute(2, 0, 1).unsqueeze(0)

    def forward(self, ids: Tensor) -> Tensor:
        x, keep = self.tokens(ids), (ids % 7 != 0)[:, None, None]
        bias = self.make_bias(ids.shape[1]) if self.reentrant is None else None
        for layer in self.layers:
            if self.reentrant is None:
                x = self.block(x, keep, layer, bias)
            else:
                x = torch.utils.checkpoint.checkpoint(self.block, x, keep, layer, None, use_reentrant=self.reentrant)
        return self.head(torch.tanh(x).mean(1))


def scores(h: Tensor) -> Tensor:
    return h @ h.transpose(2, 3)


def softly(scores: Tensor, h: Tensor) -> Tensor:
    return scores.softmax(-1) @ h


def attend(h: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h, h, attn_mask=bias.contiguous(), scale=1.0)


def future(b: Tensor) -> Tensor:
    return torch.ones(b.shape[-2:], dtype=torch.bool).tril()[None, None]


def doubled(b: Tensor) -> Tensor:
    b = b.contiguous()
    b *= 2
    return b


BIASES: dict[str, tuple[Any, str]] = {
    "attention": (lambda m, h, b, keep: attend(h, b), "hooks"),
    "masked": (lambda m, h, b, keep: attend(h, torch.where(keep, b, -9.0)), "hooks"),
    "where_not": (lambda m, h, b, keep: attend(h, torch.where(~keep, -9.0, b)), "hooks"),
    "its_where": (lambda m, h, b, keep: attend(h, b.where(keep, -9.0)), "hooks"),
    "filled": (lambda m, h, b, keep: attend(h, b.masked_fill(~keep, -9.0)), "hooks"),
    "causal": (lambda m, h, b, keep: attend(h, torch.where(future(b), b, -9.0)), "hooks"),
    "mask_added": (lambda m, h, b, keep: attend(h, b + -9.0 * ~keep), "hooks"),
    "added": (lambda m, h, b, keep: softly(scores(h) + b, h), "hooks"),
    "added_in_place": (lambda m, h, b, keep: softly(scores(h).add_(b), h), "hooks"),
    "first_added_in_place": (lambda m, h, b, keep: softly(scores(h).add_(b[0]), h), "other"),
    "subtracted": (lambda m, h, b, keep: softly(scores(h) - b, h), "hooks"),
    "times": (lambda m, h, b, keep: softly(scores(h) * b, h), "hooks"),
    "without_the_first": (lambda m, h, b, keep: softly(scores(h) + b[0], h), "hooks"),
    "function": (lambda m, h, b, keep: softly(scores(h) + 2 * torch.tanh(b).flip(-1), h), "hooks"),
    "twice": (lambda m, h, b, keep: softly((scores(h) + b).tanh() - b[..., :1] * b.mean(), h), "hooks"),
    "detached": (lambda m, h, b, keep: softly(scores(h) + b + b.detach(), h), "hooks"),
    "of_several": (
        lambda m, h, b, keep: attend(h, (b * torch.arange(7.0).view(7, 1, 1, 1).to(b)).mean(0, True)),
        "other",
    ),
    "two_tables": (lambda m, h, b, keep: attend(h, b + m.make_bias(h.shape[2], m.other)), "other"),
    "twice_made": (lambda m, h, b, keep: attend(h, b.sin() + m.make_bias(h.shape[2])), "other"),
    "apart": (lambda m, h, b, keep: softly(scores(h) + b + m.make_bias(h.shape[2], m.other), h), "hooks"),
    "times_parameter": (lambda m, h, b, keep: attend(h, b * m.scale), "other"),
    "joined": (lambda m, h, b, keep: softly(scores(h) + torch.cat([b[:, :2], b[:, 2:]], 1), h), "hooks"),
    "in_pieces": (lambda m, h, b, keep: softly(scores(h) + b.chunk(2, 1)[1].repeat(1, 2, 1, 1), h), "other"),
    "in_place": (lambda m, h, b, keep: softly(scores(h) + doubled(b), h), "other"),
    "changed_later": (lambda m, h, b, keep: (lambda c: softly(scores(h) + c + c.mul_(2), h))(b.sin()), "other"),
    "plus_hidden": (lambda m, h, b, keep: attend(h, torch.maximum(b, scores(h))), "other"),
    "out_of_sight": (lambda m, h, b, keep: attend(h, Negated.apply(b)), "hooks"),
    "no_grad": (lambda m, h, b, keep: attend(h, without_graph(lambda: b * 2) + 0.1 * scores(h)), "hooks"),
    "partly": (lambda m, h, b, keep: attend(h, b + without_graph(lambda: b * 2) * keep), "hooks"),
}


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("case", BIASES)
def test_relative_positions(case: str, layers: int) -> None:
    """As many samples as positions and heads, fewer and more."""
    combine, method = BIASES[case]
    found = against_single_samples(RelativeBias(combine, layers), token_batches((4, 4), (7, 5), (5, 5), (2, 4), (3, 1)))
    assert (found == "hooks") is (method == "hooks")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["attention", "masked", "causal", "added", "twice"])
def test_relative_positions_in_checkpoints(case: str, reentrant: bool) -> None:
    """Each of which makes the bias anew."""
    for layers in (1, 2):
        model = RelativeBias(BIASES[case][0], layers, reentrant)
        assert against_single_samples(model, token_batches((4, 4), (7, 5), (5, 5), (2, 4))) == "hooks"


def test_long_sums_of_relative_positions_in_bf16() -> None:
    """As many ones as there are places of each distance: from 256 on, another one is lost in bf16."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[-1])
            bias = self.table((place - place[:, None]).clamp(-2, 2) + 2)
            return (x * bias.permute(2, 0, 1)[None]).sum((1, 2, 3))[:, None] * 2**-10

    model, n = Counts().bfloat16(), 48
    x = torch.ones(3, 1, n, n, dtype=torch.bfloat16)
    fisher = estimate_fisher(model, [x], "exact", "gaussian")
    counts = torch.tensor([(n - 1) * (n - 2) / 2, n - 1, n, n - 1, (n - 1) * (n - 2) / 2])
    assert fisher.info.method == "hooks"
    torch.testing.assert_close(fisher["table.weight"][:, 0], (counts * 2**-10).square())


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_a_square_of_tokens_is_no_relative_position(size: int) -> None:
    """As many tokens as samples: types of segments, places after padding on the left, one token everywhere."""

    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.types, self.head = nn.Embedding(20, 5), nn.Embedding(9, 5), nn.Linear(5, NUM_CLASSES)

        def forward(self, ids: Tensor, types: Tensor) -> Tensor:
            return self.head(torch.tanh(self.tokens(ids) + self.types(types)).mean(1))

    place = torch.arange(size)
    model = Typed()
    for types in (
        torch.zeros(size, size).long(),
        (place[None] > place[:, None] + 1).long(),
        (place - place[:, None]).abs(),
    ):
        x = (torch.randint(20, (size, size)), types)
        x[0][0, 0], x[0][1, 1] = 3, 4  # or two samples of two tokens each might look like it by chance
        fisher = estimate_fisher(model, [(x, torch.randint(NUM_CLASSES, (size,)))], "empirical")
        assert fisher.info.method == "hooks"


ADDED: dict[str, Any] = {
    "scalar": ((), lambda p, e: p),
    "one": ((1,), lambda p, e: p),
    "one_one": ((1, 1), lambda p, e: p),
    "row": ((1, 4), lambda p, e: p),
    "vector": ((4,), lambda p, e: -p),
    "shared_row": ((4,), lambda p, e: e(torch.arange(1))),
    "shared_vector": ((4,), lambda p, e: e(torch.tensor(2))),
    "last_shared_row": ((4,), lambda p, e: e(torch.tensor([5]))),
}


@pytest.mark.parametrize("case", ADDED)
@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_added_to_one_vector_per_sample(case: str, kind: str) -> None:
    """Whatever is broadcast over the vectors, in one dimension or both."""
    shape, added = ADDED[case]

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, NUM_CLASSES)
            self.shift, self.table = nn.Parameter(torch.randn(shape)), nn.Embedding(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.first(x) + added(self.shift, self.table)))

    model, x, y = Adds().double().eval(), torch.randn(8, 5).double(), torch.randint(NUM_CLASSES, (8,))
    expected = estimate_fisher(model, [(x[i : i + 1], y[i : i + 1]) for i in range(8)], kind)
    found = estimate_fisher(model, [(x, y)], kind)
    assert found.info.method == "hooks"
    for name, f in expected.items():
        torch.testing.assert_close(found[name], f)


def test_sequence_first_embedding_of_one_token() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(20, 5), nn.Linear(5, NUM_CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.tokens(ids.t()).sum(0)))

    for shapes in (((8, 1),), ((8, 5), (8, 1)), ((8, 1), (8, 5))):
        against_single_samples(SequenceFirst(), token_batches(*shapes))


class Ragged(nn.Module):
    """Samples' tokens one after the other, without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layer, self.head = nn.Embedding(20, 5), nn.Linear(5, 5), nn.Linear(5, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1).tolist()
        hidden = self.tokens(ids)
        rows = torch.tanh(self.layer(torch.cat([hidden[i, :n] for i, n in enumerate(lengths)])))
        return self.head(torch.stack([part.sum(0) for part in rows.split(lengths)]))


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
@pytest.mark.parametrize("lengths", [(9, 9, 9, 9, 7, 7, 7, 7), (8, 8, 8, 8, 8, 8, 8, 8), (9, 7, 8, 8, 8, 8, 8, 8)])
def test_samples_of_several_lengths(lengths: tuple[int, ...]) -> None:
    ids = torch.randint(1, 20, (8, 9))
    for i, n in enumerate(lengths):
        ids[i, n:] = 0
    even = torch.randint(1, 20, (8, 8))
    labels = torch.randint(NUM_CLASSES, (8,))
    against_single_samples(Ragged(), [(ids, labels)])
    against_single_samples(Ragged(), [(even, labels), (ids, labels)])


@pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap")
def test_new_use_in_a_checkpoint_is_refused_before_it_is_added_twice() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)

        def block(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return torch.tanh(self.second(hidden @ self.second.weight.t() * 2 if x.shape[1] == 4 else hidden))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True).mean(1))

    labels = torch.randint(NUM_CLASSES, (8,))
    with pytest.raises(RuntimeError, match="in a way that the first batches did not show"):
        estimate_fisher(Changing(), [(torch.randn(8, 5, 6), labels), (torch.randn(8, 4, 6), labels)], "empirical")


class Merging(nn.Linear):
    """An adapter that is merged into the weight in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(6, NUM_CLASSES)
        self.adapter, self.merged = nn.Parameter(torch.randn(NUM_CLASSES, 6)), False
        self.weight.requires_grad_(False)

    def train(self, mode: bool = True) -> "Merging":
        if self.merged == mode:
            self.weight.data += -self.adapter.data if mode else self.adapter.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.adapter.t()


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_act_on_train_and_eval(training: bool) -> None:
    model = nn.Sequential(Merging(), nn.Dropout()).train(training)
    before = model[0].weight.clone()
    estimate_fisher(model, [(torch.randn(4, 6), torch.randint(NUM_CLASSES, (4,)))], "empirical")
    torch.testing.assert_close(model[0].weight, before)
    assert model[0].merged is not training and model.training is training


def test_the_model_is_read_at_every_update() -> None:
    """Weights and buffers that were loaded after the estimator was made."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, NUM_CLASSES))
        model[0].weight.requires_grad_(False)
        model(torch.randn(16, 6) * 3 + 2)
        return model

    batch = (torch.randn(8, 6), torch.randint(NUM_CLASSES, (8,)))
    for assign in (False, True):
        old, new = make(), make()
        estimator = FisherEstimator(old, "empirical")
        old.load_state_dict(new.state_dict(), assign=assign)
        if assign:
            old[0].weight.requires_grad_(False)
        estimator.update(batch)
        expected = estimate_fisher(new, [batch], "empirical")
        assert all(torch.equal(f, expected[name]) for name, f in estimator.result().items())


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model, x = nn.Linear(6, NUM_CLASSES), torch.randn(8, 6)

    def make(**options: Any) -> FisherEstimator:
        estimator = FisherEstimator(model, generator=torch.Generator().manual_seed(1), **options)
        estimator.update(x)
        return estimator

    state, estimator = make().state_dict(), make()
    estimator.update(x[:3])
    before = estimator.result()
    for wrong in (
        {"generator": torch.zeros(5, dtype=torch.uint8)},
        {"counts": [1]},
        {"counts": "text"},
        {"status": [{}]},
        {"sums": {name: total.bfloat16() for name, total in state["sums"].items()}},
        {"sums": {name: total * torch.nan for name, total in state["sums"].items()}},
        {"sums": {"weight": torch.zeros(1)}},
        {"settings": make(num_label_samples=2).state_dict()["settings"]},
    ):
        with pytest.raises((ValueError, RuntimeError)):
            estimator.load_state_dict({**state, **wrong})
        assert all(torch.equal(f, before[name]) for name, f in estimator.result().items())
    with pytest.raises(ValueError, match="ignore_index"):
        FisherEstimator(model, "empirical", nn.CrossEntropyLoss(ignore_index=3)).load_state_dict(
            FisherEstimator(model, "empirical").state_dict()
        )


def test_a_resumed_estimate_takes_the_same_ways() -> None:
    """Equal to the last bit, also where the first batch showed nothing of a layer."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.layer(x) * (x[:, :1] > 5))

    batches = [(torch.randn(8, 5) + shift, torch.randint(NUM_CLASSES, (8,))) for shift in (0, 0, 0, 0, 9, 9)]
    model = Gated()
    assert_resumes(lambda: FisherEstimator(model, "empirical"), batches, cut=4)


def test_inputs_changed_in_place_are_copies() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mul_(2))

    model, x, y = Scales(), torch.randn(8, 6), torch.randint(NUM_CLASSES, (8,))
    kept = x.clone()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    expected = estimate_fisher(model.head, [(2 * x, y)], "empirical")
    for options in ({}, {"loss": loss}):
        found = estimate_fisher(model, [{"x": x, "labels": y}] * 3, "empirical", **options)
        assert torch.equal(x, kept)
        for name, f in expected.items():
            torch.testing.assert_close(found[f"head.{name}"], f)


def test_one_look_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = FisherEstimator._look
    monkeypatch.setattr(FisherEstimator, "_look", lambda self, *args: looks.append(look(self, *args)))

    class Covered(nn.Module):
        def __init__(self, covered: bool) -> None:
            super().__init__()
            self.weight, self.covered = nn.Parameter(torch.randn(NUM_CLASSES, 5)), covered

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) if self.covered else torch.einsum("nd,cd->nc", x, self.weight)

    for covered in (True, False):
        looks.clear()
        against_single_samples(Covered(covered), [(torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0]))] * 5)
        assert len(looks) == 1


def test_gradients_are_freed_though_a_shape_is_read() -> None:
    """Batches of one sample: no more than one of the layers' gradients is there at a time."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64) / 8)

        def forward(self, x: Tensor) -> Tensor:
            assert self.weight.shape == (64, 64) and self.weight.size(0) == 64
            return torch.tanh(x @ self.weight)

    model = nn.Sequential(*(Layer() for _ in range(6)))
    held = []
    accumulate = FisherEstimator._accumulate

    def spy(total: Tensor, gradients: Tensor) -> None:
        held.append(sum(p.grad is not None for p in seen))
        accumulate(total, gradients)

    seen: list[Tensor] = []
    original = estimator_module.Uses.__init__

    def remember(self: Any, leaves: Any) -> None:
        seen[:] = leaves.values()
        original(self, leaves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FisherEstimator, "_accumulate", staticmethod(spy))
        patch.setattr(estimator_module.Uses, "__init__", remember)
        estimate_fisher(model, [(torch.randn(1, 64), torch.tensor([3]))], "empirical")
    assert held == [0] * 6
