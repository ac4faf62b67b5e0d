"""What the pytest-benchmark cases share. Run by ``pytest benchmarks``; ``make test`` does not collect them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ewc_fast.bench import workloads
from ewc_fast.bench.measure import CacheFlush
from ewc_fast.bench.peers import Peer, Sizes, Unavailable, check
from ewc_fast.bench.problem import Problem
from ewc_fast.ops import extension

DEFAULT_WORKLOADS = "many_tiny,mlp"

# Of parameters, gradients and anchor; of the Fisher, where it is another.
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16_fisher": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
    "bf16_fp32_fisher": (torch.bfloat16, torch.float32),
    "fp64": (torch.float64, None),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--workloads",
        default=DEFAULT_WORKLOADS,
        help=f"comma-separated, of {', '.join(workloads.WORKLOADS)}; {DEFAULT_WORKLOADS} if left out",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES)
    if "workload" in metafunc.fixturenames:
        found = workloads.find(metafunc.config.getoption("--workloads").split(","))
        metafunc.parametrize("workload", found, ids=[workload.name for workload in found])


@pytest.fixture
def dtypes(dtype: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Those of a name."""
    return DTYPES[dtype]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The two implementations of every op."""
    if request.param == "native" and not extension.has_kernel("cpu"):
        pytest.skip(": ".join(extension.explain("cpu")))
    return str(request.param)


@pytest.fixture
def run_peer(benchmark) -> Callable[[Problem, Peer], None]:
    """Checks a peer against the formula in fp64, then times it: caches cold, as between two optimizer steps."""

    def run(problem: Problem, peer: Peer) -> None:
        try:
            check(problem, peer)
        except Unavailable as error:
            pytest.skip(str(error))
        benchmark.pedantic(peer.run, (problem,), setup=CacheFlush(problem.device), rounds=20, warmup_rounds=1)
        moved = peer.bytes_for(Sizes.of(problem))
        benchmark.extra_info["parameters"] = problem.numel
        benchmark.extra_info["bytes_per_parameter"] = moved
        if moved is not None and benchmark.stats is not None:  # there are none under --benchmark-disable
            benchmark.extra_info["gb_per_s"] = moved * problem.numel / benchmark.stats["median"] / 1e9

    return run
