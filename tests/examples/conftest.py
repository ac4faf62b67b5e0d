"""The example scripts as modules, and one thread: their networks are too small for more."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fisher_kinds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("sklearn", "scipy", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("fisher_kinds")


@pytest.fixture
def calibration(fisher_kinds: ModuleType) -> ModuleType:
    pytest.importorskip("transformers")
    return importlib.import_module("calibration")


@pytest.fixture
def coupling(fisher_kinds: ModuleType) -> ModuleType:
    return importlib.import_module("coupling")
