"""Pictures of forgetting and of the Fisher. Each function returns a matplotlib ``Figure``; nothing is shown.

Needs matplotlib (the extra ``demo``). No window system and no global state: ``figure.savefig("x.png")``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

# Okabe & Ito's, which the colour-blind tell apart; grey first, and without the yellow.
_COLOURS = ("#999999", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")


def accuracy_over_time(accuracy: Mapping[str, ArrayLike], epochs_per_task: int, caption: str = "") -> Figure:
    """Each task's accuracy as training goes on, one panel per method; a line begins where its task does.

    Args:
        accuracy: By the method's title: (seeds, 1 + tasks * epochs, tasks); the mean over seeds is drawn.
        epochs_per_task: Epochs of each task.
        caption: A line below.

    Raises:
        ValueError: An array's shape does not fit.
    """
    figure = Figure(figsize=(3.4 * len(accuracy), 3.2), layout="constrained")
    axes = figure.subplots(1, len(accuracy), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, accuracy.items(), strict=True):
        array = np.asarray(values, dtype=float)
        num_tasks = array.shape[-1]
        if array.ndim != 3 or array.shape[1] != 1 + num_tasks * epochs_per_task:
            raise ValueError(
                f"accuracy[{title!r}] must have shape (seeds, 1 + tasks * {epochs_per_task}, tasks), got {array.shape}"
            )
        mean = array.mean(0)
        for task in range(num_tasks):
            start = task * epochs_per_task
            epochs = np.arange(start, len(mean))
            axis.plot(
                epochs, mean[start:, task], color=_shade(task, num_tasks), label=f"task {task + 1}", linewidth=1.4
            )
            if task:
                axis.axvline(start, color="0.85", linewidth=0.8, zorder=0)
        axis.set_title(f"{title}: {mean[-1].mean():.2f} at the end", fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(fontsize=7, frameon=False, loc="lower left")
    return _with_caption(figure, caption)


def accuracy_over_lambda(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    baselines: Mapping[str, float] | None = None,
    caption: str = "",
) -> Figure:
    """Mean accuracy at the end over the penalty's weight.

    Args:
        curves: By title: (lambdas, mean accuracies), in any order.
        baselines: By title: the mean accuracy of a method that has no lambda; a horizontal line.
        caption: A line below.
    """
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    axis = figure.subplots()
    colours = iter(_COLOURS)
    for title, value in (baselines or {}).items():
        axis.axhline(value, color=next(colours), linestyle="--", label=title)
    for title, (lambdas, accuracies) in curves.items():
        points = sorted(zip(lambdas, accuracies, strict=True))
        axis.plot(*zip(*points, strict=True), marker="o", color=next(colours), label=title)
    axis.set_xscale("log")
    axis.set_xlabel("lambda")
    axis.set_ylabel("mean accuracy at the end")
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    axis.spines[["top", "right"]].set_visible(False)
    return _with_caption(figure, caption)


def predicted_against_true(rises: Mapping[str, tuple[ArrayLike, ArrayLike]], caption: str = "") -> Figure:
    """The rise of the old tasks' loss as predicted, against what it truly was, on log axes.

    Points where either is not positive have no place on log axes and are left out.

    Args:
        rises: By the method's title: (predicted, true), arrays of one shape, in nats.
        caption: A line below.
    """
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axis = figure.subplots()
    drawn = []
    for colour, (title, (predicted, true)) in zip(_COLOURS[1:], rises.items(), strict=False):
        pairs = np.stack([np.ravel(np.asarray(predicted, float)), np.ravel(np.asarray(true, float))])
        pairs = pairs[:, (pairs > 0).all(0)]
        axis.scatter(pairs[0], pairs[1], s=9, alpha=0.6, linewidths=0, color=colour, label=title)
        drawn.append(pairs)
    everything = np.concatenate(drawn, axis=1)
    if everything.size:
        limits = [everything.min() / 2, everything.max() * 2]
        axis.plot(limits, limits, color="0.5", linestyle="--", linewidth=1, label="predicted = true")
        axis.set_xscale("log")
        axis.set_yscale("log")
    axis.set_xlabel("predicted rise of the old tasks' loss (nats, summed)")
    axis.set_ylabel("true rise (nats, summed)")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _with_caption(figure, caption)


def plot_fisher(fisher: Mapping[str, Tensor], caption: str = "", max_layers: int = 40) -> Figure:
    """Where the Fisher is, and how its entries are spread.

    Left, each layer's share of the trace, in the model's order; a layer is the module that holds the parameters: weight
    and bias are one bar. Right, the histogram of log10 of the entries; zeros have no place there and are counted in the
    title.

    Args:
        fisher: By parameter name, entries at least 0: what ``estimate_fisher`` returns, or ``ewc.fisher``. Any shapes,
            floating dtypes and devices; one tensor at a time is copied.
        caption: A line below.
        max_layers: If there are more, the bars are those with the largest shares, and one for the others together.

    Raises:
        ValueError: Nothing to draw, an entry that is negative or not finite, ``max_layers`` below 1.
    """
    if max_layers < 1:
        raise ValueError(f"max_layers must be at least 1, got {max_layers}")
    num_entries = sum(t.numel() for t in fisher.values())
    if not num_entries:
        raise ValueError("fisher has no entries: nothing to draw")
    masses: dict[str, float] = {}
    low, high = np.inf, -np.inf
    for name, t in fisher.items():
        entries = _entries(t)
        if not np.isfinite(entries).all() or (entries < 0).any():
            raise ValueError(f"fisher[{name!r}] has entries that are negative or not finite: it is no Fisher diagonal")
        layer = name.rpartition(".")[0] or name
        masses[layer] = masses.get(layer, 0.0) + float(entries.sum())
        positive = entries[entries > 0]
        if positive.size:
            low, high = min(low, positive.min()), max(high, positive.max())
    edges = np.linspace(np.log10(low), np.log10(high) + 1e-9, 61) if high > 0 else np.linspace(-1.0, 0.0, 61)
    counts = np.zeros(60)
    for t in fisher.values():
        entries = _entries(t)
        # Rounding may put the smallest and the largest a hair outside.
        logs = np.log10(entries[entries > 0]).clip(edges[0], edges[-1])
        counts += np.histogram(logs, edges)[0]
    zeros = num_entries - int(counts.sum())

    trace = sum(masses.values())
    layers = list(masses)
    if len(layers) > max_layers:
        largest = set(sorted(layers, key=masses.__getitem__)[-max_layers:])
        rest = sum(masses[layer] for layer in layers if layer not in largest)
        layers = [layer for layer in layers if layer in largest]
        others = f"{len(masses) - max_layers} others"
        masses[others] = rest
        layers.append(others)
    shares = [masses[layer] / trace if trace else 0.0 for layer in layers]
    figure = Figure(figsize=(9.0, max(3.2, 1.2 + 0.2 * len(layers))), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(range(len(layers)), shares, color=_COLOURS[2])
    left.set_yticks(range(len(layers)), layers, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("share of the trace")
    left.set_title(f"trace {trace:.3g} over {num_entries:,} entries", fontsize=10)
    right.stairs(counts, edges, fill=True, color=_COLOURS[2])
    right.set_xlabel("log10 of the entry")
    right.set_ylabel("entries")
    right.set_title(f"{zeros:,} entries are 0 ({zeros / num_entries:.1%})", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return _with_caption(figure, caption)


def _entries(t: Tensor) -> NDArray[np.float64]:
    return np.asarray(t.detach().double().cpu().numpy(), dtype=np.float64).ravel()


def _shade(index: int, count: int) -> tuple[float, float, float]:
    """From dark blue to light orange."""
    share = index / max(1, count - 1)
    dark, light = np.array([0.05, 0.2, 0.45]), np.array([0.95, 0.6, 0.1])
    red, green, blue = dark + share * (light - dark)
    return float(red), float(green), float(blue)


def _with_caption(figure: Figure, caption: str) -> Figure:
    if caption:
        columns = int(17 * figure.get_figwidth())
        figure.supxlabel(textwrap.fill(caption, columns), fontsize=7.5, color="0.35")
    return figure
