"""The models' shapes against published parameter counts."""

from __future__ import annotations

import math

import pytest
import torch

from ewc_fast.bench import workloads
from ewc_fast.bench.workloads import WORKLOADS, scaled, short_count


@pytest.mark.parametrize(
    ("name", "numel", "tensors"),
    [
        ("many_tiny", 2_000, 20),
        ("many_small", 128_000, 2_000),
        ("mlp", 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10, 6),
        ("resnet50", 25_557_032, 161),
        ("gpt2_48m", 47_866_176, 145),
        ("gpt2_small", 124_439_808, 148),
        ("llama_1b", 1_100_048_384, 201),
        ("llama_7b", 6_738_415_616, 291),
    ],
)
def test_published_counts(name, numel, tensors):
    assert (WORKLOADS[name].numel, WORKLOADS[name].tensors) == (numel, tensors)


def test_shapes_that_a_model_in_torch_has():
    mlp = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.Linear(512, 512), torch.nn.Linear(512, 10))
    assert WORKLOADS["mlp"].shapes == tuple(tuple(p.shape) for p in mlp.parameters())
    assert WORKLOADS["resnet50"].shapes[:4] == ((64, 3, 7, 7), (64,), (64,), (64, 64, 1, 1))
    assert WORKLOADS["resnet50"].shapes[-2:] == ((1000, 2048), (1000,))


def test_only_7b_is_on_paper():
    assert [w.name for w in WORKLOADS.values() if w.on_paper] == ["llama_7b"]


def test_bytes_needed():
    seven = WORKLOADS["llama_7b"]
    assert seven.bytes_needed(torch.float32) == 16 * seven.numel
    assert seven.bytes_needed(torch.float32, torch.bfloat16) == 14 * seven.numel
    assert seven.bytes_needed(torch.bfloat16) == 8 * seven.numel
    assert seven.bytes_needed(torch.bfloat16, torch.float32) == 10 * seven.numel


@pytest.mark.parametrize("numel", workloads.GROWTH)
def test_growth_has_about_the_size_and_always_the_same_tensors(numel):
    workload = scaled(numel)
    assert abs(workload.numel / numel - 1) < 0.08
    assert workload.tensors == WORKLOADS["gpt2_48m"].tensors
    assert all(math.prod(shape) % 16 == 0 for shape in workload.shapes)


def test_growth_includes_the_model_of_the_bars():
    assert scaled(WORKLOADS["gpt2_48m"].numel).shapes == WORKLOADS["gpt2_48m"].shapes
    with pytest.raises(ValueError, match="at least 100,000"):
        scaled(99_999)


def test_unknown_names_are_named():
    assert workloads.find(["mlp", "many_tiny"]) == [WORKLOADS["mlp"], WORKLOADS["many_tiny"]]
    with pytest.raises(ValueError, match="no workload gpt5; there are many_tiny"):
        workloads.find(["mlp", "gpt5"])


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (2_000, "2k"), (669_706, "670k"), (9_477_376, "9.5m"), (47_866_176, "48m"), (1_100_048_384, "1.1b")],
)
def test_short_counts(count, text):
    assert short_count(count) == text
