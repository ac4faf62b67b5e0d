"""What finished tasks leave behind, against the sum of their quadratics in fp64."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ewc_fast.state import EWCState, protected_part

ByName = dict[str, Tensor]

SHAPES = {"body.weight": (7, 5), "body.bias": (7,), "scale": (), "head.weight": (3, 4), "none": (0, 2)}


def make_params(dtype: torch.dtype = torch.float32) -> ByName:
    params = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    params["head.weight"] = torch.randn(4, 3).to(dtype).t()
    return params


@dataclass
class Task:
    fisher: ByName
    anchor: ByName


def make_task(params: ByName, dtype: torch.dtype | None = None) -> Task:
    """A third of the Fisher is zero; entries span six orders of magnitude."""

    def fisher(p: Tensor) -> Tensor:
        return (10.0 ** (-6 * torch.rand(p.shape, dtype=torch.float64)) * (torch.rand(p.shape) > 1 / 3)).to(
            dtype or p.dtype
        )

    return Task(
        {n: fisher(p) for n, p in params.items()},
        {n: torch.randn(p.shape, dtype=torch.float64).to(p.dtype) for n, p in params.items()},
    )


def consolidate(state: EWCState, params: ByName, *tasks: Task) -> EWCState:
    for task in tasks:
        state.consolidate(params, task.fisher, task.anchor)
    return state


def quadratic(fisher: Any, anchor: Any, constants: Any, theta: ByName) -> tuple[float, ByName]:
    """``sum F (theta - theta*)^2 + C`` and half its gradient, in fp64."""
    value, gradient = 0.0, {}
    for name, t in theta.items():
        f, d = fisher[name].double(), t.double() - anchor[name].double()
        value += float((f * d**2).sum()) + constants[name]
        gradient[name] = f * d
    return value, gradient


def of_state(state: EWCState, theta: ByName) -> tuple[float, ByName]:
    return quadratic(state.fisher, state.anchor, state.constants, theta)


def of_tasks(tasks: list[Task], theta: ByName, weights: list[float] | None = None) -> tuple[float, ByName]:
    value, gradient = 0.0, {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in theta.items()}
    for task, weight in zip(tasks, weights or [1.0] * len(tasks), strict=True):
        v, g = quadratic(task.fisher, task.anchor, dict.fromkeys(theta, 0.0), theta)
        value += weight * v
        gradient = {name: gradient[name] + weight * g[name] for name in theta}
    return value, gradient


def assert_quadratic(state: EWCState, expected: Callable[[ByName], tuple[float, ByName]], tolerance: float) -> None:
    """At random points, near and far.

    Tolerances are relative to the value, and for a gradient ``F (theta - theta*)`` to what it would be if the two did
    not cancel: a rounded theta* is off in proportion to itself.
    """
    for distance in (1.0, 30.0):
        theta = {name: distance * torch.randn(t.shape, dtype=torch.float64) for name, t in state.anchor.items()}
        value, gradient = expected(theta)
        actual, actual_gradient = of_state(state, theta)
        assert actual == pytest.approx(value, rel=tolerance)
        for name, g in gradient.items():
            reach = state.fisher[name].double() * (theta[name].abs() + state.anchor[name].double().abs())
            atol = tolerance * float(reach.max()) if g.numel() else 0.0
            torch.testing.assert_close(actual_gradient[name], g, rtol=tolerance, atol=atol)


# ---- modes ----


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "fisher_dtype", "tolerance"),
    [
        # One rounding to the state's dtype per task: u = 2^-53, 2^-24; with margin for the sums.
        (torch.float64, None, 1e-14),
        (torch.float32, None, 2e-6),
        (torch.bfloat16, torch.float32, 2e-6),
        (torch.float16, None, 2e-6),
        # A bf16 Fisher: 2^-8 per task, so half a percent of each.
        (torch.bfloat16, None, 2e-2),
    ],
    ids=["fp64", "fp32", "bf16 with fp32 Fisher", "fp16", "bf16"],
)
def test_separate_is_the_sum_over_tasks(
    num_tasks: int, dtype: torch.dtype, fisher_dtype: torch.dtype | None, tolerance: float
) -> None:
    params = make_params(dtype)
    tasks = [make_task(params, torch.float32 if dtype == torch.float16 else None) for _ in range(num_tasks)]
    state = consolidate(EWCState(fisher_dtype=fisher_dtype), params, *tasks)
    assert state.num_tasks == num_tasks
    assert_quadratic(state, lambda theta: of_tasks(tasks, theta), tolerance)


def test_the_constant_is_the_least_value_of_the_sum() -> None:
    params = {"w": torch.randn(50, dtype=torch.float64)}
    tasks = [make_task(params) for _ in range(3)]
    state = consolidate(EWCState(), params, *tasks)
    least, gradient = of_tasks(tasks, {"w": state.anchor["w"]})
    assert state.constants["w"] == pytest.approx(least, rel=1e-12) and least > 0
    assert float(gradient["w"].abs().max()) < 1e-12


def test_equal_anchors_leave_no_constant() -> None:
    params = {"w": torch.randn(50)}
    tasks = [make_task(params) for _ in range(3)]
    for task in tasks:
        task.anchor = {"w": params["w"]}
    state = consolidate(EWCState(), params, *tasks)
    assert state.constants == {"w": 0.0} and torch.equal(state.anchor["w"], params["w"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_fisher_the_newest_anchor_counts(dtype: torch.dtype) -> None:
    params = {"w": torch.randn(4, 500).to(dtype)}
    first, second = make_task(params), make_task(params)
    for task, fisher in ((first, [0.0, 0.0, 0.3, 0.7]), (second, [0.0, 0.4, 0.0, 0.7])):
        task.fisher["w"] = torch.tensor(fisher).to(dtype)[:, None].expand(4, 500)
    anchor, old, new = consolidate(EWCState(), params, first, second).anchor["w"], first.anchor["w"], second.anchor["w"]
    assert torch.equal(anchor[:2], new[:2]) and torch.equal(anchor[2], old[2])
    torch.testing.assert_close(anchor[3], (old[3] + new[3]) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_online(gamma: float) -> None:
    params = make_params()
    tasks = [make_task(params) for _ in range(3)]
    state = consolidate(EWCState("online", gamma), params, *tasks)
    newest = [Task(task.fisher, tasks[-1].anchor) for task in tasks]
    assert_quadratic(state, lambda theta: of_tasks(newest, theta, [gamma**2, gamma, 1.0]), 1e-6)
    assert set(state.constants.values()) == {0.0}
    assert all(torch.equal(state.anchor[name], a) for name, a in tasks[-1].anchor.items())


def test_latest() -> None:
    params = make_params()
    tasks = [make_task(params) for _ in range(3)]
    state = consolidate(EWCState("latest"), params, *tasks)
    for name in params:
        assert torch.equal(state.fisher[name], tasks[-1].fisher[name])
        assert torch.equal(state.anchor[name], tasks[-1].anchor[name])
    assert set(state.constants.values()) == {0.0} and state.num_tasks == 3


def test_the_states_own_views_may_be_folded_in_again() -> None:
    """``consolidate(fisher=ewc.fisher)``: what is read is also what is written."""
    params = make_params()
    task = make_task(params)
    for mode, gamma, factor in (
        ("online", 0.5, 1.5),
        ("online", 1.0, 2.0),
        ("latest", 1.0, 1.0),
        ("separate", 1.0, 2.0),
    ):
        state = consolidate(EWCState(mode, gamma), params, task)
        state.consolidate(params, state.fisher, state.anchor)
        for name, f in task.fisher.items():
            assert torch.equal(state.fisher[name], factor * f), mode
            assert torch.equal(state.anchor[name], task.anchor[name]), mode


# ---- dtypes ----


@pytest.mark.parametrize(
    ("dtype", "fisher", "anchor_once", "anchor_twice"),
    [
        (torch.float64, torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_default_dtypes(
    dtype: torch.dtype, fisher: torch.dtype, anchor_once: torch.dtype, anchor_twice: torch.dtype
) -> None:
    params = make_params(dtype)
    for mode in ("separate", "online", "latest"):
        state = EWCState(mode)
        for anchor in (anchor_once, anchor_twice if mode == "separate" else anchor_once):
            consolidate(state, params, make_task(params, torch.float32))
            assert {t.dtype for t in state.fisher.values()} == {fisher}
            assert {t.dtype for t in state.anchor.values()} == {anchor}
        assert all(g.constant.dtype == torch.float64 for g in state.groups)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chosen_dtypes(dtype: torch.dtype) -> None:
    params = {**make_params(), "half": torch.randn(3).half(), "double": torch.randn(3).double()}
    tasks = [make_task(params, torch.float32) for _ in range(2)]
    state = consolidate(EWCState(fisher_dtype=dtype, anchor_dtype=dtype), params, tasks[0])
    for _ in range(2):
        assert {t.dtype for t in state.fisher.values()} == {t.dtype for t in state.anchor.values()} == {dtype}
        consolidate(state, params, tasks[1])
    first = consolidate(EWCState(fisher_dtype=dtype), params, tasks[0])
    assert all(torch.equal(first.fisher[name], f.to(dtype)) for name, f in tasks[0].fisher.items())


@pytest.mark.parametrize("which", ["fisher_dtype", "anchor_dtype"])
def test_refused_dtypes(which: str) -> None:
    with pytest.raises(ValueError, match=f"{which}=torch.float16 .*use bfloat16"):
        EWCState(**{which: torch.float16})
    with pytest.raises(ValueError, match=f"{which} must be"):
        EWCState(**{which: torch.int32})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sepparate",), "mode must be one of separate, online, latest"),
        (("online", -0.1), r"gamma must lie in \[0, 1\]"),
        (("online", 1.1), r"gamma must lie in \[0, 1\]"),
        (("online", math.nan), r"gamma must lie in \[0, 1\]"),
        (("separate", 0.9), "gamma=0.9 has a meaning in mode='online' only"),
        (("latest", 0.0), "gamma=0.0 has a meaning"),
    ],
)
def test_arguments_out_of_range(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWCState(*arguments)


# ---- reading ----


def test_mean_fisher() -> None:
    params = {**make_params(), "half": torch.randn(1000).bfloat16()}
    state = EWCState()
    assert state.mean_fisher() == 0.0
    task = make_task(params)
    consolidate(state, params, task)
    entries = torch.cat([f.double().flatten() for f in task.fisher.values()])  # alignment gaps do not count
    assert state.mean_fisher() == pytest.approx(float(entries.mean()), rel=1e-12)


def test_mappings_are_read_only_views_in_the_models_order() -> None:
    params = make_params()
    state = consolidate(EWCState(), params, make_task(params))
    for mapping, flat in ((state.fisher, state.groups[0].fisher), (state.anchor, state.groups[0].anchor)):
        assert list(mapping) == list(params) and len(mapping) == len(params)
        assert all(
            t.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for t in mapping.values() if t.numel()
        )
        assert {n: t.shape for n, t in mapping.items()} == {n: p.shape for n, p in params.items()}
        with pytest.raises(TypeError):
            mapping["scale"] = torch.zeros(())  # type: ignore[index]
        with pytest.raises(KeyError):
            mapping["no such"]
        assert "scale" in repr(mapping)


# ---- following ----


def snapshot(state: EWCState) -> tuple[ByName, ByName, dict[str, float], int]:
    fisher = {n: t.double().clone() for n, t in state.fisher.items()}
    anchor = {n: t.double().clone() for n, t in state.anchor.items()}
    return fisher, anchor, state.constants, state.num_tasks


def assert_same(state: EWCState, before: tuple[ByName, ByName, dict[str, float], int]) -> None:
    fisher, anchor, constants, num_tasks = snapshot(state)
    assert list(fisher) == list(before[0]) and constants == before[2] and num_tasks == before[3]
    for name in fisher:
        assert torch.equal(fisher[name], before[0][name]) and torch.equal(anchor[name], before[1][name])


def two_tasks(params: ByName) -> EWCState:
    return consolidate(EWCState(), params, make_task(params), make_task(params))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_following_another_dtype_loses_nothing(dtype: torch.dtype) -> None:
    params = make_params()
    state = two_tasks(params)
    before = snapshot(state)
    assert state.matches(params)
    moved = {n: p.to(dtype) for n, p in params.items()}
    assert not state.matches(moved)
    state.follow(moved)
    assert state.matches(moved) and not state.matches(params)
    assert_same(state, before)
    assert {t.dtype for t in state.fisher.values()} == {torch.promote_types(dtype, torch.float32)}
    state.follow(params)
    assert_same(state, before)


def test_following_one_parameter_that_was_cast() -> None:
    params = make_params()
    state = two_tasks(params)
    before = snapshot(state)
    moved = {**params, "body.weight": params["body.weight"].bfloat16()}
    state.follow(moved)
    assert len(state.groups) == 2 and state.matches(moved)
    fisher, anchor, constants, _ = snapshot(state)
    assert constants == before[2]
    assert all(torch.equal(fisher[n], before[0][n]) and torch.equal(anchor[n], before[1][n]) for n in params)


@pytest.mark.parametrize(
    "lay",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ],
)
def test_following_another_memory_order(lay: Callable[[Tensor], Tensor]) -> None:
    params = {"conv": torch.randn(6, 4, 3, 2), "bias": torch.randn(6)}
    state = two_tasks(params)
    before = snapshot(state)
    moved = {**params, "conv": lay(params["conv"])}
    assert moved["conv"].stride() != params["conv"].stride() and not state.matches(moved)
    state.follow(moved)
    assert state.matches(moved) and state.anchor["conv"].stride() == moved["conv"].stride()
    assert_same(state, before)


def test_following_parameters_that_went_away() -> None:
    params = make_params()
    state = two_tasks(params)
    before = snapshot(state)
    del params["body.bias"]
    state.follow(params)
    fisher, _, constants, _ = snapshot(state)
    assert list(fisher) == list(params)
    assert constants == {n: before[2][n] for n in params}
    assert all(torch.equal(fisher[n], before[0][n]) for n in params)


# ---- growth ----


def grown(p: Tensor, rows: int) -> Tensor:
    return torch.cat([p, torch.randn(rows, *p.shape[1:]).to(p.dtype)])


@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
def test_rows_may_be_added_between_tasks(mode: str) -> None:
    params = make_params()
    first = make_task(params)
    state = consolidate(EWCState(mode), params, first)
    params["body.weight"], params["body.bias"] = grown(params["body.weight"], 3), grown(params["body.bias"], 3)
    second = make_task(params)
    consolidate(state, params, second)
    assert state.fisher["body.weight"].shape == (10, 5)
    for name in ("body.weight", "body.bias"):  # to the first task the new rows did not exist: F = 0
        zeros = torch.zeros_like(params[name][7:])
        first.fisher[name], first.anchor[name] = (torch.cat([t[name], zeros]) for t in (first.fisher, first.anchor))
    tasks = {"separate": [first, second], "online": [Task(first.fisher, second.anchor), second], "latest": [second]}
    assert_quadratic(state, lambda theta: of_tasks(tasks[mode], theta), 2e-6)
    assert torch.equal(state.anchor["body.bias"][7:], second.anchor["body.bias"][7:])


def test_new_parameters_join_and_old_ones_leave() -> None:
    params = make_params()
    state = consolidate(EWCState(), params, make_task(params))
    del params["scale"]
    params["new"] = torch.randn(4)
    task = make_task(params)
    consolidate(state, params, task)
    assert list(state.fisher) == list(params)
    assert torch.equal(state.fisher["new"], task.fisher["new"]) and state.constants["new"] == 0.0
    assert torch.equal(state.anchor["new"], task.anchor["new"])


@pytest.mark.parametrize(
    ("old", "new"), [((3, 1), (3, 4)), ((4,), (2, 4)), ((5, 2), (3, 2)), ((3, 2), (3, 3)), ((), (2,)), ((2, 4), (4,))]
)
@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
def test_a_shape_that_changed_otherwise_is_an_error_that_names_it(
    mode: str, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    """Some of these would broadcast."""
    params = {"a": torch.randn(2), "w": torch.randn(old)}
    state = consolidate(EWCState(mode), params, make_task(params))
    before = snapshot(state)
    changed = {"a": torch.randn(2), "w": torch.randn(new)}
    with pytest.raises(ValueError, match="w has shape .*only rows may be added"):
        consolidate(state, changed, make_task(changed))
    assert_same(state, before)


def test_protected_part() -> None:
    p = torch.randn(5, 3)
    assert protected_part("w", p, torch.Size((5, 3))) is p
    part = protected_part("w", p.requires_grad_(), torch.Size((2, 3)))
    assert torch.equal(part, p[:2]) and part.data_ptr() == p.data_ptr() and not part.requires_grad
    for shape in ((6, 3), (5, 2), (5,), (), (5, 3, 1)):
        with pytest.raises(ValueError, match=r"w has shape \(5, 3\)"):
            protected_part("w", p, torch.Size(shape))


# ---- bad input ----


def spoil(task: Task, which: str, value: float) -> None:
    mapping = task.fisher if which == "Fisher" else task.anchor
    mapping["head.weight"] = mapping["head.weight"].clone()
    mapping["head.weight"][2, 3] = value


@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
@pytest.mark.parametrize(
    ("which", "change", "error", "message"),
    [
        ("Fisher", -1e-30, ValueError, "negative entries"),
        ("Fisher", math.nan, ValueError, "NaN or infinite"),
        ("Fisher", math.inf, ValueError, "NaN or infinite"),
        ("anchor", math.nan, ValueError, "NaN or infinite"),
        ("anchor", -math.inf, ValueError, "NaN or infinite"),
        ("Fisher", lambda t: t.t(), ValueError, r"shape \(4, 3\), the parameter \(3, 4\)"),
        ("anchor", lambda t: t[:1], ValueError, r"shape \(1, 4\), the parameter \(3, 4\)"),
        ("Fisher", lambda t: t.int(), ValueError, "must be a dense floating point tensor"),
        ("anchor", lambda t: t.to_sparse(), ValueError, "must be a dense floating point tensor"),
        ("anchor", lambda t: t.to("meta"), ValueError, "meta device"),
        ("Fisher", lambda t: t.tolist(), TypeError, "is a list"),
    ],
)
def test_bad_tasks_are_refused_whole(mode: str, which: str, change: Any, error: type[Exception], message: str) -> None:
    params = make_params()
    state = consolidate(EWCState(mode), params, make_task(params))
    before = snapshot(state)
    task = make_task(params)
    if callable(change):
        mapping = task.fisher if which == "Fisher" else task.anchor
        mapping["head.weight"] = change(mapping["head.weight"])
    else:
        spoil(task, which, change)
    with pytest.raises(error, match=f"{which} of 'head.weight' .*{message}"):
        consolidate(state, params, task)
    assert_same(state, before)


# ---- as plain data ----


def saved(state: EWCState) -> Any:
    """Through torch.save and a load that runs no code."""
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("mode", ["separate", "online", "latest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_round_trip(mode: str, dtype: torch.dtype) -> None:
    params = {**make_params(dtype), "other": torch.randn(4, 2)}
    state = consolidate(EWCState(mode), params, make_task(params), make_task(params))
    state.info = {"kind": "exact", "num_samples": 10}
    other = EWCState(mode)
    other.load_state_dict(saved(state), params)
    assert_same(other, snapshot(state))
    assert other.info == state.info
    for name in params:
        assert other.fisher[name].dtype == state.fisher[name].dtype
        assert other.anchor[name].dtype == state.anchor[name].dtype
    more = make_task(params)  # and both go on alike
    assert_same(consolidate(other, params, more), snapshot(consolidate(state, params, more)))


def test_a_state_dict_is_a_copy_in_row_major_order() -> None:
    params = make_params()
    state = two_tasks(params)
    data = state.state_dict()
    assert all(t.is_contiguous() for kind in ("fisher", "anchor") for t in data[kind].values())
    before = snapshot(state)
    for t in data["fisher"].values():
        t.zero_()
    assert_same(state, before)


def test_an_empty_state_can_be_saved_and_loaded() -> None:
    state = consolidate(EWCState(), make_params(), make_task(make_params()))
    state.load_state_dict(saved(EWCState()), make_params())
    assert state.num_tasks == 0 and len(state.fisher) == 0 and state.groups == []


def test_loading_into_another_dtype_order_and_more_rows() -> None:
    params = make_params()
    state = two_tasks(params)
    other_params = {n: p.bfloat16() for n, p in reversed(params.items())}
    other_params["head.weight"] = other_params["head.weight"].contiguous()
    other_params["body.weight"] = grown(other_params["body.weight"], 2)
    other_params["new"] = torch.randn(3)
    other = EWCState()
    other.load_state_dict(saved(state), other_params)
    assert list(other.fisher) == list(other_params)[:-1]  # the model's order
    for name in params:
        assert torch.equal(other.fisher[name], state.fisher[name]) and other.fisher[name].dtype == torch.float32
        assert torch.equal(other.anchor[name], state.anchor[name])
    assert other.constants == state.constants
    chosen = EWCState(fisher_dtype=torch.bfloat16)
    chosen.load_state_dict(saved(state), params)
    assert {t.dtype for t in chosen.fisher.values()} == {torch.bfloat16}


def change(data: dict[str, Any], key: str, name: str, value: Any) -> None:
    data[key] = {**data[key], name: value}


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no state": (lambda d: d.clear(), "no EWC state: anchor, constant"),
    "missing": (lambda d: d.pop("anchor"), "no EWC state: anchor missing"),
    "newer format": (lambda d: d.update(format=2), "format 2, this version reads 1: update"),
    "other mode": (lambda d: d.update(mode="online"), "mode='online', this EWCLoss has 'separate'"),
    "other gamma": (lambda d: d.update(gamma=0.5), "gamma=0.5, this EWCLoss has 1.0"),
    "no constant": (lambda d: d["constant"].pop("scale"), "name different parameters"),
    "no anchor": (lambda d: d["anchor"].pop("scale"), "name different parameters"),
    "tensors for a mapping": (lambda d: d.update(fisher=torch.zeros(3)), "name different parameters"),
    "unknown": (
        lambda d: [change(d, key, "gone", d[key]["scale"]) for key in ("fisher", "anchor", "constant")],
        "protects 'gone', which is not among the parameters",
    ),
    "shape": (
        lambda d: change(d, "fisher", "body.bias", torch.ones(8)),
        r"body.bias has shape \(7,\), its anchor \(8,\)",
    ),
    "anchor's shape": (lambda d: change(d, "anchor", "body.bias", torch.ones(3)), "anchor of 'body.bias' has shape"),
    "negative": (lambda d: change(d, "fisher", "body.bias", -torch.ones(7)), "'body.bias' has negative"),
    "NaN": (lambda d: change(d, "anchor", "body.bias", torch.full((7,), math.nan)), "'body.bias' has NaN"),
    "fp16": (lambda d: change(d, "fisher", "body.bias", torch.ones(7).half()), "'body.bias' is torch.float16"),
    "integers": (lambda d: change(d, "anchor", "body.bias", torch.ones(7).int()), "'body.bias' is torch.int32"),
    "a list": (lambda d: change(d, "fisher", "body.bias", [1.0] * 7), "'body.bias' is list"),
    "number of tasks": (lambda d: d.update(num_tasks="two"), "num_tasks is 'two'"),
    "constant": (lambda d: change(d, "constant", "scale", math.nan), "constant of 'scale' is nan"),
    "constant text": (lambda d: change(d, "constant", "scale", "1"), "constant of 'scale' is '1'"),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_bad_states_are_refused_whole(bad: str) -> None:
    spoil_data, message = BAD_STATES[bad]
    params = make_params()
    data = copy.deepcopy(two_tasks(params).state_dict())
    state = two_tasks(params)
    state.load_state_dict(data, params)  # good before it is spoilt
    state = two_tasks(params)
    state.info = {"kind": "exact"}
    before = snapshot(state)
    spoil_data(data)
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(data, params)
    assert_same(state, before)
    assert state.info == {"kind": "exact"}


def test_something_that_is_no_mapping_is_no_state() -> None:
    with pytest.raises(ValueError, match="no EWC state"):
        EWCState().load_state_dict([1, 2], {})  # type: ignore[arg-type]
