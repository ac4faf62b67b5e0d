"""The benchmark's command line, and the order of things."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ewc_fast.bench import environment, measure, peers, report, step, workloads
from ewc_fast.bench.measure import BASELINE, LIMIT
from ewc_fast.bench.peers import Peer
from ewc_fast.bench.problem import Problem
from ewc_fast.bench.workloads import WORKLOADS, Workload

DEFAULT_WORKLOADS = ("many_tiny", "many_small", "mlp", "gpt2_48m")
QUICK_WORKLOADS = ("many_tiny", "mlp", "resnet50")
QUICK_GROWTH = (1_000_000, 4_000_000, 16_000_000)
GROWTH_PEERS = ("eager", "loop", "level1", "level2", "value", LIMIT)
HALF_PEERS = ("eager", "loop", "loop_no_value", "foreach", "level1", "level2", "value", LIMIT)  # at bf16 throughout
PREDICTED_PEERS = ("eager", "loop", "level1", "level2", LIMIT)
LARGE_NUMEL = 60_000_000  # from here on a third of the rounds: a call takes seconds, and its spread is small
PREDICT_FROM = 200_000_000  # at most: with larger models plain PyTorch waits for fresh pages, not for bandwidth
MEMORY_SHARE = 0.9  # of what is free
STEP_BYTES = 10 << 30  # GPT-2 small with its optimizer and EWC's state
STEP_ROUNDS = 9  # a step is seconds on a CPU
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Unmeasured:
    """A workload that was not measured, and why."""

    workload: Workload
    reason: str


def main(argv: Sequence[str]) -> int:
    """Parses the arguments, measures, prints, and writes if asked to. Returns the exit code."""
    start = time.perf_counter()
    options = _parse(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = _chosen_peers(options)
    measured: list[dict[str, Any]] = []
    growth: list[dict[str, Any]] = []
    unmeasured: list[Unmeasured] = []
    results: dict[str, Any] = {
        **environment.describe(device, options.backend),
        "command": shlex.join(["python", "-m", "ewc_fast", "bench", *_without_out(argv)]),
        "workloads": measured,
        "growth": growth,
        "steps": [],
        "predicted": [],
    }
    print(_introduction(results), flush=True)
    folder = None
    if options.out is not None:
        folder = Path(str(options.out).replace("{machine}", environment.machine_name(results["machine"])))
        folder.mkdir(parents=True, exist_ok=True)

    def keep(result: dict[str, Any] | None, section: list[dict[str, Any]]) -> bool:
        if result is not None:
            section.append(result)
            if folder is not None:  # what there is, should the rest be cut short
                report.write_json(results, folder / "results.json")
        return result is not None

    runs = [(workload, chosen, options, not options.all) for workload in options.workloads]
    if options.all and options.dtype is torch.float32:
        half = argparse.Namespace(**{**vars(options), "dtype": torch.bfloat16, "fisher_dtype": None})
        runs.append((WORKLOADS[report.MAIN], peers.find(HALF_PEERS), half, True))
    for workload, some, how, asked_for in runs:
        if keep(_run(workload, some, how, unmeasured, asked_for=asked_for), measured):
            print("\n" + report.format_workload(measured[-1]), flush=True)
    for numel in options.growth_sizes:
        scaled = workloads.scaled(numel)
        keep(_run(scaled, peers.find(GROWTH_PEERS), options, unmeasured, asked_for=True), growth)
    if growth:
        print("\n" + report.format_growth(growth), flush=True)
    if options.steps:
        results["steps"] = _measure_steps(options, device)
    reference = [w for w in [*measured, *growth] if w["parameters"] <= PREDICT_FROM]
    results["predicted"] = predict(unmeasured, reference, options.dtype, options.fisher_dtype)
    if results["predicted"]:
        print("\n" + report.format_predicted(results["predicted"]))
    if report.bars(results):
        print("\n" + report.format_bars(results))
    results["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\n{results['seconds']:.0f} s. ", end="")
    if folder is None:
        print("Nothing written: --out DIR writes JSON, CSV and pictures")
        return 0
    print("Written: " + ", ".join(str(path) for path in write(results, folder)))
    return 0


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes ``results.json``, ``results.csv`` and, where matplotlib is there, the two pictures.

    Returns:
        What was written. Pictures that could not be drawn are told of on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "results.json", folder / "results.csv"]
    report.write_json(results, written[0])
    written[1].write_text(report.to_csv(results))
    if importlib.util.find_spec("matplotlib") is None:
        print(
            'ewc-fast bench: no pictures, for matplotlib is missing: pip install --no-build-isolation ".[bench]"',
            file=sys.stderr,
        )
        return written
    from ewc_fast.bench import pictures

    caption = f"{report.where(results)}, {results['date']}"
    figures = {}
    if results["workloads"]:
        figures["time_by_peer.png"] = pictures.time_by_peer(report.main_workload(results), caption)
    sizes = results["growth"] or [w for w in results["workloads"] if w["parameters"] >= 500_000]
    if sizes:
        figures["roofline.png"] = pictures.roofline(sizes, caption)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
        written.append(folder / name)
    return written


def predict(
    unmeasured: Sequence[Unmeasured],
    measured: Sequence[dict[str, Any]],
    dtype: torch.dtype,
    fisher_dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Memory and time of what was not measured.

    Args:
        unmeasured: What to predict.
        measured: What was measured; each peer's bytes per second on the largest are what is counted with.
        dtype, fisher_dtype: As in :meth:`Workload.bytes_needed`.

    Returns:
        JSON-compatible, one per workload.
    """
    largest = max(measured, key=lambda workload: workload["parameters"], default=None)
    speeds = {
        peer["name"]: (peer["bytes_per_parameter"], peer["gb_per_s"])
        for peer in (largest["peers"] if largest else [])
        if peer["name"] in PREDICTED_PEERS and peer["gb_per_s"]
    }
    return [
        {
            "name": u.workload.name,
            "description": u.workload.description,
            "parameters": u.workload.numel,
            "tensors": u.workload.tensors,
            "reason": u.reason,
            "bytes_needed": u.workload.bytes_needed(dtype, fisher_dtype),
            "predicted_ms": {name: size * u.workload.numel / speed / 1e6 for name, (size, speed) in speeds.items()},
            "predicted_from": largest["name"] if largest else None,
        }
        for u in unmeasured
    ]


