"""Two pictures of a result: time by peer, and a roofline. Each takes the results' plain data and returns a ``Figure``.

Needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ewc_fast.bench.measure import LIMIT
from ewc_fast.bench.peers import LIMIT as LIMIT_GROUP
from ewc_fast.bench.peers import OPS, OURS, PLAIN, PUBLISHED

# Okabe & Ito's, which the colour-blind tell apart
_COLOURS = {PLAIN: "#999999", PUBLISHED: "#e69f00", OURS: "#0072b2", LIMIT_GROUP: "#000000"}
_LINES = {
    "level2": ("level 2", "#0072b2", "-", "o"),
    "level1": ("level 1", "#009e73", "-", "s"),
    "value": ("value only", "#56b4e9", "-", "^"),
    LIMIT: ("copy_, as measured", "#000000", "--", "x"),
}


def time_by_peer(workload: Mapping[str, Any], caption: str = "") -> Figure:
    """Horizontal bars: the median of each peer, with its 10th and 90th percentile; the ops alone are left out.

    Args:
        workload: One of a result's workloads.
        caption: A line below.
    """
    peers = [peer for peer in workload["peers"] if peer["group"] != OPS]
    peers.sort(key=lambda peer: peer["median_ms"])
    figure = Figure(figsize=(7.2, 1.1 + 0.27 * len(peers)), layout="constrained")
    axis = figure.subplots()
    medians = [peer["median_ms"] for peer in peers]
    errors = [
        [peer["median_ms"] - peer["p10_ms"] for peer in peers],
        [peer["p90_ms"] - peer["median_ms"] for peer in peers],
    ]
    axis.barh(
        [peer["name"] for peer in peers],
        medians,
        xerr=errors,
        color=[_COLOURS[peer["group"]] for peer in peers],
        error_kw={"elinewidth": 0.8, "ecolor": "0.3", "capsize": 1.5},
        height=0.72,
    )
    furthest = max(peer["p90_ms"] for peer in peers)
    for row, peer in enumerate(peers):
        ratio = "" if peer["ratio"] is None else f"  ({peer['ratio']:.1f}x)"
        axis.text(
            1.06 * max(peer["p90_ms"], peer["median_ms"]),
            row,
            f"{_three_digits(peer['median_ms'])}{ratio}",
            va="center",
            fontsize=7.5,
        )
    axis.invert_yaxis()  # the fastest on top
    axis.set_xscale("log")  # the slowest take a hundred times as long as the fastest
    axis.set_xlim(0.5 * min(peer["p10_ms"] for peer in peers), 2.2 * furthest)
    axis.set_xlabel("milliseconds per call, logarithmic; cold caches (in brackets: times level 2)", fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.set_title(
        f"Penalty and gradient: {workload['description']}, {workload['parameters'] / 1e6:.1f}M {workload['dtype']}",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    for group in dict.fromkeys(peer["group"] for peer in peers):
        axis.barh([0], [0], color=_COLOURS[group], label=group)
    axis.legend(fontsize=7.5, frameon=False, loc="upper right")  # the bars there are short
    return _with_caption(figure, caption)


def roofline(workloads: Sequence[Mapping[str, Any]], caption: str = "") -> Figure:
    """Bytes moved per second over the model's size, a line per level, and ``copy_``'s as the limit.

    Args:
        workloads: A result's growth, or several of its workloads, in any order. Peers whose temporaries stay in the
            cache are left out: what they read and write is not what memory delivers.
        caption: A line below.
    """
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(workloads, key=lambda workload: workload["parameters"])
    for name, (title, colour, style, marker) in _LINES.items():
        points = [
            (workload["parameters"], peer["gb_per_s"])
            for workload in ordered
            for peer in workload["peers"]
            if peer["name"] == name and peer["gb_per_s"] is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=title)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("parameters")
    axis.set_ylabel("GB/s read and written, cold caches")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return _with_caption(figure, caption)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _with_caption(figure: Figure, caption: str) -> Figure:
    if caption:
        figure.supxlabel(textwrap.fill(caption, int(17 * figure.get_figwidth())), fontsize=7.5, color="0.35")
    return figure
