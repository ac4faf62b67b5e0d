"""Small results, measured for real, that the tests of reports and pictures share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ewc_fast.bench import environment, measure, peers
from ewc_fast.bench.problem import Problem
from ewc_fast.bench.workloads import Workload

TINY = Workload("gpt2_48m", "a tiny one under the name that the bars are about", ((7, 5), (3,), (4, 4, 2)))
OTHER = Workload("other", "another", ((600, 1000), (11,)))
PEERS = ("eager", "loop", "loop_no_value", "foreach", "level1", "level2", "op_penalty", "copy_")


def measured(workload: Workload, names: tuple[str, ...] = PEERS) -> dict[str, Any]:
    """A workload's result, as in the JSON."""
    return measure.as_dict(measure.measure(Problem(workload), peers.find(names), rounds=2))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Everything that a result holds, but for training steps."""
    tiny = measured(TINY)
    tiny["skipped"] = {"compile_eager": "no compiler"}
    other = measured(OTHER)
    return {
        **environment.describe(torch.device("cpu")),
        "command": "python -m ewc_fast bench --all",
        "workloads": [tiny, other],
        "growth": [other],
        "steps": [],
        "predicted": [
            {
                "name": "llama_7b",
                "description": "Llama 2 7B",
                "parameters": 6_738_415_616,
                "tensors": 291,
                "reason": "on paper only",
                "bytes_needed": 107_814_649_856,
                "predicted_ms": {"level2": 3712.5},
                "predicted_from": "other",
            }
        ],
        "seconds": 1.0,
    }
