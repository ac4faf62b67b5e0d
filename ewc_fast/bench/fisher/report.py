"""From results to text, files and the bars. Reads nothing but the results' JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewc_fast.bench.fisher.nets import MAIN
from ewc_fast.bench.fisher.ways import BASELINE, OURS, PUBLISHED
from ewc_fast.bench.measure import median, percentile
from ewc_fast.bench.report import where
from ewc_fast.bench.text import markdown, number, read_results, size
from ewc_fast.bench.text import write_json as write_json

Results = Mapping[str, Any]
_TIMES_PLAIN = {MAIN: (1.3, 1.0), "encoder": (1.5, 1.5)}  # bar and aim


# ---- the bars ----


@dataclass(frozen=True)
class Bar:
    """What a measured ratio is held against.

    Attributes:
        what: In words.
        found: The ratio, for times the median of that within a round.
        low, high: Its 10th and 90th percentile; None for memory, which is measured once.
        bar, aim: The ratio asked for, and the one that we want to be known for.
        at_most: Whether smaller is better.
    """

    what: str
    found: float
    low: float | None
    high: float | None
    bar: float
    aim: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether the ratio is where the bar asks it to be."""
        return self.found <= self.bar if self.at_most else self.found >= self.bar


def bars(results: Results) -> list[Bar]:
    """Every bar whose two sides are among the results."""
    found = []
    for net in results["nets"]:
        ways = _by_name(net)
        for way in net["ways"]:
            if way["group"] != OURS:
                continue
            kind, about = way["kind"], f"{net['name']}, {way['kind']}"
            model = net["name"].split("_b")[0]  # without the batch size
            single = kind in ("empirical", "sampled")  # one backward per sample, as in training
            if single and (limits := _TIMES_PLAIN.get(model)) is not None:
                bar, aim = limits
                ratio = over(way, ways[BASELINE])
                found.append(Bar(f"{about}: time over that of a plain forward and backward", *ratio, bar, aim, True))
            if single and model == MAIN and "loop" in ways:
                ratio = over(ways["loop"], way)
                found.append(Bar(f"{about}: times as fast as the loop of batch size 1", *ratio, 10, 20, False))
            theirs = [w for w in net["ways"] if w["group"] == PUBLISHED and w["kind"] == kind]
            if theirs:
                fastest = min(theirs, key=lambda other: float(other["median_ms"]))
                what = f"{about}: times as fast as the fastest package, {fastest['note']}"
                found.append(Bar(what, *over(fastest, way), 1, 1, False))
            if single or kind == "exact":
                allowed = net["activation_bytes"] + net["largest_layer_bytes"]
                what = f"{about}: memory over that of activations and largest layer"
                found.append(Bar(what, way["minus_fisher"] / allowed, None, None, 1, 1, True))
    if language := results.get("language"):
        ways = _by_name(language)
        for name, way in ways.items():
            kind = name.split("_")[0]
            if kind in ("empirical", "sampled"):
                what = f"Llama, {kind}, batches of {way['batch']}: times as fast as the loop of batch size 1"
                found.append(Bar(what, *_within(ways["loop"]["times"], way["times"]), 1, 1, False))
    return found


def over(way: Results, other: Results) -> tuple[float, float, float]:
    """The ratio of two ways within a round: its median, 10th and 90th percentile; each way at its faster threads."""
    return _within(way["times"][str(way["threads"])], other["times"][str(other["threads"])])


