"""Language models of the transformers library, padded in every way, against the brute force; the token as the unit."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_fast import EWCLoss, ForgettingProbe, sample_sequences
from ewc_fast.fisher import FisherEstimator, estimate_fisher
from tests.fisher import brute_force
from tests.fisher.brute_force import assert_fisher, one_thread  # noqa: F401
from tests.fisher.resuming import assert_resumes

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, WIDTH = 11, 5, 8
MIXED = 1e-5  # of models in fp64 that still normalise in fp32
KINDS = ["sampled", "empirical", "predicted", "reversed", "batch"]

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning")


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def shaken(model: nn.Module) -> nn.Module:
    """Initial weights are so small that a language model's gradients differ by little."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**DECODER, max_position_embeddings=16, attention_dropout=0.3, **options)
    return shaken(transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return shaken(transformers.GPT2LMHeadModel(config))


def t5(**options: Any) -> nn.Module:
    """In fp64: in fp32 a plain loop, too, is off by more than 2e-4 with one seed in some hundreds."""
    shape = {"d_model": WIDTH, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
        feed_forward_proj="gated-gelu",
        **{**shape, **options},
    )
    return shaken(transformers.T5ForConditionalGeneration(config)).double()


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
        decoder_start_token_id=0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    return shaken(transformers.BartForConditionalGeneration(config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
    )
    return shaken(transformers.BertForTokenClassification(config))


def ids(size: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (size, LENGTH))


def mask(size: int, left: bool) -> Tensor:
    """Two tokens or more of each sequence, all of the first."""
    tokens = torch.cat([torch.tensor([LENGTH]), torch.randint(2, LENGTH + 1, (size - 1,))])
    kept = (torch.arange(LENGTH) < tokens[:, None]).long()
    return kept.flip(1) if left else kept


def padded(size: int, left: bool = False) -> dict[str, Tensor]:
    kept = mask(size, left)
    return {"input_ids": ids(size) * kept, "attention_mask": kept}


def labelled(size: int) -> dict[str, Tensor]:
    """The prompt does not count, nor does padding, which only the mask tells of."""
    batch = padded(size)
    labels = batch["input_ids"].clone()
    labels[:, :2] = -100
    labels[-1, 3:] = -100
    labels[0, -1] = 3
    return {**batch, "labels": labels}


BATCHES: dict[str, Callable[[int], Any]] = {
    "ids": ids,
    "dict_of_ids": lambda size: {"input_ids": ids(size)},
    "padded_right": padded,
    "padded_left": lambda size: padded(size, left=True),
    "labelled": labelled,
    "pair": lambda size: (lambda b: ({k: b[k] for k in ("input_ids", "attention_mask")}, b["labels"]))(labelled(size)),
}


def compare(
    model: nn.Module,
    batches: list[Any],
    kind: str,
    loss: str = "causal_lm",
    given: list[Any] | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Any:
    """``given``: what the package gets, if not the same as the brute force."""
    seed = int(torch.randint(2**31, ()))
    options["num_label_samples"] = 2 if kind == "sampled" else 1
    generator = torch.Generator().manual_seed(seed)
    expected = brute_force.expected(model, batches, kind, loss, generator=generator, **options)
    again = torch.Generator().manual_seed(seed)
    actual = estimate_fisher(model, given or batches, kind=kind, loss=loss, generator=again, **options)
    assert_fisher(actual, expected, tolerance)
    assert torch.equal(generator.get_state(), again.get_state())
    return actual


def counted(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch[:, 1:].numel()
    inputs, labels = batch if isinstance(batch, tuple) else (batch, batch.get("labels"))
    seen = torch.ones_like(inputs["input_ids"]) if "attention_mask" not in inputs else inputs["attention_mask"]
    kept = seen[:, 1:] * seen[:, :-1] != 0
    return int((kept if labels is None else kept & (labels[:, 1:] != -100)).sum())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_llama(kind: str, batch: str) -> None:
    batches = [BATCHES[batch](size) for size in (4, 3, 1)]
    info = compare(llama(), batches, kind).info
    assert (info.loss, info.unit, info.num_samples) == ("causal_lm", "token", 8)
    assert info.num_terms == sum(map(counted, batches))


def gemma() -> nn.Module:
    """Its norms multiply by ``1 + weight``."""
    return shaken(transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, head_dim=4)))


def ia3() -> nn.Module:
    """Scales of shape (1, width) and (width, 1), flattened at each use; the rest is frozen."""
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    return shaken(peft.get_peft_model(llama(), config))


@pytest.mark.parametrize("make", [gemma, ia3])
@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_what_norms_and_adapters_make_of_their_parameters_has_rules(kind: str, make: Callable[[], nn.Module]) -> None:
    assert compare(make().double(), [padded(size) for size in (4, 3, 1)], kind, tolerance=MIXED).info.method == "hooks"


# Not the Llama: in fp64 it still normalises in fp32.
@pytest.mark.parametrize("batch", ["ids", "padded_left", "labelled"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpt2_in_fp64(kind: str, batch: str) -> None:
    """Tied embedding and head, fused projections in transposed layout, positions of a batch of one."""
    model = gpt2().double()
    assert model.transformer.wte.weight is model.lm_head.weight
    compare(model, [BATCHES[batch](size) for size in (4, 3, 1)], kind)


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_llama_variants(options: dict[str, bool]) -> None:
    compare(llama(**options), [padded(4), padded(2)], "empirical")


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical", "batch"])
def test_every_second_parameter_frozen(kind: str) -> None:
    model = llama()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    compare(model, [padded(3), padded(1)], kind)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_exact(make: Callable[[], nn.Module]) -> None:
    """Token by token; a gradient of a whole sequence per class would add products of different tokens."""
    compare(make(), [padded(3, left=True), labelled(2)], "exact")


def test_exact_of_too_many() -> None:
    model = nn.Sequential(nn.Embedding(600, 4), nn.Linear(4, 600))
    with pytest.raises(ValueError, match="5391 backward passes.*9 positions of 600 classes.*'sampled'"):
        estimate_fisher(model, [torch.randint(600, (2, 10))], kind="exact", loss="causal_lm")


def test_sampled_is_exact_in_expectation() -> None:
    model, batch = gpt2().double(), padded(2)
    exact = torch.cat([f.flatten() for f in estimate_fisher(model, [batch], kind="exact", loss="causal_lm").values()])
    draws = torch.stack(
        [
            torch.cat(
                [f.flatten() for f in estimate_fisher(model, [batch], loss="causal_lm", num_label_samples=8).values()]
            )
            for _ in range(60)
        ]
    )
    # The trace, and ten parts of it: single entries have tails too heavy for 60 means.
    sums = torch.cat([draws.sum(1, keepdim=True), torch.stack([d.sum(1) for d in draws.chunk(10, 1)], 1)], 1)
    wanted = torch.cat([exact.sum()[None], torch.stack([e.sum() for e in exact.chunk(10)])])
    assert ((sums.mean(0) - wanted).abs() <= 5 * sums.std(0) / 60**0.5).all()


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_padding_has_no_influence(kind: str) -> None:
    """The same sequences with and without padding; what stands in the padding does not matter."""
    model = gpt2().double()
    tokens = ids(3)
    padding = torch.randint(VOCABULARY, (3, 3))
    wide = {
        "input_ids": torch.cat([tokens, padding], 1),
        "attention_mask": torch.cat([torch.ones_like(tokens), torch.zeros_like(padding)], 1),
    }
    results = [
        estimate_fisher(model, [b], kind=kind, loss="causal_lm", generator=torch.Generator().manual_seed(1))
        for b in (tokens, wide)
    ]
    assert_fisher(results[1], {name: f for name, f in results[0].items()})
    assert results[0].info.num_terms == results[1].info.num_terms == 12


def test_unit_is_the_token() -> None:
    """Equal tokens, independent of each other: a token's Fisher does not depend on the sequence's length, but for the
    cross terms, which vanish in the exact one."""

    class Unigrams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.randn(VOCABULARY).double())

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.logits.expand(*input_ids.shape, -1)

    model = Unigrams()
    p = model.logits.softmax(-1).detach()
    for length in (2, 7):
        batches = [torch.randint(VOCABULARY, (size, length)) for size in (3, 2)]
        actual = estimate_fisher(model, batches, kind="exact", loss="causal_lm")
        torch.testing.assert_close(actual["logits"], p * (1 - p))


class Wrapped(Mapping[str, Tensor]):
    """A mapping that is no dict, as tokenizers return."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values_by_name = values

    def __getitem__(self, key: str) -> Tensor:
        return self.values_by_name[key]

    def __iter__(self) -> Any:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


@pytest.mark.parametrize("wrap", [Wrapped, lambda b: transformers.BatchEncoding(b)], ids=["mapping", "batch_encoding"])
def test_mappings_that_are_no_dicts(wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    model, batches = gpt2().double(), [labelled(3), labelled(2)]
    compare(model, batches, "empirical", given=[wrap(b) for b in batches])


def test_num_samples_cuts_a_batch() -> None:
    model, batches = gpt2().double(), [labelled(3), labelled(3)]
    expected = brute_force.fisher(model, [batches[0], {k: v[:1] for k, v in batches[1].items()}], loss="causal_lm")
    actual = estimate_fisher(model, batches, kind="empirical", loss="causal_lm", num_samples=4)
    assert_fisher(actual, expected)


def test_logits_transform() -> None:
    compare(gpt2().double(), [padded(3), padded(1)], "sampled", logits_transform=lambda z: 3 * torch.tanh(z / 3))


def test_lengths_may_differ_between_batches() -> None:
    """As many tokens as samples, fewer and more."""
    batches = [torch.randint(VOCABULARY, (n, t)) for n, t in ((4, 4), (3, 6), (5, 2), (2, 2))]
    compare(gpt2().double(), batches, "empirical")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    """Switched on in the model, which leaves it off in evaluation mode."""
    model, batches = llama(), [padded(4), padded(2)]
    expected = brute_force.fisher(model, batches, loss="causal_lm")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_fisher(estimate_fisher(model, batches, kind="empirical", loss="causal_lm"), expected)
    assert model.training


def test_resumed_estimate_is_the_same_bit_for_bit() -> None:
    model, batches = llama(), [padded(3), padded(4), padded(1), labelled(4)]

    def estimator() -> FisherEstimator:
        return FisherEstimator(model, "sampled", "causal_lm", torch.Generator().manual_seed(3), num_label_samples=2)

    assert_resumes(estimator, batches, cut=2)


# ---- encoders and decoders ----

sequence_to_sequence = pytest.mark.parametrize(("make", "tolerance"), [(t5, MIXED), (bart, None)], ids=["t5", "bart"])


def shifted(labels: Tensor) -> Tensor:
    """What a decoder is given: a start token, and the labels one step later."""
    start = torch.zeros(len(labels), 1, dtype=torch.long)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], 1)


def sequence_pair(size: int) -> dict[str, Tensor]:
    labels = torch.randint(1, VOCABULARY, (size, 4))
    labels[0, 2:] = -100
    return {**padded(size), "labels": labels, "decoder_input_ids": shifted(labels)}


@pytest.mark.parametrize("kind", KINDS)
@sequence_to_sequence
def test_sequence_to_sequence(make: Callable[[], nn.Module], tolerance: float | None, kind: str) -> None:
    batches = [sequence_pair(size) for size in (4, 3, 1)]
    info = compare(make(), batches, kind, "cross_entropy", tolerance=tolerance).info
    assert (info.unit, info.num_terms) == ("label", sum(int((b["labels"] != -100).sum()) for b in batches))


def relative_batch(size: int, masked: bool = True, length: int = 4) -> dict[str, Tensor]:
    """``length``: of the decoder."""
    labels = torch.randint(1, VOCABULARY, (size, length))
    labels[0, 2:] = -100
    batch = {**padded(size), "labels": labels, "decoder_input_ids": shifted(labels)}
    if masked:
        batch["decoder_attention_mask"] = torch.ones_like(labels)
        batch["decoder_attention_mask"][-1, length - 1 :] = 0
    else:
        del batch["attention_mask"]
    return batch


@pytest.mark.filterwarnings("error:.*cannot run")
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_relative_positions(kind: str, attention: str, masked: bool) -> None:
    """Tables that samples and layers share; as many samples as the encoder has positions, the decoder, and others."""
    batches = [relative_batch(size, masked) for size in (4, LENGTH, 7, 2, 1)]
    model = t5(num_layers=2, attn_implementation=attention)
    fisher = compare(model, batches, kind, "cross_entropy", tolerance=MIXED)
    assert fisher.info.method == ("batch" if kind == "batch" else "hooks")


@pytest.mark.filterwarnings("error:.*cannot run")
@pytest.mark.parametrize("shape", [{"num_heads": 4}, {"num_heads": 1}, {"relative_attention_num_buckets": 4}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_relative_positions_of_other_shapes(attention: str, shape: dict[str, int]) -> None:
    """As many heads as samples, one head, several positions in a bucket; a decoder of one to two tokens."""
    model = t5(num_layers=3, num_decoder_layers=1, attn_implementation=attention, **shape)
    batches = [
        relative_batch(size, masked, length) for size, masked, length in ((4, True, 4), (4, False, 2), (2, True, 2))
    ]
    assert compare(model, batches, "empirical", "cross_entropy", tolerance=MIXED).info.method == "hooks"
    batches[0] = relative_batch(4, True, length=1)  # to which every position is the same: no gradient
    compare(model, batches[::-1], "empirical", "cross_entropy", tolerance=MIXED)


@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_decoder_is_not_causal(make: Callable[[], nn.Module]) -> None:
    model = make()
    tokens = torch.randint(1, VOCABULARY, (2, 6))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    with pytest.raises(ValueError, match=f"loss='causal_lm' shifts the labels by one, which {type(model).__name__}"):
        estimate_fisher(model, [batch], loss="causal_lm")
    for samples in ({"input_ids": tokens, "decoder_input_ids": tokens}, tokens):
        with pytest.raises(
            ValueError, match=f"causal language model.*and {type(model).__name__} is an encoder-decoder"
        ):
            ForgettingProbe(model, samples)
    with pytest.raises(ValueError, match="causal language model"):
        sample_sequences(model, 2, 4)


def test_what_gives_each_token_a_label_of_its_own_is_not_causal() -> None:
    model, tokens = bert(), ids(3)
    for samples in (tokens, {"input_ids": tokens, "labels": tokens % 3}):
        with pytest.raises(ValueError, match="a probe takes a causal.*BertForTokenClassification .*label of its own"):
            ForgettingProbe(model, samples)
    with pytest.raises(ValueError, match="sample_sequences takes a causal language model, and BertForToken"):
        sample_sequences(model, 2, 4)


def packed(*lengths: int) -> dict[str, Tensor]:
    """A row of documents, as transformers' DataCollatorWithFlattening makes it."""
    documents = [torch.randint(1, VOCABULARY, (length,)) for length in lengths]
    labels = torch.cat([torch.cat([torch.tensor([-100]), d[1:]]) for d in documents])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": torch.cat(documents)[None], "labels": labels[None], "position_ids": positions[None]}


@pytest.mark.parametrize("kind", ["empirical", "sampled", "batch"])
def test_packed_rows_are_refused(kind: str) -> None:
    """The gradients of a row's documents cannot be told apart."""
    model = llama()
    one, two = packed(6), packed(3, 4)
    del two["position_ids"]
    for batch in (
        packed(3, 4),
        {key: torch.cat([a, b]) for (key, a), b in zip(packed(8).items(), packed(5, 3).values(), strict=True)},
        {**one, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
        {**one, "cu_seq_lens_q": torch.tensor([0, 3, 6])},
    ):
        with pytest.raises(ValueError, match="batch 0: .*several documents .*a row of its own"):
            estimate_fisher(Ignoring(model), [batch], kind, "causal_lm")
    # Padding, whatever its positions.
    left = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]), "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]])}
    right = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 0]]), "labels": torch.tensor([[1, 2, 3, 4, -100, -100]])}
    blind = {"position_ids": left["position_ids"], "labels": torch.tensor([[-100, -100, 1, 2, 3, 4]])}
    tail = {"seq_idx": torch.tensor([[0, 0, 0, 0, -1, -1]])}
    one_document = {"cu_seq_lens_q": torch.tensor([0, 6])}, {"seq_idx": torch.zeros(1, 6).long()}
    for more in ({}, left, right, blind, tail, *one_document):
        estimate_fisher(Ignoring(model), [{**one, **more}], kind, "causal_lm")


