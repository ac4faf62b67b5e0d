"""What a result was measured with."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import sklearn
import torch

import ewc_fast
from ewc_fast.machine import describe_machine
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
        "machine": describe_machine(),
        "backend": "native" if extension.has_kernel("cpu") else "reference",
    }
