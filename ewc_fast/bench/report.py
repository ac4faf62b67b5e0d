"""From results to text, files and what README.md and docs/ say of performance. Reads nothing but the results' JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewc_fast.bench import step
from ewc_fast.bench.measure import BASELINE, LIMIT
from ewc_fast.bench.peers import OPS
from ewc_fast.bench.text import markdown, number, read_results, size
from ewc_fast.bench.text import write_json as write_json
from ewc_fast.bench.workloads import short_count

Results = Mapping[str, Any]
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
MAIN = "gpt2_48m"  # the workload that the bars are about on a CPU


@dataclass(frozen=True)
class Bar:
    """How many times faster ``peer`` must be than ``than``, and how much faster we want it to be.

    Attributes:
        device, workload: Where.
        peer, than: Which two.
        bar, aim: Factors.
        bandwidth: Compare bytes moved per second, not time.
    """

    device: str
    workload: str
    peer: str
    than: str
    bar: float
    aim: float
    bandwidth: bool = False


BARS = (
    Bar("cpu", MAIN, "level2", "eager", 5, 12),
    Bar("cpu", MAIN, "level1", "eager", 3, 7),
    Bar("cpu", MAIN, "level2", "foreach", 3.5, 6),
    Bar("cpu", MAIN, "level2", "loop", 1.6, 2.5),
    Bar("cpu", MAIN, "level2", "loop_no_value", 1.15, 1.5),
    Bar("cpu", MAIN, "level2", "compile_eager", 3, 5),
    Bar("cpu", MAIN, "level2", LIMIT, 1.2, 2, bandwidth=True),
    Bar("cuda", "llama_1b", "level2", "eager", 3.5, 4),
    Bar("cuda", "llama_1b", "level2", "compile_eager", 1.9, 2),
    Bar("cuda", "llama_1b", "level2", LIMIT, 0.95, 1, bandwidth=True),
    Bar("cuda", "gpt2_small", "level2", "eager", 10, 10),
)


# ---- files ----


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`ewc_fast.bench.text.write_json` wrote.

    Raises:
        ValueError: The file is no result of this benchmark.
    """
    return read_results(path, "workloads", "python -m ewc_fast bench")


