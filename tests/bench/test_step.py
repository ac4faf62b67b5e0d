"""The training step: the model's shapes, each variant's gradients and weights in fp64, the results' arithmetic."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ewc_fast import EWCLoss
from ewc_fast.bench import step as bench
from ewc_fast.bench.step import CONFIGS, GPT, PLAIN, VARIANTS, GPTConfig, TrainingStep, measure_steps
from ewc_fast.bench.workloads import WORKLOADS

TINY = GPTConfig("tiny", blocks=1, width=16, heads=2, vocabulary=11, positions=8)
PARAMETERS = 11 * 16 + 8 * 16 + 2 * 32 + 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 64 + 64 + 16 + 32


def tiny(**options):
    return TrainingStep(TINY, batch=2, tokens=8, micro_batches=3, **options)


def formula(training, micro_batches, fisher=None, anchor=None):
    """Gradients of task loss and penalty by autograd in fp64, from a copy of the model."""
    model = GPT(TINY).double()
    model.load_state_dict(training.model.state_dict())
    loss = sum(model(tokens) for tokens in training.micro_batches[:micro_batches]) / micro_batches
    if fisher is not None:
        for name, p in model.named_parameters():
            loss = loss + 100.0 / 2 * (fisher[name].double() * (p - anchor[name].double()) ** 2).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_sizes_are_gpt2s():
    with torch.device("meta"):
        model = GPT(CONFIGS["gpt2_small"])
    params = list(model.parameters())
    small = WORKLOADS["gpt2_small"]
    assert (sum(p.numel() for p in params), len(params)) == (small.numel, small.tensors)
    assert sum(p.numel() for p in GPT(TINY).parameters()) == PARAMETERS


def by_hand(weights, tokens):
    """GPT-2's loss from its definition, position by position, with nothing of the model's code."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length, embedding = tokens.shape[1] - 1, weights["tokens.weight"]
    losses = []
    for sequence in tokens:
        x = embedding[sequence[:-1]] + weights["positions.weight"][:length]
        for block in (f"blocks.{i}" for i in range(TINY.blocks)):
            q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.qkv").split(TINY.width, -1)
            size = TINY.width // TINY.heads
            rows = []
            for t in range(length):
                heads = []
                for h in (slice(start, start + size) for start in range(0, TINY.width, size)):
                    weight = torch.softmax(k[: t + 1, h] @ q[t, h] / size**0.5, 0)
                    heads.append(weight @ v[: t + 1, h])
                rows.append(torch.cat(heads))
            x = x + linear(torch.stack(rows), f"{block}.attention_out")
            inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp_in")
            gelu = inner / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
            x = x + linear(gelu, f"{block}.mlp_out")
        probabilities = torch.softmax(norm(x, "norm") @ embedding.T, -1)
        losses += [-probabilities[t, sequence[t + 1]].log() for t in range(length)]
    return torch.stack(losses).mean()


def test_the_model_is_gpt2():
    model = GPT(TINY).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)  # so that biases and norms do something
    tokens = torch.randint(11, (2, 8))
    loss = model(tokens)
    loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    wanted = by_hand(weights, tokens)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", [v.name for v in VARIANTS.values() if v.optimizer is None])
def test_gradients_are_the_formulas(name, micro_batches, seed):
    training = tiny(dtype=torch.float64, seed=seed)
    variant = VARIANTS[name]
    ewc = training.ewc_bf16_fisher if "bf16" in name else training.ewc
    state = {} if name == PLAIN else {"fisher": dict(ewc.fisher), "anchor": dict(ewc.anchor)}
    wanted = formula(training, micro_batches, **state)
    before = [p.detach().clone() for p in training.params]
    for _ in range(2):  # level 1's buffer is used again
        for g, name_, p in zip(training.gradients(variant, micro_batches), wanted, training.params, strict=True):
            torch.testing.assert_close(g, wanted[name_], rtol=1e-10, atol=1e-14)
            assert p.grad is None
    assert all(torch.equal(p, b) for p, b in zip(training.params, before, strict=True))
    assert [group["lr"] for group in training.optimizer.param_groups] == [bench.LEARNING_RATE]


