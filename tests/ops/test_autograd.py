"""The penalty as a node of autograd: what holds for any differentiable function holds for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ewc_fast.ops import autograd
from ewc_fast.ops.autograd import GradientBuffer
from tests.ops import exact as ex


class Penalty:
    """A penalty of some parameters, called as a loss calls it."""

    def __init__(self, backend: str, params: Sequence[Tensor], rows: Sequence[int | None] | None = None) -> None:
        self.params = [nn.Parameter(p) for p in params]
        self.rows = list(rows or [None] * len(params))
        self.protected = [p if n is None else p[:n] for p, n in zip(self.params, self.rows, strict=True)]
        dtype = params[0].dtype
        state = torch.float64 if dtype == torch.float64 else torch.float32
        self.inputs = ex.make_inputs([p.detach() for p in self.protected], state, state)
        self.buffer = GradientBuffer()
        self.backend = backend

    def __call__(self) -> Tensor:
        q = self.inputs.q
        return autograd.penalty(self.params, q, self.buffer, self.rows, backend=self.backend).penalty

    def exact_gradients(self) -> list[Tensor]:
        """At the weights as they are now."""
        return ex.exact(self.inputs).gradients

    def assert_gradients(self, actual: Sequence[Tensor | None], expected: Sequence[Tensor], factor: float = 1) -> None:
        """Tolerance: those of the op, and one more rounding for the product with grad_output; where two gradients are
        added the sum may be smaller than either, so a part of it in proportion to the largest."""
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert a is not None and a.dtype == self.params[i].dtype
            u = 10 * ex.ROUNDOFF[torch.float32] + 2 * ex.ROUNDOFF[a.dtype] if a.dtype != torch.float64 else 1e-14
            torch.testing.assert_close(a.double(), factor * e, rtol=u, atol=1e-6 * float((factor * e).abs().max() + 1))

    def move(self) -> None:
        with torch.no_grad():
            for p in self.params:
                p += torch.randn_like(p)


def make(backend: str, dtype: torch.dtype = torch.float32) -> Penalty:
    return Penalty(backend, [torch.randn(6, 5).to(dtype), torch.randn(4, 7).t().to(dtype), torch.randn(()).to(dtype)])


def grads(penalty: Penalty) -> list[Tensor | None]:
    return [p.grad for p in penalty.params]


def clear(penalty: Penalty) -> None:
    for p in penalty.params:
        p.grad = None


@pytest.mark.parametrize("dtype", ex.PARAMETER_DTYPES, ids=str)
def test_the_gradient(backend: str, dtype: torch.dtype) -> None:
    penalty = make(backend, dtype)
    for factor in (1.0, -2.5):
        clear(penalty)
        value = penalty() * factor
        assert float(value.detach()) == pytest.approx(
            factor * float(ex.exact(penalty.inputs).penalties.sum()), rel=1e-5
        )
        value.backward()
        penalty.assert_gradients(grads(penalty), penalty.exact_gradients(), factor)


def test_gradcheck(backend: str) -> None:
    penalty = make(backend, torch.float64)

    def function(*params: Tensor) -> Tensor:
        q = penalty.inputs.q
        return autograd.penalty(params, q, GradientBuffer(), penalty.rows, backend=backend).penalty * 1.7

    assert torch.autograd.gradcheck(function, penalty.params)


def test_added_rows_get_a_gradient_of_zero(backend: str) -> None:
    penalty = Penalty(backend, [torch.randn(5, 3), torch.randn(4), torch.randn(3, 6).t()], rows=[3, None, 2])
    expected = penalty.exact_gradients()
    penalty().backward()
    penalty.assert_gradients([p.grad[: len(e)] for p, e in zip(penalty.params, expected, strict=True)], expected)
    for p, e in zip(penalty.params, expected, strict=True):
        assert p.grad is not None and p.grad.shape == p.shape and not p.grad[len(e) :].any()


def test_frozen_parameters_get_none(backend: str) -> None:
    penalty = make(backend)
    penalty.params[1].requires_grad_(False)
    penalty().backward()
    assert [g is None for g in grads(penalty)] == [False, True, False]
    expected = penalty.exact_gradients()
    assert torch.allclose(penalty.params[0].grad.double(), expected[0], rtol=1e-5)


def test_a_second_derivative_raises(backend: str) -> None:
    penalty = make(backend)
    (first,) = torch.autograd.grad(penalty(), penalty.params[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_create_graph_gives_the_right_first_derivative(backend: str) -> None:
    penalty = make(backend)
    loss = penalty() + sum(p.pow(3).sum() for p in penalty.params)
    first = torch.autograd.grad(loss, penalty.params, create_graph=True)
    exact = [g + 3 * p.detach().double() ** 2 for g, p in zip(penalty.exact_gradients(), penalty.params, strict=True)]
    for a, e in zip(first, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_two_backwards(backend: str) -> None:
    penalty = make(backend)
    expected = penalty.exact_gradients()
    value = 3 * penalty()
    value.backward(retain_graph=True)
    penalty.assert_gradients(grads(penalty), expected, 3)
    held = [g.clone() for g in grads(penalty)]
    again = torch.autograd.grad(value, penalty.params)  # the graph is freed: the buffer is scaled in place
    penalty.assert_gradients(again, expected, 3)
    ex.assert_same_bits(grads(penalty), held)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_one_penalty_used_twice_in_a_loss(backend: str) -> None:
    penalty = make(backend)
    value = penalty()
    (value + 2 * value).backward()
    penalty.assert_gradients(grads(penalty), penalty.exact_gradients(), 3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_several_penalties_alive(backend: str, order: tuple[int, ...]) -> None:
    """Each has the gradient at the weights of its own forward, whatever moved since and in whatever order."""
    penalty = make(backend)
    values, expected = [], []
    for _ in order:
        values.append(penalty())
        expected.append(penalty.exact_gradients())
        penalty.move()
    for i in order:
        penalty.assert_gradients(torch.autograd.grad(2 * values[i], penalty.params), expected[i], 2)


def test_gradients_that_were_moved_into_the_parameters_stay(backend: str) -> None:
    """autograd does not copy what it accumulates first: p.grad is a view of the buffer."""
    penalty = make(backend)
    penalty().backward()
    held, before = grads(penalty), [g.clone() for g in grads(penalty)]
    penalty.move()
    value = penalty()
    ex.assert_same_bits(held, before)
    value.backward()  # no zero_grad: accumulates
    both = [b.double() + e for b, e in zip(before, penalty.exact_gradients(), strict=True)]
    penalty.assert_gradients(grads(penalty), both)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_steps_of_training(backend: str, set_to_none: bool) -> None:
    penalty = make(backend)
    optimizer = torch.optim.SGD(penalty.params, lr=0.01)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        expected = penalty.exact_gradients()
        penalty().backward()
        penalty.assert_gradients(grads(penalty), expected)
        optimizer.step()


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def test_the_buffer_is_used_again_when_it_is_free(backend: str) -> None:
    penalty = make(backend)
    places = set()
    for _ in range(4):
        clear(penalty)
        penalty().backward()
        places |= {storage(p.grad) for p in penalty.params}
        penalty.move()
    assert len(places) == 1


@pytest.mark.parametrize("holder", ["gradient", "view", "graph", "result", "numpy"])
def test_the_buffer_is_not_used_again_while_it_is_held(backend: str, holder: str) -> None:
    penalty = make(backend)
    held: object
    if holder == "graph":
        held = penalty()
        place = None
    else:
        result = torch.autograd.grad(penalty(), penalty.params)
        place = storage(result[0])
        held = {"gradient": result[0], "view": result[0][1], "result": result, "numpy": result[0].numpy()}[holder]
        before = result[0][1].clone()
        del result
    expected = penalty.exact_gradients()
    penalty.move()
    newer = torch.autograd.grad(penalty(), penalty.params)
    penalty.assert_gradients(newer, penalty.exact_gradients())
    if holder == "graph":
        penalty.assert_gradients(torch.autograd.grad(held, penalty.params), expected)
    else:
        assert storage(newer[0]) != place
        kept = torch.as_tensor(held[0] if holder == "result" else held)
        assert torch.equal(kept if holder == "view" else kept[1], before)


def test_another_dtype_or_length_gets_another_buffer() -> None:
    buffer = GradientBuffer()
    first = buffer.take(8, torch.float32, torch.device("cpu"))
    assert first.shape == (8,) and first.dtype == torch.float32
    del first
    assert buffer.take(8, torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16
    assert buffer.take(9, torch.bfloat16, torch.device("cpu")).shape == (9,)


def test_hooks_may_change_gradients_in_place(backend: str) -> None:
    penalty = make(backend)
    penalty.params[0].register_hook(lambda g: g.mul_(2))
    for _ in range(2):
        clear(penalty)
        expected = penalty.exact_gradients()
        penalty().backward()
        penalty.assert_gradients(grads(penalty), [2 * expected[0], *expected[1:]])
        penalty.move()


# ---- state in separate tensors ----


def separate(backend: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, and a state in other memory orders, inside something larger, and shared by elements."""
    params = [
        torch.randn(6, 5).to(dtype),
        torch.randn(4, 7).to(dtype).t(),
        torch.randn(9).to(dtype),
        torch.randn(()).to(dtype),
    ]
    whole = torch.randn(500).to(dtype).abs()
    fisher = [whole[40:70].view(5, 6).t(), torch.rand(1).to(dtype).expand(7, 4), whole[100:118:2], whole[200]]
    anchor = [
        torch.randn(12, 10).to(dtype)[::2, ::2],
        whole[300:328].view(7, 4),
        whole[3:12],
        torch.randn(()).to(dtype),
    ]
    return [nn.Parameter(p) for p in params], fisher, anchor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_separate_state_in_any_layout(backend: str, dtype: torch.dtype) -> None:
    params, fisher, anchor = separate(backend, dtype)
    ewc_lambda = torch.tensor(2.5, dtype=torch.float64)
    value = autograd.separate_penalty(params, fisher, anchor, ewc_lambda, {}, backend=backend)
    triples = list(zip(params, fisher, anchor, strict=True))
    exact = 1.25 * sum(float((f.double() * (p.detach().double() - a.double()) ** 2).sum()) for p, f, a in triples)
    assert value.dtype == dtype and value.shape == ()
    assert float(value.detach()) == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-13)
    value.backward()
    for p, f, a in triples:
        gradient = 2.5 * f.double() * (p.detach().double() - a.double())
        torch.testing.assert_close(p.grad, gradient.to(dtype), rtol=10 * ex.ROUNDOFF[dtype], atol=0)
    with torch.no_grad():
        again = autograd.separate_penalty(params, fisher, anchor, ewc_lambda, {}, backend=backend)
    assert torch.equal(again, value.detach()) and not again.requires_grad


def test_separate_gradcheck(backend: str) -> None:
    params, fisher, anchor = separate(backend, torch.float64)
    ewc_lambda = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *p: autograd.separate_penalty(p, fisher, anchor, ewc_lambda, {}, backend=backend) ** 2, params
    )


def test_separate_has_no_second_derivative(backend: str) -> None:
    params, fisher, anchor = separate(backend, torch.float32)
    value = autograd.separate_penalty(params, fisher, anchor, torch.tensor(2.0), {}, backend=backend)
    first = torch.autograd.grad(value, params, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        sum(g.sum() for g in first).backward()


def test_separate_is_differentiated_at_the_weights_of_its_forward(backend: str) -> None:
    params, fisher, anchor = separate(backend, torch.float32)
    value = autograd.separate_penalty(params, fisher, anchor, torch.tensor(1.0), {}, backend=backend)
    expected = [f.double() * (p.detach().double() - a.double()) for p, f, a in zip(params, fisher, anchor, strict=True)]
    with torch.no_grad():
        for p in params:
            p.zero_()
    for factor in (1, 2):
        gradients = torch.autograd.grad(value * factor, params, retain_graph=True)
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g.double(), factor * e, rtol=1e-6, atol=0)