def to_csv(results: Results) -> str:
    """A row per workload and peer, those of the growth after the others."""
    rows: list[dict[str, Any]] = []
    for section in ("workloads", "growth"):
        for workload in results[section]:
            own = {key: value for key, value in workload.items() if key not in ("peers", "skipped", "name")}
            rows += [{"section": section, "workload": workload["name"], **own, **peer} for peer in workload["peers"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["section"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- text ----


def format_workload(workload: Results) -> str:
    """The table of one workload."""
    precision, fisher = workload["dtype"], workload["fisher_dtype"]
    if fisher != precision:
        precision += f", Fisher {fisher}"
    columns: list[tuple[str, int, Any]] = [
        ("median ms", 11, lambda p: number(p["median_ms"], 3)),
        ("p10", 9, lambda p: number(p["p10_ms"], 3)),
        ("p90", 9, lambda p: number(p["p90_ms"], 3)),
        (f"/ {BASELINE}", 10, lambda p: number(p["ratio"], 2)),
        ("B/param", 9, lambda p: number(p["bytes_per_parameter"], 0)),
        ("GB/s", 8, lambda p: number(p["gb_per_s"], 1)),
        ("% of copy_", 12, lambda p: number(p["percent_of_copy"], 0)),
        ("extra memory", 14, lambda p: size(p["peak_bytes"])),
    ]
    if any(p["page_faults"] is not None for p in workload["peers"]):
        columns.append(("faults", 9, lambda p: number(p["page_faults"], 0)))
    for key, title in (("warm_us", "warm us"), ("graph_ms", "graph ms")):
        if any(p[key] is not None for p in workload["peers"]):
            columns.append((title, 10, lambda p, key=key: number(p[key], 3 if key == "graph_ms" else 1)))
    width = 2 + max(len(name) for name in [*_by_name(workload), *workload["skipped"]])
    lines = [
        f"{workload['name']}: {workload['description']}, {workload['parameters']:,} parameters in "
        f"{workload['tensors']:,} tensors, {precision}, {workload['device']}, {workload['rounds']} rounds",
        " " * width + "".join(f"{title:>{span}}" for title, span, _ in columns),
    ]
    for peer in workload["peers"]:
        lines.append(f"{peer['name']:{width}}" + "".join(f"{cell(peer):>{span}}" for _, span, cell in columns))
    lines += [f"{name:{width}}skipped: {reason}" for name, reason in workload["skipped"].items()]
    return "\n".join(lines)


def format_growth(growth: Sequence[Results]) -> str:
    """How cost grows: a row per size, a column per peer, in milliseconds."""
    names = [peer["name"] for peer in growth[0]["peers"]]
    lines = [f"{'parameters, ms':16}" + "".join(f"{name:>15}" for name in names) + f"{'level2 % copy_':>16}"]
    for workload in growth:
        by_name = _by_name(workload)
        cells = "".join(f"{number(by_name[n]['median_ms'], 2) if n in by_name else '':>15}" for n in names)
        share = by_name[BASELINE]["percent_of_copy"] if BASELINE in by_name else None
        lines.append(f"{workload['parameters']:<16,}{cells}{number(share, 0):>16}")
    return "\n".join(lines)


def format_predicted(predicted: Sequence[Results]) -> str:
    """What was not measured: the memory it takes, and the time that the measured bandwidth promises."""
    lines = ["Not measured; times predicted from the bytes and the bandwidth that each peer reached here:"]
    for workload in predicted:
        times = ", ".join(f"{name} {number(ms, 0)} ms" for name, ms in workload["predicted_ms"].items())
        lines.append(
            f"{workload['name']} ({workload['reason']}): {workload['parameters']:,} parameters, "
            f"{size(workload['bytes_needed'])} for parameters, gradients, anchor and Fisher; "
            f"predicted: {times or 'nothing, for no bandwidth was measured'}"
        )
    return "\n".join(lines)


def format_bars(results: Results) -> str:
    """The bars that a result can be held against."""
    rows = bars(results)
    if not rows:
        return ""
    lines = [f"{'':52}{'measured':>10}{'bar':>8}{'aim':>8}"]
    lines += [f"{what:52}{found:>9.2f}x{bar.bar:>7}x{bar.aim:>7}x" for bar, what, found in rows]
    return "\n".join(lines)


def bars(results: Results) -> list[tuple[Bar, str, float]]:
    """Each bar whose two sides were measured in one run, in words, and the factor found."""
    found = []
    for bar in BARS:
        for workload in results["workloads"]:
            peers = _by_name(workload)
            meant = (bar.device, bar.workload, "float32", "float32")
            if tuple(workload[key] for key in ("device", "name", "dtype", "fisher_dtype")) != meant:
                continue
            if bar.peer not in peers or bar.than not in peers:
                continue
            mine, theirs = peers[bar.peer], peers[bar.than]
            if bar.bandwidth:
                what = f"{_title(bar.peer)}, bytes per second against {bar.than}"
                found.append((bar, what, mine["gb_per_s"] / theirs["gb_per_s"]))
            else:
                what = f"{_title(bar.peer)} against {_title(bar.than)}"
                found.append((bar, what, theirs["median_ms"] / mine["median_ms"]))
    return found


# ---- the README and docs ----


_SHORT = ("eager", "compile_eager", "foreach", "loop", "loop_no_value", "ewc_loss", "level1", "level2", "value", LIMIT)
_FEW = ("eager", "compile_eager", "loop", "level1", "level2")
_SHORT_STEPS = ("plain", "eager", "loop", "level1", "level2", "level3", "level3_proximal")


def readme_section(results: Results, document: str) -> str:
    """The README's section, as Markdown: the main workload in a few rows, and in a sentence what a step pays.

    Args:
        results: What was measured.
        document: Where :func:`cost_section` is, as the README links to it.
    """
    main = main_workload(results)
    rows = [[p["note"], number(p["median_ms"], 1), number(p["ratio"], 2)] for p in main["peers"] if p["name"] in _FEW]
    parts = [
        f"{_millions(main)} {main['dtype']} parameters in {main['tensors']:,} tensors, {where(results)}, "
        f"{results['date']}, medians of {main['rounds']} rounds:",
        markdown(["penalty and gradient, per step", "ms", "times level 2"], rows),
    ]
    steps = {s["variant"]: s for s in results["steps"] if s["micro_batches"] == 1}
    if {"eager", "level2"} <= steps.keys():
        eager, attached = (
            f"{s['ewc_percent']:.0f}% ({s['ewc_percent_p10']:.0f} to {s['ewc_percent_p90']:.0f}%)"
            for s in (steps["eager"], steps["level2"])
        )
        s = steps["level2"]
        parts.append(
            f"To a whole training step of a model of {s['parameters'] / 1e6:.0f}M parameters ({s['batch']} x "
            f"{s['tokens']} tokens) the penalty in plain PyTorch adds {eager}, `ewc.attach(optimizer)` {attached}; in "
            "brackets the 10th and 90th percentile."
        )
    parts.append(f"The whole table, how much runs vary, and memory: [{document}]({document}).")
    return "\n\n".join(parts)


def cost_section(results: Results, folder: str, document: str) -> str:
    """What it costs, as Markdown: the main workload, and what a training step pays.

    Args:
        results: What was measured.
        folder: Where the pictures are, as the page links to it.
        document: Where :func:`performance_section` is, likewise.
    """
    main = main_workload(results)
    rows = [
        [p["note"], number(p["median_ms"], 1), number(p["ratio"], 2), number(p["bytes_per_parameter"], 0)]
        for p in main["peers"]
        if p["name"] in _SHORT
    ]
    parts = [
        f"{_millions(main)} {main['dtype']} parameters in {main['tensors']:,} tensors ({main['description']}), "
        f"{where(results)}, {results['date']}: all in one process, interleaved, caches cold, medians of "
        f"{main['rounds']} rounds.",
        markdown(["penalty and gradient, per step", "ms", "times level 2", "bytes per parameter"], rows),
        f"![time by peer]({folder}/time_by_peer.png)",
    ]
    steps = [s for s in results["steps"] if s["micro_batches"] == 1 and s["variant"] in _SHORT_STEPS]
    if steps:
        s = steps[0]
        parts += [
            f"A whole training step of a model like GPT-2 small ({s['parameters'] / 1e6:.0f}M parameters, AdamW, "
            f"{s['batch']} x {s['tokens']} tokens), forward, backward and optimizer, there:",
            markdown(
                ["", "ms", "EWC adds (10th to 90th percentile)"],
                [
                    [
                        s["note"],
                        number(s["median_ms"], 0),
                        ""
                        if s["ewc_percent"] is None
                        else f"{s['ewc_percent']:.0f}% ({s['ewc_percent_p10']:.0f} to {s['ewc_percent_p90']:.0f}%)",
                    ]
                    for s in steps
                ],
            ),
        ]
    more = "other models, published packages' penalties, memory, growth to 500M parameters"
    parts.append(f"The rest ({more}), and how far each level is from the limit and why: [{document}]({document}).")
    return "\n\n".join(parts)


def main_workload(results: Results) -> Results:
    """The one that the bars are about; the last where it was not measured."""
    found: Results = next((w for w in results["workloads"] if w["name"] == MAIN), results["workloads"][-1])
    return found


def where(results: Results) -> str:
    """What it was measured with, in a line."""
    machine, versions, kernels = results["machine"], results["versions"], results["kernels"]
    processor = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    instructions = kernels.get("instruction_set")
    kernel = f"{kernels['backend']} kernels" + (f" ({instructions})" if instructions and "gpu" not in machine else "")
    return f"{processor}, {machine['system']}, torch {versions['torch']}, {kernel}"


def _rounds(results: Results) -> str:
    """How many, of the models up to 60M parameters and of the larger ones."""
    most, *fewer = sorted({w["rounds"] for w in results["workloads"]}, reverse=True)
    return f"{most} rounds" + "".join(f", {rounds} for larger models" for rounds in fewer)


def performance_section(results: Results) -> str:
    """Everything, as Markdown. Every number in it is in the results."""
    main = main_workload(results)
    parts = [
        f"Measured {results['date']} on {where(results)}, with "
        f"`{results['command']}`: every peer in one process, interleaved, caches cold, medians of {_rounds(results)} "
        "(in brackets the 10th and 90th percentile). "
        "Before it is timed, each one's gradient and value are compared with the formula in fp64. Bytes are those that "
        "the peer's ops read and write per parameter.",
        f"**{main['description']}: {_millions(main)} {main['dtype']} parameters in {main['tensors']:,} tensors**",
        _main_table(main),
        _PERCENT_NOTE if main["device"] == "cpu" else "",
    ]
    measured = bars(results)
    if measured:
        parts += [
            "**Against the bars** (times faster; both sides from this run)",
            markdown(
                ["", "measured", "bar", "aim"],
                [
                    [f"{bar.workload}: {what}", f"{found:.2f}x", f"{bar.bar:g}x", f"{bar.aim:g}x"]
                    for bar, what, found in measured
                ],
            ),
        ]
    others = [w for w in results["workloads"] if w is not main]
    if others:
        parts += ["**Other models**: milliseconds, and in brackets times level 2", _others_table([main, *others])]
        warm = [w for w in results["workloads"] if any(p["warm_us"] is not None for p in w["peers"])]
        if warm:
            parts += ["Microseconds per call, many in a row with warm caches, where overhead counts:", _warm(warm)]
    if results["growth"]:
        parts += ["**How cost grows** (12 blocks of GPT-2, ever wider)", _growth_table(results["growth"])]
    if results["steps"]:
        parts += ["**A whole training step**", step.markdown(results["steps"])]
    if results["predicted"]:
        parts += ["**Not measured** (predicted from bytes and the bandwidth reached above)", _predicted(results)]
    return "\n\n".join(part for part in parts if part)


_PERCENT_NOTE = (
    "`copy_` is a measured yardstick, not a ceiling: it writes one element for each that it reads, and a store that "
    "misses the cache first reads its line, which no byte count here includes. Level 2 writes one for four, so it can "
    "be over 100%; so can a loop whose temporaries stay in the cache."
)


def _main_table(workload: Results) -> str:
    on_gpu = workload["device"] == "cuda"
    decimals = 3 if on_gpu else 1
    rows = []
    for p in workload["peers"]:
        if p["group"] == OPS:
            continue
        rows.append(
            [
                f"{p['note']} (`{p['name']}`)",
                f"{number(p['median_ms'], decimals)} "
                f"({number(p['p10_ms'], decimals)} to {number(p['p90_ms'], decimals)})",
                number(p["ratio"], 2),
                number(p["bytes_per_parameter"], 0),
                number(p["gb_per_s"], 1),
                f"{p['percent_of_copy']:.0f}%" if p["percent_of_copy"] is not None else "",
                size(p["peak_bytes"]),
                number(p["graph_ms"], 3) if on_gpu else number(p["page_faults"], 0),
            ]
        )
    rows += [[f"`{name}`", f"skipped: {reason}", *[""] * 6] for name, reason in workload["skipped"].items()]
    last = "ms as a CUDA graph" if on_gpu else "page faults"
    return markdown(["", "ms", "/ level 2", "bytes/param", "GB/s", "of `copy_`", "extra memory", last], rows)


_COLUMNS = ("eager", "compile_eager", "foreach", "loop", "loop_no_value", "ewc_loss", "level1", "level2")


def _others_table(workloads: Sequence[Results]) -> str:
    columns = [name for name in _COLUMNS if any(name in _by_name(w) for w in workloads)]
    rows = []
    for workload in workloads:
        peers = _by_name(workload)
        cells = []
        for name in columns:
            if name not in peers:
                cells.append("")
                continue
            ratio = peers[name]["ratio"]
            times = "" if name == BASELINE or ratio is None else f" ({ratio:.1f})"
            cells.append(f"{number(peers[name]['median_ms'], 2)}{times}")
        share = peers.get(BASELINE, {}).get("percent_of_copy")
        model = f"{workload['description']}, {_millions(workload)} in {workload['tensors']:,}"
        model += "" if workload["dtype"] == "float32" else f", {workload['dtype']}"
        rows.append([model, *cells, "" if share is None else f"{share:.0f}%"])
    return markdown(["", *(_title(c) for c in columns), "level 2, of `copy_`"], rows)


def _warm(workloads: Sequence[Results]) -> str:
    columns = [name for name in _COLUMNS if any(name in _by_name(w) for w in workloads)]
    rows = [
        [w["description"], *(number(_by_name(w).get(name, {}).get("warm_us"), 0) for name in columns)]
        for w in workloads
    ]
    return markdown(["", *(_title(c) for c in columns)], rows)


def _growth_table(growth: Sequence[Results]) -> str:
    names = [peer["name"] for peer in growth[0]["peers"]]
    rows = []
    for workload in growth:
        peers = _by_name(workload)
        share = peers.get(BASELINE, {}).get("percent_of_copy")
        cells = [number(peers.get(name, {}).get("median_ms"), 2) for name in names]
        rows.append([_millions(workload), *cells, "" if share is None else f"{share:.0f}%"])
    return markdown(["parameters", *(f"{_title(n)}, ms" for n in names), "level 2, of `copy_`"], rows)


def _predicted(results: Results) -> str:
    names = list(dict.fromkeys(name for w in results["predicted"] for name in w["predicted_ms"]))
    rows = [
        [
            f"{w['description']}, {_millions(w)} in {w['tensors']:,}",
            size(w["bytes_needed"]),
            *(number(w["predicted_ms"].get(name), 0) for name in names),
        ]
        for w in results["predicted"]
    ]
    return markdown(["", "parameters, gradients, anchor, Fisher", *(f"{_title(n)}, ms" for n in names)], rows)


def replace_section(readme: str, section: str) -> str:
    """A text with what stands between its two markers replaced.

    Raises:
        ValueError: It has not exactly one of each, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"there must be one line {BEGIN} and, after it, one line {END}")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.partition(END)[2]}"


# ---- cells ----


def _by_name(workload: Results) -> dict[str, Any]:
    return {peer["name"]: peer for peer in workload["peers"]}


_TITLES = {
    "level1": "level 1",
    "level2": "level 2",
    "loop_no_value": "loop, no value",
    "compile_eager": "compiled eager",
}


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _millions(workload: Results) -> str:
    return short_count(workload["parameters"]).upper().replace("K", "k")
