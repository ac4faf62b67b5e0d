"""EWC in the real Trainer: its final weights are those of a loop in plain PyTorch that is written here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ewc_fast import EWCSGD, EWCAdamW, EWCBudget, EWCLoss, ForgettingProbe

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ewc_fast.integrations.transformers import EWCCallback, consolidate  # noqa: E402

# Of transformers 4: what it calls in bf16 on a CPU; checkpoints within a second; BERT looks at its mask's values.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]
if transformers.__version__ < "5":
    pytestmark += [pytest.mark.filterwarnings("ignore:BertForSequenceClassification cannot run under torch.vmap")]

LAMBDA, LR, STEPS, TOKENS = 30.0, 0.05, 4, 6


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In transformers 4 a Trainer in bf16 leaves its precision in the environment, to all that come after it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def make_ewc(model: nn.Module, **arguments: Any) -> EWCLoss:
    """A penalty that pulls from the first step on: the anchor lies off the weights."""
    ewc = EWCLoss(model, LAMBDA, **arguments)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ewc.consolidate(
        fisher={n: 0.1 * torch.rand_like(p) for n, p in params.items()},
        anchor={n: p.detach() + 0.05 * torch.randn_like(p) for n, p in params.items()},
    )
    return ewc


def make_data(size: int = 32) -> list[dict[str, Tensor]]:
    """The first label counts in no version of transformers, as it has no prediction."""
    rows = torch.randint(40, (size, TOKENS))
    return [{"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])} for ids in rows]


class Recorder:
    """A collator that keeps what the Trainer has trained on, in its order."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
        self.samples += list(batch["input_ids"])
        return batch


def make_args(folder: Path, **changes: Any) -> TrainingArguments:
    arguments: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
    )
    return TrainingArguments(**{**arguments, **changes})


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Iterable[Tensor],
    ewc: EWCLoss,
    *,
    clip: str = "sum",
    max_norm: float | None = None,
    weight: float = LAMBDA,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Full batches of 4, the penalty's gradient by its formula; returns the penalty at each step."""
    fisher = {n: f.clone() for n, f in ewc.fisher.items()}
    anchor = {n: a.clone() for n, a in ewc.anchor.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    penalties = []
    device = trained[0].device
    scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
    model.train()
    for batch in torch.stack(list(samples)[: 4 * STEPS]).to(device).split(4):
        optimizer.zero_grad()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model(input_ids=batch).logits.float()
        scaler.scale(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())).backward()
        scaler.unscale_(optimizer)
        if clip == "task" and max_norm is not None:
            nn.utils.clip_grad_norm_(trained, max_norm)
        penalty = 0.0
        for n, p in model.named_parameters():
            if n in fisher:
                difference = p.detach() - anchor[n]
                p.grad += weight * fisher[n] * difference
                penalty += weight / 2 * (fisher[n] * difference**2).sum().item()
        penalties.append(penalty)
        if clip == "sum" and max_norm is not None:
            nn.utils.clip_grad_norm_(trained, max_norm)
        scaler.step(optimizer)
        scaler.update()
    return penalties


