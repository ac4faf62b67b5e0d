"""The kernel for convolutions against per-sample gradients in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_fast.fisher import rules

pytestmark = pytest.mark.native

# in, out, groups, height, width, kernel, padding (as F.pad), dilation
SHAPES: dict[str, tuple[Any, ...]] = {
    "one_channel": (1, 16, 1, 28, 28, (3, 3), [1, 1, 1, 1], (1, 1)),
    "one_channel_padded": (1, 16, 1, 28, 13, (3, 3), [1, 1, 1, 1], (1, 1)),
    "odd_channels": (3, 7, 1, 9, 13, (3, 3), [1, 1, 1, 1], (1, 1)),
    "no_padding": (4, 5, 1, 11, 12, (5, 5), [0, 0, 0, 0], (1, 1)),
    "same_of_even_kernels": (2, 4, 1, 8, 8, (2, 4), [1, 2, 0, 1], (1, 1)),
    "one_column_left": (2, 5, 1, 3, 25, (3, 3), [1, 1, 1, 1], (1, 1)),
    "no_column_left": (2, 6, 2, 5, 24, (3, 2), [1, 0, 1, 1], (1, 1)),
    "groups": (6, 9, 3, 7, 16, (3, 2), [1, 1, 1, 1], (1, 1)),
    "depthwise": (5, 5, 5, 6, 21, (3, 7), [3, 3, 1, 1], (1, 1)),
    "dilation": (3, 4, 1, 12, 15, (3, 3), [2, 2, 3, 3], (3, 2)),
    "one_row": (2, 8, 1, 1, 40, (1, 5), [2, 2, 0, 0], (1, 1)),
    "padding_beyond_the_input": (2, 3, 1, 2, 8, (3, 3), [4, 4, 5, 5], (1, 1)),
}


def draw(shape: str, samples: int) -> tuple[rules.Convolution, Tensor, Tensor, Tensor]:
    """The rule, sums that are not 0, inputs and output gradients."""
    inputs, outputs, groups, height, width, kernel, padding, dilation = SHAPES[shape]
    x = torch.randn(samples, inputs, height, width)
    total = torch.rand(outputs, inputs // groups, *kernel)
    rule = rules.Convolution(total.shape, (1, 1), list(padding), dilation, groups)
    y = F.conv2d(F.pad(x, padding), total, None, 1, 0, dilation, groups)
    return rule, total, x, torch.randn_like(y)


def expected(rule: rules.Convolution, total: Tensor, x: Tensor, g: Tensor) -> Tensor:
    found = total.double()
    for x_n, g_n in zip(x.double().split(1), g.double().split(1), strict=True):
        weight = torch.zeros(rule.shape, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(F.pad(x_n, rule.padding), weight, None, 1, 0, rule.dilation, rule.groups)
        found = found + torch.autograd.grad(y, weight, g_n)[0] ** 2
    return found


@pytest.mark.parametrize("samples", [1, 2, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_squares(shape: str, samples: int) -> None:
    rule, total, x, g = draw(shape, samples)
    wanted = expected(rule, total, x, g)
    version = total._version
    assert rule.add_directly_(total, x, g)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-6 * wanted.max().item())
    assert total._version > version


@pytest.mark.parametrize(("shape", "samples"), [("one_channel", 70), ("one_channel_padded", 90)])
def test_many_blocks_of_samples_and_any_number_of_threads(shape: str, samples: int) -> None:
    rule, total, x, g = draw(shape, samples)  # blocks are of 19 and of 33
    wanted = expected(rule, total, x, g)
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            mine = total.clone()
            assert rule.add_directly_(mine, x, g)
            found.append(mine)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-6 * wanted.max().item())


def test_inputs_in_any_memory_order() -> None:
    rule, total, x, g = draw("odd_channels", 6)
    wanted = expected(rule, total, x, g)
    x, g = x.contiguous(memory_format=torch.channels_last), g.repeat(1, 1, 1, 2)[..., : g.shape[3]]
    assert rule.add_directly_(total, x, g)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-6 * wanted.max().item())


def test_infinities_and_nan_do_not_vanish() -> None:
    """They may spread: the zeros that fill up a row of gradients are multiplied with them."""
    rule, total, x, g = draw("odd_channels", 2)
    x[0, 1, 4, 12] = torch.inf
    x[1, 0, 0, 0] = torch.nan
    wanted = expected(rule, total, x, g).isfinite()
    assert rule.add_directly_(total, x, g)
    assert not total.isfinite()[~wanted].any() and total.isfinite()[:, 2].all()  # whose channel has none


def test_what_is_left_to_windows() -> None:
    rule, total, x, g = draw("odd_channels", 2)
    before = total.clone()
    rule.stride = (2, 1)
    assert not rule.add_directly_(total, x, g)
    rule.stride = (1, 1)
    for other in ((total.double(), x, g), (total, x.double(), g), (total, x, g.bfloat16())):
        assert not rule.add_directly_(*other)
    narrow = torch.randn(2, 3, 9, 3)  # three columns of eight
    assert not rule.add_directly_(total, narrow, F.conv2d(F.pad(narrow, rule.padding), total))

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Sees():
        assert not rule.add_directly_(total, x, g)
    rule.padding = [-1, -1, 3, 3]
    assert not rule.add_directly_(total, x, g)
    rule.padding = [1, 1, 1, 1]
    assert torch.equal(total, before)
    with pytest.raises(RuntimeError, match="add_conv_squares_: a gradient of 12 where the stride is 1"):
        rule.add_directly_(total, x, g[..., :12])
    with pytest.raises(RuntimeError, match="inputs, gradients and sums do not fit"):
        rule.add_directly_(total, x[:1], g)
    assert torch.equal(total, before)
    empty = total.clone()
    assert rule.add_directly_(empty, x[:0], g[:0]) and torch.equal(empty, before)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "directly", "shared"),
    [
        (16, 32, 14, True, True),
        (64, 64, 16, True, False),  # windows that several g share are the faster way
        (128, 128, 8, False, False),  # products of few places: one of matrices is
        (256, 256, 14, False, False),
        (256, 512, 14, False, False),
    ],
)
def test_which_way_is_taken(inputs: int, outputs: int, size: int, directly: bool, shared: bool) -> None:
    x, g = torch.randn(1, inputs, size, size), torch.randn(1, outputs, size, size)
    rule = rules.Convolution(torch.Size((outputs, inputs, 3, 3)), (1, 1), [1, 1, 1, 1], (1, 1), 1)
    total = torch.zeros(rule.shape)
    assert rule.add_directly_(total, x, g) is directly
    assert rule.add_directly_(total, x, g, shared=True) is shared
