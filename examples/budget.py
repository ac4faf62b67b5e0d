"""Does forgetting end at its budget? Two settings, learning rates a factor of ten apart, no tuning.

    python examples/budget.py

- *digits*: the demo's network has learnt one permutation of the digits in 4 epochs, and learns another in 600 steps.
- *language model*: a Llama of 0.1M parameters on bytes has learnt Python in 500 steps (its standard library), and
  learns C++ in 400 (the headers that come with torch). Needs transformers.

``EWCBudget`` with its default settings, lambda from 100, EWCAdamW with the proximal coupling. The learning rate falls
linearly to 0, or is constant. Beside each other: without EWC, with a probe, and by the prediction alone. Reported are,
at the end: what the probe measures; what ``predicted_forgetting`` says; by how much the mean loss on old data that
were held out, from the model, the Fisher and the probe, has risen; and what was learnt of the new task.

Each run is written to examples/results/budget/results.json when it is done; interrupted, it goes on where it was.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibration import parser_for, windows
from fisher_kinds import fill, learn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ewc_fast import EWCAdamW, EWCBudget, EWCLoss, ForgettingProbe, sample_sequences
from ewc_fast.demo import environment
from ewc_fast.demo.data import permuted_digits
from ewc_fast.demo.experiment import make_model, shuffled_batches

LENGTH = 64  # bytes in a sequence
RESULTS = Path(__file__).parent / "results" / "budget"


@dataclass
class Setting:
    """A model that has learnt its old task, and what is needed to teach it the new one.

    Attributes:
        model: At the old task's weights.
        consolidate: Estimates the old task's Fisher.
        probe_samples: Unlabelled inputs of the old task, or text that the model has written itself.
        loss: Of the model on a batch.
        new_batches: Without end.
        held_out: A batch of the old task.
        new_test: A batch of the new one.
        accuracy: Whether the new task's result is its accuracy, not its loss.
        budget: Nats.
        rates: Learning rates.
        steps: Of the new task.
    """

    model: nn.Module
    consolidate: Callable[[EWCLoss], None]
    probe_samples: Tensor
    loss: Callable[[nn.Module, Any], Tensor]
    new_batches: Callable[[], Iterator[Any]]
    held_out: Any
    new_test: Any
    accuracy: bool
    budget: float
    rates: tuple[float, float]
    steps: int


def digits(quick: bool, work: Path) -> Setting:
    """The demo's network."""
    old, new = permuted_digits(2, 0)
    model = make_model(0)
    learn(model, old, 1e-3, 1 if quick else 4, torch.Generator().manual_seed(0), None)

    def new_batches() -> Iterator[Any]:
        order = torch.Generator().manual_seed(0)
        return itertools.chain.from_iterable(shuffled_batches(new, order) for _ in itertools.count())

    return Setting(
        model,
        lambda ewc: ewc.consolidate([(old.train_inputs, old.train_labels)], kind="exact"),
        old.train_inputs,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        new_batches,
        (old.test_inputs, old.test_labels),
        (new.test_inputs, new.test_labels),
        True,
        0.1,
        (1e-3, 1e-2),
        50 if quick else 600,
    )


def batch_of(part: str, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) bytes."""
    return windows(part, count, generator)[:, :LENGTH]


def language_model(quick: bool, work: Path) -> Setting:
    """A small Llama; its weights after the old task are kept in ``work``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    steps = 20 if quick else 500
    kept = work / f"python_{steps}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
            batch = batch_of("old", 16, generator)
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
        work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    count = 16 if quick else 128
    own = sample_sequences(model, 2 * count, LENGTH, generator=generator)

    def new_batches() -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(2)
        return (batch_of("new", 8, order) for _ in itertools.count())

    return Setting(
        model,
        lambda ewc: ewc.consolidate(list(own[count:].split(16)), kind="empirical", loss="causal_lm"),
        own[:count],
        lambda model, batch: model(batch, labels=batch).loss,
        new_batches,
        batch_of("held out", 2 * count, generator),
        batch_of("new", 2 * count, torch.Generator().manual_seed(3)),
        False,
        0.1,
        (5e-4, 5e-3),
        20 if quick else 400,
    )


