"""Small classifiers, each with something that an estimate may get wrong."""

from typing import Any

import torch
from torch import Tensor, nn

IMAGE = (3, 6, 6)
NUM_CLASSES = 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))


def conv_net() -> nn.Module:
    """Convolution, BatchNorm with statistics that are not the defaults, dropout, an in-place activation."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16, NUM_CLASSES),
    )
    for _ in range(3):
        model(torch.randn(8, *IMAGE) * 2 + 1)
    return model


class Times(torch.autograd.Function):
    """``x * weight`` with the derivative written by hand; vmap cannot see through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).flatten(0, -2).sum(0)


class Scale(nn.Module):
    """No rule covers it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.chunk(1)[0].exp()


class Tied(nn.Module):
    """One weight in two places, one bias used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) + self.first.bias
        return self.head(torch.tanh(self.second(hidden)))


class Branching(nn.Module):
    """Data-dependent control flow, which cannot be vectorised, and a parameter that some samples do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, NUM_CLASSES)
        self.right = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.left(row) if row.sum() > 0 else self.right(row).exp() for row in x])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.gru = nn.GRU(5, 6, batch_first=True)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0][:, -1])


class ShiftsInputInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.head(x * x)


class CountsCalls(nn.Module):
    """Changes a buffer in every forward pass, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, NUM_CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x)


class Unused(nn.Module):
    """A parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, NUM_CLASSES)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
