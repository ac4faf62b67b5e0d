"""Every layer, and every way of using a parameter, against the brute force."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from ewc_fast.fisher import FisherEstimator, estimate_fisher, rules
from ewc_fast.fisher.capture import UNCOVERED
from tests.fisher import brute_force, models
from tests.fisher.brute_force import assert_fisher, one_thread  # noqa: F401

CLASSES = 3
Inputs = Callable[[int], Any]


def normal(*shape: int) -> Inputs:
    return lambda size: torch.randn(size, *shape)


def ids(length: int, rows: int = 6) -> Inputs:
    """Few rows, so that ids repeat within a sample and are shared by samples."""
    return lambda size: torch.randint(rows, (size, length))


class Readout(nn.Module):
    """Logits from a layer's output by a fixed map, so that the layer's parameters are the only ones."""

    def __init__(self, layer: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.layer = layer
        args = inputs(2)
        features = self.features(args if isinstance(args, tuple) else (args,)).shape[1]
        self.register_buffer("mix", torch.randn(features, CLASSES) * 2 / math.sqrt(features))

    def features(self, args: tuple[Any, ...]) -> Tensor:
        output = self.layer(*args)
        output = output[0] if isinstance(output, tuple) else output
        return torch.tanh(output).flatten(1)

    def forward(self, *args: Any) -> Tensor:
        return self.features(args) @ self.mix


@dataclass(frozen=True)
class Case:
    """A layer with its inputs; ``direct``: it returns logits itself. Batches of 4, 4 and 1 unless told."""

    make: Callable[[], nn.Module]
    inputs: Inputs
    direct: bool = False
    sizes: tuple[int, ...] = (4, 4, 1)

    def build(self, dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
        layer = self.make()
        with torch.no_grad():  # no parameter at an initial value that hides something: zero biases, unit scales
            for p in layer.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
        model = layer if self.direct else Readout(layer, self.inputs)
        inputs = [self.inputs(size) for size in self.sizes]
        return model.to(dtype), [
            (cast(x, dtype), torch.randint(CLASSES, (n,))) for x, n in zip(inputs, self.sizes, strict=True)
        ]


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, tuple):
        return tuple(cast(x, dtype) for x in inputs)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def check(case: Case, kind: str, dtype: torch.dtype) -> None:
    model, batches = case.build(dtype)
    assert_fisher(estimate_fisher(model, batches, kind=kind), brute_force.fisher(model, batches, kind))


def with_statistics(norm: nn.Module, *shape: int) -> nn.Module:
    """A BatchNorm whose running statistics are not the initial ones."""
    for _ in range(3):
        norm(torch.randn(6, *shape) * 2 + 1)
    return norm


LAYERS = {
    "linear": Case(lambda: nn.Linear(5, 6), normal(5)),
    "linear_no_bias": Case(lambda: nn.Linear(5, 6, bias=False), normal(5)),
    "linear_to_one": Case(lambda: nn.Linear(5, 1), normal(5)),
    "linear_3d": Case(lambda: nn.Linear(5, 6), normal(4, 5)),
    "linear_3d_no_bias": Case(lambda: nn.Linear(5, 6, bias=False), normal(4, 5)),
    "linear_3d_one_row": Case(lambda: nn.Linear(5, 6), normal(1, 5)),
    "linear_long": Case(lambda: nn.Linear(3, 2), normal(40, 3)),
    "linear_wide": Case(lambda: nn.Linear(40, 30), normal(2, 40)),
    "linear_4d": Case(lambda: nn.Linear(5, 6), normal(2, 3, 5)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), normal(4, 11)),
    "conv1d_input_not_reached": Case(lambda: nn.Conv1d(2, 3, 3, stride=4), normal(2, 10)),
    "conv1d_same_even": Case(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), normal(2, 9)),
    "conv1d_circular": Case(lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), normal(2, 7)),
    "conv1d_pointwise": Case(lambda: nn.Conv1d(4, 3, 1), normal(4, 4)),
    "conv2d": Case(lambda: nn.Conv2d(3, 4, 3), normal(3, 6, 5)),
    "conv2d_no_bias": Case(lambda: nn.Conv2d(3, 4, 3, bias=False), normal(3, 5, 5)),
    "conv2d_uneven": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2), normal(4, 6, 7)
    ),
    "conv2d_depthwise": Case(lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), normal(3, 4, 5)),
    "conv2d_same": Case(lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), normal(2, 5, 4)),
    "conv2d_valid": Case(lambda: nn.Conv2d(2, 3, 2, padding="valid"), normal(2, 5, 4)),
    "conv2d_reflect": Case(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), normal(2, 5, 4)),
    "conv2d_same_replicate": Case(
        lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="replicate"), normal(2, 4, 4)
    ),
    "conv2d_patches": Case(lambda: nn.Conv2d(2, 3, 4, stride=4), normal(2, 8, 8)),
    "conv2d_channels_last": Case(
        lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        lambda n: torch.randn(n, 2, 5, 5).to(memory_format=torch.channels_last),
    ),
    "conv3d": Case(
        lambda: nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1, dilation=(1, 1, 2), groups=2),
        normal(2, 3, 5, 4),
    ),
    "conv_transpose1d": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2), normal(4, 5)
    ),
    "conv_transpose2d": Case(
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), normal(2, 3, 4)
    ),
    "conv_transpose3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), normal(2, 2, 2, 3)),
    "embedding": Case(lambda: nn.Embedding(6, 5), ids(7)),
    "embedding_one_id": Case(lambda: nn.Embedding(6, 5), lambda n: torch.randint(6, (n,))),
    "embedding_2d_ids": Case(lambda: nn.Embedding(6, 3), lambda n: torch.randint(6, (n, 2, 3))),
    "embedding_padding": Case(lambda: nn.Embedding(6, 5, padding_idx=2), ids(7)),
    "embedding_padding_negative": Case(lambda: nn.Embedding(6, 5, padding_idx=-1), ids(7)),
    "embedding_sparse": Case(lambda: nn.Embedding(6, 5, sparse=True), ids(7)),
    "embedding_bag_mean": Case(lambda: nn.EmbeddingBag(6, 5), ids(7)),
    "embedding_bag_sum": Case(lambda: nn.EmbeddingBag(6, 5, mode="sum", padding_idx=1), ids(7)),
    "embedding_bag_max": Case(lambda: nn.EmbeddingBag(6, 5, mode="max"), ids(7)),
    "layer_norm": Case(lambda: nn.LayerNorm(5), normal(4, 5)),
    "layer_norm_vectors": Case(lambda: nn.LayerNorm(5), normal(5)),
    "layer_norm_no_bias": Case(lambda: nn.LayerNorm(5, bias=False), normal(4, 5)),
    "layer_norm_shape": Case(lambda: nn.LayerNorm((3, 4)), normal(2, 3, 4)),
    "rms_norm": Case(lambda: nn.RMSNorm(5), normal(4, 5)),
    "rms_norm_shape": Case(lambda: nn.RMSNorm((3, 4), eps=1e-3), normal(3, 4)),
    "group_norm": Case(lambda: nn.GroupNorm(2, 4), normal(4, 3, 3)),
    "group_norm_1d": Case(lambda: nn.GroupNorm(2, 6), normal(6)),
    "instance_norm1d": Case(lambda: nn.InstanceNorm1d(3, affine=True), normal(3, 6)),
    "instance_norm2d": Case(
        lambda: with_statistics(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 3, 4, 3), normal(3, 4, 3)
    ),
    "batch_norm1d": Case(lambda: with_statistics(nn.BatchNorm1d(5), 5), normal(5)),
    "batch_norm1d_3d": Case(lambda: with_statistics(nn.BatchNorm1d(5), 5, 4), normal(5, 4)),
    "batch_norm2d": Case(lambda: with_statistics(nn.BatchNorm2d(3), 3, 4, 4), normal(3, 4, 4)),
    "batch_norm3d": Case(lambda: with_statistics(nn.BatchNorm3d(3), 3, 2, 2, 2), normal(3, 2, 2, 2)),
    "prelu": Case(lambda: nn.PReLU(), normal(4, 5)),
    "prelu_channels": Case(lambda: nn.PReLU(4), normal(4, 5)),
    "bilinear": Case(lambda: nn.Bilinear(3, 4, 5), lambda n: (torch.randn(n, 3), torch.randn(n, 4))),
    "rnn": Case(lambda: nn.RNN(4, 5, batch_first=True, nonlinearity="relu"), normal(4, 4)),
    "gru": Case(lambda: nn.GRU(4, 5, batch_first=True), normal(4, 4)),
    "lstm": Case(lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True, dropout=0.3), normal(3, 4)),
    "weight_norm": Case(lambda: parametrizations.weight_norm(nn.Linear(5, 6)), normal(4, 5)),
    "spectral_norm": Case(lambda: parametrizations.spectral_norm(nn.Linear(5, 6)), normal(5)),
    "orthogonal": Case(lambda: parametrizations.orthogonal(nn.Linear(4, 4)), normal(4)),
}


class Attention(nn.Module):
    """``nn.MultiheadAttention`` on batch-first inputs, whatever its own layout."""

    def __init__(self, masked: bool = False, cross: bool = False, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.masked, self.cross, self.weights = masked, cross, weights
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        mask = other if self.masked else None
        source = other if self.cross else x
        assert source is not None
        if not self.attention.batch_first:
            x, source = x.transpose(0, 1), source.transpose(0, 1)
        output, _ = self.attention(x, source, source, key_padding_mask=mask, need_weights=self.weights)
        return output if self.attention.batch_first else output.transpose(0, 1)


def padded(length: int, width: int) -> Inputs:
    """Inputs with a mask that is True at padding, and leaves one position or more."""
    return lambda n: (torch.randn(n, length, width), torch.arange(length) > torch.randint(length, (n, 1)))


def pair(length: int, width: int, other_length: int, other_width: int) -> Inputs:
    return lambda n: (torch.randn(n, length, width), torch.randn(n, other_length, other_width))


class Transposed(nn.Module):
    """Runs a layer in (T, N, E)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x.transpose(0, 1))
        return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)


class EncoderWithPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, **options)


def attention_cases(t: int) -> dict[str, Case]:
    """``t`` positions, as many as there are samples, so that no layout can be told from a shape."""
    return {
        "attention": Case(lambda: Attention(batch_first=True, dropout=0.4), normal(t, 4)),
        "attention_weights": Case(lambda: Attention(batch_first=True, dropout=0.4, weights=True), normal(t, 4)),
        "attention_time_first": Case(lambda: Attention(dropout=0.4), normal(t, 4)),
        "attention_padding": Case(lambda: Attention(masked=True, batch_first=True, dropout=0.4), padded(t, 4)),
        "attention_padding_time_first": Case(lambda: Attention(masked=True, weights=True), padded(t, 4)),
        "attention_cross": Case(lambda: Attention(cross=True, batch_first=True, kdim=3, vdim=3), pair(t, 4, 5, 3)),
        "attention_cross_same_width": Case(lambda: Attention(cross=True, dropout=0.4), pair(t, 4, t, 4)),
        "attention_extra_keys": Case(lambda: Attention(batch_first=True, add_bias_kv=True, bias=False), normal(t, 4)),
        "encoder_layer": Case(lambda: encoder_layer(batch_first=True), normal(t, 4)),
        "encoder_layer_norm_first": Case(lambda: encoder_layer(batch_first=True, norm_first=True), normal(t, 4)),
        "encoder_layer_no_bias": Case(lambda: encoder_layer(batch_first=True, bias=False), normal(t, 4)),
        "encoder_layer_time_first": Case(lambda: Transposed(encoder_layer()), normal(t, 4)),
        "encoder_layer_time_first_norm_first": Case(lambda: Transposed(encoder_layer(norm_first=True)), normal(t, 4)),
        "encoder_padding": Case(EncoderWithPadding, padded(t, 4)),
        "decoder_layer": Case(lambda: nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), pair(t, 4, 5, 4)),
        "gru_time_first": Case(lambda: Transposed(nn.GRU(4, 5)), normal(t, 4)),
        "linear_time_first": Case(lambda: Transposed(nn.Linear(4, 5)), normal(t, 4)),
        "layer_norm_time_first": Case(lambda: Transposed(nn.LayerNorm(4)), normal(t, 4)),
    }