def _within(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return median(ratios), percentile(ratios, 10), percentile(ratios, 90)


def _by_name(net: Results) -> dict[str, Results]:
    return {way["name"]: way for way in net["ways"]}


# ---- files ----


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`ewc_fast.bench.text.write_json` wrote.

    Raises:
        ValueError: The file is no result of this benchmark.
    """
    return read_results(path, "nets", "python -m ewc_fast bench --fisher")


def merged(old: Results, new: Results) -> dict[str, Any]:
    """New results, and of the old ones what was not measured anew.

    Raises:
        ValueError: They are of different machines or versions.
    """
    for key in ("machine", "versions", "kernels"):
        if old[key] != new[key]:
            raise ValueError(f"the results there are of another {key}: {old[key]}, here {new[key]}; use another --out")
    again = {net["name"]: net for net in new["nets"]}
    nets = [again.pop(net["name"], net) for net in old["nets"]]
    return {
        **new,
        "nets": [*nets, *again.values()],
        "language": new["language"] or old["language"],
    }


def to_csv(results: Results) -> str:
    """A row per net and way, then those of the language model; times in milliseconds per sample or sequence."""
    rows: list[dict[str, Any]] = []
    for net in results["nets"]:
        for way in net["ways"]:
            rows.append(
                {
                    "net": net["name"],
                    "parameters": net["parameters"],
                    "batch": net["batch"],
                    "samples": net["samples"],
                    "rounds": net["rounds"],
                    **{key: way[key] for key in ("name", "kind", "group", "threads")},
                    **{key: way[key] / net["samples"] for key in ("median_ms", "p10_ms", "p90_ms")},
                    **{key: way[key] for key in ("off", "trace", "peak_bytes")},
                    "times_plain": over(way, _by_name(net)[BASELINE])[0],
                }
            )
    if language := results.get("language"):
        for way in language["ways"]:
            rows.append(
                {
                    "net": "llama",
                    "parameters": language["parameters"],
                    "batch": way["batch"],
                    "samples": language["sequences"],
                    "rounds": language["rounds"],
                    "name": way["name"],
                    "threads": language["threads"],
                    "median_ms": way["seconds"] * 1e3,
                    "p10_ms": way["p10"] * 1e3,
                    "p90_ms": way["p90"] * 1e3,
                    "off": way["off"],
                    "trace": way["trace"],
                    "peak_bytes": way["peak_bytes"],
                }
            )
    text = io.StringIO()
    header = list(dict.fromkeys(key for row in rows for key in row)) or ["net"]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- text ----


def net_table(net: Results) -> str:
    """One net's ways, as Markdown."""
    plain, loop = _by_name(net)[BASELINE], _by_name(net).get("loop")
    rows = []
    for way in net["ways"]:
        faster = over(loop, way)[0] if loop else None
        rows.append(
            [
                f"{way['note']} (`{way['name']}`)",
                way["kind"] if not way["differs"] else f"none: {way['differs']}",
                f"{number(way['median_ms'], 1)} ({number(way['p10_ms'], 1)} to {number(way['p90_ms'], 1)})",
                str(way["threads"]),
                number(way["us_per_sample"], 1),
                _spread(*over(way, plain)),
                number(faster, 1),
                size(way["minus_fisher"]),
                number(way["trace"], 3),
                "" if way["off"] is None or way["differs"] else f"{way['off']:.0e}",
            ]
        )
    header = [
        "",
        "computes",
        "ms",
        "threads",
        "us per sample",
        "times plain",
        "times as fast as the loop",
        "memory beyond the Fisher",
        "trace / ours",
        "off",
    ]
    title = (
        f"{net['description']} ({net['parameters']:,} parameters), {net['samples']:,} samples in batches of "
        f"{net['batch']}, {net['rounds']} rounds. A batch's activations take {size(net['activation_bytes'])}, the "
        f"largest layer {size(net['largest_layer_bytes'])}."
    )
    skipped = "; ".join(f"`{name}`: {reason}" for name, reason in net["skipped"].items())
    parts = [title, markdown(header, rows)]
    if skipped:
        parts.append(f"Not measured: {skipped}.")
    return "\n\n".join(parts)


def _ms(seconds: float) -> str:
    return number(seconds * 1e3, 1)


def language_table(language: Results) -> str:
    """The language model's ways, as Markdown."""
    ways = _by_name(language)
    rows = []
    for way in language["ways"]:
        rows.append(
            [
                f"{way['note']} (`{way['name']}`)",
                f"{_ms(way['seconds'])} ({_ms(way['p10'])} to {_ms(way['p90'])})",
                number(_within(way["times"], ways["step"]["times"])[0], 2),
                _spread(*_within(ways["loop"]["times"], way["times"])),
                number(way["start_seconds"], 1),
                size(way["peak_bytes"]),
                number(way["trace"], 3),
                "" if way["off"] is None else f"{way['off']:.0e}",
            ]
        )
    precision = "bf16 autocast" if language["autocast"] else "fp32"
    title = (
        f"{language['description']} ({language['parameters']:,} parameters, {size(language['model_bytes'])}), "
        f"{language['sequences']} sequences of {language['tokens']} tokens, {precision}, "
        f"{language['threads']} threads, {language['rounds']} rounds."
    )
    header = [
        "",
        "ms per sequence",
        "times a step's share",
        "times as fast as the loop",
        "seconds once per estimate",
        "memory, one batch",
        "trace / loop's",
        "off the loop's",
    ]
    return f"{title}\n\n{markdown(header, rows)}"


def _spread(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def bars_table(found: Sequence[Bar]) -> str:
    """The bars, as Markdown."""
    rows = []
    for bar in found:
        sign = "at most" if bar.at_most else "at least"
        rows.append(
            [
                bar.what,
                _spread(bar.found, bar.low, bar.high),
                f"{sign} {bar.bar:g}",
                f"{bar.aim:g}",
                "yes" if bar.met else "**no**",
            ]
        )
    return markdown(["", "measured (10th to 90th percentile)", "bar", "aim", "met"], rows)


def summary(results: Results, folder: str) -> str:
    """The bars, for a document from which ``folder`` is seen."""
    return (
        f"Measured {results['date']} on {where(results)}, all in one process, interleaved; ratios within a round, "
        f"every way at its faster number of threads. Every way on every net: [results]({folder}/results.md).\n\n"
        f"{bars_table(bars(results))}"
    )


def section(results: Results) -> str:
    """Everything, as Markdown. Every number in it is in the results."""
    versions, malloc = results["versions"], results["machine"].get("malloc")
    malloc = f" ({malloc})" if malloc else ""
    packages = ", ".join(f"{name} {versions[name] or 'not installed'}" for name in ("backpack", "asdl", "nngeometry"))
    parts = [
        f"Measured {results['date']} on {where(results)}{malloc}; packages: {packages}. Before it is timed, every "
        "way's diagonal is compared with a loop over samples and labels in fp64 (`off`: the largest difference of a "
        "tensor, relative to its norm; sampled labels from one seed). Times are medians over interleaved rounds, in "
        "brackets the 10th and 90th percentile, each way at the faster number of threads; ratios are taken within a "
        "round.",
        bars_table(bars(results)),
        *(net_table(net) for net in results["nets"]),
    ]
    if results.get("language"):
        parts.append(language_table(results["language"]))
    return "\n\n".join(parts) + "\n"