def test_bf16_fisher_is_rounded_and_the_penalty_is_felt(seed):
    training = tiny(seed=seed)
    fisher, rounded = training.ewc.fisher, training.ewc_bf16_fisher.fisher
    assert all(rounded[n].dtype == torch.bfloat16 and fisher[n].dtype == torch.float32 for n in fisher)
    plain, level2 = (training.gradients(VARIANTS[name]) for name in (PLAIN, "level2"))
    task = torch.cat([g.flatten() for g in plain]).norm()
    added = torch.cat([(b - a).flatten() for a, b in zip(plain, level2, strict=True)]).norm()
    assert 0.01 < added / task < 100


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_adamws(name, micro_batches, seed):
    """From the same weights, fp64: the variant's weights after a step, against AdamW on the formula's gradients."""
    training = tiny(dtype=torch.float64, seed=seed)
    ewc = training.ewc_bf16_fisher if "bf16" in name else training.ewc
    proximal = name.endswith("proximal")
    state = {} if name == PLAIN or proximal else {"fisher": dict(ewc.fisher), "anchor": dict(ewc.anchor)}
    reference = [p.detach().clone().requires_grad_() for p in training.params]
    wanted = formula(training, micro_batches, **state)
    for p, g in zip(reference, wanted.values(), strict=True):
        p.grad = g
    (optimizer := torch.optim.AdamW(reference, lr=bench.LEARNING_RATE, foreach=False)).step()
    if proximal:
        for p, name_ in zip(reference, ewc.fisher, strict=True):
            metric = (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8
            pull = bench.LEARNING_RATE * 100.0 * ewc.fisher[name_]
            p.data = (metric * p.data + pull * ewc.anchor[name_]) / (metric + pull)
    with training.attached(VARIANTS[name]):
        training.step(VARIANTS[name], micro_batches)
    for p, r in zip(training.params, reference, strict=True):
        torch.testing.assert_close(p.detach(), r.detach(), rtol=0, atol=1e-10)  # a step is 1e-6


def test_level2_is_paid_once_and_the_loss_in_every_micro_batch(monkeypatch):
    calls = []
    for method in ("__call__", "_accumulate"):
        real = getattr(EWCLoss, method)
        monkeypatch.setattr(
            EWCLoss, method, lambda *args, real=real, method=method, **kw: (calls.append(method), real(*args, **kw))[1]
        )
    training = tiny()
    for name, wanted in (("level1", ["__call__"] * 3), ("level2", ["_accumulate"]), (PLAIN, [])):
        calls.clear()
        training.gradients(VARIANTS[name], 3)
        assert calls == wanted
        assert not training.ewc.is_attached(training.optimizer)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_check_passes_what_is_right(options, micro_batches, seed):
    training = tiny(seed=seed, **options)
    plain = training.gradients(VARIANTS[PLAIN], micro_batches)
    for variant in VARIANTS.values():
        if variant.name != PLAIN and variant.optimizer is None:
            training.check(variant, plain, micro_batches)


def _wrong_penalty(training):
    return VARIANTS["eager"].penalty(training) * 1.0001


def _forgets_one(training):
    kept = training.params[3].grad.clone()
    VARIANTS["loop"].add_gradient(training)
    training.params[3].grad.copy_(kept)


def _twice(training):
    VARIANTS["loop"].add_gradient(training)
    VARIANTS["loop"].add_gradient(training)


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(VARIANTS["eager"], name="wrong", penalty=_wrong_penalty),
        dataclasses.replace(VARIANTS["loop"], name="wrong", add_gradient=_forgets_one),
        dataclasses.replace(VARIANTS["loop"], name="wrong", add_gradient=_twice),
        dataclasses.replace(VARIANTS[PLAIN], name="wrong"),
        dataclasses.replace(VARIANTS["level2"], name="wrong", add_gradient=VARIANTS["loop"].add_gradient),
    ],
    ids=["factor", "a parameter left out", "twice", "not at all", "two ways at once"],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_check_catches_what_is_wrong(wrong, micro_batches, seed):
    training = tiny(seed=seed)
    plain = training.gradients(VARIANTS[PLAIN], micro_batches)
    with pytest.raises(AssertionError, match="wrong: the gradient of"):
        training.check(wrong, plain, micro_batches)


def test_bytes_that_each_keeps():
    training = tiny()
    kept = {name: training.kept_bytes(variant) / PARAMETERS for name, variant in VARIANTS.items()}
    assert kept == {PLAIN: 0, "eager": 8, "loop": 8, "level1": 12, "level2": 8, "level2_bf16_fisher": 6,
                    "level3": 8, "level3_proximal": 8}  # fmt: skip


def test_seed_leaves_the_generator_alone(seed):
    state = torch.get_rng_state()
    first, same, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.params, same.params, strict=True))
    assert torch.equal(first.micro_batches, same.micro_batches)
    assert not torch.equal(first.params[0], other.params[0])


# ---- results ----


@pytest.fixture(scope="module")
def results():
    return measure_steps(TINY, batch=2, tokens=8, rounds=3, accumulation=(1, 2))


def test_a_result_per_variant_and_accumulation(results):
    assert json.loads(json.dumps(results)) == results
    assert [(r["micro_batches"], r["variant"]) for r in results] == [(n, v) for n in (1, 2) for v in VARIANTS]
    for r in results:
        assert (r["config"], r["parameters"], r["device"], r["dtype"]) == ("tiny", PARAMETERS, "cpu", "float32")
        assert (r["batch"], r["tokens"], r["rounds"], r["autocast"]) == (2, 8, 3, None)
        assert 0 < r["p10_ms"] <= r["median_ms"] <= r["p90_ms"]
        assert (r["ewc_ms"] is None) == (r["variant"] == PLAIN)


