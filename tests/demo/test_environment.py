"""What a result was measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from ewc_fast.machine import cpu_model  # noqa: E402


def test_cpu_model_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor: 3 GHz\n")
    assert cpu_model(tmp_path / "cpuinfo") == "A Processor: 3 GHz"


def test_cpu_model_without_such_a_file(tmp_path: Path) -> None:
    assert cpu_model(tmp_path / "missing")
