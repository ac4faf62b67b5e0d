"""What the ops refuse: both backends, with the argument's name, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ewc_fast.ops import penalty as ops
from ewc_fast.ops.types import FlatQuadratic
from tests.ops import exact as ex

Arguments = dict[str, Any]


def make() -> Arguments:
    """A good call of every op."""
    inputs = ex.make_inputs(
        [torch.randn(5, 4), torch.randn(7), torch.randn(3, 2).t()],
        scale=torch.rand(3),
        constant=torch.rand(3, dtype=torch.float64),
    )
    return {
        "params": inputs.params,
        "grads": [torch.randn_like(p) for p in inputs.params],
        "flat": torch.randn(inputs.q.anchor.shape),
        "q": inputs.q,
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
    }


def calls(arguments: Arguments, backend: str) -> dict[str, Callable[[], Any]]:
    params, grads, flat, q = (arguments[name] for name in ("params", "grads", "flat", "q"))
    amp = (arguments["grad_scale"], arguments["found_inf"])
    return {
        "penalty": lambda: ops.penalty(params, q, backend=backend),
        "penalty_grad": lambda: ops.penalty_grad(params, flat, q, *amp, backend=backend),
        "penalty_accumulate_": lambda: ops.penalty_accumulate_(params, grads, q, *amp, backend=backend),
    }


def state(**changes: Callable[[FlatQuadratic], Any]) -> Callable[[Arguments], None]:
    """Replaces fields of the quadratic."""

    def apply(arguments: Arguments) -> None:
        q = arguments["q"]
        arguments["q"] = q._replace(**{name: change(q) for name, change in changes.items()})

    return apply


def member(which: str, i: int, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], None]:
    """Replaces one tensor of a list."""

    def apply(arguments: Arguments) -> None:
        arguments[which] = [change(t) if k == i else t for k, t in enumerate(arguments[which])]

    return apply


def field(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], None]:
    def apply(arguments: Arguments) -> None:
        arguments[name] = change(arguments[name])

    return apply


ALL = ("penalty", "penalty_grad", "penalty_accumulate_")
WRITING = ALL[1:]
GRADS = ("penalty_accumulate_",)
FLAT = ("penalty_grad",)

# name: (which ops, how to spoil their arguments, error, what the message must hold)
BAD: dict[str, tuple[tuple[str, ...], Callable[[Arguments], None], type[Exception], str]] = {
    "fp16 anchor": (ALL, state(anchor=lambda q: q.anchor.half()), ValueError, "anchor is float16.*use bfloat16"),
    "fp16 fisher": (ALL, state(fisher=lambda q: q.fisher.half()), ValueError, "fisher is float16.*use bfloat16"),
    "integer anchor": (ALL, state(anchor=lambda q: q.anchor.nan_to_num().int()), TypeError, "anchor has dtype"),
    "integer fisher": (ALL, state(fisher=lambda q: q.fisher.nan_to_num().long()), TypeError, "fisher has dtype"),
    "2-D anchor": (ALL, state(anchor=lambda q: q.anchor[None]), ValueError, "anchor must be a flat"),
    "2-D fisher": (ALL, state(fisher=lambda q: q.fisher[None]), ValueError, "fisher must be a flat"),
    "strided fisher": (
        ALL,
        state(fisher=lambda q: q.fisher.repeat_interleave(2)[::2]),
        ValueError,
        "fisher must be a flat",
    ),
    "short fisher": (ALL, state(fisher=lambda q: q.fisher[:-1].clone()), ValueError, r"fisher.*anchor"),
    "few offsets": (ALL, state(offsets=lambda q: q.offsets[:-1]), ValueError, "offsets has 2 entries for 3"),
    "negative offset": (ALL, state(offsets=lambda q: [-1, *q.offsets[1:]]), ValueError, r"params\[0\].*offset -1"),
    "offset past the end": (
        ALL,
        state(offsets=lambda q: [*q.offsets[:2], q.anchor.numel() - 5]),
        ValueError,
        r"params\[2\] has 6 elements at offset",
    ),
    "huge offset": (ALL, state(offsets=lambda q: [2**62, *q.offsets[1:]]), ValueError, r"params\[0\].*offset"),
    "few strides": (ALL, state(strides=lambda q: q.strides[:-1]), ValueError, r"strides"),
    "no strides": (ALL, state(strides=lambda q: []), ValueError, r"strides"),
    "many strides": (ALL, state(strides=lambda q: [*q.strides, 1]), ValueError, "strides has 6 entries for 5"),
    "state in another order": (
        ALL,
        state(strides=lambda q: [1, 5, *q.strides[2:]]),
        ValueError,
        r"params\[0\] has strides",
    ),
    "mixed parameters": (ALL, member("params", 1, Tensor.double), TypeError, r"params\[1\] has dtype.*params\[0\]"),
    "integer gradients": (GRADS, field("grads", lambda g: [t.int() for t in g]), TypeError, r"grads.* has dtype"),
    "integer parameters": (
        ALL,
        field("params", lambda params: [p.int() for p in params]),
        TypeError,
        r"params(\[0\])? has dtype",
    ),
    "few gradients": (GRADS, field("grads", lambda grads: grads[:-1]), ValueError, "grads has 2 (tensors|entries)"),
    "many gradients": (GRADS, field("grads", lambda g: [*g, g[0]]), ValueError, "grads has 4 (tensors|entries)"),
    "mixed gradients": (GRADS, member("grads", 2, Tensor.bfloat16), TypeError, r"grads\[2\] has dtype.*grads\[0\]"),
    "gradient of another shape": (GRADS, member("grads", 0, Tensor.t), ValueError, r"grads\[0\] has shape"),
    "gradient of fewer dimensions": (GRADS, member("grads", 2, Tensor.flatten), ValueError, r"grads\[2\] has shape"),
    "2-D flat gradient": (FLAT, field("flat", lambda t: t[None]), ValueError, "grad must be a flat buffer"),
    "short flat gradient": (FLAT, field("flat", lambda t: t[1:]), ValueError, "grad must be a flat buffer"),
    "integer flat gradient": (FLAT, field("flat", Tensor.int), TypeError, "grad has dtype"),
    "two lambdas": (ALL, state(ewc_lambda=lambda q: torch.ones(2)), ValueError, "ewc_lambda must hold one number"),
    "integer lambda": (ALL, state(ewc_lambda=lambda q: torch.tensor(1)), TypeError, "ewc_lambda must be float32"),
    "half lambda": (ALL, state(ewc_lambda=lambda q: torch.ones(()).half()), TypeError, "ewc_lambda must be float32"),
    "no delta": (ALL, state(delta=lambda q: torch.ones(0)), ValueError, "delta must hold one number"),
    "bf16 delta": (ALL, state(delta=lambda q: torch.ones(()).bfloat16()), TypeError, "delta must be float32"),
    "few scales": (ALL, state(scale=lambda q: torch.ones(2)), ValueError, "scale must be 1-D.* 3 tensors"),
    "0-dim scale": (ALL, state(scale=lambda q: torch.ones(())), ValueError, "scale must be 1-D"),
    "strided scale": (ALL, state(scale=lambda q: torch.ones(6)[::2]), ValueError, "scale must be 1-D"),
    "integer scale": (ALL, state(scale=lambda q: torch.ones(3).int()), TypeError, "scale must be float64 or float32"),
    "many constants": (
        ALL,
        state(constant=lambda q: torch.ones(4, dtype=torch.float64)),
        ValueError,
        "constant must be 1-D.* 3 tensors",
    ),
    "fp32 constant": (ALL, state(constant=lambda q: torch.ones(3)), TypeError, "constant must be float64, got"),
    "two loss scales": (WRITING, field("grad_scale", lambda t: torch.ones(2)), ValueError, "grad_scale must hold one"),
    "integer loss scale": (WRITING, field("grad_scale", Tensor.int), TypeError, "grad_scale must be float32"),
    "two overflows": (WRITING, field("found_inf", lambda t: torch.ones(2)), ValueError, "found_inf must hold one"),
    "boolean overflow": (WRITING, field("found_inf", Tensor.bool), TypeError, "found_inf must be float32"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(backend: str, bad: str) -> None:
    names, spoil, error, message = BAD[bad]
    for name in names:
        arguments = make()
        written = [*arguments["grads"], arguments["flat"]]
        calls(arguments, backend)[name]()  # which is right before it is spoilt
        before, versions = [t.clone() for t in written], [t._version for t in written]
        spoil(arguments)
        with pytest.raises(error, match=f"(?s){message}"):
            calls(arguments, backend)[name]()
        ex.assert_same_bits(written, before)
        assert [t._version for t in written] == versions


@pytest.mark.parametrize("which", ["params", "grads"])
def test_sparse_tensors_are_refused(backend: str, which: str) -> None:
    """The dispatcher itself keeps them from the kernels."""
    arguments = make()
    member(which, 1, Tensor.to_sparse)(arguments)
    before = [t.clone() for t in arguments["grads"] if not t.is_sparse]
    with pytest.raises((TypeError, NotImplementedError), match="(?i)sparse"):
        calls(arguments, backend)["penalty_accumulate_"]()
    ex.assert_same_bits([t for t in arguments["grads"] if not t.is_sparse], before)


@pytest.mark.parametrize("which", ["params", "grads", "anchor", "fisher", "ewc_lambda", "delta", "scale", "found_inf"])
def test_tensors_on_another_device_are_refused(backend: str, which: str) -> None:
    arguments = make()
    if which in ("params", "grads"):
        member(which, 1, lambda t: t.to("meta"))(arguments)
    elif which == "found_inf":
        field(which, lambda t: t.to("meta"))(arguments)
    else:
        state(**{which: lambda q: getattr(q, which).to("meta")})(arguments)
    before = [t.clone() for t in arguments["grads"] if not t.is_meta]
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        calls(arguments, backend)["penalty_accumulate_"]()
    ex.assert_same_bits([t for t in arguments["grads"] if not t.is_meta], before)


def test_overlapping_gradients_are_refused_before_others_are_written(backend: str) -> None:
    arguments = make()
    member("grads", 1, lambda t: torch.zeros(1).expand(7))(arguments)
    before = [t.clone() for t in arguments["grads"]]
    with pytest.raises((ValueError, RuntimeError), match=r"grads\[1\]"):
        calls(arguments, backend)["penalty_accumulate_"]()
    ex.assert_same_bits(arguments["grads"], before)


@pytest.mark.native
def test_one_gradient_given_twice_is_refused() -> None:
    """Two threads would write it at once."""
    arguments = make()
    arguments["grads"][1] = torch.zeros(14)[:7]
    arguments["grads"].append(arguments["grads"][1])
    arguments["params"].append(torch.zeros(7))
    q = arguments["q"]
    longer = {"offsets": [*q.offsets, q.offsets[1]], "strides": [*q.strides, 1]}
    arguments["q"] = q._replace(**longer, scale=None, constant=None)
    with pytest.raises(ValueError, match=r"grads\[1\] and grads\[\d\] share their memory"):
        calls(arguments, "native")["penalty_accumulate_"]()


def test_strides_that_leave_gaps_are_refused(backend: str) -> None:
    """A parameter that is not dense says nothing of the order, so the strides must."""
    arguments = make()
    member("params", 1, lambda t: torch.randn(14)[::2])(arguments)
    state(strides=lambda q: [*q.strides[:2], 2, *q.strides[3:]])(arguments)
    with pytest.raises(ValueError, match=r"strides.* leave gaps for shape"):
        calls(arguments, backend)["penalty"]()


@pytest.mark.parametrize(
    ("buffer", "factor", "error", "message"),
    [
        (torch.ones(4).int(), torch.tensor(1.0), TypeError, "buffer has dtype"),
        (torch.ones(4, 4).t(), torch.tensor(2.0), ValueError, "buffer must be contiguous"),
        (torch.ones(4), torch.ones(4), ValueError, "factor must hold one number"),
        (torch.ones(4), torch.tensor(2), TypeError, "factor must be float32"),
        (torch.ones(4), torch.tensor(2.0).half(), TypeError, "factor must be float32"),
    ],
    ids=["integer buffer", "strided buffer", "many factors", "integer factor", "half factor"],
)
def test_bad_arguments_of_scale(
    backend: str, buffer: Tensor, factor: Tensor, error: type[Exception], message: str
) -> None:
    before = buffer.clone()
    with pytest.raises(error, match=message):
        ops.scale_(buffer, factor, backend=backend)
    assert torch.equal(buffer, before)


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    q = make()["q"]._replace(anchor=torch.empty(30, device="meta"))
    with pytest.raises(RuntimeError, match='backend="native".* meta.*Remedy'):
        ops.penalty([], q, backend="native")