class Function(nn.Module):
    """Parameters ``w<i>`` of given shapes, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Tensor], *shapes: tuple[int, ...], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for index, shape in enumerate(shapes):
            self.register_parameter(f"w{index}", nn.Parameter(torch.randn(shape) / 2))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def sorted_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The samples in another order, and the way back."""
    order = x.flatten(1)[:, 0].argsort()
    return x[order], order.argsort()


def apply_sorted(module: nn.Module, x: Tensor) -> Tensor:
    rows, back = sorted_rows(x)
    return module(rows)[back]


def first_in_order(size: int) -> Tensor:
    """Vectors of which the first three are sorted and the others are not."""
    x = torch.randn(size, 5)
    x[:, 0] = torch.linspace(0, 1, size).roll(-2) if size > 3 else torch.linspace(0, 1, size)
    if size > 3:
        x[:3, 0] = torch.tensor([-1.0, 0.1, 2.0])
    return x


def packed(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(m.gru(rows)[0], batch_first=True, total_length=x.shape[1])[0]


def experts(m: Any, x: Tensor) -> Tensor:
    """Top-1 routing of each token; an expert sees a flat list of those that came."""
    tokens = x.flatten(0, 1)
    chosen = (tokens[:, 0] > 0).long()
    output = torch.zeros_like(tokens)
    for index, expert in enumerate((m.left, m.right)):
        rows = (chosen == index).nonzero()[:, 0]
        output = output.index_add(0, rows, expert(tokens[rows]))
    return output.view_as(x)


def lopsided(size: int) -> Tensor:
    """Tokens (size, 2, 4) of which as many as there are samples go to one expert, but not one of each sample."""
    x = torch.randn(size, 2, 4)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0])[: 2 * size].view(size, 2)
    x[..., 0] = x[..., 0].abs() * signs
    return x


def siamese(m: Any, x: Tensor) -> Tensor:
    left, right = m.layer(torch.cat([x, x.flip(-1)])).chunk(2)
    return left.tanh() * right


def repeated(m: Any, x: Tensor) -> Tensor:
    """Three rows for each sample, side by side."""
    rows = m.layer(x.repeat_interleave(3, 0) * torch.arange(1.0, 4, dtype=x.dtype).repeat(len(x))[:, None])
    return rows.view(len(x), 3, -1)


def attention_by_hand(m: Any, x: Tensor) -> Tensor:
    query, key, value = F.linear(x, m.w0).chunk(3, -1)
    return F.linear(F.scaled_dot_product_attention(query, key, value), m.w1)


def standardised(m: Any, x: Tensor) -> Tensor:
    weight = (m.w0 - m.w0.mean((1, 2, 3), True)) / m.w0.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight, m.w1)


def tied_decoder(m: Any, x: Tensor) -> Tensor:
    hidden = torch.tanh(m.encoder(x))
    return F.linear(hidden, m.encoder.weight.t())


def tie(first: nn.Module, second: nn.Module) -> dict[str, nn.Module]:
    second.weight = first.weight
    return {"first": first, "second": second}


def case(function: Callable[..., Tensor], inputs: Inputs, *shapes: tuple[int, ...], **modules: Any) -> Case:
    """``modules``: functions that make them, so that each test has its own."""
    return Case(lambda: Function(function, *shapes, **{name: make() for name, make in modules.items()}), inputs)


def tied_case(function: Callable[..., Tensor], inputs: Inputs, make: Callable[[], dict[str, nn.Module]]) -> Case:
    return Case(lambda: Function(function, **make()), inputs)


