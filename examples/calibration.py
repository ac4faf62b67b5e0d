"""Is the prediction of forgetting calibrated? Predicted against measured rise of the old data's loss.

    python examples/calibration.py

Two settings. Permuted digits, where the network of the demo learns one permutation and is fine-tuned on another; once
stopped after one epoch, still unsure, and once after 15, certain of every training sample. And a small language model:
a Llama of 0.8M parameters on bytes, which learns Python (its own standard library) and is fine-tuned on C++ (the
headers that come with torch). Needs transformers.

Along each run, at a handful of steps, on old data that was held out:

- *measured*: how far the mean loss has risen since the old data were learnt, nats per sample or token, and its standard
  error;
- *predicted*: ``predicted_forgetting`` for the Fisher of each kind;
- the *probe*: ``ForgettingProbe`` with samples of several origins;
- and what takes the prediction apart. The loss along the displacement d is, to second order, g.d + d'Hd/2. *first* is
  g.d; *full* is d'Fd/2 with the whole Fisher matrix, of which the prediction takes the diagonal; *KL* is the divergence
  of the present from the old model on the same data, which d'Fd/2 approximates. So diagonal against full shows what the
  diagonal costs, full against KL the higher orders, and KL against measured what no Fisher can see.

As a control, isotropic noise on the weights instead of training. Runs without a penalty and with one; a penalty sees
one kind, the predictions of the others come from an ``EWCLoss`` of weight 0 beside it.

Each run is written to examples/results/calibration/ when it is done; interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fisher_kinds import fill, learn
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ewc_fast import EWCLoss, estimate_fisher
from ewc_fast.demo import environment
from ewc_fast.demo.data import permuted_digits
from ewc_fast.demo.experiment import EPOCHS, make_model, shuffled_batches
from ewc_fast.forgetting import ForgettingProbe
from ewc_fast.sequences import sample_sequences

RESULTS = Path(__file__).parent / "results" / "calibration"
LENGTH = 128  # bytes in a sequence
NOISE = tuple(10 ** (power / 3) for power in range(-5, 2))  # standard deviation, in units of the weights' own
NOISE_DRAWS = 2
BINS = ((0.01, 0.1), (0.1, 1.0), (1.0, float("inf")))

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """One run of fine-tuning.

    Attributes:
        lr: Adam's learning rate.
        ewc_lambda: Weight of the penalty; 0 for none.
        kind: The penalty's Fisher, a name in the setting's ``estimates``.
        warm_up: Steps over which the learning rate rises.
        damping: The penalty's.
    """

    lr: float
    ewc_lambda: float = 0.0
    kind: str = ""
    warm_up: int = 0
    damping: float = 0.0

    def __str__(self) -> str:
        text = f"lr {self.lr:g}" + (f", warm-up {self.warm_up}" if self.warm_up else "")
        if not self.ewc_lambda:
            return f"plain, {text}"
        damping = f", damping {self.damping:g}" if self.damping else ""
        return f"EWC {self.kind} {self.ewc_lambda:g}{damping}, {text}"


@dataclass
class Setting:
    """A model that has learnt its old data, and what is needed to fine-tune it and to watch it.

    Attributes:
        title: For the tables.
        model: At the weights that the old data left.
        causal: Whether it is a language model: the loss is that of the next token.
        estimates: By name: (loader, keyword arguments of ``estimate_fisher``).
        fisher_data: What the Fishers were taken from: (inputs, labels), for a language model twice the same.
        held_out: Old data that neither the model nor the Fisher has seen.
        new_batches: From a seed, batches of new data without end.
        probe_samples: By name, what ``ForgettingProbe`` keeps, and its keyword arguments.
        plans: The runs.
        steps: When to look.
    """

    title: str
    model: nn.Module
    causal: bool
    estimates: dict[str, tuple[Any, dict[str, Any]]]
    fisher_data: Batch
    held_out: Batch
    new_batches: Callable[[int], Iterator[Batch]]
    probe_samples: dict[str, tuple[Tensor, dict[str, Any]]]
    plans: list[Plan]
    steps: tuple[int, ...]
    anchor: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def restore(self) -> None:
        """The old weights."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.anchor[name])

    def logits(self, data: Batch, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Of every term of the loss: logits (N, C) and label (N,)."""
        inputs, labels = data
        output = self.model(inputs) if weights is None else torch.func.functional_call(self.model, weights, (inputs,))
        logits = output if isinstance(output, Tensor) else output.logits
        if not self.causal:
            return logits, labels
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def loss(self, data: Batch) -> Tensor:
        """The mean over the terms."""
        return nn.functional.cross_entropy(*self.logits(data))


# ---- what is measured at one place ----


class Watch:
    """Everything that is looked at, from the moment at which the old data have been learnt."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        setting.restore()
        generator = torch.Generator().manual_seed(seed)
        self.penalties: dict[str, EWCLoss] = {}
        for name, (loader, arguments) in setting.estimates.items():
            self.penalties[name] = EWCLoss(setting.model, ewc_lambda=0.0)
            self.penalties[name].consolidate(
                fisher=estimate_fisher(setting.model, loader, generator=generator, **arguments)
            )
        self.probes = {name: ForgettingProbe(setting.model, x, **kw) for name, (x, kw) in setting.probe_samples.items()}
        with torch.no_grad():
            self.old_losses = self._losses(setting.held_out)
            self.old_loss_on_fisher_data = setting.loss(setting.fisher_data)
            self.old_logits, self.labels = setting.logits(setting.held_out)

    def _losses(self, data: Batch) -> Tensor:
        """(independent samples,): the mean loss of each, a sequence for a language model."""
        losses = nn.functional.cross_entropy(*self.setting.logits(data), reduction="none")
        return losses.view(len(data[0]), -1).double().mean(1)

    def look(self) -> dict[str, Any]:
        """The present weights; see the module's docstring."""
        setting = self.setting
        with torch.no_grad():
            rises = self._losses(setting.held_out) - self.old_losses
            rise_on_fisher_data = setting.loss(setting.fisher_data) - self.old_loss_on_fisher_data
            now, _ = setting.logits(setting.held_out)
            old = self.old_logits.double().log_softmax(-1)
            kl = (old.exp() * (old - now.double().log_softmax(-1))).sum(-1).mean()
            predicted = {}
            for name, ewc in self.penalties.items():
                ewc()
                predicted[name] = ewc.predicted_forgetting.item()
        first, full = self._orders()
        return {
            "measured": rises.mean().item(),
            "standard_error": (rises.std() / len(rises) ** 0.5).item(),
            "measured_on_fisher_data": rise_on_fisher_data.item(),
            "first": first,
            "full": full,
            "kl": kl.item(),
            "predicted": predicted,
            "probe": {name: [float(probe()), float(probe.standard_error)] for name, probe in self.probes.items()},
        }

    def _orders(self) -> tuple[float, float]:
        """g.d and d'Fd/2 on the held-out data, from the derivative of the logits along d."""
        anchor = self.setting.anchor
        step = {name: p.detach() - anchor[name] for name, p in self.setting.model.named_parameters()}
        _, slope = torch.func.jvp(
            lambda weights: self.setting.logits(self.setting.held_out, weights)[0], (anchor,), (step,)
        )
        slope, probs = slope.double(), self.old_logits.double().softmax(-1)
        mean = (probs * slope).sum(-1)
        first = (mean - slope.gather(1, self.labels[:, None]).squeeze(1)).mean()
        full = ((probs * slope.square()).sum(-1) - mean.square()).mean() / 2
        return first.item(), full.item()


# ---- runs ----


def fine_tune(watch: Watch, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """One run; a row per look."""
    setting, model = watch.setting, watch.setting.model
    setting.restore()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (plan.warm_up + 1)))
    handle = None
    if plan.ewc_lambda:
        ewc = EWCLoss(model, plan.ewc_lambda, damping=plan.damping)
        ewc.consolidate(fisher=watch.penalties[plan.kind].fisher)
        handle = ewc.attach(optimizer)
    rows = []
    for step, batch in enumerate(itertools.islice(setting.new_batches(seed), setting.steps[-1]), 1):
        optimizer.zero_grad()
        loss = setting.loss(batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in setting.steps:
            rows.append({"step": step, "new_loss": loss.item(), **watch.look()})
    if handle is not None:
        handle.remove()
    return rows


def add_noise(watch: Watch, seed: int) -> list[dict[str, Any]]:
    """The control: independent Gaussian noise of one size on all weights; a row per size and draw."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.cat([p.flatten() for p in watch.setting.anchor.values()])
    rows = []
    for size, _ in itertools.product(NOISE, range(NOISE_DRAWS)):
        watch.setting.restore()
        with torch.no_grad():
            for p in watch.setting.model.parameters():
                p += size * weights.std() * torch.randn(p.shape, generator=generator)
        rows.append({"noise": size, **watch.look()})
    return rows


# ---- the two settings ----


def digits(epochs: int, seed: int, quick: bool) -> Setting:
    """The demo's network on its first task; the second is the new one."""
    old, new = permuted_digits(2, seed)
    model = make_model(seed)
    learn(model, old, 5e-3, epochs, torch.Generator().manual_seed(seed), None)
    data = (old.train_inputs, old.train_labels)
    whole = [data]
    batches = list(zip(*(t.split(32) for t in data), strict=True))

    def new_batches(seed: int) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(seed)
        return itertools.chain.from_iterable(shuffled_batches(new, order) for _ in itertools.count())

    estimates: dict[str, tuple[Any, dict[str, Any]]] = {
        "exact": (whole, {"kind": "exact"}),
        "exact, held-out data": ([(old.test_inputs, old.test_labels)], {"kind": "exact"}),
        "sampled, 1 label": (whole, {"kind": "sampled"}),
        "sampled, 10 labels": (whole, {"kind": "sampled", "num_label_samples": 10}),
        "empirical": (whole, {"kind": "empirical"}),
        "predicted": (whole, {"kind": "predicted"}),
        "reversed": (whole, {"kind": "reversed"}),
        "batch of 32": (batches, {"kind": "batch"}),
    }
    return Setting(
        f"digits, {epochs} epoch{'s' if epochs > 1 else ''}",
        model,
        False,
        estimates,
        data,
        (old.test_inputs, old.test_labels),
        new_batches,
        {"training inputs": (old.train_inputs[:64], {}), "held-out inputs": (old.test_inputs[:64], {})},
        [
            Plan(1e-5),
            Plan(1e-4),
            Plan(1e-3),
            Plan(5e-3),
            Plan(5e-3, 10.0, "exact"),
            Plan(5e-3, 100.0, "exact"),
            Plan(5e-3, 1000.0, "exact"),
            Plan(5e-3, 100.0, "exact", damping=0.1),
        ],
        (1, 3) if quick else (1, 2, 5, 10, 20, 44, 110, 220, 440, 660),
    )


@functools.lru_cache
def text(part: str) -> Tensor:
    """Bytes, (N,) int64: ``"old"`` and ``"held out"`` are Python's standard library, ``"new"`` is C++."""
    if part == "new":
        files = sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h"))
    else:
        every = sorted(Path(os.__file__).parent.glob("*.py"))
        files = [file for index, file in enumerate(every) if (index % 10 == 0) == (part == "held out")]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def windows(part: str, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) bytes from random places."""
    source = text(part)
    return source[torch.randint(len(source) - LENGTH, (count, 1), generator=generator) + torch.arange(LENGTH)]


def make_language_model(seed: int, quick: bool) -> LlamaForCausalLM:
    """A Llama on bytes; without fused attention, which has no derivative in forward mode."""
    width = 32 if quick else 128
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 21 // 8,
        num_hidden_layers=1 if quick else 4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model.eval()


def learn_python(model: nn.Module, steps: int, seed: int) -> None:
    """Trains from scratch: batches of 16 windows, warm-up, then a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    factor = [min(1.0, (step + 1) / 50) * (1 - step / steps) for step in range(steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor[min(step, steps - 1)])
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = windows("old", 16, generator)
        model(inputs, labels=inputs).loss.backward()
        optimizer.step()
        schedule.step()


def language_model(seed: int, quick: bool, work: Path) -> Setting:
    """A small language model that has learnt Python; C++ is new. The trained weights are kept in ``work``."""
    model = make_language_model(seed, quick)
    steps = 20 if quick else 700
    kept = work / f"python_{'quick' if quick else 'whole'}_{seed}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        learn_python(model, steps, seed)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    generator = torch.Generator().manual_seed(1000 + seed)
    num = 16 if quick else 256
    old = windows("old", num, generator)
    held_out = windows("held out", 64, generator)
    own = sample_sequences(model, num, LENGTH, generator=generator)
    num_samples = 8 if quick else 64
    prompts = windows("old", num_samples, generator)[:, :16]

    def loader(sequences: Tensor) -> list[Tensor]:
        return list(sequences.split(16))

    def new_batches(seed: int) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(seed)
        while True:
            inputs = windows("new", 16, order)
            yield inputs, inputs

    lm = {"loss": "causal_lm"}
    estimates: dict[str, tuple[Any, dict[str, Any]]] = {
        "sampled, 1 label": (loader(old), {"kind": "sampled", **lm}),
        "sampled, 4 labels": (loader(old), {"kind": "sampled", "num_label_samples": 4, **lm}),
        "empirical": (loader(old), {"kind": "empirical", **lm}),
        "empirical, own text": (loader(own), {"kind": "empirical", **lm}),
        "predicted": (loader(old), {"kind": "predicted", **lm}),
        "reversed": (loader(old), {"kind": "reversed", **lm}),
        "batch of 16": (loader(old), {"kind": "batch", **lm}),
    }
    return Setting(
        "language model",
        model,
        True,
        estimates,
        (old, old),
        (held_out, held_out),
        new_batches,
        {
            "temperature 1": (own[:num_samples], {}),
            "temperature 0.7": (sample_sequences(model, num_samples, LENGTH, generator, temperature=0.7), {}),
            "from prompts": (
                sample_sequences(model, num_samples, LENGTH, generator, prompts=prompts),
                {"num_prompt_tokens": prompts.shape[1]},
            ),
        },
        [
            Plan(1e-4),
            Plan(1e-3),
            Plan(1e-3, warm_up=50),
            Plan(1e-3, 10.0, "sampled, 1 label"),
            Plan(1e-3, 100.0, "sampled, 1 label"),
            Plan(1e-3, 1000.0, "sampled, 1 label"),
            Plan(1e-3, 100.0, "sampled, 1 label", damping=0.1),
        ],
        (1, 3) if quick else (1, 2, 5, 10, 20, 50, 100, 150),
    )


# ---- what is shown ----

GROUPS = ("noise", "plain", "penalty")


def group_of(run: str) -> str:
    """Noise, plain training, or training with a penalty."""
    return run if run == "noise" else "plain" if run.startswith("plain") else "penalty"


def points(rows: Sequence[dict[str, Any]], setting: str, group: str) -> list[dict[str, Any]]:
    """A setting's rows in which something was forgotten, by more than three standard errors."""
    return [
        r
        for r in rows
        if r["setting"] == setting
        and group_of(r["run"]) == group
        and r["measured"] > max(BINS[0][0], 3 * r["standard_error"])
    ]


def within(ratios: Sequence[float]) -> float:
    """The share that is right within a factor of two."""
    return float(np.mean([0.5 <= x <= 2.0 for x in ratios]))


def _cell(ratios: Sequence[float]) -> str:
    return f"{np.median(ratios):.2g} ({within(ratios):.0%})"


def _bin_name(low: float, high: float) -> str:
    return f"{low:g} to {high:g}" if high < float("inf") else f"over {low:g}"


def prediction_table(rows: Sequence[dict[str, Any]], setting: str) -> str:
    """Markdown: median of predicted over measured, and the share within a factor of two, by the measured rise."""
    columns = [
        (group, low, high, [r for r in points(rows, setting, group) if low <= r["measured"] < high])
        for group in GROUPS
        for low, high in BINS
    ]
    columns = [c for c in columns if len(c[3]) >= 2]
    lines = [
        "| Fisher | " + " | ".join(f"{group}, {_bin_name(low, high)}" for group, low, high, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    names = next(r for r in rows if r["setting"] == setting)["predicted"]
    for name in names:
        cells = [_cell([r["predicted"][name] / r["measured"] for r in c[3]]) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| *points* | " + " | ".join(str(len(c[3])) for c in columns) + " |")
    return "\n".join(lines)


def _reference_kind(setting: str) -> str:
    return "sampled, 4 labels" if setting == "language model" else "exact"


def anatomy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: where the prediction loses what it loses; medians over the points of the table above."""
    lines = [
        "| setting | | diagonal / full | full / KL | KL / measured | first order / measured | "
        "measured on the Fisher's data / on held-out |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        for group in GROUPS:
            mine = points(rows, setting, group)
            if len(mine) < 2:
                continue
            kind = _reference_kind(setting)
            ratios = [
                [r["predicted"][kind] / r["full"] for r in mine],
                [r["full"] / r["kl"] for r in mine],
                [r["kl"] / r["measured"] for r in mine],
                [r["first"] / r["measured"] for r in mine],
                [r["measured_on_fisher_data"] / r["measured"] for r in mine],
            ]
            lines.append(f"| {setting} | {group} | " + " | ".join(f"{np.median(x):.2g}" for x in ratios) + " |")
    return "\n".join(lines)


def probe_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the probe over the measured rise, likewise."""
    lines = ["| setting | samples | noise | plain | penalty |", "|---|---|---:|---:|---:|"]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        for name in next(r for r in rows if r["setting"] == setting)["probe"]:
            cells = []
            for group in GROUPS:
                ratios = [r["probe"][name][0] / r["measured"] for r in points(rows, setting, group)]
                cells.append(_cell(ratios) if len(ratios) > 1 else "")
            lines.append(f"| {setting} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_table(rows: Sequence[dict[str, Any]], setting: str, steps: Sequence[int]) -> str:
    """Markdown: measured / probe / prediction along one seed's runs."""
    mine = [r for r in rows if r["setting"] == setting and r["run"] != "noise" and r["seed"] == 0]
    kind, probe = _reference_kind(setting), next(iter(mine[0]["probe"]))
    lines = ["| run | " + " | ".join(f"step {s}" for s in steps) + " |", "|---|" + "---:|" * len(steps)]
    for run in dict.fromkeys(r["run"] for r in mine):
        by_step = {r["step"]: r for r in mine if r["run"] == run}
        cells = [
            f"{r['measured']:+.2g} / {r['probe'][probe][0]:.2g} / {r['predicted'][kind]:.2g}"
            for r in (by_step[s] for s in steps)
        ]
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_COLOURS = {
    "exact": "#000000",
    "exact, held-out data": "#e69f00",
    "sampled, 1 label": "#56b4e9",
    "sampled, 4 labels": "#009e73",
    "sampled, 10 labels": "#009e73",
    "empirical": "#0072b2",
    "empirical, own text": "#e69f00",
    "predicted": "#d55e00",
    "reversed": "#cc79a7",
    "batch of 16": "#999999",
    "batch of 32": "#999999",
}
_MEASURED, _PREDICTED = (1e-3, 3e1), (1e-6, 1e2)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Predicted over measured for every kind, and the probe; the band is a factor of two."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    figure = Figure(figsize=(11.5, 3.3 * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), len(GROUPS), sharex=True, sharey=True, squeeze=False)
    for line, setting in zip(panels, settings, strict=True):
        first = next(r for r in rows if r["setting"] == setting)
        probe = next(iter(first["probe"]))
        for axis, group in zip(line, GROUPS, strict=True):
            mine = [
                r
                for r in rows
                if r["setting"] == setting and group_of(r["run"]) == group and r["measured"] > 3 * r["standard_error"]
            ]
            measured = [r["measured"] for r in mine]
            axis.fill_between(_MEASURED, [x / 2 for x in _MEASURED], [x * 2 for x in _MEASURED], color="0.9", lw=0)
            for name in first["predicted"]:
                predicted = [r["predicted"][name] for r in mine]
                axis.scatter(measured, predicted, s=8, lw=0, alpha=0.7, color=_COLOURS[name], label=name)
            probed = [r["probe"][probe][0] for r in mine]
            axis.scatter(measured, probed, s=14, marker="x", lw=0.8, color="red", label=f"probe, {probe}")
            axis.set(xscale="log", yscale="log", xlim=_MEASURED, ylim=_PREDICTED)
            axis.set_title(f"{setting}: {group}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("predicted (nats)")
        line[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)
    for axis in panels[-1]:
        axis.set_xlabel("measured on held-out old data (nats)")
    return figure


STEPS_SHOWN = {"language model": (1, 5, 20, 50, 150)}


def fill_document(rows: Sequence[dict[str, Any]], document: Path) -> None:
    """Writes the tables into the document."""
    for setting in dict.fromkeys(r["setting"] for r in rows):
        fill(document, f"prediction, {setting}", prediction_table(rows, setting))
    fill(document, "anatomy", anatomy_table(rows))
    fill(document, "probe", probe_table(rows))
    for setting, steps in STEPS_SHOWN.items():
        fill(document, f"runs, {setting}", run_table(rows, setting, steps))


def write(results: dict[str, Any], folder: Path) -> None:
    """results.json, and its rows as points.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "results.json.tmp"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(folder / "results.json")
    flat = []
    for row in results["rows"]:
        plain = {k: v for k, v in row.items() if k not in ("predicted", "probe")}
        plain |= {f"predicted: {name}": value for name, value in row["predicted"].items()}
        flat.append(plain | {f"probe: {name}": value for name, (value, _) in row["probe"].items()})
    names = list(dict.fromkeys(name for row in flat for name in row))
    with (folder / "points.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in flat)


def parser_for(description: str | None, results: Path) -> argparse.ArgumentParser:
    """With the options of an example that goes on from its results, and trains a language model once."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results, help="folder to write to, and to go on from")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"ewc_fast_{results.name}",
        help="folder that keeps the trained language model",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Computes what is missing of the results, and draws."""
    parser = parser_for(__doc__, RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; call again to go on")
    parser.add_argument("--docs", type=Path, help="folder of fisher.md, to write the tables and the picture there")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps: seconds, to see it work")
    options = parser.parse_args(arguments)

    deadline = time.monotonic() + 60 * options.minutes
    seeds = (0,) if options.quick else (0, 1, 2)
    settings: dict[tuple[str, int], Callable[[], Setting]] = {
        (f"digits {epochs}", seed): functools.partial(digits, epochs, seed, options.quick)
        for epochs in ((1,) if options.quick else (1, EPOCHS))
        for seed in seeds
    }
    settings["language model", 0] = functools.partial(language_model, 0, options.quick, options.work)

    path = options.out / "results.json"
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **environment.describe(),
        "rows": json.loads(path.read_text())["rows"] if path.exists() else [],
        "done": json.loads(path.read_text())["done"] if path.exists() else [],
    }
    for (key, seed), make in settings.items():
        if f"{key} {seed}" in results["done"]:
            continue
        if time.monotonic() > deadline:
            print("call again to go on")
            return
        setting = make()
        watch = Watch(setting, seed)
        runs: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
            ("noise", functools.partial(add_noise, watch, seed))
        ]
        runs += [(str(plan), functools.partial(fine_tune, watch, plan, seed)) for plan in setting.plans]
        ran = {(r["setting"], r["seed"], r["run"]) for r in results["rows"]}
        for name, run in runs:
            if (setting.title, seed, name) in ran:
                continue
            if time.monotonic() > deadline:
                print("call again to go on")
                return
            results["rows"] += [{"setting": setting.title, "seed": seed, "run": name, **row} for row in run()]
            write(results, options.out)
        results["done"].append(f"{key} {seed}")
        write(results, options.out)
    rows = results["rows"]
    for setting_title in dict.fromkeys(r["setting"] for r in rows):
        print(f"{setting_title}: predicted over measured\n\n{prediction_table(rows, setting_title)}\n")
    print(f"{anatomy_table(rows)}\n\n{probe_table(rows)}")
    if options.docs is not None:
        fill_document(rows, options.docs / "fisher.md")
        draw(rows).savefig(options.docs / "images" / "calibration.png", dpi=110)


if __name__ == "__main__":
    main()
