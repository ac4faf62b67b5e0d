"""The permuted digits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits  # noqa: E402

from ewc_fast.demo.data import permuted_digits  # noqa: E402


def test_the_first_task_is_the_digits_themselves_each_once() -> None:
    task = permuted_digits(1, seed=0)[0]
    assert task.train_inputs.shape == (1400, 64) and task.test_inputs.shape == (397, 64)
    digits = load_digits()
    rows = torch.cat([torch.cat([task.train_inputs, task.test_inputs]) * 16, _column(task)], dim=1)
    expected = torch.cat(
        [torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target).float()[:, None]], dim=1
    )
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_tasks_differ_in_the_order_of_the_pixels_alone() -> None:
    first, second, third = permuted_digits(3, seed=5)
    assert torch.equal(first.train_labels, second.train_labels)
    assert not torch.equal(first.train_inputs, second.train_inputs)
    assert not torch.equal(second.train_inputs, third.train_inputs)
    for task in (second, third):
        assert torch.equal(task.train_inputs.sort(1).values, first.train_inputs.sort(1).values)
        # One permutation for all samples, training and test: the columns are the same, elsewhere.
        whole, moved = (torch.cat([t.train_inputs, t.test_inputs]).T.tolist() for t in (first, task))
        assert sorted(whole) == sorted(moved)


def test_the_seed_decides_the_permutations_and_not_the_split() -> None:
    one, other = permuted_digits(2, seed=1), permuted_digits(2, seed=2)
    assert torch.equal(one[0].train_inputs, other[0].train_inputs)
    assert not torch.equal(one[1].train_inputs, other[1].train_inputs)
    assert torch.equal(one[1].train_inputs, permuted_digits(2, seed=1)[1].train_inputs)


def _column(task: object) -> torch.Tensor:
    return torch.cat([task.train_labels, task.test_labels]).float()[:, None]  # type: ignore[attr-defined]
