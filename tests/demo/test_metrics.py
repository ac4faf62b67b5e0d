"""The metrics against matrices worked out by hand."""

from __future__ import annotations

import pytest

from ewc_fast.demo import metrics

# Rows: before training, after task 1, 2, 3. Task 1 gets better with task 2, so that its best is not when it was learnt.
MATRIX = [
    [0.1, 0.2, 0.1],
    [0.8, 0.2, 0.3],
    [0.9, 0.7, 0.1],
    [0.5, 0.6, 1.0],
]


def test_mean_accuracy_is_of_the_last_row() -> None:
    assert metrics.mean_accuracy(MATRIX) == pytest.approx((0.5 + 0.6 + 1.0) / 3)


def test_accuracy_when_learnt_is_the_diagonal_below_the_first_row() -> None:
    assert metrics.accuracy_when_learnt(MATRIX) == pytest.approx((0.8 + 0.7 + 1.0) / 3)


def test_backward_transfer_leaves_the_last_task_out() -> None:
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)


def test_forgetting_is_from_the_best_accuracy_before_the_end() -> None:
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)


def test_nothing_forgotten() -> None:
    matrix = [[0.0, 0.0], [0.9, 0.0], [0.95, 0.9]]
    assert metrics.backward_transfer(matrix) == pytest.approx(0.05)
    assert metrics.forgetting(matrix) == pytest.approx(-0.05)


def test_spread_is_the_sample_standard_deviation() -> None:
    assert metrics.spread([1.0, 2.0, 4.0]) == pytest.approx(1.5275252316519468)
    assert metrics.spread([3.0]) == 0.0
