"""Whole architectures against a loop over samples in fp64: the empirical Fisher, in the unit of its loss."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast.fisher import FisherEstimator, estimate_fisher

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
    labels, mask = batch["labels"][0, 1:], batch["attention_mask"][0, 1:]
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
    counted = sum(int(((b["labels"] != -100) & (b["attention_mask"] != 0))[:, 1:].sum()) for b in data)
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
