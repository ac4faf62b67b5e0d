"""An interrupted estimate against one without interruption."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from ewc_fast.fisher import FisherEstimator


def assert_resumes(make: Callable[[], FisherEstimator], batches: list[Any], cut: int = 1) -> None:
    """Saved after ``cut`` batches and taken up by another estimator it is the same, bit for bit."""
    whole, first, second = make(), make(), make()
    for batch in batches:
        whole.update(batch)
    for batch in batches[:cut]:
        first.update(batch)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in batches[cut:]:
        second.update(batch)
    expected, found = whole.result(), second.result()
    assert all(torch.equal(f, found[name]) for name, f in expected.items())
    assert found.info == expected.info