class Ignoring(nn.Module):
    """A model that is given more than it takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, seq_idx: Any = None, cu_seq_lens_q: Any = None, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_positions_before_the_tokens() -> None:
    """As prompt tuning puts them."""

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, input_ids: Tensor) -> Tensor:
            prompt = input_ids.new_ones(len(input_ids), 3)
            return self.model(torch.cat([prompt, input_ids], 1)).logits

    model, tokens = Prompted(), ids(2)
    with pytest.raises(ValueError, match=r"prompt tuning\): logits_transform=lambda z: z\[:, 3:\]"):
        estimate_fisher(model, [{"input_ids": tokens}], "empirical", "causal_lm")
    estimate_fisher(model, [{"input_ids": tokens}], "empirical", "causal_lm", logits_transform=lambda z: z[:, 3:])


def test_an_encoder_decoder_may_be_a_classifier() -> None:
    config = bart().config
    config.num_labels = 3
    model = transformers.BartForSequenceClassification(config)
    tokens = torch.randint(3, VOCABULARY, (4, 6))
    tokens[:, -1] = config.eos_token_id
    assert ForgettingProbe(model, {"input_ids": tokens})() == 0


@sequence_to_sequence
def test_decoder_inputs_from_labels(make: Callable[[], nn.Module], tolerance: float | None) -> None:
    """As a data collator gives them: the model makes its decoder's inputs from the labels."""
    batches = [sequence_pair(size) for size in (3, 1)]
    given = [{k: v for k, v in b.items() if k != "decoder_input_ids"} for b in batches]
    compare(make(), batches, "empirical", "cross_entropy", given=given, tolerance=tolerance)


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical", "batch"])
def test_token_classification(kind: str) -> None:
    def batch(size: int) -> dict[str, Tensor]:
        labels = torch.randint(3, (size, LENGTH))
        labels[0, 1:3] = -100
        return {**padded(size), "labels": labels, "token_type_ids": torch.randint(2, (size, LENGTH))}

    info = compare(bert(), [batch(4), batch(1)], kind, "cross_entropy").info
    assert info.unit == "label"


