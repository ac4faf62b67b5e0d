"""Per-sample gradients of a parameter in one operation, from its input and output gradient; sums of their squares.

Everything here is laid out with the samples first: inputs x and gradients g are (N, ...).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ewc_fast.ops.fisher import fisher_accumulate_
from ewc_fast.ops.native import direct

_conv_squares_ = direct("conv_squares_")

# Per-sample gradients held at once: on the CPU they should still be in the cache when they are squared.
_BLOCK_BYTES = {"cpu": 2 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20
# Gradients of several cotangents held at once, in all operations together.
_HELD_BYTES = 64 << 20
_HELD_BYTES_ELSEWHERE = 512 << 20
# Several cotangents: a batch whose layers' outputs take more than this, and than the largest parameter, is taken in
# parts, of no fewer samples. Not on a GPU, most of which would be idle.
_PART_BYTES = 256 << 10
_PART_SAMPLES = 8
# Elements. Below, BLAS libraries add each product to what they are given, which in fp32 loses digits of a long sum;
# above, they add the sum of the products.
SMALL = 1 << 16
# Samples whose vectors are squared at a time: the more, the faster the product, and the more memory.
VECTORS = 256


def block_bytes(device: torch.device) -> int:
    """How many bytes of per-sample gradients to hold at once."""
    return _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE)


def held_bytes(graph_bytes: int, largest_bytes: int, device: torch.device) -> int:
    """How many bytes of gradients of several cotangents to hold at once.

    Args:
        graph_bytes: Of the layers' outputs for the samples taken at once; 0 where that is not known.
        largest_bytes: Of the largest parameter.
        device: Where.
    """
    if device.type != "cpu":
        return _HELD_BYTES_ELSEWHERE
    return min(_HELD_BYTES, max(graph_bytes, largest_bytes - graph_bytes)) if graph_bytes else _HELD_BYTES


def samples_at_once(size: int, output_bytes: int, largest_bytes: int, device: torch.device) -> int:
    """Into parts of how many samples to divide a batch that has several backwards.

    So that the part's graph, which stays until its last backward, and the gradients that are held of it together take
    no more memory than the graph of the whole batch and one copy of the largest parameter.

    Args:
        size: Samples in the batch.
        output_bytes: Of the layers' outputs for one sample.
        largest_bytes: Of the largest parameter.
        device: Where.
    """
    if device.type != "cpu" or size * output_bytes <= max(_PART_BYTES, largest_bytes):
        return size
    return min(size, max(_PART_SAMPLES, size // 2))


def add_squares_(total: Tensor, gradients: Tensor) -> None:
    """``total += sum_n gradients[n]^2``; gradients have one more dimension, in front."""
    fisher_accumulate_([total], [gradients])


def product_dtype(g: Tensor) -> torch.dtype:
    """In which dtype to multiply: fp32 where a CPU has no instructions for 16-bit ones, and takes 8 times as long."""
    if g.device.type != "cpu" or g.dtype not in (torch.bfloat16, torch.float16):
        return g.dtype
    return torch.bfloat16 if g.dtype == torch.bfloat16 and _multiplies_bf16() else torch.float32


@functools.cache
def _multiplies_bf16() -> bool:
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in known)


class Rule(ABC):
    """How a parameter's gradient follows from x and g."""

    @abstractmethod
    def add_one_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        """Adds the gradient of the only sample in x and g."""

    @abstractmethod
    def add_squares_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        """Adds the squares of all samples' gradients."""