def those_that_fit(
    chosen: Sequence[Peer], numel: int, dtype: torch.dtype, free: int | None
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be measured together in the memory that is free: those that take most are left out first.

    Args:
        chosen: In the order of the tables. Level 2 and ``copy_`` stay, or none does.
        numel, dtype: Of the parameters.
        free: Bytes; None if unknown, and then everything fits.

    Returns:
        Those that fit, and why the others do not, by name.
    """
    fitting, too_large = list(chosen), {}
    while free is not None and (needed := measure.bytes_to_measure(numel, dtype, fitting)) > MEMORY_SHARE * free:
        reason = f"measuring it takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        largest = max(fitting, key=lambda peer: (peer.keeps + peer.temporaries, peer.name not in (BASELINE, LIMIT)))
        if largest.name in (BASELINE, LIMIT):
            return [], dict.fromkeys((peer.name for peer in chosen), reason)
        fitting.remove(largest)
        too_large[largest.name] = reason
    return fitting, too_large


def rounds_for(numel: int, rounds: int) -> int:
    """The rounds for a model of some size: all of them, or a third of them, but at least 5, for a large one."""
    return rounds if numel < LARGE_NUMEL else min(rounds, max(5, rounds // 3))


def _run(
    workload: Workload,
    chosen: Sequence[Peer],
    options: argparse.Namespace,
    unmeasured: list[Unmeasured],
    *,
    asked_for: bool,
) -> dict[str, Any] | None:
    """Measures a workload, if it fits into memory; if not, says so in ``unmeasured`` and returns None."""
    if workload.on_paper and not asked_for:
        unmeasured.append(Unmeasured(workload, "on paper only"))
        return None
    device = torch.device(options.device)
    free = measure.available_bytes(device)
    fitting, too_large = those_that_fit(chosen, workload.numel, options.dtype, free)
    if not fitting:
        unmeasured.append(Unmeasured(workload, "; ".join(dict.fromkeys(too_large.values()))))
        return None
    _say(f"{workload.name}: {workload.numel:,} parameters")
    problem = Problem(workload, device, options.dtype, options.fisher_dtype, options.backend)
    result = measure.measure(
        problem, fitting, rounds_for(workload.numel, options.rounds), lambda doing: _say(f"{workload.name}: {doing}")
    )
    del problem
    gc.collect()  # a model of gigabytes may hang in a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
    as_dict = measure.as_dict(result)
    return {**as_dict, "skipped": {**as_dict["skipped"], **too_large}}


def _measure_steps(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The whole training step: sizes that a machine of the kind would train with."""
    config = step.CONFIGS["gpt2_mini" if options.quick else "gpt2_small"]
    free = measure.available_bytes(device)
    if not options.quick and free is not None and free < STEP_BYTES:
        _say(f"no training steps: they take {STEP_BYTES / 2**30:.0f} GiB, {free / 2**30:.1f} GiB are free")
        return []
    on_gpu = device.type == "cuda"
    batch, tokens = (8, 1024) if on_gpu and not options.quick else (1, 128)
    results = step.measure_steps(
        config,
        device,
        batch,
        tokens,
        min(options.rounds, STEP_ROUNDS),
        autocast=torch.bfloat16 if on_gpu else None,
        backend=options.backend,
        progress=lambda doing: _say(f"training step: {doing}"),
    )
    print("\n" + step.table(results), flush=True)
    return results


def _without_out(argv: Sequence[str]) -> list[str]:
    """The arguments that say what is measured; not where to."""
    kept, skip = [], False
    for argument in argv:
        if not skip and not argument.startswith("--out="):
            kept.append(argument)
        skip = argument == "--out"
        if skip:
            kept.pop()
    return kept


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _introduction(results: dict[str, Any]) -> str:
    lines = [f"{results['date']}, {report.where(results)}"]
    if results["kernels"]["backend"] == "reference":
        lines.append(f"ewc_fast runs on its PyTorch reference here: {results['kernels']['reason']}")
    return "\n".join(lines)


def _chosen_peers(options: argparse.Namespace) -> list[Peer]:
    if options.peers:
        needed = [name for name in (BASELINE, LIMIT) if name not in options.peers]
        return peers.find([*options.peers, *needed])
    every = peers.all_peers().values()
    return [peer for peer in every if not (options.quick and peer.name.startswith("compile_"))]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ewc-fast bench",
        description="What EWC's penalty and its gradient cost per step, beside what one would otherwise write. What a "
        "Fisher diagonal costs: --fisher first (bench --fisher --help); what EWC adds to an optimizer's step: "
        "--optimizers first.",
        epilog=f"Workloads: {', '.join(WORKLOADS)}. Peers: {', '.join(peers.all_peers())}.",
    )

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser.add_argument(
        "--quick", action="store_true", help="under a minute: smaller models, fewer rounds, no compiler"
    )
    parser.add_argument(
        "--all", action="store_true", help="every workload that fits into memory, bf16, --growth and --steps"
    )
    parser.add_argument("--workloads", type=names, help=f"comma-separated; {','.join(DEFAULT_WORKLOADS)} if left out")
    parser.add_argument(
        "--peers", type=names, help=f"comma-separated; all if left out. {BASELINE} and {LIMIT} always run"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of parameters, gradients and anchor")
    parser.add_argument("--fisher-dtype", choices=[d for d in _DTYPES if d != "float16"], help="as the parameters'")
    parser.add_argument("--backend", choices=("auto", "native", "reference"), default="auto", help="EWCLoss's")
    parser.add_argument("--rounds", type=int, help="timings of each peer; 25, with --quick 5")
    parser.add_argument("--threads", type=int, help="torch's own number if left out")
    parser.add_argument("--growth", action="store_true", help="how cost grows from 1M to 500M parameters")
    parser.add_argument("--steps", action="store_true", help="a whole training step, with and without EWC")
    parser.add_argument("--out", type=Path, help="folder to write to; {machine} in it becomes the machine's name")
    options = parser.parse_args(argv)

    if options.quick and options.all:
        parser.error("--quick and --all: one of the two")
    if options.rounds is None:
        options.rounds = 5 if options.quick else 25
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        device = torch.device(options.device)
        if options.workloads is None:
            default = QUICK_WORKLOADS if options.quick else tuple(WORKLOADS) if options.all else DEFAULT_WORKLOADS
            options.workloads = list(default)
        options.workloads = workloads.find(options.workloads)
        if options.peers:
            peers.find(options.peers)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(
            f"--device {options.device}: torch has no such device here; use cpu"
            + (" or cuda" if torch.cuda.is_available() else "")
        )
    options.dtype = _DTYPES[options.dtype]
    options.fisher_dtype = _DTYPES[options.fisher_dtype] if options.fisher_dtype else None
    options.steps = options.steps or options.all or options.quick
    options.growth_sizes = QUICK_GROWTH if options.quick else workloads.GROWTH if options.growth or options.all else ()
    return options
