"""Names, selection and places of parameters."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ewc_fast.layout import make_groups, module_edges, own_name, select_parameters, trainable_parameters
from ewc_fast.ops.memory import ALIGNMENT, is_dense, memory_strides, same_memory_order


def make() -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), head=nn.Linear(4, 2)))


NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]


def wrap_inside(model: nn.Sequential, wrap: Any) -> nn.Sequential:
    model.body = wrap(model.body)
    return model


# ---- names ----


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: m,
        nn.DataParallel,
        torch.compile,
        checkpoint_wrapper,
        lambda m: nn.DataParallel(torch.compile(m)),
        lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.DataParallel(checkpoint_wrapper(m)),
        lambda m: wrap_inside(m, nn.DataParallel),
        lambda m: wrap_inside(m, checkpoint_wrapper),
        lambda m: wrap_inside(m, torch.compile),
        lambda m: nn.DataParallel(wrap_inside(m, checkpoint_wrapper)),
    ],
    ids=[
        "bare",
        "DataParallel",
        "compiled",
        "checkpoint",
        "DataParallel of compiled",
        "compiled DataParallel",
        "DataParallel of checkpoint",
        "DataParallel inside",
        "checkpoint inside",
        "compiled inside",
        "DataParallel with checkpoint inside",
    ],
)
def test_wrappers_leave_no_trace_in_names(wrapped: Any) -> None:
    model = make()
    expected = dict(model.named_parameters())
    found = trainable_parameters(wrapped(model))
    assert list(found) == NAMES
    assert all(found[name] is p for name, p in expected.items())
    _, _, buffers = select_parameters(wrapped(make()), None)
    assert "body.1.running_mean" in buffers


def test_modules_that_are_only_named_like_a_wrappers_child_keep_their_name() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)
            self._checkpoint_wrapped_module = nn.ModuleDict({"module": nn.Linear(2, 2)})

    names = [name for name, _ in Mine().named_parameters()]
    assert list(trainable_parameters(Mine())) == names
    assert list(trainable_parameters(nn.DataParallel(Mine()))) == names  # one prefix is the wrapper's


def test_names_that_are_no_parameters_are_taken_as_they_are() -> None:
    assert own_name(make(), "no.such.thing") == "no.such.thing"
    assert own_name(nn.DataParallel(make()), "module.no.such") == "no.such"
    assert own_name(nn.DataParallel(make()), "head.weight") == "head.weight"


def test_two_names_that_become_equal_are_an_error() -> None:
    class Twice(nn.DataParallel):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.weight = nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match="two parameters are both named 'weight'"):
        trainable_parameters(Twice(nn.Linear(2, 2)))


# ---- selection ----


def test_everything_that_requires_grad_is_selected() -> None:
    model = make()
    model.body[0].requires_grad_(False)
    chosen, others, buffers = select_parameters(model, None)
    assert list(chosen) == NAMES[2:]
    assert others == set(NAMES[:2])
    assert buffers == {f"body.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_tied_parameters_come_once_and_their_aliases_are_known() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    chosen, others, _ = select_parameters(model, None)
    assert list(chosen) == ["embed.weight", "head.bias"] and others == {"head.weight"}
    for by in ("head.weight", "embed.weight", model["head"].weight, "*.weight"):  # by either name
        chosen, others, _ = select_parameters(model, [by])
        assert list(chosen) == ["embed.weight"] and others == {"head.weight", "head.bias"}


def test_selection_by_name_pattern_and_identity() -> None:
    model = make()
    for params, expected in (
        (["head.bias"], ["head.bias"]),
        (["head.*"], ["head.weight", "head.bias"]),
        (["*.bias", "head.weight"], ["body.0.bias", "body.1.bias", "head.weight", "head.bias"]),
        ([model.head.weight, "body.0.weight"], ["body.0.weight", "head.weight"]),
        (model.body.parameters(), NAMES[:4]),
        (["body.[1]*"], ["body.1.weight", "body.1.bias"]),
        ([], []),
    ):
        chosen, others, _ = select_parameters(model, params)
        assert list(chosen) == expected  # in the model's order
        assert others == set(NAMES) - set(expected)
    chosen, _, _ = select_parameters(nn.DataParallel(model), ["head.*"])
    assert list(chosen) == ["head.weight", "head.bias"]


def test_frozen_parameters_are_not_selected_even_if_named() -> None:
    model = make()
    model.head.weight.requires_grad_(False)
    chosen, others, _ = select_parameters(model, ["head.*"])
    assert list(chosen) == ["head.bias"] and "head.weight" in others


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["haed.weight"], "'haed.weight' is no parameter.*body.0.weight"),
        (["head.*", "tail.*"], r"'tail\.\*' is no parameter"),
        ([torch.zeros(2, 4)], r"a tensor of shape \(2, 4\) is no parameter"),
        ("head.weight", "wrap it in a list"),
        (torch.zeros(2), "wrap it in a list"),
        (["head"], "'head' is no parameter"),
    ],
)
def test_selections_that_match_nothing(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_parameters(make(), params)


def test_edges_show_what_was_replaced() -> None:
    model = make()
    edges = module_edges(model, [model.head.weight])

    def moved() -> bool:
        return any(holder.get(name) is not content for holder, name, content in edges)

    assert not moved()
    model.head.bias = nn.Parameter(torch.zeros(2))  # not asked about
    assert not moved()
    head, model.head = model.head, nn.Linear(4, 2)
    assert moved()
    model.head = head
    assert not moved()
    model.head.weight = nn.Parameter(torch.zeros(2, 4))
    assert moved()


# ---- memory order ----


@pytest.mark.parametrize(
    ("t", "strides"),
    [
        (torch.zeros(3, 4), (4, 1)),
        (torch.zeros(3, 4).t(), (1, 4)),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), (60, 1, 15, 3)),
        (torch.zeros(6, 4)[::2], (4, 1)),  # with gaps: row-major
        (torch.zeros(3, 1).expand(3, 4), (4, 1)),  # overlapping: row-major
        (torch.zeros(()), ()),
        (torch.zeros(0, 4), (4, 1)),
        (torch.zeros(5, 4)[1:3], (4, 1)),
    ],
)
def test_memory_strides(t: Tensor, strides: tuple[int, ...]) -> None:
    assert memory_strides(t) == strides
    assert same_memory_order(t, strides)


def test_dense_agrees_with_the_addresses() -> None:
    for _ in range(300):
        shape = [int(n) for n in torch.randint(1, 4, (3,))]
        strides = [int(s) for s in torch.randint(0, 8, (3,))]
        t = torch.empty(100).as_strided(shape, strides)
        places = {sum(map(operator.mul, index, strides)) for index in itertools.product(*map(range, shape))}
        assert is_dense(t) == (places == set(range(t.numel()))), (shape, strides)


def test_the_order_of_size_1_dimensions_does_not_matter() -> None:
    t = torch.zeros(5, 1, 3)
    assert same_memory_order(t, (3, 77, 1)) and not same_memory_order(t, (1, 77, 5))


# ---- groups and slots ----


def test_groups_by_dtype_in_the_models_order() -> None:
    params = {
        "a": torch.randn(3, 5),
        "b": torch.randn(70).bfloat16(),
        "c": torch.randn(4, 3).t(),
        "d": torch.randn(0, 2),
        "e": torch.randn(()),
        "f": torch.randn(65),
    }
    groups = make_groups(params)
    assert [(g.dtype, [s.name for s in g.slots]) for g in groups] == [
        (torch.float32, ["a", "c", "d", "e", "f"]),
        (torch.bfloat16, ["b"]),
    ]
    for group in groups:
        assert group.device == torch.device("cpu") and group.numel % ALIGNMENT == 0
        flat = torch.zeros(group.numel)
        for k, slot in enumerate(group.slots, 1):
            p = params[slot.name]
            assert slot.shape == p.shape and slot.numel == p.numel() and slot.strides == memory_strides(p)
            assert slot.offset % ALIGNMENT == 0
            view = slot.view(flat)
            assert view.shape == p.shape and not view.any()  # overlaps no slot before it
            view.fill_(k)
            assert bool((flat[slot.offset : slot.offset + slot.numel] == k).all())
        assert int((flat != 0).sum()) == sum(s.numel for s in group.slots)


def test_no_parameters_no_groups() -> None:
    assert make_groups({}) == []
