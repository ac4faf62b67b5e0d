"""Right before fast: values against a loop in fp64, then interleaved timings at every number of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_fast.bench.fisher.nets import CLASSES, Batches, Net
from ewc_fast.bench.fisher.packages import PACKAGE_WAYS
from ewc_fast.bench.fisher.ways import BASELINE, OURS, WAYS, Fisher, Run, Way
from ewc_fast.bench.measure import interleave, median, peak_bytes, percentile, time_once
from ewc_fast.bench.peers import Unavailable
from ewc_fast.bench.text import check_names

TOLERANCE = 2e-4  # of a tensor's Euclidean norm: everything runs in fp32
CHECK_BATCH, CHECK_BATCHES = 8, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class WayResult:
    """One way on one net. Times are of one run over all batches, at the number of threads at which it is faster.

    Attributes:
        name, kind, note, group, differs: The way's.
        times: Milliseconds of each round, by number of threads (a string, as JSON has it).
        threads: The faster number of threads.
        median_ms, p10_ms, p90_ms: At that number.
        us_per_sample: The median, in microseconds.
        off: Of the check: the largest difference of a tensor from the fp64 loop, relative to its norm; None for
            ``plain``.
        trace: On the timed batches: the sum of its values over that of ours of the same kind; None where there is
            none to compare with.
        peak_bytes: The most memory that a run over one batch had allocated at once.
        minus_fisher: That, less the diagonal that it returns.
    """

    name: str
    kind: str
    note: str
    group: str
    differs: str
    times: dict[str, list[float]]
    threads: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    us_per_sample: float
    off: float | None
    trace: float | None
    peak_bytes: int
    minus_fisher: int


def find(names: Sequence[str] | None) -> list[Way]:
    """Ways by name, or all; ``plain`` always among them and first.

    Raises:
        ValueError: There is none of that name; lists those there are.
    """
    every = {way.name: way for way in (*WAYS, *PACKAGE_WAYS)}
    check_names("way", names or (), every)
    return [way for name, way in every.items() if names is None or name in names or name == BASELINE]


# ---- what is right ----


def drawn_labels(model: nn.Module, batches: Batches, seed: int) -> list[Tensor]:
    """The labels that a sampled Fisher takes after ``torch.manual_seed(seed)``: per batch, (B,)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return [torch.multinomial(model(inputs).softmax(-1), 1).flatten() for inputs, _ in batches]


