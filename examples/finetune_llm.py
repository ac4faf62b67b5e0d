"""A pre-trained language model learns new text: what does it forget, with EWC and with everything else?

    python examples/finetune_llm.py --texts texts

SmolLM2-135M-Instruct learns German from the Debian handbook, in transformers' Trainer. Before and after, on held-out
text, in nats per token: German; English that it never trains on, Debian's fortunes and the handbook in English; and the
capitals of 161 countries, the first token of the answer. llm_data.py says where all that comes from and has the
commands that bring it. Any other causal language model and text:

    python examples/finetune_llm.py --model FOLDER --new new.txt --old old.txt

Methods, each over its own grid of learning rate, warm-up and weight: plain fine-tuning, LoRA, L2-SP (a penalty on the
distance), EWC with and without damping, and rehearsal, where half of each batch is text that the model wrote itself
before. Then, around the best EWC: the proximal coupling; the Fisher of self-written text, which needs no old data; and
labels drawn from the model. Then two more seeds of the best arm of each method, and the best EWC run with and
without its penalty once more, watched along the way. *Best* is the lowest sum of new and old text's nats per token.

Each arm is written to results.json when it is done; interrupted, it goes on where it was. On a GPU, --jobs 6 trains six
arms at a time. Time and memory of each method are measured first, one at a time.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import llm_data
import torch
import torch.nn.functional as F
from arms import processes, run_all, write_whole
from llm_data import Data
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ewc_fast import EWCLoss, ForgettingProbe, estimate_fisher, sample_sequences
from ewc_fast.fisher.importances import uniform_importance
from ewc_fast.integrations.transformers import EWCCallback
from ewc_fast.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "finetune_llm"
LORA_RANK = 16
COST_STEPS = 20  # for time and memory
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
TITLES = {
    "plain": "plain fine-tuning",
    "lora": f"LoRA, rank {LORA_RANK}",
    "l2sp": "L2-SP",
    "ewc": "EWC",
    "ewc_damped": "EWC, damping 0.1",
    "rehearsal": "rehearsal on self-written text",
    "proximal": "EWC, damping 0.1, proximal",
    "own": "EWC, damping 0.1, Fisher of self-written text",
    "sampled": "EWC, damping 0.1, sampled labels",
}
SHORT = ("plain", "lora", "rehearsal", "l2sp", "ewc_damped", "own")
PENALISED = [method for method in TITLES if method not in ("plain", "lora", "rehearsal")]
TESTS = {"new": "new text", "old": "old text", "same": "new text's subject in the old language"}


@dataclass(frozen=True)
class Setup:
    """What all arms share.

    Attributes:
        texts: Folder of the packages' texts; None for ``new`` and ``old``.
        language: Of the handbook.
        model: Folder or name of a causal language model; empty for SmolLM2, ``"tiny"`` for random weights on bytes.
        new, old: Plain text files.
        work: Folder for what is computed once.
        steps, batch, length: Optimizer steps, sequences in each, and tokens in each of those.
        fisher_sequences: For the Fisher, of old or self-written text.
        test_sequences: At most so many of each test.
    """

    texts: Path | None
    language: str
    model: str
    new: Path | None
    old: Path | None
    work: Path
    steps: int = 150
    batch: int = 8
    length: int = 128
    fisher_sequences: int = 256
    test_sequences: int = 64

    @property
    def test_batch(self) -> int:
        """Sequences that are measured at once."""
        return self.batch * (4 if DEVICE.type == "cuda" else 1)

    @property
    def looks(self) -> tuple[int, ...]:
        """Steps after which a run is looked at."""
        return tuple(sorted({max(1, round(self.steps * share)) for share in (0.05, 0.15, 0.33, 0.66)}))


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        method: A key of ``TITLES``.
        lr: AdamW's highest learning rate; it rises over ``warm_up`` steps and falls to 0.
        warm_up: A share of the steps.
        ewc_lambda: Weight of the penalty, per token.
        stop: After this share of the steps it stops, early.
        seed: Of the order of the data.
        watched: With the probe and the prediction at every look.
    """

    method: str
    lr: float
    warm_up: float = 0.33
    ewc_lambda: float = 0.0
    stop: float = 1.0
    seed: int = 0
    watched: bool = False


