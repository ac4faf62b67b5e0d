"""The command line of ``python -m ewc_fast bench --fisher``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ewc_fast.bench import environment
from ewc_fast.bench.fisher import language, measure, nets, packages, report
from ewc_fast.bench.peers import Unavailable

LANGUAGE = "llama"
DRAWN = (nets.MAIN, "mlp_85k", "conv", "encoder")


def main(argv: Sequence[str]) -> int:
    """Parses the arguments, measures, prints, and writes if asked to. Returns the exit code."""
    start = time.perf_counter()
    options = _parse(argv)
    results: dict[str, Any] = {
        **environment.describe(options.device),
        "command": shlex.join(["python", "-m", "ewc_fast", "bench", "--fisher", *options.told]),
        "nets": [],
        "language": None,
    }
    results["versions"] |= packages.versions()
    if malloc := [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_")]:
        results["machine"]["malloc"] = " ".join(malloc)
    folder = None
    if options.out is not None:
        folder = Path(str(options.out).replace("{machine}", environment.machine_name(results["machine"])))
        folder = folder / "fisher"
        if options.add and (folder / "results.json").exists():
            results = report.merged(report.read_json(folder / "results.json"), results)
        folder.mkdir(parents=True, exist_ok=True)
    for net in options.chosen:
        result = measure.measure(net, options.ways, options.rounds, options.threads, partial(_say, net.name))
        print("\n" + report.net_table(result), flush=True)
        results = report.merged(results, {**results, "nets": [result], "language": None})
        if folder is not None:
            report.write_json(results, folder / "results.json")  # what there is, should the rest be cut short
    if options.language:
        try:
            many = options.device.type == "cuda"  # a sequence alone leaves a card idle
            results["language"] = language.measure(
                sequences=32 if many else 8,
                batches=(1, 8, 32) if many else (1, 4, 8),
                rounds=options.rounds,
                device=options.device,
                progress=partial(_say, LANGUAGE),
            )
            print("\n" + report.language_table(results["language"]), flush=True)
        except Unavailable as error:
            _say(LANGUAGE, f"not measured: {error}")
    print("\n" + report.bars_table(report.bars(results)))
    print(f"\n{time.perf_counter() - start:.0f} s. ", end="")
    if folder is None:
        print("Nothing written: --out DIR writes JSON, CSV, a table and a picture")
        return 0
    print("Written: " + ", ".join(str(path) for path in write(results, folder)))
    return 0


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes ``results.json``, ``results.csv``, ``results.md`` and, where matplotlib is there, ``time_by_way.png``.

    Returns:
        What was written. A picture that could not be drawn is told of on stderr.
    """
    written = [folder / "results.json", folder / "results.csv", folder / "results.md"]
    report.write_json(results, written[0])
    written[1].write_text(report.to_csv(results))
    written[2].write_text(report.section(results))
    if importlib.util.find_spec("matplotlib") is None:
        _say("no picture", 'matplotlib is missing: pip install --no-build-isolation ".[bench]"')
        return written
    from ewc_fast.bench.fisher import pictures

    caption = f"{report.where(results)}, {results['date']}; medians, 10th to 90th percentile"
    drawn = [net["name"] for net in results["nets"] if net["name"] in DRAWN]
    pictures.time_by_way(results, drawn or None, caption).savefig(folder / "time_by_way.png", dpi=150)
    return [*written, folder / "time_by_way.png"]


def _say(about: str, text: str) -> None:
    print(f"{about}: {text}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    every = [way.name for way in measure.find(None)]
    parser = argparse.ArgumentParser(
        prog="ewc-fast bench --fisher",
        description="What a Fisher diagonal costs, beside a plain forward and backward, loops, vmap and packages.",
        epilog=f"Nets: {', '.join(nets.NETS)}, {LANGUAGE}. Ways: {', '.join(every)}.",
    )
    parser.add_argument("--nets", type=names, help=f"comma-separated; all if left out. {LANGUAGE} needs transformers")
    parser.add_argument("--ways", type=names, help="comma-separated; all if left out. plain always runs")
    parser.add_argument("--device", default="cpu", help=f"cpu, or cuda for the {LANGUAGE}; cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each way; 9")
    parser.add_argument("--threads", type=names, help="comma-separated numbers to try; 1 and torch's own")
    parser.add_argument("--out", type=Path, help="writes to DIR/fisher; {machine} in it becomes the machine's name")
    parser.add_argument("--add", action="store_true", help="keep what DIR/fisher has of other nets")
    options = parser.parse_args(argv)
    chosen = options.nets if options.nets is not None else [*nets.NETS, LANGUAGE]
    options.language = LANGUAGE in chosen
    options.told = [] if options.device == "cpu" else ["--device", options.device, "--nets", LANGUAGE]
    if options.device != "cpu" and chosen != [LANGUAGE]:
        parser.error(f"--device {options.device} measures the {LANGUAGE} alone: add --nets {LANGUAGE}")
    try:
        options.device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device {options.device}: {error}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    try:
        options.chosen = nets.find([name for name in chosen if name != LANGUAGE])
        options.ways = measure.find(options.ways)
        own = options.threads or [1, torch.get_num_threads()]
        options.threads = sorted({int(number) for number in own})
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.threads[0] < 1:
        parser.error("--threads must be at least 1")
    return options