DIRECT = {
    "position": case(lambda m, x: torch.tanh(x + m.w0), normal(4, 5), (1, 4, 5)),
    "class_token": case(
        lambda m, x: m.layer(torch.cat([m.w0.expand(len(x), -1, -1), x], 1)),
        normal(3, 5),
        (1, 1, 5),
        layer=lambda: nn.Linear(5, 4),
    ),
    "layer_scale": case(lambda m, x: x + m.w0 * m.layer(x), normal(4, 5), (5,), layer=lambda: nn.Linear(5, 5)),
    "temperature": case(lambda m, x: m.layer(x) * m.w0.exp(), normal(5), (), layer=lambda: nn.Linear(5, 4)),
    "matmul": case(lambda m, x: x @ m.w0, normal(4, 5), (5, 6)),
    "matmul_vectors": case(lambda m, x: x @ m.w0 + m.w1, normal(5), (5, 6), (6,)),
    "matmul_left": case(lambda m, x: m.w0 @ x, normal(4, 5), (6, 4)),
    "matmul_by_batch": case(lambda m, x: torch.bmm(x, m.w0.expand(len(x), -1, -1)), normal(4, 5), (5, 6)),
    "addmm": case(lambda m, x: torch.addmm(m.w1, x, m.w0), normal(5), (5, 6), (6,)),
    "einsum": case(lambda m, x: torch.einsum("bte,hef->bhtf", x, m.w0), normal(4, 5), (2, 5, 3)),
    "per_position": case(lambda m, x: torch.einsum("bte,tef->btf", x, m.w0), normal(4, 5), (4, 5, 3)),
    "functional_linear": case(lambda m, x: F.linear(x, m.w0, m.w1), normal(4, 5), (6, 5), (6,)),
    "functional_keywords": case(lambda m, x: F.linear(input=x, weight=m.w0, bias=m.w1), normal(4, 5), (6, 5), (6,)),
    "functional_keywords_vectors": case(lambda m, x: F.linear(input=x, weight=m.w0), normal(5), (6, 5)),
    "functional_slices": case(lambda m, x: F.linear(F.linear(x, m.w0[:4]).tanh(), m.w0[4:, :4]), normal(5), (6, 5)),
    "functional_embedding": case(lambda m, x: F.embedding(x, m.w0), ids(5), (6, 4)),
    "indexed": case(lambda m, x: m.w0[x], ids(5), (6, 4)),
    "functional_norm": case(lambda m, x: F.layer_norm(x, (5,), m.w0, m.w1), normal(4, 5), (5,), (5,)),
    "attention_by_hand": case(attention_by_hand, normal(4, 5), (15, 5), (4, 5)),
    "standardised_weight": case(standardised, normal(2, 5, 5), (3, 2, 3, 3), (3,)),
    "hypernetwork": case(
        lambda m, x: torch.einsum("bi,bio->bo", x, m.layer(x).view(len(x), 5, 4)),
        normal(5),
        layer=lambda: nn.Linear(5, 20),
    ),
    "weight_by_batch": case(  # a product that has no sample dimension
        lambda m, x: F.linear(x, m.w0 @ m.w1), normal(5), (6, 3), (3, 5)
    ),
    "custom_function": case(
        lambda m, x: models.Times.apply(m.layer(x), m.w0), normal(4, 5), (6,), layer=lambda: nn.Linear(5, 6)
    ),
}