# ---- the arms ----


def first_stage() -> list[Arm]:
    """Each method over ten settings; the methods in turn."""
    grids = (
        [
            *_rates_and_warm_ups("plain", (4e-4, 2e-4, 8e-4)),
            Arm("plain", 4e-4, stop=0.66),
            Arm("plain", 2e-4, stop=0.66),
            Arm("plain", 1e-4),
            Arm("plain", 5e-5),
        ],
        _rates_and_weights("ewc_damped", (30.0, 10.0, 100.0)),
        _rates_and_weights("l2sp", (3e-3, 1e-3, 1e-2)),
        [*_rates_and_warm_ups("lora", (1e-3, 3e-3, 5e-4, 6e-3)), *_rates_and_warm_ups("lora", (2e-3,))[::-1]],
        _rates_and_weights("ewc", (30.0, 10.0, 100.0)),
        [*_rates_and_warm_ups("rehearsal", (4e-4, 8e-4, 2e-4, 1e-4)), *_rates_and_warm_ups("rehearsal", (5e-5,))],
    )
    return [grid[i] for i in range(max(map(len, grids))) for grid in grids if i < len(grid)]


def _rates_and_warm_ups(method: str, rates: Iterable[float]) -> list[Arm]:
    return [Arm(method, lr, warm_up) for lr in rates for warm_up in (0.33, 0.1)]


def _rates_and_weights(method: str, weights: tuple[float, float, float]) -> list[Arm]:
    """All pairs, and the first weight at a low rate."""
    arms = [Arm(method, lr, ewc_lambda=weight) for lr in (4e-4, 2e-4, 8e-4) for weight in weights]
    return [*arms, Arm(method, 1e-4, ewc_lambda=weights[0])]


def second_stage(rows: Rows) -> list[Arm]:
    """Around the best damped EWC; the Fisher of self-written text is smaller, and so is tried at one more weight."""
    best = best_of(rows, "ewc_damped")
    around = [("own", 9.0)] + [(m, factor) for factor in (1.0, 1 / 3, 3.0) for m in ("proximal", "own", "sampled")]
    return [replace(best, method=method, ewc_lambda=best.ewc_lambda * factor) for method, factor in around]


def third_stage(rows: Rows) -> list[Arm]:
    """The best of each method with two more seeds, and the best damped EWC without its penalty; both watched before."""
    damped = best_of(rows, "ewc_damped")
    without = replace(damped, method="plain", ewc_lambda=0.0)
    best = dict.fromkeys([*(best_of(rows, method) for method in TITLES), without])
    watched = [replace(arm, watched=True) for arm in (without, damped)]
    return watched + [replace(arm, seed=seed) for seed in (1, 2) for arm in best]


Rows = list[dict[str, Any]]


def arm_of(row: dict[str, Any]) -> Arm:
    """The arm that a result is of."""
    return Arm(**row["arm"])


def best_of(rows: Rows, method: str) -> Arm:
    """The arm of the first seed that ends with the lowest sum of new and old text's loss."""
    mine = [r for r in rows if r["arm"]["method"] == method and not r["arm"]["seed"] and not r["arm"]["watched"]]
    return arm_of(min(mine, key=total))


def seeds_of(rows: Rows, arm: Arm) -> Rows:
    """The runs of an arm, one for each seed."""
    return [r for r in rows if replace(arm_of(r), seed=arm.seed) == arm]


def total(row: dict[str, Any]) -> float:
    """Nats per token of new and old text together."""
    return row["tests"]["new"]["mean"] + row["tests"]["old"]["mean"]


# ---- model, texts, and what is computed once ----