class MeanPooled(nn.Module):
    """BERT, whose pooler runs and is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = transformers.BertModel(bert().config)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.encoder(**inputs).last_hidden_state.mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_unused_pooler(kind: str) -> None:
    batches = [{**padded(size), "labels": torch.randint(3, (size,))} for size in (4, 5)]
    fisher = compare(MeanPooled(), batches, kind, "cross_entropy")  # a warning would be an error
    assert fisher.info.method == ("batch" if kind == "batch" else "hooks")
    assert not fisher["encoder.pooler.dense.weight"].any()


# ---- refused ----


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_cross_entropy_of_a_causal_model_is_refused(kind: str, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="batch 0: .*'cross_entropy'.*causal.*use loss='causal_lm'"):
        estimate_fisher(make(), [labelled(3)], kind=kind)


def test_cross_entropy_on_the_inputs_is_refused() -> None:
    """Of a model whose name tells nothing."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids))

    tokens = ids(3)
    with pytest.raises(ValueError, match="use loss='causal_lm'"):
        estimate_fisher(Plain(), [{"input_ids": tokens, "labels": tokens.clone()}], kind="empirical")


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_counts(kind: str) -> None:
    batch = {**padded(3), "labels": torch.full((3, LENGTH), -100)}
    with pytest.raises(ValueError, match="no label counts|no token counts"):
        estimate_fisher(gpt2(), [batch], kind=kind, loss="causal_lm")