def reference(kind: str, model: nn.Module, batches: Batches, seed: int = 0) -> dict[str, Tensor]:
    """A kind of Fisher as its definition has it, in fp64: one backward per sample and label.

    Args:
        kind: "exact", "sampled", "empirical" or "batch".
        model: In evaluation mode; it is copied.
        batches: What to estimate on.
        seed: Of the sampled labels.
    """
    labels = drawn_labels(model, batches, seed) if kind == "sampled" else [given for _, given in batches]
    model = copy.deepcopy(model).double()
    names, params = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in params]

    def add(log_likelihood: Tensor, weight: float) -> None:
        for total, g in zip(sums, torch.autograd.grad(log_likelihood, params, retain_graph=True), strict=True):
            total += weight * g**2

    for (inputs, _), chosen in zip(batches, labels, strict=True):
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        if kind == "batch":
            add(model(inputs).log_softmax(-1).gather(1, chosen[:, None]).sum(), 1.0)
            continue
        for x, label in zip(inputs, chosen.tolist(), strict=True):
            log_probs = model(x[None]).log_softmax(-1)[0]
            for c in range(CLASSES) if kind == "exact" else (label,):
                add(log_probs[c], log_probs[c].exp().item() if kind == "exact" else 1.0)
    count = sum(len(given) for _, given in batches)
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def difference(found: Fisher, wanted: Mapping[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to the Euclidean norm of what is wanted.

    Raises:
        AssertionError: Other names or shapes.
    """
    assert found.keys() == wanted.keys(), f"parameters {sorted(found.keys() ^ wanted.keys())} on one side only"
    differences = []
    for name, w in wanted.items():
        assert found[name].shape == w.shape, f"{name} has shape {tuple(found[name].shape)}, not {tuple(w.shape)}"
        differences.append((found[name].double() - w).norm() / w.norm())
    return torch.stack(differences).max().item()  # NaN if one is


def check(way: Way, model: nn.Module, batches: Batches, seed: int = 0) -> float | None:
    """How far a way's values are from the definition of its kind.

    Returns:
        As :func:`difference`; None for a way that computes no Fisher.

    Raises:
        Unavailable: The way's package is not installed.
        AssertionError: Further than :data:`TOLERANCE`, and the way does not say that it differs.
    """
    if not way.kind:
        return None
    wanted = reference(way.kind, model, batches, seed)
    run = way.make(model)
    torch.manual_seed(seed)
    off = difference(run(batches), wanted)
    if not (off <= TOLERANCE or way.differs):
        raise AssertionError(f"{way.name}: off the {way.kind} Fisher by {off:.2g} of a tensor's norm")
    return off


# ---- how long it takes ----


def at_threads(threads: int, run: Callable[[], object]) -> float:
    """Milliseconds of one call with so many threads."""
    torch.set_num_threads(threads)
    return time_once(run, CPU)


def measure(
    net: Net,
    ways: Sequence[Way],
    rounds: int,
    threads: Sequence[int],
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Checks the ways on a net against the definition, then times them all, interleaved.

    Args:
        net: Which.
        ways: Which; reports take ratios to ``plain``.
        rounds: How often each is timed at each number of threads, at least 1.
        threads: Those numbers.
        progress: Told what is being done.

    Returns:
        JSON-compatible: the net, its memory, a :class:`WayResult` per way as a dict, and why others were skipped.

    Raises:
        AssertionError: A way computes something else; names it.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    before = torch.get_num_threads()
    model, batches = net.model(), net.data()
    runs: dict[str, Run] = {}
    off: dict[str, float | None] = {}
    skipped: dict[str, str] = {}
    able: list[Way] = []
    progress(f"checking {len(ways)} ways")
    for way in ways:
        if net.ways is not None and way.name not in net.ways:
            continue
        try:
            if way.package and way.package not in net.packages:
                raise Unavailable(f"{way.package} does not cover all of its layers")
            off[way.name] = check(way, net.model(smooth=True), net.data(CHECK_BATCH, CHECK_BATCHES))
            runs[way.name] = way.make(model)
            able.append(way)
        except Unavailable as error:
            skipped[way.name] = str(error)
    progress("comparing values")
    traces = {way.name: _trace(runs[way.name](batches)) for way in able if way.kind}
    ours = {way.kind: traces[way.name] for way in able if way.group == OURS}
    progress(f"timing {len(able)} ways, {rounds} rounds, threads: {', '.join(map(str, threads))}")
    timed = {(way.name, n): partial(at_threads, n, partial(runs[way.name], batches)) for way in able for n in threads}
    try:
        keyed = interleave({f"{name}@{n}": run for (name, n), run in timed.items()}, rounds)
    finally:
        torch.set_num_threads(before)
    times = {(name, n): keyed[f"{name}@{n}"] for name, n in timed}
    progress("measuring memory")
    model.zero_grad()
    fisher = sum(p.nbytes for p in model.parameters())
    results = []
    for way in able:
        peak = peak_bytes(partial(runs[way.name], batches[:1]), CPU)
        results.append(
            WayResult(
                name=way.name,
                kind=way.kind,
                note=way.note,
                group=way.group,
                differs=way.differs,
                **summarise({n: times[way.name, n] for n in threads}, net.samples),
                off=off[way.name],
                trace=traces[way.name] / ours[way.kind] if way.kind in ours else None,
                peak_bytes=peak,
                minus_fisher=peak - (fisher if way.kind else 0),
            )
        )
    return {
        "name": net.name,
        "description": net.description,
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": net.samples,
        "batch": net.batch,
        "rounds": rounds,
        "activation_bytes": activation_bytes(model, batches[0]),
        "largest_layer_bytes": largest_layer_bytes(model),
        "fisher_bytes": fisher,
        "ways": [asdict(result) for result in results],
        "skipped": skipped,
    }


def summarise(times: Mapping[int, Sequence[float]], samples: int) -> dict[str, Any]:
    """The fields of :class:`WayResult` that come from times.

    Args:
        times: Milliseconds of each round, by number of threads.
        samples: In a run.
    """
    best = min(times, key=lambda threads: median(times[threads]))
    return {
        "times": {str(threads): list(rounds) for threads, rounds in times.items()},
        "threads": best,
        "median_ms": median(times[best]),
        "p10_ms": percentile(times[best], 10),
        "p90_ms": percentile(times[best], 90),
        "us_per_sample": median(times[best]) * 1e3 / samples,
    }


def _trace(fisher: Fisher) -> float:
    return sum(f.double().sum().item() for f in fisher.values())


# ---- memory ----


def activation_bytes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """The most that a plain forward and backward of a batch holds besides parameters and their gradients.

    Each gradient is freed as soon as it is there, so that there is at most one parameter's at a time: the peak is
    cleared of the largest.
    """
    inputs, labels = batch

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(free) for p in model.parameters()]
    try:
        forward = peak_bytes(lambda: F.cross_entropy(model(inputs), labels), CPU)
        both = peak_bytes(lambda: F.cross_entropy(model(inputs), labels).backward(), CPU)
    finally:
        for handle in handles:
            handle.remove()
    return max(forward, both - max(p.nbytes for p in model.parameters()))


def largest_layer_bytes(model: nn.Module) -> int:
    """The parameters of the largest module, without its children's."""
    return max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules())
