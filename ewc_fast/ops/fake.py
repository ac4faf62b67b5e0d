"""Fake kernels: the shapes of what the native ops return, for ``torch.compile`` and ``torch.export``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library


def _check_devices(expected: torch.device, *arguments: Any) -> None:
    """The dispatcher runs a fake kernel on real tensors too, if one among them is on the meta device."""
    for argument in arguments:
        for t in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(t, Tensor) and t.device != expected:
                raise ValueError(f"all tensors must be on one device, got one on {t.device} and one on {expected}")


def _result(params: list[Tensor], anchor: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(anchor.device, params, *others)
    fp64 = len(params) > 0 and params[0].dtype == torch.float64
    dtype = torch.float64 if fp64 else torch.float32
    return (
        anchor.new_empty((), dtype=dtype),
        anchor.new_empty((), dtype=dtype),
        anchor.new_empty((2, len(params)), dtype=torch.float64),
    )


def register() -> None:
    """Called once, after the extension has defined the ops."""

    @library.register_fake("ewc_fast::penalty")
    def _(params: list[Tensor], anchor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _result(params, anchor, *args, *kwargs.values())

    @library.register_fake("ewc_fast::penalty_grad")
    def _(params: list[Tensor], grad: Tensor, anchor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _result(params, anchor, grad, *args, *kwargs.values())

    @library.register_fake("ewc_fast::penalty_accumulate_")
    def _(params: list[Tensor], grads: list[Tensor], anchor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _result(params, anchor, grads, *args, *kwargs.values())

    @library.register_fake("ewc_fast::scale_")
    def _(buffer: Tensor, factor: Tensor) -> None:
        _check_devices(buffer.device, factor)

    @library.register_fake("ewc_fast::fisher_accumulate_")
    def _(fisher: list[Tensor], grads: list[Tensor], weight: float = 1.0) -> None:
        if fisher:
            _check_devices(fisher[0].device, fisher, grads)

    def step(params: list[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of an optimizer: all tensors on one device; where there is no parameter, an anchor says which."""
        tensors = [a for a in (*params, *args, *kwargs.values()) if isinstance(a, Tensor)]
        return _result(params, tensors[0], *args, *kwargs.values())

    for name in ("adamw_", "sgd_", "proximal_"):
        library.register_fake(f"ewc_fast::{name}")(step)
