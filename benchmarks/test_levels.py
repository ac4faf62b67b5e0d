"""What users call, per dtype, backend and workload; and what they would write instead."""

from __future__ import annotations

import pytest

from ewc_fast.bench import peers
from ewc_fast.bench.problem import Problem


@pytest.mark.parametrize("name", ["level2", "level1", "value"])
def test_level(benchmark, run_peer, workload, dtype, dtypes, backend, name):
    benchmark.group = f"{workload.name}, {dtype}: {name}"
    run_peer(Problem(workload, "cpu", *dtypes, backend=backend), peers.all_peers()[name])


def test_functional(benchmark, run_peer, workload, dtype, dtypes):
    benchmark.group = f"{workload.name}, {dtype}: ewc_loss"
    run_peer(Problem(workload, "cpu", *dtypes), peers.all_peers()["ewc_loss"])


@pytest.mark.parametrize("name", ["eager", "eager_flat", "loop", "loop_no_value", "foreach", "copy_"])
def test_plain_pytorch(benchmark, run_peer, workload, dtype, dtypes, name):
    benchmark.group = f"{workload.name}, {dtype}: plain PyTorch"
    run_peer(Problem(workload, "cpu", *dtypes), peers.all_peers()[name])
