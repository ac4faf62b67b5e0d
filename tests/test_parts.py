"""``Watch``: what it notices, natively and in Python; gradients that are read where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc_fast import EWCLoss, parts
from ewc_fast.parts import Part, Watch


@pytest.fixture(params=["native", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(parts, "_unchanged", lambda *_: None)
        monkeypatch.setattr(parts, "_all_have_grads", lambda *_: None)
    return str(request.param)


def things() -> tuple[dict[str, Any], list[Any], nn.Parameter]:
    return {"a": 1.5, "b": None, "c": torch.ones(2)}, [torch.ones(2), 3], nn.Parameter(torch.ones(2, 3))


CHANGES: dict[str, Callable[[dict[str, Any], list[Any], nn.Parameter], Any]] = {
    "another value": lambda d, items, p: d.update(a=2.5),
    "an equal tensor": lambda d, items, p: d.update(c=torch.ones(2)),
    "a value that was none": lambda d, items, p: d.update(b=0),
    "a value that was missing": lambda d, items, p: d.update(x=1),
    "no value": lambda d, items, p: d.pop("a"),
    "an item more": lambda d, items, p: items.append(None),
    "an item less": lambda d, items, p: items.pop(),
    "an equal item": lambda d, items, p: items.__setitem__(0, torch.ones(2)),
    "frozen": lambda d, items, p: p.requires_grad_(False),
    "another shape": lambda d, items, p: setattr(p, "data", torch.ones(3, 2)),
    "fewer dimensions": lambda d, items, p: setattr(p, "data", torch.ones(2)),
    "another dtype": lambda d, items, p: setattr(p, "data", torch.ones(2, 3, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(way: str, change: str) -> None:
    d, items, p = things()
    watch = Watch([(d, key, d.get(key)) for key in (*d, "x")], [items], [p])
    d["other"] = 1  # is not watched
    p.data = torch.zeros(2, 3)  # nor is this
    assert watch.holds() is True
    CHANGES[change](d, items, p)
    assert watch.holds() is False


@pytest.mark.parametrize("change", ["frozen", "another dtype"])
def test_a_pass_follows(way: str, change: str) -> None:
    """The same through an attached optimizer: a changed parameter is not stepped over unseen."""
    model = nn.Linear(3, 2)
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = ewc.attach(optimizer)
    assert [len(part.params) for part in handle.parts()] == [2]
    assert handle.parts() is handle.parts()
    if change == "frozen":
        model.bias.requires_grad_(False)
        assert [len(part.params) for part in handle.parts()] == [1]
    else:
        model.bias.data = model.bias.data.double()
        assert [len(part.params) for part in handle.parts()] == [1, 1]


def test_nothing_to_watch(way: str) -> None:
    assert Watch().holds() is True


def test_extended(way: str) -> None:
    d, items, p = things()
    watch = Watch([(d, "a", d["a"])], (), [p])
    more = watch.extended([(d, "c", d["c"])], [items])
    items.append(1)
    assert watch.holds() and not more.holds()
    items.pop()
    assert more.holds()
    p.requires_grad_(False)
    assert not watch.holds() and not more.holds()


class Subclass(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_are_left_to_python() -> None:
    p = Subclass(torch.ones(2))
    watch = Watch((), (), [p])
    assert watch.holds()
    p.requires_grad_(False)
    assert not watch.holds()


@pytest.mark.native
@pytest.mark.parametrize(
    "arguments",
    [([], []), ((), [], []), ([1], [], []), ([({}, "a")], [], []), ([(1, "a", 2)], [], []), ([], [([],)], []),
     ([], [([], [])], []), ([], [], [(1,)]), ([], [], [(1, True, [], 2)])],
)  # fmt: skip
def test_native_refuses_what_it_does_not_know(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="unchanged takes three lists|expected a"):
        parts._unchanged(*arguments)


def test_have_grads(way: str) -> None:
    model = nn.Linear(3, 2)
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    (part,) = ewc._parts()
    assert not part.have_grads()
    model.weight.grad = torch.ones(2, 3)
    assert not part.have_grads()
    model.bias.grad = torch.ones(2)
    assert part.have_grads()


def steps_of(coupling: str, lr: Any) -> list[Tensor]:
    """What an attached optimizer leaves behind, in steps that cannot be served quickly among others that can."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ewc = EWCLoss(model)
    ewc.consolidate(fisher={n: torch.rand(p.shape) for n, p in model.named_parameters()})
    optimizer = torch.optim.Adam(model.parameters(), lr)
    ewc.attach(optimizer, coupling)
    seen: list[Tensor] = []
    for i in range(6):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if i == 2:
            model.bias.grad = None
        if i == 4:  # another memory order
            model.weight.data = model.weight.detach().t().contiguous().t()
        optimizer.step()
        seen += [p.detach().clone() for p in model.parameters()]
        seen += [ewc.last_penalty, ewc.predicted_forgetting, *ewc.penalty_by_parameter().values()]
    return seen


@pytest.mark.native
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("coupling", ["coupled", "proximal"])
def test_a_step_served_quickly_is_the_same(coupling: str, lr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "accumulate_quickly" if coupling == "coupled" else "pull_quickly"
    original, served = getattr(Part, method), []

    def counted(*arguments: Any) -> Any:
        result = original(*arguments)
        served.append(result is not None)
        return result

    monkeypatch.setattr(Part, method, counted)
    quickly = steps_of(coupling, lr)
    assert any(served) == (coupling == "coupled" or not isinstance(lr, Tensor))
    monkeypatch.setattr(Part, method, lambda *_: None)
    for a, b in zip(quickly, steps_of(coupling, lr), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
