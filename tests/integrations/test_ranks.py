"""Processes with different penalties are told before they drift apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from ewc_fast import EWCLoss
from ewc_fast.integrations.ranks import check_same_on_all, share_lambda

CASES = {
    "same": {},
    "rounding": {"fisher": 1 + 1e-9},
    "lambda": {"ewc_lambda": 1.1},
    "Fisher": {"fisher": 1.001},
    "anchor": {"anchor": 1.001},
}


def penalty(ewc_lambda: float = 1.0, fisher: float = 1.0, anchor: float = 1.0) -> EWCLoss:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    ewc = EWCLoss(model, 30.0 * ewc_lambda)
    ewc.consolidate(
        fisher={n: fisher * torch.rand_like(p) for n, p in model.named_parameters()},
        anchor={n: anchor * p.detach() for n, p in model.named_parameters()},
    )
    return ewc


def in_a_process(rank: int, store: str, found: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with Path(f"{found}.{rank}").open("w") as file:
        for name, changed in CASES.items():
            message = ""
            try:
                check_same_on_all(penalty(**(changed if rank else {})))
            except ValueError as error:
                message = str(error).split(" differ among the processes")[0]
            file.write(f"{name}: {message}\n")
        ewc = penalty(1.0 + rank)
        share_lambda(ewc)
        file.write(f"shared: {ewc.ewc_lambda}\n")
    distributed.destroy_process_group()


def test_every_process_is_told_what_differs(tmp_path: Path) -> None:
    multiprocessing.spawn(in_a_process, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
    expected = "same: \nrounding: \nlambda: ewc: lambda\nFisher: ewc: Fisher\nanchor: ewc: anchor\nshared: 30.0\n"
    assert [(tmp_path / f"found.{rank}").read_text() for rank in range(2)] == [expected, expected]


def test_one_process_has_nothing_to_compare() -> None:
    check_same_on_all(penalty())


@pytest.mark.filterwarnings("ignore")  # of the frameworks
@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_callbacks_ask_before_they_train(framework: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    from importlib import import_module

    integration = import_module(f"ewc_fast.integrations.{framework}")

    def differs(ewc: EWCLoss) -> None:
        raise ValueError("ewc: Fisher differ among the processes")

    monkeypatch.setattr(integration, "check_same_on_all", differs)
    model, train = (hugging_face if framework == "transformers" else lightning)(tmp_path)
    ewc = EWCLoss(model, 3.0)
    ewc.consolidate(fisher={n: torch.rand_like(p) for n, p in model.named_parameters()})
    with pytest.raises(ValueError, match="differ among the processes"):
        train(integration.EWCCallback(ewc))
    assert not ewc._is_attached()


def hugging_face(folder: Path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(20, (4, 5))]
    arguments = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    return model, lambda callback: Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()


def lightning(folder: Path):
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Module()
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, enable_model_summary=False, default_root_dir=folder, **settings)
    return model, lambda callback: (trainer.callbacks.append(callback), trainer.fit(model, torch.rand(4, 1, 3)))
