"""Every op, per dtype, backend and workload."""

from __future__ import annotations

import pytest

from ewc_fast.bench import peers
from ewc_fast.bench.problem import Problem


@pytest.mark.parametrize("op", ["op_penalty", "op_penalty_grad", "op_penalty_accumulate_", "op_scale_"])
def test_op(benchmark, run_peer, workload, dtype, dtypes, backend, op):
    benchmark.group = f"{workload.name}, {dtype}: {op}"
    run_peer(Problem(workload, "cpu", *dtypes, backend=backend), peers.all_peers()[op])
