"""EWC on real PEFT adapters: which parameters, under which names, and what must not happen to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import (  # noqa: E402
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from ewc_fast.integrations.peft import check_adapters, from_peft_names, to_peft_names  # noqa: E402
from ewc_fast.integrations.transformers import EWCCallback, consolidate  # noqa: E402

# peft 0.18, of a model without a name.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")

LAMBDA, LR, TOKENS = 30.0, 0.1, 6
BASE = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **changes)


def make_model(**adapters: LoraConfig) -> PeftModel:
    """Adapters with numbers in both factors, as after training."""
    names = list(adapters) or ["default"]
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**BASE)), adapters.get(names[0]) or lora(), names[0])
    for name in names[1:]:
        model.add_adapter(name, adapters[name])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def end_task(ewc: EWCLoss, model: nn.Module) -> None:
    ewc.consolidate(
        fisher={n: 0.1 * torch.rand(p.shape) for n, p in trained(model).items()},
        anchor={n: p.detach() + 0.05 * torch.randn(p.shape) for n, p in trained(model).items()},
    )


def task_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def steps(model: nn.Module, data: Tensor, ewc: EWCLoss | None, by_hand: dict[str, tuple[Tensor, Tensor]]) -> None:
    """A step for each two sequences with the penalty attached, or with its formula on ``by_hand`` (Fisher, anchor)."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=LR)
    handle = None if ewc is None else ewc.attach(optimizer)
    for ids in data.split(2):
        optimizer.zero_grad()
        task_loss(model, ids).backward()
        for n, p in trained(model).items():
            if n in by_hand:
                fisher, anchor = by_hand[n]
                p.grad += LAMBDA * fisher * (p.detach() - anchor)
        optimizer.step()
    if handle is not None:
        handle.remove()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_adapters_switched_merged_and_unmerged() -> None:
    model = make_model(one=lora(), other=lora())
    model.set_adapter("one")
    ewc = EWCLoss(model, LAMBDA)
    end_task(ewc, model)
    assert set(ewc.fisher) == set(trained(model)) and all(".one." in name for name in ewc.fisher)
    model.set_adapter("other")
    end_task(ewc, model)  # the first adapter is frozen now, and what is known of it stays
    assert {name.split(".")[-2] for name in ewc.fisher} == {"one", "other"} and len(ewc.fisher) == 8
    plain = copy.deepcopy(model)
    kept = {n: (ewc.fisher[n].clone(), ewc.anchor[n].clone()) for n in ewc.fisher}
    for active in ("other", "one", "other"):
        for m in (model, plain):
            m.set_adapter(active)
        data = torch.randint(40, (6, TOKENS))
        model.merge_adapter()
        model.unmerge_adapter()
        with model.disable_adapter():
            model(input_ids=data)
        steps(model, data, ewc, {})
        steps(plain, data, None, kept)
        assert_same(model, plain)
        assert set(ewc.penalty_by_parameter()) == set(trained(model))


def test_an_adapter_added_later_is_free_until_it_is_consolidated() -> None:
    model = make_model()
    ewc = EWCLoss(model, LAMBDA)
    end_task(ewc, model)
    model.add_adapter("late", lora())
    model.set_adapter("late")
    plain, data = copy.deepcopy(model), torch.randint(40, (6, TOKENS))
    with pytest.warns(UserWarning, match="no protected parameter requires grad any more"):
        steps(model, data, ewc, {})
    steps(plain, data, None, {})
    assert_same(model, plain)
    consolidate(ewc, [{"input_ids": ids} for ids in data], kind="empirical")
    assert {name.split(".")[-2] for name in ewc.fisher} == {"default", "late"}
    assert ewc.info is not None and ewc.info["loss"] == "causal_lm"  # the model inside is what counts