SHARED = {
    "two_linears": tied_case(
        lambda m, x: m.second(m.first(x).tanh()), normal(5), lambda: tie(nn.Linear(5, 5), nn.Linear(5, 5))
    ),
    "two_linears_3d": tied_case(
        lambda m, x: m.second(m.first(x).tanh()),
        normal(4, 5),
        lambda: tie(nn.Linear(5, 5), nn.Linear(5, 5, bias=False)),
    ),
    "embedding_and_head": tied_case(
        lambda m, x: m.second(m.first(x).tanh()), ids(5), lambda: tie(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    ),
    "embedding_and_functional": case(
        lambda m, x: F.linear(m.layer(x).tanh(), m.layer.weight), ids(5), layer=lambda: nn.Embedding(6, 4)
    ),
    "linear_and_embedding_bag": tied_case(
        lambda m, x: m.second(x).tanh() @ m.first.weight.t() + m.first(m.second(x)),
        ids(5),
        lambda: tie(nn.Linear(4, 6), nn.EmbeddingBag(6, 4)),
    ),
    "layer_twice": case(lambda m, x: m.layer(m.layer(x).tanh()), normal(5), layer=lambda: nn.Linear(5, 5)),
    "layer_twice_3d": case(lambda m, x: m.layer(m.layer(x).tanh()), normal(4, 5), layer=lambda: nn.Linear(5, 5)),
    "layer_twice_two_lengths": case(
        lambda m, x: torch.cat([m.layer(x), m.layer(x.mean(1, keepdim=True)).tanh()], 1),
        normal(4, 5),
        layer=lambda: nn.Linear(5, 6),
    ),
    "layer_twice_two_ranks": case(
        lambda m, x: m.layer(x) * m.layer(x.mean(1)).tanh()[:, None], normal(4, 5), layer=lambda: nn.Linear(5, 6)
    ),
    "conv_twice": case(
        lambda m, x: m.layer(m.layer(x).tanh()), normal(3, 5, 5), layer=lambda: nn.Conv2d(3, 3, 3, padding=1)
    ),
    "conv_twice_two_sizes": case(
        lambda m, x: torch.cat([m.layer(x).flatten(1), m.layer(x[:, :, ::2, ::2]).flatten(1)], 1),
        normal(2, 6, 6),
        layer=lambda: nn.Conv2d(2, 3, 3),
    ),
    "norm_twice": case(lambda m, x: m.layer(m.layer(x) + x), normal(4, 5), layer=lambda: nn.LayerNorm(5)),
    "batch_norm_twice": case(
        lambda m, x: m.layer(m.layer(x).tanh()), normal(5), layer=lambda: with_statistics(nn.BatchNorm1d(5), 5)
    ),
    "embedding_twice": case(
        lambda m, x: m.layer(x) * m.layer(x.flip(1)).tanh(), ids(5), layer=lambda: nn.Embedding(6, 4)
    ),
    "layer_and_direct": case(tied_decoder, normal(5), encoder=lambda: nn.Linear(5, 4)),
    "layer_and_direct_3d": case(tied_decoder, normal(4, 5), encoder=lambda: nn.Linear(5, 4)),
    "layer_and_norm_of_weight": case(
        lambda m, x: m.layer(x) / m.layer.weight.square().sum().sqrt(), normal(5), layer=lambda: nn.Linear(5, 4)
    ),
    "bias_of_two": tied_case(
        lambda m, x: m.second(m.first(x).tanh()),
        normal(4, 5),
        lambda: (lambda first, second: setattr(second, "bias", first.bias) or {"first": first, "second": second})(
            nn.Linear(5, 5), nn.Linear(5, 5)
        ),
    ),
    "one_use_detached": case(
        lambda m, x: m.layer(x) * m.layer(x.flip(-1)).detach(), normal(5), layer=lambda: nn.Linear(5, 4)
    ),
    "one_use_without_grad": case(
        lambda m, x: m.layer(x) * no_grad(m.layer, x.flip(-1)), normal(4, 5), layer=lambda: nn.Linear(5, 4)
    ),
    "one_use_ignored": case(
        lambda m, x: m.layer(x) + 0 * m.layer(x.flip(-1)).detach().sum(), normal(5), layer=lambda: nn.Linear(5, 4)
    ),
    "output_used_twice": case(
        lambda m, x: (lambda y: y.tanh() * y.flip(-1))(m.layer(x)), normal(4, 5), layer=lambda: nn.Linear(5, 4)
    ),
}


def flattened_norm(time_first: bool, m: Any, x: Tensor) -> Tensor:
    """Channels last in a layer of three dimensions, then of rows, whose normalisation takes dimension 1 for them."""
    h = m.layer(x.transpose(0, 1) if time_first else x)
    h = m.norm(h.flatten(0, 1)).view_as(h)
    return h.transpose(0, 1) if time_first else h


def no_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def row_cases(t: int) -> dict[str, Case]:
    """Rows of a matrix that are not the samples in their order; ``t`` positions, as many as there are samples."""
    return {
        "flattened": case(
            lambda m, x: m.layer(x.flatten(0, 1)).view(len(x), -1), normal(t, 5), layer=lambda: nn.Linear(5, 6)
        ),
        "flattened_norm": case(
            lambda m, x: m.layer(x.flatten(0, 1)).view(len(x), -1), normal(t, 5), layer=lambda: nn.LayerNorm(5)
        ),
        **{
            f"flattened_{name}{'_time_first' * first}": case(
                partial(flattened_norm, first),
                normal(t, 3),
                layer=lambda width=width: nn.Linear(3, width),
                norm=lambda make=make, width=width: make(width),
            )
            for width in (t, 6)
            for first in (False, True)
            for name, make in (
                (f"batch_norm_{width}", lambda width: with_statistics(nn.BatchNorm1d(width), width)),
                (f"group_norm_{width}", lambda width: nn.GroupNorm(1, width)),
            )
        },
        "flattened_time_first": case(
            lambda m, x: m.layer(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), -1).transpose(0, 1),
            normal(t, 5),
            layer=lambda: nn.Linear(5, 6),
        ),
        "flattened_conv": case(
            lambda m, x: m.layer(x.flatten(0, 1)).view(len(x), -1), normal(2, 3, 4, 4), layer=lambda: nn.Conv2d(3, 2, 3)
        ),
        "flattened_embedding": case(
            lambda m, x: m.layer(x.flatten()).view(*x.shape, -1), ids(t), layer=lambda: nn.Embedding(6, 5)
        ),
        "sorted": case(lambda m, x: apply_sorted(m.layer, x), normal(5), layer=lambda: nn.Linear(5, 6)),
        "sorted_3d": case(lambda m, x: apply_sorted(m.layer, x), normal(t, 5), layer=lambda: nn.Linear(5, 6)),
        "sorted_and_not": case(
            lambda m, x: apply_sorted(m.layer, x).tanh() * m.layer(x.flip(-1)), normal(5), layer=lambda: nn.Linear(5, 6)
        ),
        "sorted_and_not_3d": case(
            lambda m, x: apply_sorted(m.layer, x).tanh() * m.layer(x.flip(-1)),
            normal(t, 5),
            layer=lambda: nn.Linear(5, 6),
        ),
        "reversed_and_not": case(
            lambda m, x: m.layer(x.flip(0)).flip(0).tanh() * m.layer(x.flip(-1)),
            normal(5),
            layer=lambda: nn.Linear(5, 6),
        ),
        "packed_sequences": case(
            packed,
            lambda n: (torch.randn(n, t, 5), torch.randint(1, t + 1, (n,))),
            gru=lambda: nn.GRU(5, 3, batch_first=True),
        ),
        "experts": case(experts, lopsided, left=lambda: nn.Linear(4, 4), right=lambda: nn.Linear(4, 4)),
        "siamese": case(siamese, normal(5), layer=lambda: nn.Linear(5, 6)),
        "siamese_3d": case(siamese, normal(t, 5), layer=lambda: nn.Linear(5, 6)),
        "repeated": case(repeated, normal(5), layer=lambda: nn.Linear(5, 6)),
        "some_samples": case(
            lambda m, x: x.index_add(0, rows := (x[:, 0] > -1).nonzero()[:, 0], m.layer(x[rows])),
            normal(5),
            layer=lambda: nn.Linear(5, 5),
        ),
        "position_ids": case(
            lambda m, x: m.tokens(x).tanh() * m.positions(torch.arange(x.shape[1])[None]),
            ids(t),
            tokens=lambda: nn.Embedding(6, 5),
            positions=lambda: nn.Embedding(t, 5),
        ),
        "position_ids_flat": case(
            lambda m, x: (m.tokens(x) + m.positions(torch.arange(x.shape[1]))).tanh(),
            ids(t),
            tokens=lambda: nn.Embedding(6, 5),
            positions=lambda: nn.Embedding(t, 5),
        ),
        "projected_positions": case(
            lambda m, x: torch.tanh(x + m.layer(m.w0)), normal(t, 5), (1, t, 3), layer=lambda: nn.Linear(3, 5)
        ),
        "prototypes": case(  # as many as there are samples, and none of them a sample
            lambda m, x: m.encoder(x) @ m.layer(m.w0).t(),
            normal(5),
            (t, 3),
            encoder=lambda: nn.Linear(5, 6),
            layer=lambda: nn.Linear(3, 6),
        ),
        "unbatched_rows": case(
            lambda m, x: torch.stack([m.layer(row) for row in x]), normal(5), layer=lambda: nn.Linear(5, 6)
        ),
        "samples_one_by_one": case(
            lambda m, x: torch.cat([m.layer(row) for row in x.split(1)]), normal(t, 5), layer=lambda: nn.Linear(5, 6)
        ),
        "class_token": case(lambda m, x: m.layer(x)[:, 0], normal(t, 4), layer=lambda: encoder_layer(batch_first=True)),
        "class_token_time_first": case(
            lambda m, x: m.layer(x.transpose(0, 1))[0], normal(t, 4), layer=lambda: encoder_layer(norm_first=True)
        ),
        "first_step": case(lambda m, x: m.layer(x.transpose(0, 1))[0], normal(t, 5), layer=lambda: nn.Linear(5, 6)),
        "last_step": case(lambda m, x: m.layer(x.transpose(0, 1))[-1], normal(t, 5), layer=lambda: nn.Linear(5, 6)),
        "first_step_norm": case(
            lambda m, x: m.layer(x.transpose(0, 1))[0], normal(t, 5), layer=lambda: nn.LayerNorm(5)
        ),
        "first_step_scale": case(lambda m, x: (x.transpose(0, 1) * m.w0)[0], normal(t, 5), (5,)),
        "first_step_flattened": case(
            lambda m, x: m.second(m.first(x.transpose(0, 1)).flatten(0, 1)).view(t, len(x), -1)[0],
            normal(t, 5),
            first=lambda: nn.Linear(5, 4),
            second=lambda: nn.Linear(4, 6),
        ),
        "first_position_flattened": case(
            lambda m, x: m.second(m.first(x).flatten(0, 1)).view(len(x), t, -1)[:, 0],
            normal(t, 5),
            first=lambda: nn.Linear(5, 4),
            second=lambda: nn.Linear(4, 6),
        ),
        "first_samples_in_order": case(
            lambda m, x: apply_sorted(m.layer, x).tanh() * m.layer(x.flip(-1)),
            first_in_order,
            layer=lambda: nn.Linear(5, 6),
        ),
    }


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(5, 6)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 6))
        self.scale = nn.Parameter(torch.ones(6))

    def body(self, x: Tensor) -> Tensor:
        return x + self.scale * self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = checkpoint(self.body, hidden, use_reentrant=self.use_reentrant)
        return checkpoint(self.body, hidden, use_reentrant=self.use_reentrant)


