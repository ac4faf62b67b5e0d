"""A picture of a result. Needs matplotlib (the extra ``bench``)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ewc_fast.bench.fisher.report import over
from ewc_fast.bench.fisher.ways import BASELINE, LOOP, OURS, PLAIN, PUBLISHED

# Okabe & Ito's, which the colour-blind tell apart
_COLOURS = {PLAIN: "#000000", LOOP: "#999999", PUBLISHED: "#e69f00", OURS: "#0072b2"}


def time_by_way(results: Mapping[str, Any], nets: Sequence[str] | None = None, caption: str = "") -> Figure:
    """A panel per net: the time of each way over that of a plain forward and backward, with its spread; the language
    model's over a step's share.

    Args:
        results: With at least one net, or the language model.
        nets: Names of those to draw; None for all.
        caption: A line below.
    """
    panels = []
    for net in results["nets"]:
        if nets is None or net["name"] in nets:
            plain = next(way for way in net["ways"] if way["name"] == BASELINE)
            bars = [(way["name"], way["group"], *over(way, plain)) for way in net["ways"]]
            panels.append((net["description"], bars, "times a plain forward and backward"))
    if language := results.get("language"):
        step = next(way["seconds"] for way in language["ways"] if way["name"] == "step")
        groups = {"step": PLAIN, "loop": LOOP}
        bars = [
            (w["name"], groups.get(w["name"], OURS), w["seconds"] / step, w["p10"] / step, w["p90"] / step)
            for w in language["ways"]
        ]
        panels.append((language["description"], bars, "times a sequence's share of a training step"))
    rows = max(len(bars) for _, bars, _ in panels)
    lines = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 0.6 + lines * (0.9 + 0.24 * rows)), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, bars, label) in zip(axes, panels, strict=False):
        _panel(axis, title, bars, label)
    for group in (PLAIN, LOOP, PUBLISHED, OURS):
        axes[0].barh([0], [0], color=_COLOURS[group], label=group)
    axes[0].legend(fontsize=7.5, frameon=False, loc="upper right")  # the bars there are short
    if caption:
        figure.supxlabel(textwrap.fill(caption, 170), fontsize=7.5, color="0.35")
    return figure


def _panel(axis: Axes, title: str, bars: Sequence[tuple[str, str, float, float, float]], label: str) -> None:
    ordered = sorted(bars, key=lambda bar: bar[2])
    values = [bar[2] for bar in ordered]
    errors = [[max(0, bar[2] - bar[3]) for bar in ordered], [max(0, bar[4] - bar[2]) for bar in ordered]]
    axis.barh(
        [bar[0] for bar in ordered],
        values,
        xerr=errors,
        color=[_COLOURS[bar[1]] for bar in ordered],
        error_kw={"elinewidth": 0.8, "ecolor": "0.3", "capsize": 1.5},
        height=0.72,
    )
    for row, bar in enumerate(ordered):
        axis.text(1.06 * max(bar[2], bar[4]), row, f"{bar[2]:.2f}", va="center", fontsize=7.5)
    axis.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
    axis.invert_yaxis()  # the fastest on top
    axis.set_xscale("log")
    axis.set_xlim(0.5 * min(1.0, *values), 2.2 * max(max(bar[2], bar[4]) for bar in ordered))
    axis.set_xlabel(f"{label}, logarithmic", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=9.5)
    axis.spines[["top", "right"]].set_visible(False)
