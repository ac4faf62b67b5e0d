"""Pictures of forgetting. Each function takes plain data and returns a matplotlib ``Figure``; nothing is shown.

Needs matplotlib (the extra ``demo``). No window system and no global state: ``figure.savefig("x.png")``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_COLOURS = ("#999999", "#e69f00", "#0072b2", "#009e73", "#cc79a7")  # Okabe & Ito's, which the colour-blind tell apart


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
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
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
    axis.legend(fontsize=8, frameon=False)
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
