"""What docs/trainer.md shows works; the recipes for frameworks that are installed by few, where these are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

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
        fisher={n: torch.ones_like(p) for n, p in params.items()}, anchor={n: p + 0.01 for n, p in params.items()}
    )
    ewc.save(path)
    return ewc


def check_logs(log_history: list[dict[str, float]], ewc: EWCLoss) -> None:
    """lambda/2 * sum F (1 + damping) d^2 before the first step, where d is 0.01 everywhere."""
    count = sum(a.numel() for a in ewc.anchor.values())
    assert log_history[0]["ewc/penalty"] == pytest.approx(50 * 1.1 * count * 1e-4, rel=1e-2)


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
    callbacks = manager.add_callbacks_pre_trainer(cfg={}, model=model)
    args = TrainingArguments(
        output_dir="out", use_cpu=True, max_steps=2, logging_steps=1, report_to=[], save_strategy="no"
    )
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (16, 8))]
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    check_logs(trainer.state.log_history, ewc)


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
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-4,
        report_to="none",
        use_cpu=True,
    )
    exec(compile(recipe("llamafactory"), "docs/trainer.md", "exec"), {"args": args})
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    check_logs(state["log_history"], ewc)
