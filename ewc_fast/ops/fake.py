"""Fake kernels: the shapes of what the native ops return, for ``torch.compile`` and ``torch.export``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _result(params: list[Tensor], anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fp64 = len(params) > 0 and params[0].dtype == torch.float64
    dtype = torch.float64 if fp64 else torch.float32
    return (
        anchor.new_empty((), dtype=dtype),
        anchor.new_empty((), dtype=dtype),
        anchor.new_empty((2, len(params)), dtype=torch.float64),
    )


def register() -> None:
    """Called once, after the extension has defined the ops."""

    @torch.library.register_fake("ewc_fast::penalty")
    def _(params: list[Tensor], anchor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _result(params, anchor)

    @torch.library.register_fake("ewc_fast::penalty_grad")
    def _(params: list[Tensor], grad: Tensor, anchor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _result(params, anchor)

    @torch.library.register_fake("ewc_fast::penalty_accumulate_")
    def _(params: list[Tensor], grads: list[Tensor], anchor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _result(params, anchor)

    @torch.library.register_fake("ewc_fast::scale_")
    def _(buffer: Tensor, factor: Tensor) -> None:
        return None
