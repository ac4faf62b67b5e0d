"""What a result was measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch

import ewc_fast
from ewc_fast.ops import extension


def describe() -> dict[str, Any]:
    """Versions, machine, and which implementation of the penalty serves the CPU; JSON-compatible."""
    return {
        "versions": {
            "ewc_fast": ewc_fast.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "backend": "native" if extension.has_kernel("cpu") else "reference",
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as far as the system tells."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
