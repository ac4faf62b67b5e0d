"""A model with its EWC state and gradients that are there already, as they are after the task's backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss
from ewc_fast.bench.workloads import Workload
from ewc_fast.ops.types import FlatQuadratic

LAMBDA = 100.0


class _Idle(torch.optim.Optimizer):
    """An optimizer of which only the hooks are left."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


class Problem:
    """What every peer is handed.

    Fisher and anchor are views of one state, so that all peers read the same memory, and a large model fits once.
    What only some peers need is made when the first of them asks.

    Args:
        workload: The model's shapes.
        device: Where everything lies.
        dtype: Of parameters, gradients and anchor.
        fisher_dtype: Of the Fisher; as EWCLoss chooses if None.
        backend: EWCLoss's.
        seed: Of the random numbers.

    Attributes:
        model: An ``nn.Module`` with the parameters.
        params, names: Its parameters, each with a gradient, and their names.
        fisher, anchor: By name; shaped like the parameters.
        fishers, anchors: The same as lists.
        ewc: An EWCLoss with that state.
        ewc_lambda: 100.
    """

    def __init__(
        self,
        workload: Workload,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        fisher_dtype: torch.dtype | None = None,
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        self.workload, self.device, self.dtype, self.backend = workload, torch.device(device), dtype, backend
        self.ewc_lambda = LAMBDA
        generator = torch.Generator(self.device).manual_seed(seed)

        def noise(shape: tuple[int, ...], scale: float) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=self.device).mul_(scale)

        self.model = nn.Module()
        for i, shape in enumerate(workload.shapes):
            self.model.register_parameter(f"p{i}", nn.Parameter(noise(shape, 0.02)))
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params: list[Tensor] = list(self.model.parameters())
        state_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.ewc = EWCLoss(self.model, LAMBDA, fisher_dtype=fisher_dtype, backend=backend)
        self.ewc.consolidate(
            fisher={
                name: torch.rand(p.shape, generator=generator, dtype=fisher_dtype or state_dtype, device=self.device)
                for name, p in self.model.named_parameters()
            },
            anchor={name: p.detach() + noise(p.shape, 0.01) for name, p in self.model.named_parameters()},
        )
        self.fisher, self.anchor = dict(self.ewc.fisher), dict(self.ewc.anchor)
        self.fishers, self.anchors = [self.fisher[n] for n in self.names], [self.anchor[n] for n in self.names]
        self.fisher_dtype = self.fishers[0].dtype
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.cache: dict[str, Any] = {}  # what a peer makes once, such as a compiled function

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return self.workload.numel

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, in the parameters' order."""
        return [p.grad for p in self.params if p.grad is not None]

    @contextmanager
    def fresh_grads(self) -> Iterator[None]:
        """Zeros for gradients inside, and whatever they were before, outside: for a check in the midst of a run."""
        before = [p.grad for p in self.params]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        try:
            yield
        finally:
            for p, grad in zip(self.params, before, strict=True):
                p.grad = grad

    @cached_property
    def quadratic(self) -> FlatQuadratic:
        """The state as the ops take it."""
        (part,) = self.ewc._parts()
        return part.quadratic

    @cached_property
    def flat_buffer(self) -> Tensor:
        """As long as the flat state and of the parameters' dtype: what ``copy_`` and the ops write into."""
        return torch.zeros_like(self.quadratic.anchor, dtype=self.dtype)

    @cached_property
    def flat_state(self) -> tuple[Tensor, Tensor]:
        """Fisher and anchor as one vector each, without gaps, for those who concatenate."""
        return torch.cat([f.reshape(-1) for f in self.fishers]), torch.cat([a.reshape(-1) for a in self.anchors])

    @cached_property
    def attached(self) -> tuple[EWCLoss, torch.optim.Optimizer]:
        """The same state once more, attached to an optimizer whose step does nothing."""
        ewc = self._same_state(self.fisher_dtype)
        optimizer = _Idle(self.params, {})
        ewc.attach(optimizer)
        return ewc, optimizer

    @cached_property
    def ewc_bf16_fisher(self) -> EWCLoss:
        """The same state with its Fisher in bf16."""
        return self._same_state(torch.bfloat16)

    def _same_state(self, fisher_dtype: torch.dtype) -> EWCLoss:
        ewc = EWCLoss(self.model, LAMBDA, fisher_dtype=fisher_dtype, backend=self.backend)
        ewc.consolidate(fisher=self.fisher, anchor=self.anchor)
        return ewc