class CheckpointedOnce(nn.Module):
    """Layers that are used once each, in a checkpoint."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))


class Subtracted(nn.Module):
    """A parameter that is added, subtracted and subtracted from: the gradients have signs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(5, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x) - self.shift)
        hidden = torch.tanh(torch.sub(self.shift, self.second(hidden)) + self.shift)
        return torch.sub(hidden, self.shift)


class Routed(nn.Module):
    """Rows sorted by what they hold, a layer, and put back. Sorted already in the first batches."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.pick = nn.Linear(5, 6), pick

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.pick(torch.tanh(self.layer(self.pick(x, order))), order.argsort())


ROUTES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brackets": lambda x, i: x[i],
    "brackets_none": lambda x, i: x[None, i][0],
    "brackets_ellipsis": lambda x, i: x[i, ...],
    "brackets_list": lambda x, i: x[i.tolist()],
    "brackets_numpy": lambda x, i: x[i.numpy()],
    "brackets_tuple": lambda x, i: x[i, :],
    "index_select": lambda x, i: torch.index_select(x, dim=0, index=i),
    "index_select_names": lambda x, i: torch.index_select(input=x, dim=0, index=i),
    "index_select_method": lambda x, i: x.index_select(0, i),
    "gather": lambda x, i: x.gather(0, i[:, None].expand_as(x)),
    "take_along_dim": lambda x, i: torch.take_along_dim(x, i[:, None], dim=0),
    "set": lambda x, i: _set(torch.zeros_like(x), i.argsort(), x),
    "index_put": lambda x, i: torch.zeros_like(x).index_put((i.argsort(),), x),
    "index_add": lambda x, i: torch.zeros_like(x).index_add_(0, i.argsort(), x),
    "index_copy": lambda x, i: torch.zeros_like(x).index_copy(0, i.argsort(), x),
    "scatter": lambda x, i: torch.zeros_like(x).scatter(0, i.argsort()[:, None].expand_as(x), x),
    "scatter_add": lambda x, i: torch.zeros_like(x).scatter_add_(0, i.argsort()[:, None].expand_as(x), x),
    "masked_select": lambda x, i: x.masked_select(torch.ones_like(x).bool()).reshape(x.shape)[i],
}


def _set(target: Tensor, index: Tensor, values: Tensor) -> Tensor:
    target[index] = values
    return target


@pytest.mark.parametrize("route", ROUTES)
def test_rows_moved_by_the_data(route: str) -> None:
    """In the first batch there is nothing to move, so that a look at it shows nothing."""
    model = Readout(Routed(ROUTES[route]), normal(5)).double()
    batches = [(torch.randn(4, 5).double(), torch.randint(CLASSES, (4,))) for _ in range(3)]
    first, _ = batches[0]
    first[:, 0] = first[:, 0].sort().values
    assert_fisher(estimate_fisher(model, batches, kind="empirical"), brute_force.fisher(model, batches))


def test_indices_that_move_no_sample() -> None:
    """They do not send what comes after them to a slower way."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)  # (N, 7, 6)
            hidden = torch.index_select(input=hidden, dim=1, index=torch.tensor([5, 1, 2]))
            hidden = hidden[:, torch.tensor([2, 0])]
            return self.second(hidden[torch.arange(len(x)), torch.randint(2, (len(x),))] * 0 + hidden[:, 0])

    model = Picks().double()
    batches = [(torch.randn(4, 7, 5).double(), torch.randint(CLASSES, (4,))) for _ in range(2)]
    fisher = estimate_fisher(model, batches, kind="empirical")
    assert fisher.info.method == "hooks"
    assert_fisher(fisher, brute_force.fisher(model, batches))