def test_peak_memory_holds_gradients_and_eagers_temporaries(results):
    peaks = {r["variant"]: r["peak_bytes"] for r in results if r["micro_batches"] == 1}
    assert peaks[PLAIN] >= 4 * PARAMETERS
    assert peaks["eager"] >= peaks[PLAIN] + 4 * PARAMETERS - 4096  # the drift, kept for the backward
    assert peaks["level2"] <= peaks[PLAIN] + 4096


def test_what_ewc_adds_is_taken_within_rounds():
    times = {PLAIN: [10.0, 100.0, 20.0], "other": [11.0, 104.0, 22.0]}
    found = bench.summarise("other", times)
    assert (found["median_ms"], found["ewc_ms"], found["ewc_percent"]) == (22.0, 2.0, 10.0)
    assert found["ewc_ms_p10"] == pytest.approx(1.2)
    assert found["ewc_ms_p90"] == pytest.approx(3.6)
    assert found["ewc_percent_p90"] == pytest.approx(18.0)
    assert found["p10_ms"] == pytest.approx(13.2)
    plain = bench.summarise(PLAIN, times)
    assert plain["median_ms"] == 20.0
    assert all(value is None for key, value in plain.items() if key.startswith("ewc_"))


def test_plain_is_always_measured():
    assert [v.name for v in bench.find(["level2"])] == [PLAIN, "level2"]
    found = measure_steps(TINY, batch=1, tokens=4, rounds=1, variants=["level2"], accumulation=[1])
    assert [r["variant"] for r in found] == [PLAIN, "level2"]


def test_a_wrong_variant_is_not_timed(monkeypatch):
    monkeypatch.setitem(VARIANTS, "eager", dataclasses.replace(VARIANTS["eager"], penalty=_wrong_penalty_of_loop))
    with pytest.raises(AssertionError, match="eager: the gradient of"):
        measure_steps(TINY, batch=1, tokens=4, rounds=1, variants=["eager"], accumulation=[1])


def _wrong_penalty_of_loop(training):
    return sum((f * (p - a)).sum() for p, f, a in training.state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"config": "gpt5"}, "no model gpt5; there are gpt2_mini, gpt2_small"),
        ({"tokens": 9}, "tokens must be 1 to 8"),
        ({"tokens": 0}, "tokens must be 1 to 8"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"accumulation": [2, 0]}, "accumulation must be at least 1"),
        ({"accumulation": []}, "accumulation must be at least 1"),
        ({"variants": ["level2", "level7"]}, "no variant level7; there are plain, eager"),
    ],
)
def test_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        measure_steps(**{"config": TINY, "tokens": 8, **wrong})


def test_tables(results):
    rows = [dict(r, median_ms=200.0, p10_ms=190.0, p90_ms=212.34) for r in results]
    rows[1].update(ewc_ms=24.0, ewc_percent=12.04, ewc_percent_p10=-1.0, ewc_percent_p90=15.0, peak_bytes=3 << 20)
    text = bench.table(rows)
    lines = text.splitlines()
    assert lines[0] == f"tiny, {PARAMETERS:,} float32 parameters, cpu, 2 x 8 tokens, 3 rounds"
    for found in ("eager", "200.0", "190.0 to 212.3", "24.0", "12.0%", "-1.0 to 15.0%", "3.0 MiB"):
        assert found in lines[3]
    assert "%" not in lines[2]
    assert f"tiny, {PARAMETERS:,} float32 parameters, cpu, 2 micro-batches of 2 x 8 tokens, 3 rounds" in lines
    assert len(lines) == 2 * (2 + len(VARIANTS)) + 1
    under = [dict(rows[0], autocast="bfloat16")]
    assert "float32 under bfloat16 autocast parameters" in bench.table(under)

    readme = bench.markdown(rows)
    blocks = readme.split("\n\n")
    assert len(blocks) == 4 and blocks[0] == lines[0] + ":"
    assert blocks[1].splitlines()[0].startswith("|  | ms per step |")
    assert "| 24.0 | 12.0% |" in blocks[1]
    assert all(line.count("|") == blocks[1].splitlines()[0].count("|") for line in blocks[1].splitlines())


@pytest.mark.gpu
def test_on_a_gpu(seed):
    found = measure_steps(TINY, "cuda", 2, 8, rounds=2, autocast=torch.bfloat16, seed=seed)
    assert {r["device"] for r in found} == {"cuda"}
    assert all(r["median_ms"] > 0 for r in found)
