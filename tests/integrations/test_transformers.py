"""EWC in the real Trainer: its final weights are those of a loop in plain PyTorch that is written here."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCSGD, EWCAdamW, EWCBudget, EWCLoss, ForgettingProbe

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ewc_fast.integrations.transformers import EWCCallback, consolidate  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]

LAMBDA, LR, STEPS, TOKENS = 30.0, 0.05, 4, 6


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
        fisher={n: 0.1 * torch.rand(p.shape) for n, p in params.items()},
        anchor={n: p.detach() + 0.05 * torch.randn(p.shape) for n, p in params.items()},
    )
    return ewc


def make_data(size: int = 32) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(40, (size, TOKENS))]


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
    autocast: bool = False,
) -> list[float]:
    """Full batches of 4, the penalty's gradient by its formula; returns the penalty at each step."""
    fisher = {n: f.clone() for n, f in ewc.fisher.items()}
    anchor = {n: a.clone() for n, a in ewc.anchor.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    penalties = []
    model.train()
    for batch in torch.stack(list(samples)[: 4 * STEPS]).split(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch).logits.float()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
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
        optimizer.step()
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
    # fp64 would hide nothing, but the model's own roundings are those of fp32 on both sides.
    penalties = plain_loop(plain, kind(decayed(plain, 0.01), lr=lr), recorder.samples, ewc, clip=clip, max_norm=1.0)
    # Adam's first steps divide by gradients as small as roundings.
    assert_same_weights(model, plain, atol=1e-6 if optim == "sgd" else 2e-5)
    logged = [entry["ewc/penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(penalties, rel=1e-3)
    assert not ewc._is_attached()
