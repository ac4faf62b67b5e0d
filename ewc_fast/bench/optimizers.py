"""``python -m ewc_fast bench --optimizers``: what EWC adds to an optimizer's step, beside the step without it.

All optimizers step the same parameters from the same moments, one step each in turn, with the last-level cache flushed
in between. Before they are timed, each one's step is compared with its own formula's in fp64.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast import EWCSGD, EWCAdamW, EWCLoss
from ewc_fast.bench import environment, step, workloads
from ewc_fast.bench.measure import CacheFlush, interleave, median, percentile, time_many, time_once
from ewc_fast.bench.problem import LAMBDA, Problem
from ewc_fast.bench.report import where
from ewc_fast.bench.text import markdown, number, read_results, write_json
from ewc_fast.bench.workloads import Workload

Results = Mapping[str, Any]
MAIN = "gpt2_48m"
BASELINE, SGD_BASELINE = "adamw", "sgd"
STEP_VARIANTS = ("plain", "eager", "level1", "level2", "level3", "level3_proximal")
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
MOMENTUM: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9}
TOLERANCE = 2e-5  # of an update's largest entry
ROUNDOFFS = 4 * 2**-24  # of the parameters' largest: they are fp32
SMALL_TENSORS = 20


@dataclass(frozen=True)
class Way:
    """One way to step.

    Attributes:
        name, note: On the command line, and for the reader of a table.
        make: The optimizer over a problem's parameters; the penalty that it has, if any, is attached.
        than: Without EWC, what it is held against.
        coupling: Empty without EWC.
        fisher_dtype: Of the penalty.
        bytes_per_parameter: What a step reads and writes per fp32 parameter.
        bar, gpu_bar, aim: How many times the time of ``than`` it may take, on a CPU and on a GPU, and is meant to; None
            for no bar.
    """

    name: str
    note: str
    make: Callable[[list[nn.Parameter], EWCLoss], torch.optim.Optimizer]
    than: str
    coupling: str = ""
    fisher_dtype: torch.dtype = torch.float32
    bytes_per_parameter: float = 28
    bar: float | None = None
    gpu_bar: float | None = None
    aim: float | None = None


def _attached(optimizer: torch.optim.Optimizer, ewc: EWCLoss, coupling: str) -> torch.optim.Optimizer:
    ewc.attach(optimizer, coupling)
    return optimizer


def _adamw(coupling: str, fisher: torch.dtype, bar: float, gpu_bar: float) -> Way:
    bf16 = fisher == torch.bfloat16
    return Way(
        f"ewc_adamw_{coupling}" + ("_bf16_fisher" if bf16 else ""),
        f'EWCAdamW, coupling="{coupling}"' + (", Fisher in bf16" if bf16 else ""),
        lambda p, ewc: EWCAdamW(p, **OPTIONS, ewc=ewc, coupling=coupling),
        BASELINE,
        coupling,
        fisher,
        34 if bf16 else 36,
        bar,
        gpu_bar,
        1.0,
    )


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way(BASELINE, "torch's AdamW, fused, without EWC", lambda p, _: torch.optim.AdamW(p, **OPTIONS, fused=True),
            BASELINE),
        Way("adamw_foreach", "the same, foreach", lambda p, _: torch.optim.AdamW(p, **OPTIONS, foreach=True), BASELINE,
            bytes_per_parameter=math.nan),
        Way("ewc_adamw", "EWCAdamW without EWC", lambda p, _: EWCAdamW(p, **OPTIONS), BASELINE),
        _adamw("coupled", torch.float32, 1.35, 1.30),
        _adamw("proximal", torch.float32, 1.35, 1.30),
        _adamw("coupled", torch.bfloat16, 1.25, 1.23),
        _adamw("proximal", torch.bfloat16, 1.25, 1.23),
        Way("attach_coupled", "torch's AdamW, fused, ewc.attach(optimizer)",
            lambda p, ewc: _attached(torch.optim.AdamW(p, **OPTIONS, fused=True), ewc, "coupled"), BASELINE, "coupled",
            bytes_per_parameter=48),
        Way("attach_proximal", 'the same, coupling="proximal"',
            lambda p, ewc: _attached(torch.optim.AdamW(p, **OPTIONS, fused=True), ewc, "proximal"), BASELINE,
            "proximal", bytes_per_parameter=48),
        Way(SGD_BASELINE, "torch's SGD, momentum, fused, without EWC",
            lambda p, _: torch.optim.SGD(p, **MOMENTUM, fused=True), SGD_BASELINE, bytes_per_parameter=20),
        Way("ewc_sgd", "EWCSGD without EWC", lambda p, _: EWCSGD(p, **MOMENTUM), SGD_BASELINE, bytes_per_parameter=20),
        Way("ewc_sgd_coupled", 'EWCSGD, coupling="coupled"',
            lambda p, ewc: EWCSGD(p, **MOMENTUM, ewc=ewc, coupling="coupled"), SGD_BASELINE, "coupled",
            bytes_per_parameter=28),
        Way("ewc_sgd_proximal", 'EWCSGD, coupling="proximal"',
            lambda p, ewc: EWCSGD(p, **MOMENTUM, ewc=ewc, coupling="proximal"), SGD_BASELINE, "proximal",
            bytes_per_parameter=28),
    )
}  # fmt: skip


class Steps:
    """The ways over one model.

    Args:
        workload: The model's shapes.
        ways: Which.
        device, backend: As elsewhere.
    """

    def __init__(
        self, workload: Workload, ways: Sequence[Way], device: str | torch.device = "cpu", backend: str = "auto"
    ) -> None:
        self.problem = Problem(workload, device, backend=backend)
        self.params = list(self.problem.model.parameters())
        for p in self.params:
            p.grad = torch.randn_like(p).mul_(0.01)
        penalties = {torch.float32: self.problem.ewc, torch.bfloat16: self.problem.ewc_bf16_fisher}
        self._states: dict[str, Any] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for way in ways:
            penalty = penalties[way.fisher_dtype]
            ewc = EWCLoss(self.problem.model, LAMBDA, fisher_dtype=way.fisher_dtype, backend=backend)
            ewc._state = penalty._state  # the same memory: a large model fits once
            ewc._state_changed()
            optimizer = way.make(self.params, ewc)
            if way.than in self._states:
                optimizer.state = self._states[way.than]
            else:
                optimizer.step()  # makes the state
                self._states[way.than] = optimizer.state
            self.optimizers[way.name] = optimizer


def expected(way: Way, p: Tensor, g: Tensor, state: Mapping[str, Any], fisher: Tensor, anchor: Tensor) -> Tensor:
    """Where a step leads, by the formulas, in fp64; of one parameter, before the step."""
    p, g, fisher, anchor = p.double(), g.double(), fisher.double(), anchor.double()
    if way.coupling == "coupled":
        g = g + LAMBDA * fisher * (p - anchor)
    if way.than == SGD_BASELINE:
        lr, momentum = MOMENTUM["lr"], MOMENTUM["momentum"]
        p = p - lr * (momentum * state["momentum_buffer"].double() + g)
        metric = torch.full_like(p, 1 - momentum)
    else:
        lr, count = OPTIONS["lr"], float(state["step"]) + 1
        first = 0.9 * state["exp_avg"].double() + 0.1 * g
        second = 0.999 * state["exp_avg_sq"].double() + 0.001 * g * g
        metric = (second / (1 - 0.999**count)).sqrt() + 1e-8
        p = p * (1 - lr * OPTIONS["weight_decay"]) - lr * first / (1 - 0.9**count) / metric
    if way.coupling == "proximal":
        pull = lr * LAMBDA * fisher
        p = (metric * p + pull * anchor) / (metric + pull)
    return p


def check(way: Way, device: str | torch.device = "cpu", backend: str = "auto") -> float:
    """How far a way's step is from the formula's on a small model, relative to the largest update.

    Raises:
        AssertionError: Further than :data:`TOLERANCE`.
    """
    steps = Steps(Workload("small", "for a check", ((64, 33), (129,), (7,))), [way], device, backend)
    optimizer = steps.optimizers[way.name]
    worst = 0.0
    ewc = steps.problem.ewc_bf16_fisher if way.fisher_dtype == torch.bfloat16 else steps.problem.ewc
    for _ in range(3):
        before = [p.detach().clone() for p in steps.params]
        wanted = [
            expected(way, p.detach(), p.grad, optimizer.state[p], f, a)  # type: ignore[arg-type]
            for p, f, a in zip(steps.params, ewc.fisher.values(), ewc.anchor.values(), strict=True)
        ]
        optimizer.step()
        for p, w, b in zip(steps.params, wanted, before, strict=True):
            off = (p.detach().double() - w).abs().max()
            allowed = ROUNDOFFS * b.abs().max() + TOLERANCE * (w - b).abs().max()
            worst = max(worst, float(off / allowed))
    if not worst <= 1:
        raise AssertionError(f"{way.name}: a step is off its formula by {worst:.2g} times what rounding allows")
    return worst


def overhead(coupling: str, backend: str = "auto", rounds: int = 15) -> dict[str, float]:
    """Microseconds that ``attach`` adds to a step over 20 small tensors, warm: what Python and the call cost.

    Returns:
        Medians of a step without EWC, with it, of the difference within a round, and, with the native kernel, of its
        call, timed in steps of its own, and of what is left of the difference without it.
    """
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(16)) for _ in range(SMALL_TENSORS))
    ewc = EWCLoss(model, LAMBDA, backend=backend)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    optimizers = []
    for _ in range(2):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=1e-6, foreach=True))
    handle = ewc.attach(optimizers[1], coupling)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    cpu = torch.device("cpu")
    runs = {str(i): partial(time_many, o.step, cpu) for i, o in enumerate(optimizers)}
    times = interleave(runs, rounds)
    added = [b - a for a, b in zip(times["0"], times["1"], strict=True)]
    (part,) = handle.parts()
    name = "_into_own" if coupling == "coupled" else "_pull"
    call = _Timed(getattr(part, name))
    setattr(part, name, call)
    calls = interleave({"0": runs["0"], "call": lambda: call.microseconds(runs["1"])}, rounds)["call"]
    found = {"without": median(times["0"]), "with": median(times["1"]), "adds": median(added)}
    if call.declined == 0:
        python = [a - b for a, b in zip(added, calls, strict=True)]
        found |= {"kernel": median(calls), "python": median(python)}
    return found


class _Timed:
    """A function that counts its own time, and how often it did nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds, self.calls, self.declined = function, 0.0, 0, 0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        self.declined += result is None
        return result

    def microseconds(self, run: Callable[[], object]) -> float:
        """What a call takes on average in a run."""
        self.seconds, self.calls = 0.0, 0
        run()
        return self.seconds * 1e6 / self.calls


