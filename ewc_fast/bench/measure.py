"""Timing: interleaved rounds, cold caches, medians; memory in calls of its own.

Every peer is called once per round, in an order that changes from round to round, so that whatever disturbs the machine
disturbs all of them. Before each call a buffer larger than the last-level cache is read and written, for between two
optimizer steps a model is run forward and backward, and nothing of the state is left in the cache.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ewc_fast.bench.peers import Peer, Sizes, Unavailable, check
from ewc_fast.bench.problem import Problem

WARM_CALLS = 100  # in a row; fewer of a slow peer, to take about
WARM_MS = 25
WARM_NUMEL = 200_000  # models up to here are timed warm as well: overhead is all there is to them
BASELINE = "level2"  # what ratios are relative to
LIMIT = "copy_"


@dataclass(frozen=True)
class PeerResult:
    """One peer on one workload. Times are of one call.

    Attributes:
        name, group, note: The peer's.
        bytes_per_parameter: At the workload's dtypes; None if the peer says none.
        median_ms, p10_ms, p90_ms: Over the rounds; cold caches.
        gb_per_s: ``bytes_per_parameter`` of all parameters over the median, in 1e9 bytes per second.
        percent_of_copy: That, as a share of ``copy_``'s in the same rounds.
        ratio: The median over level 2's.
        ratio_p10, ratio_p90: Percentiles of the ratio within a round.
        peak_bytes: The most memory that a call had allocated at once, beyond what was there before it.
        page_faults: Of a call: pages of memory that the system had to find for it, and to zero. CPU only.
        warm_us: Median microseconds of a call among up to 100 in a row, warm caches; small models only.
        graph_ms: Median of a CUDA graph's replay, cold caches; where it can be captured.
    """

    name: str
    group: str
    note: str
    bytes_per_parameter: float | None
    median_ms: float
    p10_ms: float
    p90_ms: float
    gb_per_s: float | None
    percent_of_copy: float | None
    ratio: float | None
    ratio_p10: float | None
    ratio_p90: float | None
    peak_bytes: int
    page_faults: int | None = None
    warm_us: float | None = None
    graph_ms: float | None = None


@dataclass(frozen=True)
class WorkloadResult:
    """One workload; JSON-compatible by ``dataclasses.asdict``.

    Attributes:
        name, description: The workload's.
        parameters, tensors: How many.
        dtype, fisher_dtype, device: As torch names them, without ``torch.``.
        rounds: How often each peer was timed.
        peers: What was measured, in the order of the tables.
        skipped: Why, by the names of the peers that could not run.
    """

    name: str
    description: str
    parameters: int
    tensors: int
    dtype: str
    fisher_dtype: str
    device: str
    rounds: int
    peers: list[PeerResult]
    skipped: dict[str, str]


def dtype_name(dtype: torch.dtype) -> str:
    """As torch names it, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values, as ``numpy.percentile``.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return percentile(values, 50)


def cache_bytes(device: torch.device, caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The size of the last-level cache: a GPU's L2, a CPU's L3. 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_parse_size(file.read_text()) for file in caches.glob("index*/size")]
    return max(sizes, default=32 << 20)


def _parse_size(text: str) -> int:
    """Bytes, of a size as the system writes it: 32768K."""
    text = text.strip()
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    return int(text.rstrip("KMG")) << unit