def test_checkpoint_names(tmp_path: Path) -> None:
    config = lora(task_type="SEQ_CLS")  # whose classification layer is saved whole
    base = LlamaForSequenceClassification(LlamaConfig(**BASE, num_labels=3, pad_token_id=0))
    model = get_peft_model(base, config, "x")
    model.add_adapter("xy", config)  # a name that another begins with
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(tmp_path)
    ewc = EWCLoss(model, LAMBDA)
    for adapter in ("x", "xy"):
        model.set_adapter(adapter)
        end_task(ewc, model)
        saved = load_file(tmp_path / adapter / "adapter_model.safetensors")
        saved = {n: t for n, t in saved.items() if ".xy." not in n}  # which peft 0.18 has saved with x
        own = {n: p.detach() for n, p in model.named_parameters() if f".{adapter}." in n}
        assert not {n for n in own if n in saved}
        assert to_peft_names(model, own, adapter).keys() == saved.keys()
        for name, t in to_peft_names(model, own, adapter).items():
            assert torch.equal(t, saved[name])
        back = from_peft_names(model, saved, adapter)
        assert back.keys() == own.keys() and all(torch.equal(back[n], own[n]) for n in own)
        fisher = to_peft_names(model, ewc.fisher, adapter)
        assert fisher.keys() == saved.keys()
        again = EWCLoss(model, LAMBDA)
        again.consolidate(fisher=from_peft_names(model, fisher, adapter), anchor=back)
        assert all(torch.equal(again.anchor[n], own[n]) and torch.equal(again.fisher[n], ewc.fisher[n]) for n in own)
    assert len(ewc.fisher) == 10  # the two do not share an entry
    wrapped = nn.DataParallel(model)
    assert to_peft_names(wrapped, EWCLoss(wrapped).anchor or own, "xy").keys() == saved.keys()


@pytest.mark.parametrize("names", [("0", "1"), ("default", "model"), ("mine", "self_attn"), ("task", "layers")])
def test_an_adapter_named_like_a_module_costs_no_entry(names: tuple[str, str]) -> None:
    """Where PEFT can save them: some of its versions drop another's name wherever it stands in a path."""
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**{**BASE, "num_hidden_layers": 2})), lora(), names[0])
    model.add_adapter(names[1], lora())
    own = {n: p.detach() for n, p in trained(model).items()}
    for active in (names[1], names[0]):
        model.set_adapter(active)
        try:
            saved = to_peft_names(model, own, names[0])
        except ValueError as error:
            assert names[0] != "default"
            assert "leave out" in str(error) and f"name adapter {names[1]!r} otherwise" in str(error)
            with pytest.raises(ValueError, match="leave out"):
                from_peft_names(model, {}, names[0])
            continue
        back = from_peft_names(model, saved, names[0])
        assert len(own) == 8 and back.keys() == own.keys() and all(torch.equal(back[n], own[n]) for n in own)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    ],
    ids=["vera", "embedding", "adalora"],
)
def test_what_is_saved_and_not_trained_or_the_other_way_is_left_out(config: PeftConfig, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**BASE)), config)
    own = {n: p.detach() for n, p in trained(model).items()}
    assert own
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert to_peft_names(model, own).keys() <= saved.keys()
    back = from_peft_names(model, saved)
    assert back.keys() == own.keys() and all(torch.equal(back[n], own[n]) for n in own)


def test_prompt_methods_are_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**BASE)), config)
    for rename in (to_peft_names, from_peft_names):
        with pytest.raises(ValueError, match="'default' is PROMPT_TUNING, and prompt methods are not supported"):
            rename(model, {})


def test_names_that_do_not_fit() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="there is no 'other', only default"):
        to_peft_names(model, {}, "other")
    with pytest.raises(ValueError, match="tensors have no entry of adapter 'default'"):
        to_peft_names(model, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="adapter 'default' has no x; its names look like"):
        from_peft_names(model, {"x": torch.zeros(1)})
    model.requires_grad_(False)  # as an adapter is that is not active
    with pytest.raises(ValueError, match="adapter 'default' has no .*lora_A.default.weight"):
        from_peft_names(model, {n: p.detach() for n, p in model.named_parameters()})
    with pytest.raises(ValueError, match="model must be a PeftModel, got LlamaForCausalLM"):
        from_peft_names(model.get_base_model(), {})