def test_batch_in_which_no_token_counts() -> None:
    empty = {**padded(3), "labels": torch.full((3, LENGTH), -100)}
    with pytest.raises(ValueError, match="batch 1: no label counts"):
        estimate_fisher(gpt2(), [labelled(3), empty], kind="empirical", loss="causal_lm")


def test_padding_on_either_side_is_no_padding() -> None:
    """Positions are relative in a Llama; the first token after padding on the left is predicted from nothing."""
    model, ids = llama().double(), torch.randint(VOCABULARY, (2, LENGTH))
    expected = estimate_fisher(model, [{"input_ids": ids}], kind="empirical", loss="causal_lm")
    for pads in ((3, 0), (0, 3), (2, 1)):
        batch = {
            "input_ids": F.pad(ids, pads, value=1),
            "attention_mask": F.pad(torch.ones_like(ids), pads),
        }
        actual = estimate_fisher(model, [batch], kind="empirical", loss="causal_lm")
        assert actual.info.num_terms == expected.info.num_terms == 2 * (LENGTH - 1)
        assert_fisher(actual, dict(expected), 1e-4)  # some of its arithmetic is fp32


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(2, 1, dtype=torch.long)}, "two tokens or more"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.full((2, 4), VOCABULARY)}, "out of range"),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)},
            "labels must",
        ),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 4)}, "integers"),
    ],
)
def test_bad_batches(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"batch 0: .*{message}"):
        estimate_fisher(gpt2(), [batch], kind="empirical", loss="causal_lm")


