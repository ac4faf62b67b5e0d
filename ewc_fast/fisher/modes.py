"""Switching a model between training and evaluation, and back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def module_mode(model: nn.Module, *, training: bool, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Puts ``model`` into training or evaluation mode; on exit every submodule has its own flag back.

    Args:
        model: Any module; submodules may differ in mode.
        training: True for ``model.train()``, False for ``model.eval()``.
        modules: ``model.modules()``, where they have been listed before.
    """
    flags = [(module, module.training) for module in modules or model.modules()]
    switch = any(flag != training for _, flag in flags)
    try:
        if switch:
            model.train(training)
        yield
    finally:
        if switch:
            model.train(flags[0][1])  # not only the flags: some modules merge weights or drop caches there
        for module, flag in flags:
            if module.training != flag:
                module.training = flag
