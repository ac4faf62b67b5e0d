"""What docs/trainer.md shows works; the recipes for frameworks that are installed by few, where these are."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ewc_fast import EWCLoss

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments  # noqa: E402

from ewc_fast.integrations.transformers import EWCCallback  # noqa: E402

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "trainer.md").read_text()
SNIPPETS = dict(
    zip(
        ("trainer", "optimizer", "peft", "trl"),
        re.findall(r"^```python\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL),
        strict=True,
    )
)
RECIPES = re.findall(r"^```py\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
Weights = dict[str, Tensor]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("peft", "trl"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(SNIPPETS[name], f"docs/trainer.md, {name}", "exec"), namespace)
    if name == "peft":
        ewc = namespace["ewc"]
        assert ewc.is_attached(namespace["optimizer"]) and len(namespace["saved"]) == len(ewc.anchor) == 8
        assert ewc.num_tasks == 2  # the second is the one that came back by PEFT's names
        return
    trainer = namespace["trainer"]
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, EWCCallback))
    assert callback.ewc.num_tasks == 1 and callback.ewc.last_penalty > 0
    if name == "trainer":
        assert sum("ewc/measured_forgetting" in entry for entry in trainer.state.log_history) == 4
        assert (tmp_path / "out" / "checkpoint-8" / "ewc.safetensors").exists()


def recipe(name: str) -> str:
    (found,) = [code for code in RECIPES if f"from {name}." in code]
    return found


def save_state(model: torch.nn.Module, path: Path) -> EWCLoss:
    ewc = EWCLoss(model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    ewc.consolidate(
        fisher={n: torch.ones_like(p) for n, p in params.items()}, anchor={n: p + OFF for n, p in params.items()}
    )
    ewc.save(path)
    return ewc


LR, OFF = 1e-3, 0.01  # of the one step of SGD; every weight's distance from its anchor before it


def check_step(log_history: list[dict[str, float]], ewc: EWCLoss, with_ewc: Weights, without: Weights) -> None:
    """The penalty before the step, lambda/2 * sum F (1 + damping) d^2, and what its gradient added to each weight."""
    count = sum(a.numel() for a in ewc.anchor.values())
    assert log_history[0]["ewc/penalty"] == pytest.approx(50 * 1.1 * count * OFF**2, rel=1e-3)
    assert ewc.anchor.keys() == with_ewc.keys() == without.keys()
    for name, weight in with_ewc.items():
        added = (weight - without[name]).double()
        torch.testing.assert_close(added, torch.full_like(added, LR * 100 * 1.1 * OFF), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("default")
def test_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("axolotl.integrations.base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ewc_plugin.py").write_text(recipe("axolotl"))
    model = LlamaForCausalLM(CONFIG)
    ewc = save_state(model, tmp_path / "ewc.safetensors")
    manager = base.PluginManager.get_instance()
    manager.register("ewc_plugin.EWCPlugin")
    args = TrainingArguments(
        output_dir="out", use_cpu=True, max_steps=1, logging_steps=1, report_to=[], save_strategy="no", optim="sgd",
        learning_rate=LR, max_grad_norm=0.0, gradient_accumulation_steps=2,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 8))]

    def train(model: torch.nn.Module, callbacks: list[Any]) -> tuple[list[dict[str, float]], Weights]:
        trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
        trainer.train()
        return trainer.state.log_history, {n: p.detach() for n, p in model.named_parameters()}

    _, without = train(copy.deepcopy(model), [])
    logs, weights = train(model, manager.add_callbacks_pre_trainer(cfg={}, model=model))
    check_step(logs, ewc, weights, without)


@pytest.mark.filterwarnings("default")
def test_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llamafactory.train.tuner")
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    ewc = save_state(model, tmp_path / "ewc.safetensors")
    model.save_pretrained(tmp_path / "model")
    words = {f"w{i}": i for i in range(62)} | {"<eos>": 62, "<pad>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "data").mkdir()
    rows = [{"instruction": "w1 w2", "input": "", "output": f"w{i} w3"} for i in range(16)]
    (tmp_path / "data" / "new.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"new": {"file_name": "new.json"}}))
    args = dict(
        stage="sft",
        do_train=True,
        model_name_or_path=str(tmp_path / "model"),
        finetuning_type="full",
        dataset="new",
        dataset_dir=str(tmp_path / "data"),
        template="default",
        cutoff_len=32,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        optim="sgd",
        learning_rate=LR,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
    )
    code = recipe("llamafactory")
    exec(compile(code, "docs/trainer.md", "exec"), {"args": {**args, "output_dir": str(tmp_path / "out")}})
    without_ewc = code.replace(", callbacks=[EWCCallback(make_ewc)]", "")
    assert without_ewc != code
    exec(compile(without_ewc, "docs/trainer.md", "exec"), {"args": {**args, "output_dir": str(tmp_path / "plain")}})
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    check_step(logs, ewc, *(load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "plain")))
