"""Published penalties: the gradient they give, their bytes as the dispatcher counts them, the package's own ops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_fast.bench import peers, published
from ewc_fast.bench.peers import Sizes, Unavailable, check
from ewc_fast.bench.problem import Problem
from ewc_fast.bench.workloads import Workload

SMALL = Workload("small", "", ((17, 5), (3,), (2, 3, 4), (1,)))
LARGE = Workload("large", "so that what does not grow with it does not show", ((1 << 18,),))

VERSION = published.avalanche_version()
needs_avalanche = pytest.mark.skipif(VERSION is None, reason="Avalanche is not installed: pip install avalanche-lib")
STATEMENTS = [*published.avalanche_peers(None), published.PEERS[-1]]
# Its imports warn, and a warning is an error here.
REAL = [
    pytest.param(peer, marks=[needs_avalanche, pytest.mark.filterwarnings("ignore")])
    for peer in published.avalanche_peers(VERSION or "of no version")
]


def name_of(value):
    return value.name if isinstance(value, peers.Peer) else str(value)


class Ops(TorchDispatchMode):
    """The ops that reach the kernels, and the bytes they read and write; a view has none, nor an expanded number."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func is torch.ops.aten.detach.default:
            return result
        self.names.append(str(func))
        tensors = [result, *(b for a in args for b in (a if isinstance(a, (list, tuple)) else [a]))]
        self.bytes += sum(
            math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.element_size()
            for t in tensors
            if isinstance(t, torch.Tensor)
        )
        return result


def ops_of(peer, problem):
    peer.run(problem)  # what is made once
    with Ops() as ops:
        peer.run(problem)
    return ops


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)], ids=str
)
@pytest.mark.parametrize("peer", [*STATEMENTS, *REAL], ids=name_of)
def test_each_computes_the_formula(peer, dtypes, seed):
    check(Problem(SMALL, "cpu", *dtypes, seed=seed), peer)


@pytest.mark.parametrize("peer", [*STATEMENTS, *REAL], ids=name_of)
def test_each_against_a_formula_of_this_test(peer, seed):
    """Lambda is halved for those who have no 1/2; the gradients there are added to, and stay where they are."""
    problem = Problem(SMALL, seed=seed)
    before = [torch.randn_like(p) for p in problem.params]
    for p, g in zip(problem.params, before, strict=True):
        p.grad = g.clone()
    places = [p.grad.data_ptr() for p in problem.params]
    found = peer.run(problem)
    theta = [p.detach().double().requires_grad_() for p in problem.params]
    value = sum(
        50.0 * (problem.fisher[n].double() * (t - problem.anchor[n].double()) ** 2).sum()
        for n, t in zip(problem.names, theta, strict=True)
    )
    value.backward()
    for p, g, t in zip(problem.params, before, theta, strict=True):
        torch.testing.assert_close(p.grad.double(), g.double() + t.grad, rtol=1e-5, atol=1e-6)
    assert [p.grad.data_ptr() for p in problem.params] == places
    assert (found is None) == (peer.name == "mammoth_statements")
    if found is not None:
        assert float(found) == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize(("count", "shares"), [(1, [1]), (2, [0.5, 0.5]), (3, [0.5, 0.25, 0.25])])
def test_several_tasks_sum_to_the_problem_and_share_no_memory(count, shares):
    problem = Problem(SMALL)
    tasks = published.tasks(problem, count)
    assert len(tasks) == count
    for name in problem.names:
        assert torch.equal(sum(fisher[name] for _, fisher in tasks), problem.fisher[name])
        for (anchor, fisher), share in zip(tasks, shares, strict=True):
            assert torch.equal(anchor[name], problem.anchor[name])
            assert torch.equal(fisher[name], share * problem.fisher[name])
        assert len({t[name].data_ptr() for task in tasks for t in task}) == 2 * count
    assert published.tasks(problem, count) is tasks


@pytest.mark.parametrize("peer", [*STATEMENTS, *REAL], ids=name_of)
def test_bytes_are_those_that_the_dispatcher_sees(peer):
    problem = Problem(LARGE)
    counted = ops_of(peer, problem).bytes / problem.numel
    assert counted == pytest.approx(peer.bytes_for(Sizes.of(problem)), rel=1e-3)


@needs_avalanche
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(3))
def test_the_statements_are_the_ones_of_the_package(index):
    problem = Problem(SMALL)
    real, ours = published.avalanche_peers(VERSION)[index], published.avalanche_peers(None)[index]
    assert ops_of(real, problem).names == ops_of(ours, problem).names
    with problem.fresh_grads():
        value = real.run(problem)
        grads = [g.clone() for g in problem.grads]
    with problem.fresh_grads():
        assert torch.equal(ours.run(problem), value)
        assert all(torch.equal(a, b) for a, b in zip(problem.grads, grads, strict=True))


def test_the_name_says_whether_it_is_the_package():
    assert [peer.name for peer in published.avalanche_peers(None)] == [
        "avalanche_statements_separate",
        "avalanche_statements_separate_3_tasks",
        "avalanche_statements_online",
    ]
    assert [peer.name for peer in published.avalanche_peers("0.6.0")] == [
        "avalanche_separate",
        "avalanche_separate_3_tasks",
        "avalanche_online",
    ]
    for version, words in ((None, "written anew"), ("0.6.0", "Avalanche 0.6.0's EWCPlugin")):
        assert all(words in peer.note for peer in published.avalanche_peers(version))
    assert [peer.name for peer in published.PEERS] == [
        *(peer.name for peer in published.avalanche_peers(VERSION)),
        "mammoth_statements",
    ]
    assert {peer.name for peer in published.PEERS} < peers.all_peers().keys()


def test_an_import_that_fails_is_said(monkeypatch):
    """As a torchvision of another torch does: an error that is no ImportError."""

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(published, "import_module", broken)
    with pytest.raises(Unavailable, match=r"importing Avalanche raised RuntimeError: operator torchvision::nms"):
        check(Problem(SMALL), published.avalanche_peers("0.6.0")[0])


@pytest.mark.parametrize("peer", [*published.avalanche_peers(None), *published.avalanche_peers("0.6.0")], ids=name_of)
def test_avalanche_has_no_fp64(peer):
    with pytest.raises(Unavailable, match="fp32"):
        check(Problem(SMALL, dtype=torch.float64), peer)


def test_mammoth_needs_one_dtype(seed):
    mammoth = published.PEERS[-1]
    check(Problem(SMALL, dtype=torch.float64, seed=seed), mammoth)
    problem = Problem(SMALL, dtype=torch.bfloat16, fisher_dtype=torch.float32)
    with pytest.raises(Unavailable, match="dtype"):
        check(problem, mammoth)
    assert all(g.dtype == torch.bfloat16 for g in problem.grads)


def test_a_published_lambda_that_was_not_halved_is_caught(seed):
    problem = Problem(SMALL, seed=seed)
    ours = published.avalanche_peers(None)[0]

    def twice(problem):
        problem.ewc_lambda *= 2
        try:
            return ours.run(problem)
        finally:
            problem.ewc_lambda /= 2

    with pytest.raises(AssertionError, match="avalanche_statements_separate"):
        check(problem, dataclasses.replace(ours, run=twice))