def test_merged_and_disabled_adapters_are_refused() -> None:
    model = make_model()
    ewc = EWCLoss(model, LAMBDA)
    check_adapters(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj has merged adapters \(default\), .*: call model.unmerge_adapter"):
        consolidate(ewc, [{"input_ids": torch.arange(5)}])
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="q_proj has its adapters disabled"):
        check_adapters(model)
    check_adapters(nn.DataParallel(model))


# ---- in the Trainer ----


def make_trainer(model: PeftModel, ewc: EWCLoss, folder: Path, data: Tensor, steps: int) -> Trainer:
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
    )
    rows = [{"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])} for ids in data]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[EWCCallback(ewc)])
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)  # type: ignore[method-assign]
    return trainer


def test_adapters_in_the_trainer_equal_a_loop_and_resume(tmp_path: Path) -> None:
    start, data = make_model(), torch.randint(40, (8, TOKENS))
    fisher = {n: 0.1 * torch.rand_like(p) for n, p in trained(start).items()}
    anchor = {n: p.detach() + 0.05 * torch.randn_like(p) for n, p in trained(start).items()}

    def prepare(folder: str, steps: int) -> tuple[PeftModel, EWCLoss, Trainer]:
        model = copy.deepcopy(start)
        ewc = EWCLoss(model, LAMBDA)
        ewc.consolidate(fisher=fisher, anchor=anchor)
        return model, ewc, make_trainer(model, ewc, tmp_path / folder, data, steps)

    model, _, whole = prepare("whole", 4)
    whole.train()
    plain = copy.deepcopy(start)
    steps(plain, data, None, {n: (fisher[n], anchor[n]) for n in fisher})
    assert_same(model, plain)

    prepare("parts", 2)[2].train()
    model, ewc, resumed = prepare("parts", 4)
    ewc.consolidate(fisher=fisher)  # another anchor than the checkpoint's, which counts
    resumed.train(resume_from_checkpoint=True)
    assert_same(model, plain)
    assert all(torch.equal(ewc.anchor[n], anchor[n]) for n in anchor)


def test_merged_adapters_are_refused_before_training(tmp_path: Path) -> None:
    model = make_model()
    ewc = EWCLoss(model, LAMBDA)
    end_task(ewc, model)
    trainer = make_trainer(model, ewc, tmp_path, torch.randint(40, (4, TOKENS)), 1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        trainer.train()
    assert not ewc._is_attached()
    model.unmerge_adapter()
    trainer.train()


def test_a_new_adapter_is_trained_free_in_the_trainer(tmp_path: Path) -> None:
    model, data = make_model(), torch.randint(40, (8, TOKENS))
    ewc = EWCLoss(model, LAMBDA)
    end_task(ewc, model)
    model.add_adapter("late", lora())
    model.set_adapter("late")
    plain = copy.deepcopy(model)
    with (
        pytest.warns(UserWarning, match=r"nothing of what is consolidated \(such as .*default.*\) is trained"),
        pytest.warns(UserWarning, match="no protected parameter requires grad any more"),
    ):
        make_trainer(model, ewc, tmp_path, data, 4).train()
    steps(plain, data, None, {})
    assert_same(model, plain)
    for p in model.parameters():
        p.requires_grad_(False)
    trainer = make_trainer(model, ewc, tmp_path, data, 4)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    trainer.create_optimizer()
    model.base_model.model.lm_head.weight.requires_grad_(False)
    with (
        pytest.warns(UserWarning, match="no parameter to protect requires grad"),
        pytest.raises(ValueError, match="steps none of the protected parameters .*is_trainable=True"),
    ):
        trainer.train()
