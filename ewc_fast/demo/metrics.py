"""What an accuracy matrix says.

``R[i][j]`` is the accuracy on task j after i tasks, so row 0 is before any training: shape (T + 1, T).
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def mean_accuracy(accuracy: Matrix) -> float:
    """Mean over all tasks at the end."""
    return _mean(accuracy[-1])


def accuracy_when_learnt(accuracy: Matrix) -> float:
    """Mean over the tasks of the accuracy right after each was learnt: how well a method learns at all."""
    return _mean([accuracy[j + 1][j] for j in range(len(accuracy[0]))])


def backward_transfer(accuracy: Matrix) -> float:
    """BWT of Lopez-Paz & Ranzato (2017, arXiv:1706.08840): mean over the old tasks of accuracy at the end less right
    after learning. Negative where something was forgotten."""
    return _mean([accuracy[-1][j] - accuracy[j + 1][j] for j in range(len(accuracy[0]) - 1)])


def forgetting(accuracy: Matrix) -> float:
    """Forgetting of Chaudhry et al. (2018, arXiv:1801.10112): mean over the old tasks of the best accuracy that the
    task had before the last one was learnt, less the one at the end."""
    old = range(len(accuracy[0]) - 1)
    return _mean([max(row[j] for row in accuracy[j + 1 : -1]) - accuracy[-1][j] for j in old])


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
