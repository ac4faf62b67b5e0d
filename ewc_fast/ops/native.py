"""How an op is called: which backend serves a device, and the way to the kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ewc_fast.ops import extension, fake

BACKENDS = ("auto", "native", "reference")

_C = importlib.import_module("ewc_fast._C") if extension.status().loaded else None
if _C is not None:
    fake.register()


def use_native(device: torch.device, backend: str) -> bool:
    """Whether the native kernel serves a device. Says so once where the reference has to step in on CPU or CUDA.

    Raises:
        RuntimeError: ``backend`` is ``"native"`` and there is no kernel; the message says why and what to do.
    """
    if backend == "reference":
        return False
    if extension.has_kernel(device.type):
        return True
    if backend == "native":
        extension.require(device.type)
    if not torch.compiler.is_compiling():
        extension.warn_missing(device.type)
    return False


def call(op: Any, *arguments: Any) -> Any:
    """Calls an op without a graph: it has no derivative of its own, and its results must not claim one."""
    if not torch.is_grad_enabled():
        return op(*arguments)
    torch._C._set_grad_enabled(False)  # what no_grad does, in a fifth of its time
    try:
        return op(*arguments)
    finally:
        torch._C._set_grad_enabled(True)


def direct(name: str) -> Callable[..., Any]:
    """An op past ``torch.ops``, whose conversion of arguments takes longer than the op where the tensors are small; or
    another function that is called at every step.

    It gives None, with nothing done, for arguments that only ``torch.ops`` can take: tensor subclasses, and
    modes that want to see the call.
    """
    return getattr(_C, name, never)  # an older build has fewer


def never(*_: Any) -> None:
    """Stands for a direct call that is never possible."""
    return None
