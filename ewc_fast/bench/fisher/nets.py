"""The nets that Fisher diagonals are estimated for, and the batches they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ewc_fast.bench.text import check_names

CLASSES = 10
VOCABULARY, TOKENS, WIDTH = 1000, 64, 256
PACKAGES = frozenset({"backpack", "asdl", "nngeometry"})

Batches = list[tuple[Tensor, Tensor]]
"""(inputs, labels) per batch; labels (B,), int64."""


@dataclass(frozen=True)
class Net:
    """A classifier of :data:`CLASSES` classes and the size of its data.

    Attributes:
        name: As the command line knows it.
        description: For the reader of a table.
        make: Builds the model.
        inputs: So many samples' inputs.
        batch, batches: Samples per batch, and how many batches a run sees.
        packages: Those that cover all of its layers.
        ways: Names of the ways that are measured on it; None for all.
        make_smooth: Builds the same without ReLUs, to check values on, where there are so many of them that some lie on
            the other side of 0 in fp32 than in fp64; None where ``make`` will do.
    """

    name: str
    description: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    batches: int
    packages: frozenset[str] = PACKAGES
    ways: tuple[str, ...] | None = None
    make_smooth: Callable[[], nn.Module] | None = None

    @property
    def samples(self) -> int:
        """Samples in a run."""
        return self.batch * self.batches

    def model(self, seed: int = 0, *, smooth: bool = False) -> nn.Module:
        """A new model in evaluation mode, in which a Fisher is taken: every way computes the same function."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make = self.make_smooth if smooth and self.make_smooth else self.make
            return make().eval()

    def data(self, batch: int | None = None, batches: int | None = None, seed: int = 0) -> Batches:
        """Random inputs and labels; its own number and size of batches where none is given."""
        batch, batches = batch or self.batch, batches or self.batches
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [(self.inputs(batch), torch.randint(CLASSES, (batch,))) for _ in range(batches)]


class Encoder(nn.Module):
    """A transformer encoder that classifies the mean of its outputs.

    Args:
        layers, width, heads, feedforward, activation: Of the encoder. Nothing is dropped in evaluation mode.
    """

    def __init__(
        self, layers: int = 6, width: int = WIDTH, heads: int = 4, feedforward: int = 1024, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, feedforward, activation=activation, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), int64, to logits (B, :data:`CLASSES`)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits: Tensor = self.head(self.encoder(self.tokens(tokens) + self.positions(positions)).mean(1))
        return logits


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    """Two convolutions and a linear layer, for images of 1 x 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, CLASSES),
    )


def _mnist_mlp() -> nn.Module:
    return mlp(784, 512, 512, CLASSES)


def _mnist_pixels(count: int) -> Tensor:
    return torch.rand(count, 784)


MAIN = "mlp"
_FEW = ("plain", "loop", "empirical", "sampled")  # where only the batch's size changes

NETS: dict[str, Net] = {
    net.name: net
    for net in (
        Net(MAIN, "MLP 784-512-512-10", _mnist_mlp, _mnist_pixels, 128, 20),
        Net("mlp_b32", "the same, batches of 32", _mnist_mlp, _mnist_pixels, 32, 20, ways=_FEW),
        Net("mlp_b512", "the same, batches of 512", _mnist_mlp, _mnist_pixels, 512, 3, ways=_FEW),
        Net("mlp_85k", "MLP 64-256-256-10", lambda: mlp(64, 256, 256, CLASSES), lambda n: torch.rand(n, 64), 128, 20),
        Net("conv", "two 3x3 convolutions, 28x28 pixels", convolutions, lambda n: torch.rand(n, 1, 28, 28), 128, 4),
        Net(
            "encoder",
            f"transformer encoder, 6 layers, width {WIDTH}, sequence {TOKENS}",
            Encoder,
            lambda n: torch.randint(VOCABULARY, (n, TOKENS)),
            32,
            3,
            packages=frozenset(),
            make_smooth=lambda: Encoder(activation="gelu"),
        ),
    )
}


def find(names: Sequence[str]) -> list[Net]:
    """Nets by name.

    Raises:
        ValueError: There is none of that name; lists those there are.
    """
    check_names("net", names, NETS)
    return [NETS[name] for name in names]