def assert_same_weights(model: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The Trainer's two groups: it decays no norms and biases."""
    named = list(model.named_parameters())
    free = [p for n, p in named if "norm" in n]
    return [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


# ---- the step ----


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("clip", ["sum", "task"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_equals_a_loop_in_plain_pytorch(tmp_path: Path, accumulation: int, clip: str, optim: str) -> None:
    model = make_model()
    plain, ewc, recorder = copy.deepcopy(model), make_ewc(model), Recorder()
    lr = LR if optim == "sgd" else 1e-3
    args = make_args(
        tmp_path,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        optim=optim,
        learning_rate=lr,
        weight_decay=0.01,
    )
    trainer = Trainer(
        model, args, train_dataset=make_data(), data_collator=recorder, callbacks=[EWCCallback(ewc, clip=clip)]
    )
    trainer.train()
    kind = torch.optim.SGD if optim == "sgd" else torch.optim.AdamW
    penalties = plain_loop(plain, kind(decayed(plain, 0.01), lr=lr), recorder.samples, ewc, clip=clip, max_norm=1.0)
    # Adam's first steps divide by gradients as small as roundings.
    assert_same_weights(model, plain, atol=1e-6 if optim == "sgd" else 2e-5)
    logged = [entry["ewc/penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(penalties, rel=1e-3)
    assert not ewc._is_attached()


@pytest.mark.parametrize("clip", ["sum", "task"])
def test_ewc_adamw_through_optimizer_cls_and_kwargs(tmp_path: Path, clip: str) -> None:
    model = make_model()
    plain, ewc, recorder = copy.deepcopy(model), make_ewc(model), Recorder()
    trainer = Trainer(
        model,
        make_args(tmp_path, max_grad_norm=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        train_dataset=make_data(),
        data_collator=recorder,
        callbacks=[EWCCallback(ewc, clip=clip)],
        optimizer_cls_and_kwargs=(EWCAdamW, {"ewc": ewc, "lr": 1e-3, "eps": 1e-3, "coupling": "coupled"}),
    )
    trainer.train()
    optimizer = torch.optim.AdamW(decayed(plain, 0.0), lr=1e-3, eps=1e-3)
    penalties = plain_loop(plain, optimizer, recorder.samples, ewc, clip=clip, max_norm=0.5)
    assert_same_weights(model, plain)
    assert [e["ewc/penalty"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(penalties, rel=1e-3)


@pytest.mark.parametrize("which", ["attached by the callback", "attached before", "in the optimizer"])
def test_proximal(tmp_path: Path, which: str) -> None:
    model = make_model()
    plain, ewc, recorder = copy.deepcopy(model), make_ewc(model), Recorder()
    callback, optimizer = EWCCallback(ewc), torch.optim.SGD(model.parameters(), lr=LR)
    if which == "attached by the callback":
        callback = EWCCallback(ewc, coupling="proximal")
    elif which == "attached before":
        ewc.attach(optimizer, coupling="proximal")
    else:
        optimizer = EWCSGD(model.parameters(), lr=LR, ewc=ewc, coupling="proximal")
    args = make_args(tmp_path, max_grad_norm=1.0)
    data = dict(train_dataset=make_data(), data_collator=recorder)
    Trainer(model, args, callbacks=[callback], optimizers=(optimizer, None), **data).train()
    assert ewc.is_attached(optimizer) == (which != "attached by the callback")  # what others attached, stays
    reference = torch.optim.SGD(plain.parameters(), lr=LR)
    for batch in torch.stack(recorder.samples[: 4 * STEPS]).split(4):
        reference.zero_grad()
        logits = plain(input_ids=batch).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        with torch.no_grad():
            for n, p in plain.named_parameters():
                c = LR * LAMBDA * ewc.fisher[n]
                p.copy_((p + c * ewc.anchor[n]) / (1 + c))
    assert_same_weights(model, plain)


def test_mixed_precision(tmp_path: Path) -> None:
    model = make_model()
    plain, ewc, recorder = copy.deepcopy(model), make_ewc(model), Recorder()
    probe = ForgettingProbe(model, torch.randint(40, (4, TOKENS)))
    args = make_args(tmp_path, bf16=True, max_grad_norm=1.0)
    callback = EWCCallback(ewc, probe=probe)
    trainer = Trainer(model, args, train_dataset=make_data(), data_collator=recorder, callbacks=[callback])
    trainer.train()
    plain_loop(
        plain, torch.optim.SGD(plain.parameters(), lr=LR), recorder.samples, ewc, max_norm=1.0, autocast=torch.bfloat16
    )
    assert_same_weights(model, plain, atol=1e-4)  # a step is 1e-3 and more; bf16 rounds the activations
    measured = trainer.state.log_history[-2]["ewc/measured_forgetting"]
    probe.model = copy.deepcopy(plain)
    probe.model.load_state_dict(model.state_dict())
    assert measured == probe().item()  # in the precision in which the probe was made


@pytest.mark.gpu
@pytest.mark.parametrize("clip", ["sum", "task"])
def test_fp16_with_a_gradient_scaler(tmp_path: Path, clip: str) -> None:
    model = make_model().cuda()
    plain, ewc, recorder = copy.deepcopy(model), make_ewc(model), Recorder()
    args = make_args(
        tmp_path,
        use_cpu=False,
        fp16=True,
        max_grad_norm=1.0,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    callback = EWCCallback(ewc, clip=clip)
    Trainer(model, args, train_dataset=make_data(), data_collator=recorder, callbacks=[callback]).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cuda")
    plain_loop(plain, optimizer, recorder.samples, ewc, clip=clip, max_norm=1.0, autocast=torch.float16, scaler=scaler)
    assert_same_weights(model, plain, atol=1e-4)  # a step is 1e-3 and more; fp16 rounds the activations


# ---- what is logged ----


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs or {}))


def test_logs_reach_the_history_and_the_reporters(tmp_path: Path) -> None:
    model = make_model()
    ewc, reporter = make_ewc(model), Reporter()
    asked = []
    callback = EWCCallback(ewc, probe=lambda: asked.append(len(asked)) or float(len(asked)), probe_every=2)  # type: ignore[func-returns-value]
    trainer = Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=[reporter, callback])
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == STEPS
    for seen, entry in zip(reporter.seen, entries, strict=False):
        assert {k: v for k, v in entry.items() if k != "step"} == seen
        assert entry["ewc/penalty"] == pytest.approx(LAMBDA * entry["ewc/predicted_forgetting"], rel=1e-5)
        assert all(isinstance(v, float) for k, v in seen.items() if k.startswith("ewc/"))
    assert [e["ewc/measured_forgetting"] for e in entries] == [1.0, 1.0, 2.0, 2.0]
    json.dumps(trainer.state.log_history)


def test_a_budget_sets_lambda(tmp_path: Path) -> None:
    model = make_model()
    ewc = make_ewc(model)
    budget = EWCBudget(ewc, 1e-6, every=1)
    trainer = Trainer(
        model, make_args(tmp_path), train_dataset=make_data(), callbacks=[EWCCallback(ewc, budget=budget)]
    )
    trainer.train()
    assert len(budget.measurements) == STEPS
    logged = [e["ewc/lambda"] for e in trainer.state.log_history if "loss" in e]
    assert logged == [m.ewc_lambda for m in budget.measurements]


# ---- checkpoints ----


@pytest.mark.parametrize("with_budget", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, with_budget: bool) -> None:
    torch.manual_seed(0)
    start, data = make_model(), make_data()
    fisher = {n: torch.rand(p.shape) for n, p in start.named_parameters()}

    def prepare(folder: str, steps: int) -> tuple[Trainer, EWCLoss]:
        model = copy.deepcopy(start)
        ewc = EWCLoss(model, LAMBDA)
        ewc.consolidate(fisher=fisher)
        budget = EWCBudget(ewc, 1e-4, every=2) if with_budget else None
        args = make_args(tmp_path / folder, save_strategy="steps", save_steps=2, optim="adamw_torch", max_steps=steps)
        return Trainer(model, args, train_dataset=data, callbacks=[EWCCallback(ewc, budget=budget)]), ewc

    whole, _ = prepare("whole", 6)
    whole.train()
    first, _ = prepare("parts", 2)
    first.train()
    resumed, ewc = prepare("parts", 6)
    ewc.consolidate(fisher=fisher)  # another state than the file's, which counts
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model, atol=0)
    assert ewc.num_tasks == 1
    for n, p in start.named_parameters():
        assert torch.equal(ewc.anchor[n], p)
    histories = [[e for e in t.state.log_history if "loss" in e] for t in (resumed, whole)]
    keys = ["ewc/penalty", "loss"]
    assert [[e[k] for k in keys] for e in histories[0]] == [[e[k] for k in keys] for e in histories[1]]


def test_a_checkpoint_without_the_budget_is_said(tmp_path: Path) -> None:
    model = make_model()
    ewc = make_ewc(model)
    train(model, EWCCallback(ewc), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    callback = EWCCallback(ewc, budget=EWCBudget(ewc, 1e-4))
    with pytest.warns(UserWarning, match=r"no ewc_budget.json in .*checkpoint-2.* present lambda, 30.0"):
        train(model, callback, tmp_path, resume=str(tmp_path / "checkpoint-2"))


def test_a_sequence_to_sequence_model_is_not_causal() -> None:
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    ids = torch.randint(40, (20,))
    ewc = EWCLoss(model, params=["shared*"])
    consolidate(ewc, [{"input_ids": ids, "labels": ids}], kind="empirical")
    logits = model(input_ids=ids[None], labels=ids[None]).logits[0]
    loss = nn.functional.cross_entropy(logits, ids, reduction="sum")
    (wanted,) = torch.autograd.grad(loss, model.shared.weight)
    torch.testing.assert_close(ewc.fisher["shared.weight"], wanted**2 / 20, rtol=1e-4, atol=1e-7)


def test_rotation_and_the_best_model(tmp_path: Path) -> None:
    model = make_model()
    ewc = make_ewc(model)
    anchor = {n: a.clone() for n, a in ewc.anchor.items()}
    args = make_args(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        learning_rate=5.0,  # the best is an early one
    )
    data = make_data()
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=[EWCCallback(ewc)])
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [best.name]
    loaded = EWCLoss(make_model())
    loaded.load(best / "ewc.safetensors")
    for n, a in anchor.items():
        assert torch.equal(ewc.anchor[n], a) and torch.equal(loaded.anchor[n], a)
    assert not any("ewc/" in key for e in trainer.state.log_history if "eval_loss" in e for key in e)


# ---- the end of a task ----


def test_consolidates_at_the_end(tmp_path: Path) -> None:
    model, data = make_model(), make_data(20)
    ewc = EWCLoss(model, LAMBDA)
    arguments: dict[str, Any] = dict(kind="empirical", num_samples=10, batch_size=4)
    callback = EWCCallback(ewc, consolidate=arguments)
    Trainer(model, make_args(tmp_path), train_dataset=data, callbacks=[callback]).train()
    wanted: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for sample in data[::2]:  # per sequence, evenly spaced over the dataset
        ids = sample["input_ids"][None]
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        for n, g in zip(wanted, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            wanted[n] += g**2 / (10 * (TOKENS - 1))
    for n, p in model.named_parameters():
        torch.testing.assert_close(ewc.fisher[n], wanted[n], rtol=1e-4, atol=1e-8)
        assert torch.equal(ewc.anchor[n], p)
    assert ewc.info is not None and ewc.info["loss"] == "causal_lm" and ewc.info["num_samples"] == 10


def test_consolidating_by_hand_takes_off_the_trainers_autocast(tmp_path: Path) -> None:
    model, data = make_model(), make_data(8)
    args = make_args(tmp_path, bf16=True, max_steps=1)
    Trainer(model, args, train_dataset=data, callbacks=[EWCCallback(make_ewc(model))]).train()
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    ewc, wanted = EWCLoss(nn.DataParallel(model)), EWCLoss(plain)
    for e in (ewc, wanted):
        consolidate(e, data, kind="empirical")
    assert all(torch.equal(f, wanted.fisher[n]) for n, f in ewc.fisher.items())


@pytest.mark.parametrize("remove", [False, True])
def test_the_collator_gets_the_trainers_columns(tmp_path: Path, remove: bool) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(s) == ({"words", "input_ids"} if remove else {"words", "input_ids", "more"}) for s in samples)
        ids = torch.stack([s["words"] for s in samples])
        return {"input_ids": ids, "labels": ids}

    model = make_model()
    data = [{"words": s["input_ids"], "input_ids": 0, "more": 1} for s in make_data(8)]
    ewc = EWCLoss(model)
    args = make_args(tmp_path, remove_unused_columns=remove, label_names=["words"])
    callback = EWCCallback(ewc, consolidate=dict(kind="empirical"))
    Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=[callback]).train()
    plain = EWCLoss(model)
    consolidate(plain, [{"input_ids": s["words"], "labels": s["words"]} for s in data], kind="empirical")
    assert all(torch.equal(f, plain.fisher[n]) for n, f in ewc.fisher.items())
    consolidate(plain, data, collate, columns=["words", "input_ids"] if remove else "all")


def test_a_collator_of_its_own_gets_the_models_arguments(tmp_path: Path) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(s) == {"input_ids", "attention_mask", "labels"} for s in samples)
        return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}

    model, data = make_model(), make_data(8)
    masked = [{**s, "attention_mask": torch.ones(TOKENS, dtype=torch.long), "text": "no argument"} for s in data]
    callback = EWCCallback(EWCLoss(model), consolidate=dict(dataset=masked, collator=collate, kind="empirical"))
    trainer = Trainer(model, make_args(tmp_path, max_steps=1), train_dataset=data, callbacks=[callback])
    trainer._signature_columns = ["input_ids", "labels"]  # as TRL's, whose collator makes the mask
    trainer.train()
    assert callback.ewc.num_tasks == 1


@pytest.mark.parametrize("what", [("position_ids",), ("seq_idx",), ("cu_seq_lens_q",), ()])
def test_packed_rows_are_refused(tmp_path: Path, what: tuple[str, ...]) -> None:
    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        n = len(samples)
        ids = torch.cat([s["input_ids"] for s in samples])[None]
        more = {
            "position_ids": torch.arange(TOKENS).repeat(n)[None],
            "seq_idx": torch.arange(n).repeat_interleave(TOKENS)[None],
            "cu_seq_lens_q": torch.arange(n + 1) * TOKENS,
        }
        return {"input_ids": ids, "labels": ids, **{key: more[key] for key in what}}

    model = make_model()
    ewc = EWCLoss(model)
    before = copy.deepcopy(model.state_dict())
    callback = EWCCallback(ewc, consolidate=dict(kind="empirical"))
    trainer = Trainer(
        model, make_args(tmp_path), train_dataset=make_data(), data_collator=collate, callbacks=[callback]
    )
    with pytest.raises(ValueError, match="packing or padding_free.* a dataset that is not packed"):
        trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    row = {"input_ids": torch.randint(40, (2 * TOKENS,))}  # packed when the dataset was made
    packed = {"position_ids": torch.arange(TOKENS).repeat(2), "seq_idx": torch.arange(2).repeat_interleave(TOKENS)}
    if what and what[0] in packed:
        with pytest.raises(ValueError, match="packing or padding_free"):
            consolidate(ewc, [{**row, what[0]: packed[what[0]]}], columns="all", kind="sampled")
    padded = {"position_ids": torch.tensor([1, 1, 0, 1, 2, 3]), "attention_mask": torch.tensor([0, 0, 1, 1, 1, 1])}
    consolidate(ewc, [{**make_data(1)[0], **padded}], kind="empirical")


def make_classifier(num_labels: int = 3) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("num_labels", "label", "loss"),
    [(1, 0.5, "gaussian"), (3, [1.0, 0.0, 1.0], "binary_cross_entropy"), (3, 2, "cross_entropy")],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_the_loss_is_the_one_that_transformers_infers(num_labels: int, label: Any, loss: str, explicit: bool) -> None:
    model = make_classifier(num_labels)
    data = [{"input_ids": s["input_ids"], "label": label} for s in make_data(4)]
    if explicit:
        batch = {"input_ids": data[0]["input_ids"][None], "labels": torch.tensor([label])}
        model(**batch)  # sets config.problem_type
    ewc = EWCLoss(model)
    consolidate(ewc, data, kind="empirical")
    assert ewc.info is not None and ewc.info["loss"] == loss
    assert model.eval().config.problem_type is None or explicit
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for s in data:
        logits = model(input_ids=s["input_ids"][None]).logits[0]
        losses = {
            "gaussian": lambda x: 0.5 * (x - label).square().sum(),
            "binary_cross_entropy": lambda x: nn.functional.binary_cross_entropy_with_logits(
                x, torch.tensor(label), reduction="sum"
            ),
            "cross_entropy": lambda x: nn.functional.cross_entropy(x, torch.tensor(label)),
        }
        for n, g in zip(wanted, torch.autograd.grad(losses[loss](logits), list(model.parameters())), strict=True):
            wanted[n] += g**2 / len(data)
    for n, f in wanted.items():
        torch.testing.assert_close(ewc.fisher[n], f, rtol=1e-4, atol=1e-8)


def test_a_classifier_and_a_dataset_with_other_columns(tmp_path: Path) -> None:
    model = make_classifier()
    rows = torch.randint(40, (8, TOKENS))
    data = [{"input_ids": ids, "label": i % 3, "text": "not the model's", "idx": i} for i, ids in enumerate(rows)]
    ewc = EWCLoss(model, LAMBDA)
    consolidate(ewc, data, kind="exact")
    assert ewc.info is not None and ewc.info["loss"] == "cross_entropy" and ewc.info["num_samples"] == 8
    consolidate(ewc, iter(data), num_samples=3, kind="empirical")
    assert ewc.info["num_samples"] == 3
    args = make_args(tmp_path, remove_unused_columns=True, max_steps=2)
    unlabelled = [{"input_ids": ids} for ids in rows]
    bad = EWCCallback(ewc, consolidate=dict(dataset=unlabelled, kind="empirical"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="consolidate: the dataset's first samples cannot be used: .*needs labels"):
        Trainer(model, args, train_dataset=data, callbacks=[bad]).train()
    with pytest.raises(ValueError, match="consolidate: the dataset's first samples cannot be used: .*empty"):
        Trainer(model, args, train_dataset=data, callbacks=[EWCCallback(ewc, consolidate=dict(dataset=[]))]).train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    trainer = Trainer(model, args, train_dataset=data, callbacks=[EWCCallback(ewc)])
    trainer.accelerator.clip_grad_norm_ = lambda *args: torch.zeros(())
    with pytest.raises(ValueError, match="something else has replaced accelerator.clip_grad_norm_; take clip='task'"):
        trainer.train()


def test_the_penalty_is_made_from_the_trainers_model(tmp_path: Path) -> None:
    model = make_model()
    callback = EWCCallback(lambda m: make_ewc(m))
    with pytest.raises(RuntimeError, match="made when the Trainer is built"):
        _ = callback.ewc
    trainer = Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=[callback])
    assert callback.ewc.model is model
    trainer.train()
    assert trainer.state.log_history[0]["ewc/penalty"] > 0


def test_the_penalty_follows_the_models_of_model_init(tmp_path: Path) -> None:
    def trainer_of(callback: EWCCallback, **changes: Any) -> Trainer:
        arguments: dict[str, Any] = dict(model_init=make_model, args=make_args(tmp_path, **changes))
        return Trainer(train_dataset=make_data(), data_collator=recorder, callbacks=[callback], **arguments)

    recorder, starts = Recorder(), []

    def make(model: nn.Module) -> EWCLoss:
        starts.append(copy.deepcopy(model))
        return make_ewc(model)

    callback = EWCCallback(make)
    trainer = trainer_of(callback, save_strategy="steps", save_steps=1)
    for _ in range(2):
        recorder.samples.clear()
        trainer.train()
        assert callback.ewc.model is trainer.model
        plain = starts[-1]
        plain_loop(plain, torch.optim.SGD(plain.parameters(), lr=LR), recorder.samples, callback.ewc)
        assert_same_weights(trainer.model, plain)
    assert len(starts) == 3  # with the one of when the Trainer was built
    with pytest.raises(ValueError, match="resume_from_checkpoint: ewc is a function .* a model, not model_init"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"the one that model_init has made: pass a function of the model"):
        trainer_of(EWCCallback(make_ewc(make_model())))


def test_a_trials_checkpoints_hold_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of ``hyperparameter_search``, of which no backend need be installed."""
    model = make_model()
    args = make_args(tmp_path, save_strategy="steps", save_steps=2)
    trainer = Trainer(model, args, train_dataset=make_data(), callbacks=[EWCCallback(make_ewc(model))])
    trials = []

    def folder(trial: Any) -> str:
        trials.append(trial)
        return str(tmp_path / "run-7")

    monkeypatch.setattr(trainer, "_get_output_dir", folder)
    monkeypatch.setattr(trainer, "_hp_search_setup", lambda trial: setattr(trainer, "_trial", "seven"))
    trainer.train()
    assert [p.parent.name for p in sorted(tmp_path.rglob("ewc.safetensors"))] == ["checkpoint-2", "checkpoint-4"]
    assert all((tmp_path / "run-7" / f"checkpoint-{n}" / "ewc.safetensors").exists() for n in (2, 4))
    assert "seven" in trials


def test_batches_in_which_no_label_counts_are_left_out(tmp_path: Path) -> None:
    """As the Trainer trains on them, and by number."""
    model, data = make_model(), make_data(9)
    nothing = {"input_ids": torch.randint(40, (TOKENS,)), "labels": torch.full((TOKENS,), -100)}
    only_first = {**nothing, "labels": torch.tensor([7] + [-100] * (TOKENS - 1))}  # which follows no token
    with_them = [nothing, nothing, *data[:4], nothing, only_first, *data[4:]]
    ewc, wanted = EWCLoss(model, LAMBDA), EWCLoss(model, LAMBDA)
    consolidate(wanted, data, kind="empirical")
    arguments = dict(kind="empirical", batch_size=2)
    callback = EWCCallback(ewc, consolidate=arguments)
    args = make_args(tmp_path, learning_rate=0.0)
    with pytest.warns(UserWarning, match="dataset: 2 of 7 batches were left out, because no label counts in them"):
        Trainer(model, args, train_dataset=with_them, callbacks=[callback]).train()
    assert ewc.info is not None and ewc.info["num_samples"] == 9
    for n, f in wanted.fisher.items():
        torch.testing.assert_close(ewc.fisher[n], f, rtol=1e-4, atol=1e-8)
    for use in (lambda: consolidate(ewc, [nothing] * 3), Trainer(
        model, args, train_dataset=[nothing, only_first], callbacks=[EWCCallback(ewc, consolidate=arguments)]
    ).train):  # fmt: skip
        with pytest.raises(ValueError, match="no label counts in any batch of the dataset"):
            use()
    assert ewc.num_tasks == 1


def test_a_dataset_is_tried_on_what_is_trained_now(tmp_path: Path) -> None:
    model = make_model()
    ewc = EWCLoss(model, LAMBDA)
    model.lm_head.weight.requires_grad_(False)
    args = make_args(tmp_path, max_steps=1)
    Trainer(model, args, train_dataset=make_data(), callbacks=[EWCCallback(ewc, consolidate={})]).train()
    assert ewc.num_tasks == 1 and "lm_head.weight" not in ewc.fisher


class Stream(IterableDataset[dict[str, Tensor]]):
    """Has a length, and no items by number."""

    def __init__(self) -> None:
        self.rows = make_data(5)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


def test_what_is_a_dataset(tmp_path: Path) -> None:
    ewc, data = EWCLoss(make_model(), LAMBDA), make_data(4)
    consolidate(ewc, Stream(), kind="empirical")
    assert ewc.info is not None and ewc.info["num_samples"] == 5
    uneven = [{"input_ids": torch.randint(40, (n,))} for n in (3, 5)]

    def pairs(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([s[key] for s in samples] * 2) for key in ("input_ids", "labels")}

    for dataset, collator, error, message in (
        (DataLoader(data), None, TypeError, r"dataset is a DataLoader: .*ewc.consolidate\(loader\)"),
        ({"train": data, "test": data}, None, TypeError, "dataset is a dict: give one of train, test"),
        (uneven, None, ValueError, "default collator makes no batch of its samples .*give collator= one that pads"),
        (["a text"], None, ValueError, "default collator makes no batch .*samples that are dicts"),
        (data, pairs, ValueError, "the collator makes 8 rows of 4 samples"),
    ):
        with pytest.raises(error, match=message):
            consolidate(ewc, dataset, collator)
    assert ewc.num_tasks == 1


def test_checkpoints_without_an_event_are_said(tmp_path: Path) -> None:
    model = make_model()
    args = make_args(tmp_path, max_steps=1)
    args.enable_jit_checkpoint = True  # an option since transformers 5
    with pytest.warns(UserWarning, match="enable_jit_checkpoint writes a checkpoint without telling callbacks"):
        Trainer(model, args, train_dataset=make_data(), callbacks=[EWCCallback(make_ewc(model))]).train()


# ---- errors, before anything is written ----


def test_bad_arguments() -> None:
    ewc = make_ewc(make_model())
    for arguments, error, message in (
        (dict(ewc=3), TypeError, "ewc must be an EWCLoss, or a function"),
        (dict(ewc=make_model()), TypeError, "ewc must be an EWCLoss, or a function .*got LlamaForCausalLM"),
        (dict(coupling="copled"), ValueError, "coupling must be one of"),
        (dict(clip="both"), ValueError, "clip must be one of sum, task"),
        (dict(probe=3), TypeError, "probe must be callable"),
        (dict(probe_every=0), ValueError, "every must be a positive integer"),
        (dict(budget=EWCBudget(make_ewc(make_model()), 0.1)), ValueError, "its EWCLoss is another one"),
        (dict(budget=EWCBudget(ewc, 0.1, lambda: 0.0), probe=lambda: 0.0), ValueError, "has a probe of its own"),
        (dict(consolidate=make_data()), TypeError, "consolidate must be a dict of arguments"),
        (dict(consolidate=dict(dataset=iter(make_data()))), TypeError, "dataset is an iterator .* give a list"),
    ):
        with pytest.raises(error, match=message):
            EWCCallback(**{"ewc": ewc, **arguments})  # type: ignore[arg-type]


def train(model: nn.Module, callback: EWCCallback, folder: Path, **changes: Any) -> None:
    resume = changes.pop("resume", None)
    optimizers = changes.pop("optimizers", (None, None))
    args = make_args(folder, **changes)
    trainer = Trainer(model, args, train_dataset=make_data(), callbacks=[callback], optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_strategies_that_show_no_gradients(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    names = {"DEEPSPEED": "DeepSpeed updates the weights", "FSDP": "FSDP cuts", "MEGATRON_LM": "MEGATRON_LM: this"}
    model = make_model()
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=names[kind]):
        Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=[EWCCallback(make_ewc(model))])


def test_what_cannot_be_penalised(tmp_path: Path) -> None:
    model = make_model()
    ewc = make_ewc(model)
    other = make_model()
    with pytest.raises(ValueError, match="ewc is of another model than the Trainer's"):
        train(other, EWCCallback(ewc), tmp_path)
    optimizer = EWCAdamW(model.parameters(), ewc=ewc, coupling="proximal")
    with pytest.raises(ValueError, match="coupling='coupled', but the optimizer has this penalty with 'proximal'"):
        train(model, EWCCallback(ewc, coupling="coupled"), tmp_path, optimizers=(optimizer, None))
    part = EWCLoss(model, LAMBDA, params=["lm_head.*"])
    part.consolidate(fisher={"lm_head.weight": torch.ones_like(model.lm_head.weight)})
    elsewhere = torch.optim.SGD(model.model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match="none of the parameters that EWC protects"),
        pytest.raises(ValueError, match=r"none of the protected parameters \(such as lm_head.weight\)"),
    ):
        train(model, EWCCallback(part), tmp_path, optimizers=(elsewhere, None))
    with pytest.warns(UserWarning, match="no task is consolidated yet"):
        train(other, EWCCallback(EWCLoss(other)), tmp_path, max_steps=1)
    with torch.device("meta"):
        empty = make_model()
    callback = EWCCallback(EWCLoss(empty))
    trainer = Trainer(make_model(), make_args(tmp_path), train_dataset=make_data(), callbacks=[callback])
    with pytest.raises(ValueError, match="model.embed_tokens.weight is on the meta device"):
        trainer.train()
    with pytest.raises(RuntimeError, match="was called by no Trainer"):
        callback.on_train_begin(None, None, None)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = make_model()
    without = tmp_path / "checkpoint-1"
    Trainer(
        model, make_args(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=make_data()
    ).train()
    ewc = make_ewc(model)
    anchor = {n: a.clone() for n, a in ewc.anchor.items()}
    with pytest.raises(ValueError, match="no ewc.safetensors in .*checkpoint-1, which was saved without EWCCallback"):
        train(model, EWCCallback(ewc), tmp_path, resume=str(without))
    foreign = make_classifier()
    make_ewc(foreign).save(without / "ewc.safetensors")
    with pytest.raises(ValueError, match="checkpoint-1 does not fit this EWCLoss: .*bert"):
        train(model, EWCCallback(ewc), tmp_path, resume=str(without))
    assert all(torch.equal(ewc.anchor[n], a) for n, a in anchor.items())
    assert not ewc._is_attached()


def test_a_wrapped_model_and_a_second_training(tmp_path: Path) -> None:
    # The penalty of a model that is wrapped twice acts on the model inside, once.
    model = make_model()
    plain, recorder = copy.deepcopy(model), Recorder()
    ewc = EWCLoss(nn.DataParallel(nn.DataParallel(model)), LAMBDA)
    params = {n: p.detach() for n, p in model.named_parameters()}
    ewc.consolidate(
        fisher={n: 0.1 * torch.rand_like(p) for n, p in params.items()},
        anchor={n: p + 0.05 * torch.randn_like(p) for n, p in params.items()},
    )
    trainer = Trainer(
        model,
        make_args(tmp_path, max_grad_norm=1.0),
        train_dataset=make_data(),
        data_collator=recorder,
        callbacks=[EWCCallback(ewc)],
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for _ in range(2):
        recorder.samples.clear()
        trainer.train()
        plain_loop(plain, optimizer, recorder.samples, ewc, max_norm=1.0)
        assert_same_weights(model, plain)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_training_that_breaks_off_leaves_nothing_doubled(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        on = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.on:
                raise KeyboardInterrupt

    model = make_model()
    ewc, recorder, stop = make_ewc(model), Recorder(), Stop()
    trainer = Trainer(
        model,
        make_args(tmp_path),
        train_dataset=make_data(),
        data_collator=recorder,
        callbacks=[EWCCallback(ewc), stop],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stop.on = False
    recorder.samples.clear()
    plain = copy.deepcopy(model)
    trainer.train()
    plain_loop(plain, torch.optim.SGD(plain.parameters(), lr=LR), recorder.samples, ewc)
    assert_same_weights(model, plain)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("error:a parameter is penalised by two")
@pytest.mark.parametrize("same", ["nothing", "optimizer", "trainer"])
@pytest.mark.parametrize("clip", ["sum", "task"])
def test_another_callback_after_a_training_that_broke_off(tmp_path: Path, same: str, clip: str) -> None:
    model = make_model()
    ewc, recorder = make_ewc(model), Recorder()
    args = make_args(tmp_path, max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    arguments: dict[str, Any] = dict(args=args, train_dataset=make_data(), data_collator=recorder)
    arguments["optimizers"] = (None if same == "nothing" else optimizer, None)
    broken = Trainer(model, callbacks=[EWCCallback(ewc), Stop()], **arguments)  # stays, with its optimizer
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    recorder.samples.clear()
    plain, callback = copy.deepcopy(model), EWCCallback(ewc, clip=clip)
    if same == "trainer":
        trainer = broken
        for kind in (EWCCallback, Stop):
            trainer.remove_callback(kind)
        trainer.add_callback(callback)
    else:
        trainer = Trainer(model, callbacks=[callback], **arguments)
    trainer.train()
    plain_loop(plain, torch.optim.SGD(plain.parameters(), lr=LR), recorder.samples, ewc, clip=clip, max_norm=1.0)
    assert_same_weights(model, plain)
    assert not ewc._is_attached() and "clip_grad_norm_" not in vars(trainer.accelerator)


def test_errors_leave_nothing_attached(tmp_path: Path) -> None:
    asked = []

    def fail() -> float:
        asked.append(0)
        if len(asked) == 1:  # the budget's baseline
            return 0.0
        raise OSError("the probe")

    model = make_model()
    ewc = make_ewc(model)
    saved = tmp_path / "checkpoint-1"
    args = make_args(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    Trainer(model, args, train_dataset=make_data(), callbacks=[EWCCallback(ewc)]).train()
    (saved / "ewc.safetensors").unlink()
    (saved / "ewc.safetensors").mkdir()
    cases: list[tuple[list[TrainerCallback], type[Exception], str]] = [
        ([EWCCallback(ewc)], OSError, "ewc.safetensors"),
        ([EWCCallback(ewc, budget=EWCBudget(ewc, 0.1, fail, every=1))], OSError, "the probe"),
        ([EWCCallback(ewc, probe=fail)], OSError, "the probe"),
    ]
    for i, (callbacks, error, message) in enumerate(cases):
        trainer = Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=callbacks)
        with pytest.raises(error, match=message):
            trainer.train(resume_from_checkpoint=None if i else str(saved))
        assert not ewc._is_attached()
        assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_clipping_that_another_library_has_replaced_stays(tmp_path: Path) -> None:
    model = make_model()
    callback = EWCCallback(make_ewc(model), clip="task")
    trainer = Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=[callback])
    clip = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = others = lambda *args, **kwargs: clip(*args, **kwargs)
    trainer.train()
    assert vars(trainer.accelerator)["clip_grad_norm_"] is others


def test_a_penalty_has_one_callback(tmp_path: Path) -> None:
    model = make_model()
    ewc = make_ewc(model)
    callback = EWCCallback(ewc)
    for other in (callback, EWCCallback(ewc, clip="task"), EWCCallback(make_ewc(model), clip="task")):
        with pytest.raises(ValueError, match="callbacks: two of them are an EWCCallback, .* would replace each other"):
            Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=[callback, other])
    trainer = Trainer(model, make_args(tmp_path), train_dataset=make_data(), callbacks=[callback])
    trainer.add_callback(EWCCallback(make_ewc(model), clip="task"))
    with pytest.raises(ValueError, match="callbacks: two of them"):
        trainer.train()
    assert not ewc._is_attached()


def test_imported_lazily_and_a_missing_package_is_named() -> None:
    command = (
        "import sys, ewc_fast; assert not {'transformers', 'accelerate', 'peft', 'trl'} & set(sys.modules); "
        "sys.modules['transformers'] = None; import ewc_fast.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert "EWCCallback needs transformers" in done.stderr and 'pip install --no-build-isolation ".[hf]"' in done.stderr