def measure(
    workload: Workload,
    ways: Sequence[Way],
    rounds: int,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Checks the ways, then times a step of each, interleaved.

    Returns:
        JSON-compatible: the workload, and times of each way.

    Raises:
        AssertionError: A way's step is wrong; names it.
    """
    for way in ways:
        progress(f"checking {way.name}")
        check(way, device, backend)
    progress(f"timing {len(ways)} ways, {rounds} rounds")
    where_ = torch.device(device)
    with warnings.catch_warnings():  # that a parameter has two penalties: one of them steps at a time
        warnings.filterwarnings("ignore", "a parameter is penalised by two attached penalties", UserWarning)
        steps = Steps(workload, ways, device, backend)
        flush = CacheFlush(where_)
        runs = {name: partial(time_once, optimizer.step, where_) for name, optimizer in steps.optimizers.items()}
        times = interleave(runs, rounds, flush)
    return {
        "name": workload.name,
        "description": workload.description,
        "parameters": workload.numel,
        "tensors": workload.tensors,
        "device": where_.type,
        "rounds": rounds,
        "ways": [
            {
                "name": way.name,
                "note": way.note,
                "than": way.than,
                "bytes_per_parameter": None if math.isnan(way.bytes_per_parameter) else way.bytes_per_parameter,
                "times": times[way.name],
                "bar": way.gpu_bar if where_.type == "cuda" else way.bar,
                "aim": way.aim,
            }
            for way in ways
        ],
    }


# ---- text ----


def ratio(result: Results, way: Results) -> tuple[float, float, float]:
    """A way's time over that of its baseline, within a round: median, 10th and 90th percentile."""
    (than,) = [other for other in result["ways"] if other["name"] == way["than"]]
    ratios = [a / b for a, b in zip(way["times"], than["times"], strict=True)]
    return median(ratios), percentile(ratios, 10), percentile(ratios, 90)


def table(result: Results) -> str:
    """Of one workload, as Markdown."""
    rows = []
    for way in result["ways"]:
        found, low, high = ratio(result, way)
        ms, size = median(way["times"]), way["bytes_per_parameter"]
        speed = None if size is None else size * result["parameters"] / ms / 1e6
        bar = "" if way["bar"] is None else f"at most {way['bar']:g}: {'met' if found <= way['bar'] else '**missed**'}"
        rows.append(
            [
                way["note"],
                number(ms, 1),
                f"{found:.2f} ({low:.2f} to {high:.2f})",
                number(size, 0),
                number(speed, 1),
                bar,
            ]
        )
    return markdown(["a step", "ms", "times the one without EWC", "bytes per parameter", "GB/s", "bar"], rows)


def section(results: Results) -> str:
    """Everything, as Markdown. Every number in it is in the results."""
    result = results["optimizers"]
    parts = [
        f"{result['parameters'] / 1e6:.0f}M fp32 parameters in {result['tensors']} tensors ({result['description']}), "
        f"{where(results)}, {results['date']}: one process, interleaved, caches cold, medians of {result['rounds']} "
        "rounds; ratios within a round, with their 10th and 90th percentile. Each step is compared with its formula in "
        "fp64 before it is timed.",
        table(result),
    ]
    if results["overhead"]:
        cells = [
            f"{coupling} {found['adds']:.0f} microseconds"
            + (f", {found['python']:.0f} of them Python's" if "python" in found else "")
            + f" (a step without EWC takes {found['without']:.0f})"
            for coupling, found in results["overhead"].items()
        ]
        parts.append(f"What `attach` adds to a step of {SMALL_TENSORS} small tensors, warm: {'; '.join(cells)}.")
    if results["steps"]:
        parts += ["A whole training step:", step.markdown(results["steps"])]
    return "\n\n".join(parts)


def read_json(path: Path) -> dict[str, Any]:
    """What the command wrote.

    Raises:
        ValueError: The file is no result of it.
    """
    return read_results(path, "optimizers", "python -m ewc_fast bench --optimizers")


# ---- the command line ----


def main(argv: Sequence[str]) -> int:
    """Parses the arguments, measures, prints, and writes if asked to. Returns the exit code."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="ewc-fast bench --optimizers",
        description="What EWC adds to an optimizer's step.",
        epilog=f"Ways: {', '.join(WAYS)}.",
    )
    parser.add_argument("--workload", default=MAIN, help=f"one of {', '.join(workloads.WORKLOADS)}; {MAIN}")
    parser.add_argument("--rounds", type=int, default=25, help="timings of each way; 25")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-steps", action="store_true", help="leave out the whole training step, which takes 10 GB")
    parser.add_argument("--out", type=Path, help="writes to DIR/optimizers; {machine} becomes the machine's name")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        (workload,) = workloads.find([options.workload])
    except ValueError as error:
        parser.error(str(error))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    device = torch.device(options.device)
    results: dict[str, Any] = {
        **environment.describe(device),
        "command": shlex.join(["python", "-m", "ewc_fast", "bench", "--optimizers"]),
        "overhead": {},
        "steps": [],
    }
    results["overhead"] = {coupling: overhead(coupling) for coupling in ("coupled", "proximal")}
    results["optimizers"] = measure(workload, list(WAYS.values()), options.rounds, device, progress=say)
    if not options.no_steps:
        results["steps"] = step.measure_steps(
            "gpt2_small" if options.workload == MAIN else "gpt2_mini", device, rounds=min(options.rounds, 9),
            variants=STEP_VARIANTS, accumulation=(1,), progress=say,
        )  # fmt: skip
    print(section(results))
    print(f"\n{time.perf_counter() - start:.0f} s. ", end="")
    if options.out is None:
        print("Nothing written: --out DIR writes JSON and a table")
        return 0
    folder = Path(str(options.out).replace("{machine}", environment.machine_name(results["machine"]))) / "optimizers"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / "results.json")
    (folder / "results.md").write_text(section(results) + "\n")
    print(f"Written: {folder / 'results.json'}, {folder / 'results.md'}")
    return 0