def test_nan_names_the_layer() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"batch 0: .*not finite.*model\.layers\.1\.mlp\.up_proj"):
        estimate_fisher(model, [padded(3)], kind="empirical", loss="causal_lm")


def test_nan_in_padding_does_not_matter() -> None:
    """Nothing there counts."""

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = self.head(self.embedding(input_ids))
            return torch.where(attention_mask[..., None] != 0, logits, torch.nan)

    batch = padded(3)
    expected = brute_force.fisher(Leaky().double(), [batch], loss="causal_lm")
    assert all(f.isfinite().all() for f in expected.values())
    model = Leaky().double()
    compare(model, [batch], "empirical")


def as_lists(row: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value.tolist() for key, value in row.items()}


@pytest.mark.parametrize("make", [dict, as_lists], ids=["tensors", "lists"])
def test_rows_of_a_dataset_are_refused(make: Any) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embedding(input_ids)

    model = Reader()
    tokens = torch.randint(VOCABULARY, (5,))
    rows = [make({"input_ids": tokens, "labels": tokens.clone()}) for _ in range(2)]
    refused = r"input_ids is one-dimensional: these are rows of a dataset: use .*consolidate, or stack them into batche"
    for loader in (rows, [rows]):  # a loader that stacks nothing
        with pytest.raises(ValueError, match=f"batch 0: {refused}"):
            estimate_fisher(model, loader, "empirical", "causal_lm")
        with pytest.raises(ValueError, match=f"batch 0: {refused}"):
            EWCLoss(model).consolidate(loader, kind="batch")
        with pytest.raises(ValueError, match=f"batch 0 of the samples: {refused}"):
            ForgettingProbe(model, loader)
    with pytest.raises(ValueError, match=refused):
        ForgettingProbe(model, rows[0])
    with pytest.raises(ValueError, match=refused):
        estimate_fisher(model, [(rows[0], tokens)], "empirical")
