"""What is measured: the parameter shapes of models, which are all that the penalty sees of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ewc_fast.bench.text import check_names

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """A model, as its parameters' shapes.

    Attributes:
        name: As the command line knows it.
        description: For the reader of a table.
        shapes: One per parameter tensor, in the model's order.
        on_paper: Too large for most machines: measured only where it is asked for by name.
    """

    name: str
    description: str
    shapes: Shapes
    on_paper: bool = False

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def tensors(self) -> int:
        """Number of parameter tensors."""
        return len(self.shapes)

    def bytes_needed(self, dtype: torch.dtype, fisher_dtype: torch.dtype | None = None) -> int:
        """What EWC's user holds: parameters, gradients, anchor and Fisher, without the optimizer's state.

        Args:
            dtype: Of parameters, gradients and anchor.
            fisher_dtype: Of the Fisher; ``dtype`` if None.
        """
        return self.numel * (3 * dtype.itemsize + (fisher_dtype or dtype).itemsize)


def _linear(inputs: int, outputs: int) -> Shapes:
    return ((outputs, inputs), (outputs,))


def _mlp(*widths: int) -> Shapes:
    return tuple(shape for layer in zip(widths, widths[1:], strict=False) for shape in _linear(*layer))


def _gpt2_block(width: int) -> Shapes:
    """GPT-2's weights are laid (inputs, outputs)."""
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return norm + attention + norm + mlp


def _gpt2(width: int, blocks: int, vocabulary: int, positions: int) -> Shapes:
    """With the head tied to the embedding."""
    return ((vocabulary, width), (positions, width), *(_gpt2_block(width) * blocks), (width,), (width,))


def _gpt2_blocks(width: int) -> Shapes:
    """Twelve of GPT-2's blocks and one norm's weight; no embedding."""
    return (*(_gpt2_block(width) * 12), (width,))


def _resnet50() -> Shapes:
    """torchvision's: bottlenecks of 1x1, 3x3 and 1x1 convolutions, each without a bias and followed by a batch norm."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Shapes:
        return ((outputs, inputs, kernel, kernel), (outputs,), (outputs,))

    shapes = [*convolution(3, 64, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [*convolution(inputs, width, 1), *convolution(width, width, 3), *convolution(width, 4 * width, 1)]
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return (*shapes, *_linear(inputs, 1000))


def _llama(width: int, blocks: int, key_width: int, mlp_width: int, vocabulary: int = 32000) -> Shapes:
    """Llama 2's: grouped keys and values, a gated MLP, RMS norms, a head of its own, and no biases."""
    attention = ((width, width), (key_width, width), (key_width, width), (width, width))
    mlp = ((mlp_width, width), (mlp_width, width), (width, mlp_width))
    block = attention + mlp + ((width,), (width,))
    return ((vocabulary, width), *(block * blocks), (width,), (vocabulary, width))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("many_tiny", "20 tensors of 100", ((100,),) * 20),
        Workload("many_small", "2,000 tensors of 64", ((64,),) * 2000),
        Workload("mlp", "MLP 784-512-512-10", _mlp(784, 512, 512, 10)),
        Workload("resnet50", "ResNet-50", _resnet50()),
        Workload("gpt2_48m", "12 blocks of GPT-2 at width 576", _gpt2_blocks(576)),
        Workload("gpt2_small", "GPT-2 small", _gpt2(768, 12, 50257, 1024)),
        Workload("llama_1b", "TinyLlama 1.1B", _llama(2048, 22, 256, 5632)),
        Workload("llama_7b", "Llama 2 7B", _llama(4096, 32, 4096, 11008), on_paper=True),
    )
}

GROWTH = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000, 500_000_000)


def scaled(numel: int) -> Workload:
    """Twelve blocks of GPT-2, as wide as it takes for about so many parameters: how cost grows, and nothing else does.

    The width is a multiple of 16, so that the count comes within some percent; ``gpt2_48m`` is one of them.

    Args:
        numel: Parameters wanted, at least 100,000.
    """
    if numel < 100_000:
        raise ValueError(f"numel must be at least 100,000, got {numel}: 12 blocks of width 16 have 40,000")
    width = max(16, round(math.sqrt(numel / 144) / 16) * 16)
    return Workload(f"gpt2_{short_count(numel)}", f"12 blocks of GPT-2 at width {width}", _gpt2_blocks(width))


def short_count(count: int) -> str:
    """1_100_048_384 -> "1.1b"; 47_866_176 -> "48m"; 2_000 -> "2k": two digits, or all before the point."""
    for size, unit in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if count >= size:
            share = count / size
            return (f"{share:.1f}".removesuffix(".0") if share < 9.95 else f"{share:.0f}") + unit
    return str(count)


def find(names: Sequence[str]) -> list[Workload]:
    """Workloads by name.

    Raises:
        ValueError: There is none of that name; lists those there are.
    """
    check_names("workload", names, WORKLOADS)
    return [WORKLOADS[name] for name in names]