class CacheFlush:
    """Reads and writes a buffer of twice the last-level cache."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(2 * cache_bytes(device) // 4, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call. On CUDA between two events on an idle stream, so that what the host takes to launch is
    part of it, as far as the device has to wait for it."""
    _synchronize(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def time_many(run: Callable[[], object], device: torch.device, calls: int = WARM_CALLS) -> float:
    """Microseconds per call of several in a row, by the clock."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - begin) * 1e6 / calls


def interleave(
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    between: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Runs everything once per round.

    Args:
        runs: By name; each takes its own time and returns it.
        rounds: How many, after one that warms up and is not counted.
        between: Called before each run, outside of the timing.
        seed: Of the order, which is drawn anew in each round.

    Returns:
        By name, a value per round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(seed).shuffle
    for round_ in range(rounds + 1):
        order = list(runs)
        shuffle(order)
        for name in order:
            between()
            elapsed = runs[name]()
            if round_:
                times[name].append(elapsed)
    return times


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call has allocated at once, beyond what was there before it; in a call of its own.

    On CUDA as the allocator counts it; on the CPU every allocation and release by torch's allocator, from its profiler.
    """
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _nothing_on_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run()
    assert profiler.kineto_results is not None
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def page_faults(run: Callable[[], object]) -> int:
    """Minor page faults of the second of two calls."""
    run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """torch's profiler logs each start and stop to the process's stderr, whatever the level."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A CUDA graph of a call; its replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(
    problem: Problem,
    peers: Sequence[Peer],
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> WorkloadResult:
    """Checks every peer against the formula in fp64, then times them all.

    Args:
        problem: What to run on.
        peers: In the order of the tables. Ratios need ``level2`` among them, shares of the bandwidth ``copy_``.
        rounds: How often each is timed, at least 1.
        progress: Told what is being done.

    Raises:
        AssertionError: A peer computes something else; names it.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = problem.device
    able: list[Peer] = []
    skipped: dict[str, str] = {}
    progress(f"checking {len(peers)} peers")
    for peer in peers:
        try:
            check(problem, peer)
            able.append(peer)
        except Unavailable as error:
            skipped[peer.name] = str(error)
    runs = {peer.name: partial(peer.run, problem) for peer in able}
    flush = CacheFlush(device)
    progress(f"timing {len(runs)} peers, {rounds} rounds")
    times = interleave({name: partial(time_once, run, device) for name, run in runs.items()}, rounds, flush)
    warm: dict[str, list[float]] = {}
    if problem.numel <= WARM_NUMEL:
        progress("timing them warm")
        calls = {name: max(1, min(WARM_CALLS, int(WARM_MS / median(times[name])))) for name in runs}
        warm = interleave({name: partial(time_many, run, device, calls[name]) for name, run in runs.items()}, rounds)
    graphs: dict[str, list[float]] = {}
    if device.type == "cuda":
        progress("timing CUDA graphs")
        replays = {peer.name: capture(runs[peer.name], device) for peer in able if peer.capturable}
        graphs = interleave({n: partial(time_once, replay, device) for n, replay in replays.items()}, rounds, flush)
        del replays
    progress("measuring memory")
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    faults = {name: page_faults(run) for name, run in runs.items()} if device.type == "cpu" else {}
    return WorkloadResult(
        name=problem.workload.name,
        description=problem.workload.description,
        parameters=problem.numel,
        tensors=problem.workload.tensors,
        dtype=dtype_name(problem.dtype),
        fisher_dtype=dtype_name(problem.fisher_dtype),
        device=device.type,
        rounds=rounds,
        peers=[
            summarise(
                peer, Sizes.of(problem), problem.numel, times, peaks[peer.name], faults.get(peer.name), warm, graphs
            )
            for peer in able
        ],
        skipped=skipped,
    )


def summarise(
    peer: Peer,
    sizes: Sizes,
    numel: int,
    times: Mapping[str, Sequence[float]],
    peak: int,
    faults: int | None = None,
    warm: Mapping[str, Sequence[float]] | None = None,
    graphs: Mapping[str, Sequence[float]] | None = None,
) -> PeerResult:
    """One peer's numbers.

    Args:
        peer: Which.
        sizes: Bytes of the problem's elements.
        numel: Number of parameters.
        times: Milliseconds by peer and round; of all peers, for the ratios.
        peak: Peak memory in bytes.
        faults: Page faults.
        warm: Microseconds per call, likewise.
        graphs: Milliseconds of graph replays, likewise.
    """
    mine = times[peer.name]
    moved = peer.bytes_for(sizes)
    speed = None if moved is None else moved * numel / median(mine) / 1e6
    share = None
    if speed is not None and LIMIT in times:
        share = 100 * speed / ((sizes.a + sizes.p) * numel / median(times[LIMIT]) / 1e6)
    ratio = low = high = None
    if BASELINE in times:
        ratio = median(mine) / median(times[BASELINE])
        within = [t / base for t, base in zip(mine, times[BASELINE], strict=True)]
        low, high = percentile(within, 10), percentile(within, 90)
    return PeerResult(
        name=peer.name,
        group=peer.group,
        note=peer.note,
        bytes_per_parameter=moved,
        median_ms=median(mine),
        p10_ms=percentile(mine, 10),
        p90_ms=percentile(mine, 90),
        gb_per_s=speed,
        percent_of_copy=share,
        ratio=ratio,
        ratio_p10=low,
        ratio_p90=high,
        peak_bytes=peak,
        page_faults=faults,
        warm_us=median(warm[peer.name]) if warm else None,
        graph_ms=median(graphs[peer.name]) if graphs and peer.name in graphs else None,
    )


def models_held(peers: Sequence[Peer]) -> float:
    """How many copies of the model measuring these peers takes: parameters, gradients, anchor, Fisher, the buffer that
    ``copy_`` and the ops write into, what peers keep, and the most that one of them makes in a call."""
    return 5 + sum(peer.keeps for peer in peers) + max((peer.temporaries for peer in peers), default=0)


def bytes_to_measure(numel: int, dtype: torch.dtype, peers: Sequence[Peer]) -> int:
    """The memory that measuring takes, estimated from :func:`models_held`."""
    return math.ceil(models_held(peers) * numel * dtype.itemsize)


def available_bytes(device: torch.device, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that is free now; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    return None


def as_dict(result: WorkloadResult) -> dict[str, Any]:
    """JSON-compatible."""
    return dataclasses.asdict(result)