class InPlace(nn.Module):
    """Activations that overwrite a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), with_statistics(nn.BatchNorm2d(3), 3, 3, 3)
        self.first, self.second = nn.Linear(27, 6), nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(self.norm(F.relu(self.conv(x), inplace=True)), 0.2)
        x = self.first(x.flatten(1)).sigmoid_()
        return self.second(x).add_(x).add_(self.shift)


class SomeSamples(nn.Module):
    """A parameter that some samples' paths leave out, and one that no path has."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)
        self.never = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x[:, :1] > 0), self.always(x) + self.sometimes(x), self.always(x))


def lora() -> nn.Module:
    module = Function(
        lambda m, x: m.base(x) + m.up(m.down(x)),
        base=nn.Linear(5, 6),
        down=nn.Linear(5, 2, bias=False),
        up=nn.Linear(2, 6),
    )
    module.base.requires_grad_(False)
    return module


def frozen_parts() -> nn.Module:
    model = models.conv_net()
    for name in ("0.weight", "1.bias", "5.bias"):
        model.get_parameter(name).requires_grad_(False)
    return model


def gpt2_conv1d() -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(layer(6, 5), nn.GELU(), layer(4, 6))


MODELS = {
    "gpt2_conv1d": Case(gpt2_conv1d, normal(4, 5)),
    "gpt2_conv1d_vectors": Case(gpt2_conv1d, normal(5)),
    "tied": Case(models.Tied, normal(5), direct=True),
    "branching": Case(models.Branching, normal(5), direct=True),
    "checkpoint": Case(lambda: Checkpointed(False), normal(5)),
    "checkpoint_3d": Case(lambda: Checkpointed(False), normal(4, 5)),
    "checkpoint_reentrant": Case(lambda: Checkpointed(True), normal(5)),
    "checkpoint_reentrant_3d": Case(lambda: Checkpointed(True), normal(4, 5)),
    "checkpoint_once": Case(lambda: CheckpointedOnce(False), normal(5)),
    "checkpoint_once_reentrant": Case(lambda: CheckpointedOnce(True), normal(5)),
    "subtracted": Case(Subtracted, normal(5)),
    "subtracted_3d": Case(Subtracted, normal(4, 5)),
    "in_place": Case(InPlace, normal(2, 5, 5)),
    "in_place_conv_net": Case(models.conv_net, normal(*models.IMAGE), direct=True),
    "lora": Case(lora, normal(4, 5)),
    "frozen": Case(frozen_parts, normal(*models.IMAGE), direct=True),
    "some_samples": Case(SomeSamples, normal(5), direct=True),
    "input_changed_in_place": Case(models.ShiftsInputInPlace, normal(5), direct=True),
    "unused": Case(models.Unused, normal(5), direct=True),
    "batches_grow": Case(models.conv_net, normal(*models.IMAGE), direct=True, sizes=(3, 6)),
    "batches_of_one": Case(lambda: encoder_layer(batch_first=True), normal(4, 4), sizes=(1, 1)),
}

