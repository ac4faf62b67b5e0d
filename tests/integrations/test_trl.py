"""EWC in TRL's real SFTTrainer, with TRL's own preparation of the data: final weights as a plain loop's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("peft")

with pytest.MonkeyPatch.context() as quiet:
    quiet.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

from ewc_fast.integrations.transformers import EWCCallback  # noqa: E402

LAMBDA, LR, STEPS, WORDS = 30.0, 0.05, 3, 40


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(WORDS - 2)} | {"<eos>": WORDS - 2, "<pad>": WORDS - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=WORDS - 1,
        eos_token_id=WORDS - 2,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_ewc(model: nn.Module) -> EWCLoss:
    ewc = EWCLoss(model, LAMBDA)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    ewc.consolidate(
        fisher={n: 0.1 * torch.rand_like(p) for n, p in params.items()},
        anchor={n: p + 0.05 * torch.randn_like(p) for n, p in params.items()},
    )
    return ewc


def make_data() -> Dataset:
    lengths = torch.randint(4, 9, (24,)).tolist()
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in torch.randint(38, (n,)).tolist()) for n in lengths]})


class Recorder:
    """Keeps the batches that TRL's own collator makes."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collator(samples)
        batch["labels"][:, 0] = -100  # has no prediction, but some versions of transformers count it
        self.batches.append({k: v.clone() for k, v in batch.items()})
        return batch


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("adapters", [False, True])
def test_sft_equals_a_loop_in_plain_pytorch(tmp_path: Path, accumulation: int, adapters: bool) -> None:
    model = make_model()
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=STEPS,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1.0,
        max_length=16,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    callback = EWCCallback(make_ewc)  # TRL wraps the model itself, so the penalty is made from what it trains
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=make_data(),
        processing_class=make_tokenizer(),
        callbacks=[callback],
        peft_config=lora if adapters else None,
    )
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    ewc, plain = callback.ewc, make_model()
    if adapters:
        plain = get_peft_model(plain, lora)
    plain.load_state_dict(trainer.model.state_dict())
    assert all("lora_" in name for name in ewc.fisher) == adapters
    trainer.train()

    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=LR)
    plain.train()
    batches = recorder.batches[: STEPS * accumulation]
    for step in range(STEPS):
        optimizer.zero_grad()
        micro = batches[step * accumulation : (step + 1) * accumulation]
        counted = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
        for batch in micro:
            logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            (nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum") / counted).backward()
        for n, p in plain.named_parameters():
            if n in ewc.fisher:
                p.grad += LAMBDA * ewc.fisher[n] * (p.detach() - ewc.anchor[n])
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, p), q in zip(trainer.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert all("ewc/penalty" in e for e in trainer.state.log_history if "loss" in e)
