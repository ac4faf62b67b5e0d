"""What a result was measured with."""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

import torch

import ewc_fast
from ewc_fast.bench.measure import cache_bytes
from ewc_fast.machine import describe_machine
from ewc_fast.ops import extension


def describe(device: torch.device, backend: str = "auto") -> dict[str, Any]:
    """Date, machine, versions, and which kernels serve a device under a backend; JSON-compatible."""
    machine = {**describe_machine(), "threads": torch.get_num_threads(), "last_level_cache_bytes": cache_bytes(device)}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    status = extension.status()
    kernels: dict[str, Any] = {
        "backend": "native" if extension.has_kernel(device.type) and backend != "reference" else "reference",
        "reason": "asked for" if backend == "reference" else extension.explain(device.type)[0],
        "build": status.build,
    }
    if status.loaded:
        kernels["instruction_set"] = importlib.import_module("ewc_fast._C").cpu_capability()
    return {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {
            "ewc_fast": ewc_fast.__version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "kernels": kernels,
    }


def machine_name(machine: Mapping[str, Any]) -> str:
    """A folder's name for a machine: ``amd_epyc_2core``, or the GPU's name where one was measured."""
    title = machine.get("gpu") or f"{machine['cpu']} {machine['cores']}core"
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm)\)|processor|cpu @.*ghz", "", title.lower())).strip("_")