def load_model(setup: Setup) -> nn.Module:
    """The pre-trained model, in fp32."""
    if setup.model == "tiny":
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        return LlamaForCausalLM(config).to(DEVICE)
    if setup.model:
        return AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32).to(DEVICE)
    folder = setup.work / "model"
    if not folder.exists():  # taking the 4-bit file apart needs half a minute
        file = llm_data.smollm2_file()
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        del quantized.config.quantization_config
        model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        with tempfile.TemporaryDirectory(dir=setup.work) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            os.rename(unfinished, folder)
            os.mkdir(unfinished)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


@functools.lru_cache(1)
def load_data(setup: Setup) -> Data:
    """Sequences to learn from and to measure on; on the CPU."""
    encode: llm_data.Encode = lambda text: list(text.encode())  # noqa: E731
    facts = []
    if setup.model != "tiny":
        tokenizer = AutoTokenizer.from_pretrained(setup.model or setup.work / "model")
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    cut = functools.partial(llm_data.blocks, encode=encode, length=setup.length)
    if setup.texts is None:
        assert setup.new is not None and setup.old is not None
        parts = {name: cut(path.read_text().split("\n\n")) for name, path in (("new", setup.new), ("old", setup.old))}
        (new, new_test), (old, old_test) = (p.tensor_split([len(p) * 3 // 4]) for p in parts.values())
        tests = {"new": new_test, "old": old_test}
    else:
        new, tests_new = map(cut, llm_data.read_handbook(setup.texts, setup.language))
        old, tests_old = map(cut, llm_data.read_fortunes(setup.texts))
        same = cut(llm_data.read_handbook(setup.texts, llm_data.ENGLISH)[1])
        tests = {"new": tests_new, "old": tests_old, "same": same}
        facts = llm_data.capitals(tokenizer)
    tests = {name: llm_data.shuffled(test, setup.test_sequences) for name, test in tests.items()}
    return Data(llm_data.shuffled(new), llm_data.shuffled(old, setup.fisher_sequences), tests, facts)


def own_text(setup: Setup, model: nn.Module, count: int = 0) -> Tensor:
    """Sequences that the model writes itself; by default for the Fisher, and after those for the probe."""
    path = setup.work / (f"own_{count}.pt" if count else "own.pt")
    if not path.exists():
        generator = torch.Generator().manual_seed(count)
        count = count or setup.fisher_sequences + setup.test_sequences
        own = sample_sequences(model, count, setup.length, generator, batch_size=min(-(-count // 2), 300)).cpu()
        write_whole(path, functools.partial(torch.save, own))
    return torch.load(path)


def rehearsed(setup: Setup) -> int:
    """Own sequences for rehearsal: as many as half of all batches take, so that none comes twice."""
    return setup.steps * setup.batch // 2


def fisher(setup: Setup, model: nn.Module, data: Data, source: str) -> dict[str, Tensor]:
    """Of ``source``: ``"old"`` text, ``"own"``, or old text with labels ``"sampled"`` from the model."""
    path = setup.work / f"fisher_{source}.safetensors"
    if not path.exists():
        text = own_text(setup, model)[: setup.fisher_sequences] if source == "own" else data.old
        kind = "sampled" if source == "sampled" else "empirical"
        loader = [{"input_ids": part, "labels": part} for part in text.split(setup.batch)]
        generator = torch.Generator(DEVICE).manual_seed(0)
        estimate = estimate_fisher(model, loader, kind=kind, loss="causal_lm", generator=generator, progress=True)
        write_whole(path, functools.partial(save_file, dict(estimate)))
    return load_file(path)


# ---- measuring ----


@torch.no_grad()
def losses(model: nn.Module, sequences: Tensor, batch: int) -> Tensor:
    """Nats per token of each sequence, (N,)."""
    training = model.training
    model.eval()
    found = []
    for part in sequences.to(DEVICE).split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(each.view(len(part), -1).mean(1))
    model.train(training)
    return torch.cat(found).cpu()


@torch.no_grad()
def share_of_facts(model: nn.Module, facts: Sequence[tuple[Tensor, int]], batch: int) -> float | None:
    """For how many the most likely next token is right."""
    if not facts:
        return None
    model.eval()
    right = 0
    for begin in range(0, len(facts), batch):
        prompts, answers = zip(*facts[begin : begin + batch], strict=True)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(DEVICE)
        logits = model(input_ids=ids, use_cache=False).logits  # causal: padding at the end has no part in them
        right += int((logits[torch.arange(len(last)), last].argmax(-1).cpu() == torch.tensor(answers)).sum())
    return right / len(facts)


def measure(model: nn.Module, data: Data, batch: int) -> dict[str, Any]:
    """Every test's loss of each sequence, and the facts."""
    return {
        "losses": {name: losses(model, test, batch).tolist() for name, test in data.tests.items()},
        "facts": share_of_facts(model, data.facts, batch),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def compared(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Means with standard errors over the sequences, and changes, whose errors are of the differences."""
    tests = {}
    for name, values in after["losses"].items():
        mean, error = mean_and_error(values)
        change, change_error = mean_and_error(
            [now - then for now, then in zip(values, before["losses"][name], strict=True)]
        )
        tests[name] = {"mean": mean, "error": error, "change": change, "change_error": change_error}
    return {"tests": tests, "facts": after["facts"]}


# ---- a run ----


class Look(TrainerCallback):
    """Half of the tests' sequences, at some steps; watched, the prediction and the probe too."""

    def __init__(self, setup: Setup, data: Data, before: dict[str, Any], watch: Callable[[], dict[str, float]]) -> None:
        self._setup, self._tests, self._before, self._watch = setup, data.tests, before["losses"], watch
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step not in self._setup.looks:
            return
        row: dict[str, float] = {"step": state.global_step}
        for name in ("new", "old"):
            half = len(self._tests[name]) // 2
            now = losses(model, self._tests[name][:half], self._setup.test_batch)
            row[name] = float(now.mean())
            row[f"{name}_change"] = row[name] - statistics.fmean(self._before[name][:half])
        self.curve.append(row | self._watch())


class StopAfter(TrainerCallback):
    """Stops after so many steps, whatever the learning rate's schedule has left."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self._steps


class Stopwatch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(_now() - self._began)


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def penalty(setup: Setup, arm: Arm, model: nn.Module, data: Data) -> EWCLoss | None:
    """The arm's, consolidated at the pre-trained weights; a watched arm without one has one of lambda 0, to predict."""
    if not (arm.ewc_lambda or arm.watched):
        return None
    ewc = EWCLoss(model, ewc_lambda=arm.ewc_lambda, damping=0.0 if arm.method in ("plain", "ewc", "l2sp") else 0.1)
    if arm.method == "l2sp":
        ewc.consolidate(fisher=uniform_importance(model))
    else:
        source = arm.method if arm.method in ("own", "sampled") else "old"
        ewc.consolidate(fisher=fisher(setup, model, data, source))
    return ewc


def train(
    setup: Setup, arm: Arm, model: nn.Module, data: Data, ewc: EWCLoss | None, look: TrainerCallback
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains; returns the model, an adapter merged into it, and the Trainer's log."""
    items = data.new[:, None]
    if arm.method == "rehearsal":
        own = own_text(setup, model, rehearsed(setup))
        items = torch.stack([data.new[torch.arange(len(own)) % len(data.new)], own], 1)
    trained: nn.Module = model
    if arm.method == "lora":
        import peft

        torch.manual_seed(arm.seed)
        trained = peft.get_peft_model(
            model,
            peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    callbacks = [look, StopAfter(round(arm.stop * setup.steps))]
    if ewc is not None:
        callbacks.append(EWCCallback(ewc, coupling="proximal" if arm.method == "proximal" else "coupled"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=setup.steps,
            per_device_train_batch_size=setup.batch // items.shape[1],
            learning_rate=arm.lr,
            warmup_steps=round(arm.warm_up * setup.steps),
            weight_decay=0.0,
            seed=arm.seed,
            logging_steps=max(1, setup.steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=DEVICE.type == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(trained, arguments, data_collator=_collate, train_dataset=list(items), callbacks=callbacks)
        trainer.train()
    if arm.method == "lora":
        trained = trained.merge_and_unload()  # type: ignore[operator]
    return trained, [entry for entry in trainer.state.log_history if "loss" in entry]


def run(setup: Setup, before: dict[str, Any], arm: Arm) -> dict[str, Any]:
    """One arm."""
    data = load_data(setup)
    model = load_model(setup)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ewc = penalty(setup, arm, model, data)
    probe = ForgettingProbe(model, own_text(setup, model)[setup.fisher_sequences :]) if arm.watched else None

    def watch() -> dict[str, float]:
        if ewc is None or probe is None:
            return {}
        return {"predicted": predicted(ewc), "probe": float(probe())}

    look = Look(setup, data, before, watch)
    model, log = train(setup, arm, model, data, ewc, look)
    distance = sum(float((p.detach() - start[name]).double().square().sum()) for name, p in model.named_parameters())
    return {
        "arm": asdict(arm),
        **compared(measure(model, data, setup.test_batch), before),
        "distance": distance**0.5,
        "predicted": None if ewc is None or arm.method == "l2sp" else predicted(ewc),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "curve": look.curve,
        "log": log,
    }


def cost(setup: Setup, arm: Arm) -> dict[str, float]:
    """Seconds of a step, and the memory's peak over some steps, model and optimizer included; alone in a process."""
    gc.collect()  # a Trainer holds itself
    data = load_data(setup)
    model = load_model(setup)
    ewc = penalty(setup, arm, model, data)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch()
    train(replace(setup, steps=min(COST_STEPS, setup.steps)), arm, model, data, ewc, watch)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds_per_step": statistics.median(watch.times), "peak_mib": peak}


@torch.no_grad()
def predicted(ewc: EWCLoss) -> float:
    """Forgetting as the Fisher predicts it, nats per token, at the present weights: the last step's pass was before."""
    ewc()
    return float(ewc.predicted_forgetting)


def _collate(items: list[Tensor]) -> dict[str, Tensor]:
    tokens = torch.cat(items)
    return {"input_ids": tokens, "labels": tokens}


def prepare(setup: Setup, measured: bool) -> dict[str, Any] | None:
    """What all arms share, written to the work folder; measures the pre-trained model if that is not done yet."""
    model, data = load_model(setup), load_data(setup)
    for count in (0, rehearsed(setup)):
        own_text(setup, model, count)
    for source in ("old", "own", "sampled"):
        fisher(setup, model, data, source)
    return None if measured else measure(model, data, setup.test_batch)


# ---- the report ----


def table(results: dict[str, Any]) -> str:
    """The best arm of each method, Markdown; with several seeds their means."""
    rows: Rows = results["rows"]
    tests = [name for name in TESTS if name in results["before"]["losses"]]
    header = [
        "",
        "lr",
        "warm-up",
        "stop",
        "lambda",
        *(TESTS[n] for n in tests),
        "facts",
        "ms per step",
        "MiB",
        "arms",
        "seeds",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    cells = [f"{mean_and_error(results['before']['losses'][n])[0]:.3f}" for n in tests]
    facts = results["before"]["facts"]
    lines.append(f"| before | | | | | {' | '.join(cells)} | {'' if facts is None else f'{facts:.3f}'} | | | | |")
    for method, title in TITLES.items():
        mine = [r for r in rows if r["arm"]["method"] == method and not r["arm"]["watched"]]
        if not mine:
            continue
        best = best_of(rows, method)
        same = seeds_of(rows, best)
        cells = [
            f"{best.lr:g}",
            f"{best.warm_up:.0%}",
            f"{best.stop:.0%}",
            f"{best.ewc_lambda:g}" if best.ewc_lambda else "",
        ]
        for name in tests:
            mean, change, error = over_seeds(same, name)
            cells.append(f"{mean:.3f} ({change:+.3f} ± {error:.3f})")
        cells.append("" if same[0]["facts"] is None else f"{statistics.fmean(r['facts'] for r in same):.3f}")
        used = results.get("costs", {}).get(method)
        cells += ["", ""] if used is None else [f"{1000 * used['seconds_per_step']:.0f}", f"{used['peak_mib']:.0f}"]
        cells += [str(len({replace(arm_of(r), seed=0) for r in mine})), str(len(same))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(results: dict[str, Any]) -> str:
    """The same arms with what was learnt and forgotten alone, for the README."""
    lines = ["| | German | English (change) | capitals |", "|---|---:|---:|---:|"]
    before = [mean_and_error(results["before"]["losses"][name])[0] for name in ("new", "old")]
    lines.append(f"| before | {before[0]:.3f} | {before[1]:.3f} | {results['before']['facts']:.3f} |")
    for method in SHORT:
        if any(r["arm"]["method"] == method for r in results["rows"]):
            same = seeds_of(results["rows"], best_of(results["rows"], method))
            new, (old, change, error) = over_seeds(same, "new")[0], over_seeds(same, "old")
            facts = statistics.fmean(r["facts"] for r in same)
            lines.append(f"| {TITLES[method]} | {new:.3f} | {old:.3f} ({change:+.3f} ± {error:.3f}) | {facts:.3f} |")
    return "\n".join(lines)


def over_seeds(rows: Rows, test: str) -> tuple[float, float, float]:
    """Mean, change, and the change's standard error over the sequences, each the mean over the seeds."""
    mean, change, error = (
        statistics.fmean(r["tests"][test][key] for r in rows) for key in ("mean", "change", "change_error")
    )
    return mean, change, error


def watched_table(rows: Rows) -> str:
    """Along the watched runs: the true rise, the probe, the prediction."""
    lines = ["| run | step | true rise | probe | predicted |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        if row["arm"]["watched"]:
            lines += [
                f"| {TITLES[row['arm']['method']]} | {p['step']} | {p['old_change']:+.3f} | {p['probe']:.3f} | "
                f"{p['predicted']:.4f} |"
                for p in row["curve"]
            ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Figure:
    """Learning against forgetting: a dot for each run, a line through the best of each method's first seed.

    As high as the best of those that have learnt 85% of the most: what forgot more is above the picture.
    """
    rows: Rows = results["rows"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    fronts: list[tuple[float, float]] = []
    for i, (method, title) in enumerate(TITLES.items()):
        points = sorted(
            (-r["tests"]["new"]["change"], r["tests"]["old"]["change"], r["arm"]["seed"])
            for r in rows
            if r["arm"]["method"] == method and not r["arm"]["watched"]
        )
        if not points:
            continue
        first = [(x, y) for x, y, seed in points if not seed]
        front = [p for p in first if not any(q[0] >= p[0] and q[1] < p[1] for q in first)]
        axes.scatter([p[0] for p in points], [p[1] for p in points], s=12, color=f"C{i}", alpha=0.5)
        axes.plot(*zip(*front, strict=True), "o-", color=f"C{i}", markersize=5, label=title)
        fronts += front
    axes.axhline(0, color="gray", linewidth=0.8)
    low, high = (end(y for x, y in fronts if x > 0.85 * max(fronts)[0]) for end in (min, max))
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.set_xlabel("learnt: fall of the loss on new text, nats per token")
    axes.set_ylabel("forgotten: rise of the loss on old text, nats per token")
    axes.legend(fontsize="small", loc="upper left")
    return figure


def write(results: dict[str, Any], folder: Path) -> None:
    """The results, and all that is drawn from them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    if not results["rows"]:
        return
    flat = [
        {
            **row["arm"],
            **{f"{name} {key}": value for name, test in row["tests"].items() for key, value in test.items()},
            **{key: row[key] for key in ("facts", "distance", "predicted")},
        }
        for row in results["rows"]
    ]
    with (folder / "arms.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in flat)
    (folder / "table.md").write_text(f"{table(results)}\n\n{watched_table(results['rows'])}\n")
    draw(results).savefig(folder / "learnt_and_forgotten.png", dpi=110)


# ---- the command ----


def setup_of(options: argparse.Namespace) -> Setup:
    """From the command line.

    Raises:
        SystemExit: The texts are not given.
    """
    shared = Setup(options.texts, options.language, options.model, options.new, options.old, options.work)
    if options.quick:
        here = Path(__file__)
        shared = replace(shared, texts=None, model="tiny", new=here, old=here.with_name("calibration.py"))
        return replace(shared, steps=6, length=64, fisher_sequences=16, test_sequences=8)
    if options.texts is None and (options.new is None or options.old is None):
        raise SystemExit(f"--texts FOLDER, or --new FILE and --old FILE, is missing. {llm_data.__doc__}")
    return replace(shared, steps=options.steps, batch=options.batch, length=options.length)


def quick_arms() -> list[Arm]:
    """One of each method."""
    return [Arm(method, 1e-3, ewc_lambda=1.0 if method in PENALISED else 0.0) for method in TITLES]


def main(arguments: Iterable[str] | None = None) -> None:
    """Computes what is missing of the results, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="folder with the extracted Debian packages")
    parser.add_argument("--language", default="de-DE", help="of the handbook")
    parser.add_argument("--model", default="", help="folder of another causal language model")
    parser.add_argument("--new", type=Path, help="another text to learn")
    parser.add_argument("--old", type=Path, help="text of the kind that the model knows")
    parser.add_argument("--steps", type=int, default=Setup.steps)
    parser.add_argument("--batch", type=int, default=Setup.batch, help="sequences in a step, an even number")
    parser.add_argument("--length", type=int, default=Setup.length, help="tokens in a sequence")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ewc_fast_finetune_llm")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm later than this")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time: a small model leaves most of a GPU idle")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps: seconds, to see it work")
    options = parser.parse_args(None if arguments is None else list(arguments))
    deadline = time.monotonic() + 60 * options.minutes
    setup = setup_of(options)
    setup.work.mkdir(parents=True, exist_ok=True)

    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept = {key: getattr(setup, key) for key in ("language", "model", "steps", "batch", "length", "fisher_sequences")}
    if results.setdefault("setup", kept) != kept:
        raise SystemExit(f"{path} has results of {results['setup']}, not of {kept}: choose another --out")
    results |= {"date": datetime.date.today().isoformat(), "machine": describe_machine(), "torch": torch.__version__}
    with processes(options.quick) as pool:
        before = pool.submit(prepare, setup, "before" in results).result()
    results.setdefault("before", before)

    costs = results.setdefault("costs", {})
    missing = [method for method in TITLES if method not in costs]
    # A process's peak is of all that it ever did, a GPU's can be reset.
    for methods in [missing] if DEVICE.type == "cuda" else [[method] for method in missing]:
        with processes(options.quick) as pool:
            for method in methods:
                arm = Arm(method, 1e-5, ewc_lambda=1e-3 if method in PENALISED else 0.0)
                costs[method] = pool.submit(cost, setup, arm).result()
                write(results, options.out)

    stages: list[Callable[[Rows], list[Arm]]] = [lambda rows: first_stage(), second_stage, third_stage]
    if options.quick:
        stages = [lambda rows: quick_arms()]
    one = functools.partial(run, setup, results["before"])
    with processes(options.quick, options.jobs) as pool:
        for stage in stages:
            done = [arm_of(row) for row in results["rows"]]
            left = [arm for arm in stage(results["rows"]) if arm not in done]
            for row in run_all(pool, options.jobs, one, tuple(left), deadline):
                results["rows"].append(row)
                write(results, options.out)
                left.remove(arm_of(row))
                tests = ", ".join(f"{name} {t['mean']:.3f} ({t['change']:+.3f})" for name, t in row["tests"].items())
                print(f"{arm_of(row)}: {tests}, facts {row['facts']}", flush=True)
            if left:
                print("call again to go on")
                return
    print(table(results))


if __name__ == "__main__":
    main()
