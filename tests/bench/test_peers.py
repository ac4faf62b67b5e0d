"""Every peer computes what it claims to; one that does not is caught; bytes as counted by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ewc_fast.bench import peers
from ewc_fast.bench.peers import Peer, Sizes, Unavailable, check
from ewc_fast.bench.problem import Problem
from ewc_fast.bench.workloads import Workload

SMALL = Workload("small", "", ((17, 5), (3,), (2, 3, 4), (1,)))
DTYPES = [
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float64, None),
]
PLAIN_AND_OURS = [name for name, p in peers._PEERS.items() if not name.startswith("compile_")]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLAIN_AND_OURS)
def test_each_peer_computes_the_formula(name, dtypes, seed):
    problem = Problem(SMALL, "cpu", *dtypes, seed=seed)
    check(problem, peers.all_peers()[name])


@pytest.mark.parametrize("name", [name for name in PLAIN_AND_OURS if "_bf16_" not in name])
def test_each_peer_against_a_formula_of_this_test(name, seed):
    """The check itself has an independent witness."""
    problem = Problem(SMALL, dtype=torch.float64, seed=seed)
    peer = peers.all_peers()[name]
    before = [torch.randn_like(p) for p in problem.params]
    for p, g in zip(problem.params, before, strict=True):
        p.grad = g.clone()
    found = peer.run(problem)
    value = 0.0
    for n, p, g in zip(problem.names, problem.params, before, strict=True):
        d = p.detach() - problem.anchor[n]
        value += 50.0 * (problem.fisher[n] * d**2).sum().item()
        added = 100.0 * problem.fisher[n] * d if peer.writes_gradient else torch.zeros_like(d)
        torch.testing.assert_close(p.grad, g + added, rtol=1e-12, atol=1e-12)
    if found is not None:
        assert float(found) == pytest.approx(value, rel=1e-12)


def test_what_is_there_of_value_and_gradient():
    problem = Problem(SMALL)
    without_value = {name for name in PLAIN_AND_OURS if peers.all_peers()[name].run(problem) is None}
    assert without_value == {"loop_no_value", "op_scale_", "copy_"}
    read_only = {name for name in PLAIN_AND_OURS if not peers.all_peers()[name].writes_gradient}
    assert read_only == {"value", "op_penalty", "op_penalty_grad", "op_scale_", "copy_"}


def scaled_gradient(problem: Problem) -> torch.Tensor:
    before = [g.clone() for g in problem.grads]
    value = peers.level2(problem)
    for g, b in zip(problem.grads, before, strict=True):
        g.sub_(b).mul_(1.0001).add_(b)
    return value


def one_element_missing(problem: Problem) -> torch.Tensor:
    before = problem.grads[-1].clone()
    value = peers.level2(problem)
    problem.grads[-1].copy_(before)
    return value


def not_a_number(problem: Problem) -> torch.Tensor:
    value = peers.level2(problem)
    problem.grads[0].view(-1)[3] = torch.nan
    return value


def without_the_half(problem: Problem) -> torch.Tensor:
    return 2 * peers.level2(problem)


@pytest.mark.parametrize("wrong", [scaled_gradient, one_element_missing, not_a_number, without_the_half])
def test_a_wrong_peer_is_caught(wrong, seed):
    with pytest.raises(AssertionError, match="the wrong one: "):
        check(Problem(SMALL, seed=seed), Peer("the wrong one", wrong))


def test_a_peer_that_only_reads_must_not_write(seed):
    problem = Problem(SMALL, seed=seed)
    reads = dataclasses.replace(peers.all_peers()["level2"], writes_gradient=False)
    with pytest.raises(AssertionError, match="level2: wrong gradient of p0"):
        check(problem, reads)


def test_the_check_leaves_the_gradients_alone(seed):
    problem = Problem(SMALL, seed=seed)
    grads = problem.grads
    for g in grads:
        g.normal_()
    before = [g.clone() for g in grads]
    for name in ("eager", "level2", "mammoth_statements"):
        check(problem, peers.all_peers()[name])
    assert all(g is same for g, same in zip(grads, problem.grads, strict=True))
    torch.testing.assert_close(before, problem.grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        # counted by hand, in elements: sub 3, pow 2, mul 3, sum 1; mul 2, pow 7; accumulate 3
        ("eager", 21 * 4, 21 * 2),
        ("eager_flat", 23 * 4, 23 * 2),  # and cat 2
        ("loop", 11 * 4, 11 * 2),  # sub 3, mul 3, add_ 3, dot 2
        ("loop_no_value", 7 * 4, 7 * 2),  # sub 3, addcmul_ 4
        ("foreach", 13 * 4, 13 * 2),  # sub 3, mul 3, add_ 3, mul_ 3, sum 1
        ("compile_eager", 10 * 4, 10 * 2),  # forward 3, backward 4, accumulate 3
        ("compile_loop", 5 * 4, 5 * 2),
        ("ewc_loss", 7 * 4, 7 * 2),
        ("level1", 7 * 4, 7 * 2),  # read 3, write 1; accumulate 3
        ("level2", 5 * 4, 5 * 2),
        ("level2_bf16_fisher", 4 * 4 + 2, 5 * 2),
        ("value", 3 * 4, 3 * 2),
        ("op_penalty", 3 * 4, 3 * 2),
        ("op_penalty_grad", 4 * 4, 4 * 2),
        ("op_penalty_accumulate_", 5 * 4, 5 * 2),
        ("op_scale_", 2 * 4, 2 * 2),
        ("copy_", 2 * 4, 2 * 2),
    ],
)
def test_bytes_against_a_count_by_hand(name, fp32, bf16):
    peer = peers.all_peers()[name]
    assert peer.bytes_for(Sizes(4, 4, 4, 4)) == fp32
    assert peer.bytes_for(Sizes(2, 2, 2, 2)) == bf16


def test_bytes_as_numbers_and_unknown():
    assert Peer("one", peers.level2, 76).bytes_for(Sizes(4, 4, 4, 4)) == 76
    assert Peer("two", peers.level2).bytes_for(Sizes(4, 4, 4, 4)) is None


def test_sizes_of_a_problem():
    assert Sizes.of(Problem(SMALL, "cpu", torch.bfloat16, torch.float32)) == Sizes(2, 2, 4, 2)
    assert Sizes.of(Problem(SMALL, "cpu", torch.float32, torch.bfloat16)) == Sizes(4, 4, 2, 4)


def test_order_and_names():
    every = peers.all_peers()
    groups = list(dict.fromkeys(peer.group for peer in every.values()))
    assert groups == [peers.PLAIN, peers.PUBLISHED, peers.OURS, peers.OPS, peers.LIMIT]
    assert all(peer.name == name and peer.note for name, peer in every.items())
    assert [peer.name for peer in peers.find(["copy_", "eager"])] == ["eager", "copy_"]
    with pytest.raises(ValueError, match="no peer sonic; there are eager"):
        peers.find(["sonic"])
    with pytest.raises(ValueError, match="two peers are called 'eager'"):
        peers.peer("eager", bytes=None, group=peers.PLAIN, note="")(peers.level2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_check_leaves_the_state_alone(dtype, seed):
    problem = Problem(SMALL, dtype=dtype, seed=seed)
    state = [*problem.params, *problem.fishers, *problem.anchors]
    before = [t.detach().clone() for t in state]
    for name in PLAIN_AND_OURS:
        check(problem, peers.all_peers()[name])
    assert all(torch.equal(t, b) for t, b in zip(state, before, strict=True))


# ---- torch.compile ----


@pytest.mark.parametrize("name", ["compile_eager", "compile_loop"])
def test_compiled_peers(name, monkeypatch, seed):
    """Traced whole and once, by whatever compiles; the default compiler takes seconds."""
    compile_ = torch.compile
    seen = []
    monkeypatch.setattr(
        torch, "compile", lambda f, **how: (seen.append(how), compile_(f, backend="aot_eager", **how))[1]
    )
    problem = Problem(SMALL, seed=seed)
    check(problem, peers.all_peers()[name])
    check(problem, peers.all_peers()[name])
    assert seen == [{"fullgraph": True, "dynamic": False}]


def test_without_a_compiler_it_is_unavailable(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler(function, **how):
        def call(*arguments):
            raise InvalidCxxCompiler()

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(Unavailable, match="torch.compile failed: InvalidCxxCompiler"):
        peers.compile_eager(Problem(SMALL))


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peers.compile_loop(Problem(SMALL))


def test_a_graph_too_large_to_compile_is_unavailable(monkeypatch):
    monkeypatch.setattr(peers, "MAX_COMPILED_TENSORS", 3)
    with pytest.raises(Unavailable, match="a graph of 4 tensors"):
        peers.compile_eager(Problem(SMALL))
