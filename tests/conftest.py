"""What every test has: fresh random inputs each run, and what to skip on a machine that lacks something."""

from __future__ import annotations

import os
import random
import secrets
import warnings

import numpy as np
import pytest
import torch

from ewc_fast.ops import extension

SEED_VARIABLE = "EWC_FAST_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: needs the compiled extension")
    # Where the extension is not built, tests with backend="auto" run on the reference; the skips below say so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        extension.warn_missing("cpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("native") and not extension.has_kernel("cpu"):
        pytest.skip(": ".join(extension.explain("cpu")))
    if item.get_closest_marker("native") and item.get_closest_marker("gpu") and not extension.has_kernel("cuda"):
        pytest.skip(": ".join(extension.explain("cuda")))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator afresh. A failing test shows the seed; to repeat it, set EWC_FAST_TEST_SEED to that."""
    value = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(31))
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)
    print(f"{SEED_VARIABLE}={value}")
    return value


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The two implementations of every op, on the CPU."""
    return str(request.param)
