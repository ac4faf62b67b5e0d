"""The data: scikit-learn's handwritten digits, one permutation of the pixels per task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

NUM_PIXELS = 64
NUM_CLASSES = 10
NUM_TRAIN = 1400
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Task:
    """One task's samples.

    Attributes:
        train_inputs: (1400, 64) fp32, 0 to 1.
        train_labels: (1400,) int64.
        test_inputs: (397, 64), likewise.
        test_labels: (397,) int64.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def permuted_digits(num_tasks: int, seed: int) -> list[Task]:
    """The 1,797 digits as a sequence of tasks, their pixels permuted (Goodfellow et al. 2013; Kirkpatrick et al. 2017).

    The split into training and test samples is the same for all tasks and seeds. The first task's pixels stay in place.

    Args:
        num_tasks: How many tasks.
        seed: Of the permutations.
    """
    digits = load_digits()
    inputs = torch.from_numpy(digits.data).float() / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for index in range(num_tasks):
        places = torch.arange(NUM_PIXELS) if index == 0 else torch.randperm(NUM_PIXELS, generator=generator)
        tasks.append(Task(inputs[train][:, places], labels[train], inputs[test][:, places], labels[test]))
    return tasks