GROUPS = {
    "layer": LAYERS,
    "attention": attention_cases(4),
    "direct": DIRECT,
    "shared": SHARED,
    "rows": row_cases(4),
    "model": MODELS,
}
CASES = {f"{group}-{name}": layer for group, cases in GROUPS.items() for name, layer in cases.items()}
# Also in batches of three: as many as are looked at to find out where the samples lie.
THREES = {f"{n}_threes": replace(c, sizes=(3, 3, 1)) for n, c in {**attention_cases(3), **row_cases(3)}.items()}
ALL = {**CASES, **THREES}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot run under torch.vmap:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


@pytest.mark.parametrize("name", ALL)
def test_empirical(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        check(ALL[name], "empirical", dtype)


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    """Several backward passes over one graph."""
    check(CASES[name], "exact", torch.float64)


@pytest.mark.parametrize("limit", [0, 1000])
def test_exact_with_little_memory(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of several classes held until so many bytes, per-sample ones in blocks of so many."""
    monkeypatch.setattr(rules, "_HELD_BYTES", limit)
    monkeypatch.setitem(rules._BLOCK_BYTES, "cpu", limit)
    for name in ("layer-conv2d_uneven", "layer-linear_wide", "model-in_place_conv_net"):
        check(CASES[name], "exact", torch.float64)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_scripted_submodule(kind: str) -> None:
    """Against its twin in Python, for a copy of a scripted module has no leaves."""
    inner = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    plain = nn.Sequential(nn.Linear(5, 5), inner, nn.Linear(6, CLASSES)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(plain[0], torch.jit.script(inner), plain[2])
    batches = [(torch.randn(n, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))) for n in (4, 1)]
    assert_fisher(estimate_fisher(model, batches, kind=kind), brute_force.fisher(plain, batches, kind))


MADE: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "one_plus": ((6,), lambda h, w: h * (1 + w.to(h.dtype))),
    "negative": ((6,), lambda h, w: h + (-w)),
    "exp": ((), lambda h, w: h * w.exp()),
    "softplus": ((6,), lambda h, w: h * F.softplus(w)),
    "flattened": ((1, 6), lambda h, w: h * w.flatten()),
    "softmax": ((6,), lambda h, w: h * w.softmax(0)),
    "a_row": ((7, 6), lambda h, w: h + w[2] * w[3]),
    "the_sum": ((4, 3), lambda h, w: h * w.sum().tanh()),
    "view": ((6,), lambda h, w: h * w.view(*[1] * (h.dim() - 1), -1)),
    "twice": ((6,), lambda h, w: (h * w.exp()).tanh() * (1 + w)),
    "made_and_plain": ((6,), lambda h, w: (h * w.exp()).tanh() - w),
    "norm_weight": ((6,), lambda h, w: F.layer_norm(h, (6,), 1 + w, -w)),
    "bias": ((6,), lambda h, w: F.linear(h, torch.ones(6, 6, dtype=h.dtype), w * 2)),
}


@pytest.mark.parametrize("kind", ["empirical", "exact"])
@pytest.mark.parametrize("inputs", [normal(5), normal(3, 5), normal(4, 5)], ids=["vectors", "three", "four"])
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_a_parameter_alone(name: str, inputs: Inputs, kind: str) -> None:
    """Broadcast it is seen in the parameter's place; against the brute force, and without a loop or vmap."""
    shape, use = MADE[name]
    function = lambda m, x: use(torch.tanh(m.layer(x)), m.w0)  # noqa: E731
    model = Readout(Function(function, shape, layer=nn.Linear(5, 6)), inputs).double()
    batches = [(inputs(n).double(), torch.randint(CLASSES, (n,))) for n in (5, 4, 1)]
    fisher = estimate_fisher(model, batches, kind=kind)
    assert fisher.info.method == "hooks"
    assert_fisher(fisher, brute_force.fisher(model, batches, kind))


@pytest.mark.parametrize(
    "use", [torch.maximum, lambda w, x: F.linear(x, w.diag() * 2), lambda w, x: torch.maximum(w.exp(), x)]
)
def test_what_is_made_of_a_parameter_and_the_inputs(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The samples are no longer alike: the parameter is taken without a rule, the layers after it by theirs."""
    model = Function(lambda m, x: m.layer(use(m.w0, x).tanh()), (5,), layer=nn.Linear(5, CLASSES)).double()
    batches = [(torch.randn(n, 5).double(), torch.randint(CLASSES, (n,))) for n in (5, 3)]
    estimator = FisherEstimator(model, "empirical")
    for batch in batches:
        estimator.update(batch)
    assert_fisher(estimator.result(), brute_force.fisher(model, batches))
    assert estimator._status == {"w0": UNCOVERED, "layer.weight": "rows", "layer.bias": "rows"}