class PerSample(Rule):
    """Where all samples' gradients are formed, in blocks."""

    @abstractmethod
    def per_sample(self, x: Tensor, g: Tensor) -> Tensor:
        """(N, *parameter's shape)."""

    def add_one_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        total += self.per_sample(x, g)[0].to(total.dtype)

    def add_squares_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        step = max(1, block_bytes(total.device) // max(1, 4 * total.numel()))
        for start in range(0, len(g), step):
            add_squares_(total, self.per_sample(x[start : start + step], g[start : start + step]))


class OfVectors(Rule):
    """Where x and g may be one vector per sample: the square of a product is then the product of the squares."""

    @abstractmethod
    def is_of_vectors(self, y: Tensor) -> bool:
        """Whether the operation with this output is such a one."""

    @abstractmethod
    def add_vectors_(self, total: Tensor, x: Tensor, g_squared: Tensor) -> None:
        """Adds the squares, given those of g: (N, out) in the dtype of ``total``, summed over several g or not."""


@dataclass
class Product(OfVectors):
    """A matrix: the gradient is ``left^T right``, summed over positions. Left is g for (out, in), x for (in, out)."""

    left_is_g: bool

    def _sides(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        x, g = (t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2) for t in (x.to(g.dtype), g))
        return (g, x) if self.left_is_g else (x, g)

    def add_one_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        left, right = self._sides(x, g)
        total.addmm_(left[0].t().to(total.dtype), right[0].to(total.dtype))

    def add_squares_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        left, right = self._sides(x, g)
        dtype = product_dtype(g)
        rows = max(1, block_bytes(total.device) // max(1, 4 * total.shape[1]))
        step = max(1, rows // max(1, total.shape[0]))
        for start in range(0, len(g), step):
            part = slice(start, start + step)
            right_part = right[part].to(dtype)
            for row in range(0, total.shape[0], rows):
                of_rows = left[part, :, row : row + rows].transpose(1, 2).to(dtype)
                add_squares_(total[row : row + rows], torch.bmm(of_rows, right_part))

    def is_of_vectors(self, y: Tensor) -> bool:
        return y.dim() == 2

    def add_vectors_(self, total: Tensor, x: Tensor, g_squared: Tensor) -> None:
        if len(x) > VECTORS:
            for x_part, g_part in zip(x.split(VECTORS), g_squared.split(VECTORS), strict=True):
                self.add_vectors_(total, x_part, g_part)
            return
        x_squared = x.to(g_squared.dtype).square()
        left, right = (g_squared, x_squared) if self.left_is_g else (x_squared, g_squared)
        if total.numel() < SMALL:
            total += left.t() @ right
        else:
            total.addmm_(left.t(), right)


@dataclass
class Broadcast(PerSample, OfVectors):
    """A parameter that was broadcast against x: the gradient is g (times x) summed down to its shape."""

    shape: torch.Size
    times_x: bool = False
    channels: bool = False  # dimension 1 is the parameter's only one
    negative: bool = False
    of: Callable[[Tensor], Tensor] | None = None  # from what is kept to x

    def of_rows(self, x: Tensor) -> tuple[Broadcast, Tensor]:
        """The rule and its x where rows are to be parted into samples, after which the channels come last.

        Only the rows themselves may be normalised: by sample they would be taken for (N, C, ...).
        """
        if not self.channels:
            return self, x
        return replace(self, channels=False, of=None), x if self.of is None else self.of(x)

    def per_sample(self, x: Tensor, g: Tensor) -> Tensor:
        t = -g if self.negative else g
        if self.times_x:
            x = x.to(g.dtype)
            t = t * (x if self.of is None else self.of(x))
        if self.channels:
            return t.flatten(2).sum(2) if t.dim() > 2 else t
        shape = self.shape[1:] if len(self.shape) == t.dim() else self.shape  # its first one is 1
        extra = t.dim() - 1 - len(shape)
        if extra:
            t = t.sum(tuple(range(1, 1 + extra)))
        summed = [d + 1 for d, n in enumerate(shape) if n == 1 and t.shape[d + 1] != 1]
        if summed:
            t = t.sum(summed, keepdim=True)
        return t.reshape(len(g), *self.shape)

    def is_of_vectors(self, y: Tensor) -> bool:
        return y.dim() == 2 and not self.times_x and self.shape.numel() == y.shape[1]

    def add_vectors_(self, total: Tensor, x: Tensor, g_squared: Tensor) -> None:
        total += g_squared.sum(0)


@dataclass
class Rows(Rule):
    """An embedding: x are row numbers."""

    shape: torch.Size
    padding: int | None

    def _kept(self, x: Tensor, g: Tensor) -> Tensor:
        return g if self.padding is None else g.masked_fill((x == self.padding)[..., None], 0)

    def add_one_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        total.index_add_(0, x.flatten(), self._kept(x, g).reshape(-1, self.shape[1]).to(total.dtype))

    def add_squares_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        sample = torch.arange(len(x), device=x.device).reshape(-1, *[1] * (x.dim() - 1))
        keys, place = (sample * self.shape[0] + x).flatten().unique(return_inverse=True)
        sums = total.new_zeros(len(keys), self.shape[1])
        sums.index_add_(0, place, self._kept(x, g).reshape(-1, self.shape[1]).to(total.dtype))
        total.index_add_(0, keys % self.shape[0], sums.square())


@dataclass
class SharedRows(Broadcast):
    """An embedding that all samples share, as of positions, where it is broadcast against x."""

    rows: Rows | None = None
    ids: Tensor | None = None

    def is_of_vectors(self, y: Tensor) -> bool:
        return False

    def _per_row(self, x: Tensor, g: Tensor) -> tuple[Rows, Tensor, Tensor]:
        assert self.rows is not None and self.ids is not None
        g = super().per_sample(x, g).reshape(len(g), *self.ids.shape, -1)
        return self.rows, self.ids.expand(len(g), *self.ids.shape), g

    def add_one_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        rows, ids, g = self._per_row(x, g)
        rows.add_one_(total, ids, g)

    def add_squares_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        rows, ids, g = self._per_row(x, g)
        rows.add_squares_(total, ids, g)


@dataclass
class OfTable(Broadcast):
    """What is made of an embedding that all samples share, as of relative positions, and broadcast against x."""

    made: Tensor | None = None
    table: Tensor | None = None  # the weight, from which the graph of what is made begins

    def per_sample(self, x: Tensor, g: Tensor) -> Tensor:
        assert self.made is not None and self.table is not None
        g = super().per_sample(x, g).to(self.made.dtype)
        return torch.autograd.grad(self.made, self.table, g, retain_graph=True, is_grads_batched=True)[0]

    def is_of_vectors(self, y: Tensor) -> bool:
        return False


@dataclass
class Convolution(PerSample):
    """A convolution's weight, from windows of the padded input."""

    shape: torch.Size
    stride: tuple[int, ...]
    padding: list[int] = field(default_factory=list)  # as F.pad takes it
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def per_sample(self, x: Tensor, g: Tensor) -> Tensor:
        return self._of_many(x, [g])

    def _of_many(self, x: Tensor, gs: list[Tensor]) -> Tensor:
        """(N * len(gs), *parameter's shape): for each sample the gradients of all its g."""
        n, many, groups, places = len(x), len(gs), self.groups, gs[0].shape[2:].numel()
        windows = self._windows(x.to(gs[0].dtype), gs[0]).reshape(n * groups, -1, places)
        g = torch.stack([g.reshape(n, groups, -1, places) for g in gs], 2)  # (N, groups, many, channels, places)
        found = torch.bmm(g.reshape(n * groups, -1, places), windows.transpose(1, 2))
        return found.reshape(n, groups, many, -1).transpose(1, 2).reshape(n * many, *self.shape)

    def _windows(self, x: Tensor, g: Tensor) -> Tensor:
        """What each place of the output sees of the padded input, (N, channels * kernel, places)."""
        kernel, places = self.shape[2:], g.shape[2:]
        if len(kernel) < 3:  # torch's own does it for two dimensions, twice as fast
            flat = len(kernel) == 1
            x = torch.nn.functional.pad(x[:, :, None] if flat else x, self.padding)
            size, dilation, stride = (((1, *k) if flat else k) for k in (kernel, self.dilation, self.stride))
            return torch.nn.functional.unfold(x, size, dilation, 0, stride)
        x = torch.nn.functional.pad(x, self.padding).contiguous()
        steps = x.stride()[2:]
        windows = x.as_strided(
            (*x.shape[:2], *kernel, *places),
            (
                *x.stride()[:2],
                *(s * by for s, by in zip(steps, self.dilation, strict=True)),
                *(s * by for s, by in zip(steps, self.stride, strict=True)),
            ),
        )
        return windows.reshape(len(x), -1, places.numel())

    def add_squares_(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        if not self.add_directly_(total, x, g):
            self.add_many_(total, x, [g])

    def add_directly_(self, total: Tensor, x: Tensor, g: Tensor, *, shared: bool = False) -> bool:
        """Without windows, where there is a kernel for it and it is the faster way; says whether.

        ``shared``: several g would share a copy of the windows.
        """
        if self.stride != (1, 1) or len(total.shape) != 4:
            return False
        # The kernel ends every product over the places of a plane with a sum over lanes, which the few places of wide
        # layers' planes do not pay for: there a matrix product of windows is faster. Fitted to measured times.
        places, outputs = g.shape[2] * (-(-g.shape[3] // 8) * 8), len(total) // self.groups
        if places * (outputs + (48 if shared else 320)) <= 512 * outputs:
            return False
        return bool(_conv_squares_(total, x, g, self.padding, list(self.dilation), self.groups))

    def add_many_(self, total: Tensor, x: Tensor, gs: list[Tensor]) -> None:
        """Adds the squares of several g for one x, whose windows are copied once."""
        g = gs[0]
        windows = 4 * x.shape[1] * g.shape[2:].numel() * self.shape[2:].numel()
        step = max(1, block_bytes(total.device) // max(1, windows + 4 * len(gs) * (total.numel() + g[:1].numel())))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            add_squares_(total, self._of_many(x[part], [g[part] for g in gs]))