def run(setting: Setting, method: str, lr: float, schedule: str) -> dict[str, Any]:
    """One run from the old task's weights."""
    model = copy.deepcopy(setting.model)
    ewc = EWCLoss(model, ewc_lambda=100.0, damping=0.1)
    setting.consolidate(ewc)
    probe = ForgettingProbe(model, setting.probe_samples, batch_size=128)
    optimizer = EWCAdamW(model.parameters(), lr=lr, weight_decay=0.0, ewc=ewc, coupling="proximal")
    budget = None
    if method == "without EWC":
        ewc.ewc_lambda = 0.0  # predicts, and does nothing
    else:
        budget = EWCBudget(ewc, setting.budget, probe if method == "probe" else None)
    with torch.no_grad():
        old_loss = setting.loss(model, setting.held_out).item()
    for step, batch in enumerate(itertools.islice(setting.new_batches(), setting.steps)):
        if schedule == "linear":
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / setting.steps)
        optimizer.zero_grad()
        setting.loss(model, batch).backward()
        optimizer.step()
        if budget is not None:
            budget.step()
    with torch.no_grad():
        ewc()
        row = {
            "method": method,
            "lr": lr,
            "schedule": schedule,
            "budget": setting.budget,
            "measured": float(probe()),
            "standard_error": float(probe.standard_error),
            "predicted": ewc.predicted_forgetting.item(),
            "true_rise": setting.loss(model, setting.held_out).item() - old_loss,
            "new_loss": setting.loss(model, setting.new_test).item(),
            "new_accuracy": None,
            "ewc_lambda": ewc.ewc_lambda,
        }
        if budget is not None:
            looks = budget.measurements
            row |= {
                "looks": len(looks),
                "highest_look": max(m.forgetting for m in looks),
                "smallest_lambda": min(m.ewc_lambda for m in looks),
                "largest_lambda": max(m.ewc_lambda for m in looks),
            }
        if setting.accuracy:
            inputs, labels = setting.new_test
            row["new_accuracy"] = (model(inputs).argmax(1) == labels).double().mean().item()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per run."""
    lines = [
        "| setting | learning rate | kept by | measured / budget (highest look) | true rise / budget | "
        "predicted / budget | lambda, smallest to largest | at the end | new task |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        highest = f" ({r['highest_look'] / r['budget']:.1f})" if r["method"] == "probe" else ""
        spread = "| "
        if "looks" in r:
            spread = f"{r['smallest_lambda']:.2g} to {r['largest_lambda']:.2g} | {r['ewc_lambda']:.2g}"
        new = f"{r['new_loss']:.2f} nats" if r["new_accuracy"] is None else f"{r['new_accuracy']:.1%}"
        lines.append(
            f"| {r['setting']}, {r['budget']:g} | {r['lr']:g} {r['schedule']} | {r['method']} | "
            f"{r['measured'] / r['budget']:.2f}{highest} | {r['true_rise'] / r['budget']:.2f} | "
            f"{r['predicted'] / r['budget']:.2g} | {spread} | {new} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Computes what is missing of the results."""
    parser = parser_for(__doc__, RESULTS)
    parser.add_argument("--docs", type=Path, help="folder of optimizers.md, to write the table there")
    parser.add_argument("--quick", action="store_true", help="a few steps: seconds, to see it work")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for name, make in (("digits", digits), ("language model", language_model)):
        setting = make(options.quick, options.work)
        jobs = [(m, lr, "linear") for m in ("probe", "without EWC", "prediction") for lr in setting.rates]
        if name == "digits":
            jobs += [("probe", lr, "constant") for lr in setting.rates]
        for method, lr, schedule in jobs:
            if any((r["setting"], r["method"], r["lr"], r["schedule"]) == (name, method, lr, schedule) for r in rows):
                continue
            rows.append({"setting": name, **run(setting, method, lr, schedule)})
            results = {"date": datetime.date.today().isoformat(), **environment.describe(), "rows": rows}
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if options.docs is not None:
        fill(options.docs / "optimizers.md", "budget", table(rows))


if __name__ == "__main__":
    main()
