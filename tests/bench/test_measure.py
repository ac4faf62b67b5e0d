"""Timing and counting: the arithmetic, the order of things, and memory; no time is asserted."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from ewc_fast.bench import measure, peers
from ewc_fast.bench.measure import interleave, percentile, summarise
from ewc_fast.bench.peers import Peer, Sizes, Unavailable
from ewc_fast.bench.problem import Problem
from ewc_fast.bench.workloads import Workload, scaled

CPU = torch.device("cpu")
SMALL = Workload("small", "a small one", ((17, 5), (3,)))
LARGE = Workload("large", "", ((1000, 1000), (50,)))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("percent", [0, 10, 50, 90, 100])
def test_percentiles(count, percent):
    values = list(np.random.default_rng().lognormal(size=count))
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)


def test_no_percentile_of_nothing():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_rounds_are_interleaved_shuffled_and_the_first_is_not_counted():
    calls: list[str] = []

    def run(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    runs = {name: partial(run, name) for name in "abc"}
    times = interleave(runs, 20, between=lambda: calls.append("-"))
    assert calls[::2] == ["-"] * 63
    rounds = [calls[i + 1 : i + 6 : 2] for i in range(0, len(calls), 6)]
    assert len(rounds) == 21 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert all(len(times[name]) == 20 and min(times[name]) > 6 for name in "abc")


def test_time_is_that_of_the_call(monkeypatch):
    clock = iter([10.0, 10.25, 20.0, 20.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert measure.time_once(lambda: calls.append(1), CPU) == pytest.approx(250)
    assert measure.time_many(lambda: calls.append(1), CPU, calls=50) == pytest.approx(10_000)
    assert len(calls) == 51


def test_numbers_of_one_peer():
    peer = Peer("eager", lambda problem: None, lambda s: 10 * s.p, group=peers.PLAIN, note="as articles have it")
    times = {"eager": [4.0, 2.0, 12.0], "level2": [1.0, 2.0, 3.0], "copy_": [0.5, 0.5, 0.5]}
    result = summarise(peer, Sizes(4, 4, 4, 4), 1_000_000, times, 123, 45, {"eager": [7.0, 9.0]}, {"eager": [3.0]})
    assert result.bytes_per_parameter == 40
    assert (result.median_ms, result.p10_ms, result.p90_ms) == (4.0, pytest.approx(2.4), pytest.approx(10.4))
    assert result.gb_per_s == pytest.approx(40e6 / 4e-3 / 1e9)  # 10
    assert result.percent_of_copy == pytest.approx(100 * 10 / (8e6 / 0.5e-3 / 1e9))  # of 16
    assert result.ratio == 2.0
    assert (result.ratio_p10, result.ratio_p90) == (pytest.approx(1.6), pytest.approx(4.0))  # of 4, 1, 4
    assert (result.peak_bytes, result.warm_us, result.graph_ms) == (123, 8.0, 3.0)


def test_what_is_not_known_is_none():
    result = summarise(Peer("x", lambda problem: None), Sizes(4, 4, 4, 4), 10, {"x": [1.0]}, 0)
    assert result.bytes_per_parameter is result.gb_per_s is result.percent_of_copy is result.ratio is None
    assert result.warm_us is result.graph_ms is None


def test_peak_memory_is_counted_and_nothing_is_said(capfd):
    def call() -> None:
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        del second, third

    assert measure.peak_bytes(call, CPU) == 6000
    assert measure.peak_bytes(lambda: None, CPU) == 0
    said = capfd.readouterr()
    assert said.err == said.out == ""


def test_memory_of_the_peers():
    problem = Problem(scaled(1_000_000))
    size = 4 * problem.numel
    peak = {}
    for name, peer in peers.all_peers().items():
        if not name.startswith("compile_"):
            peer.run(problem)  # what it keeps is there then
            peak[name] = measure.peak_bytes(lambda peer=peer: peer.run(problem), CPU)
    assert all(peak[name] < 20_000 for name in ("ewc_loss", "level1", "level2", "value", "copy_"))
    assert size < peak["eager"] < 1.2 * size and peak["eager_flat"] > 5 * size
    for name, found in peak.items():
        assert found < (peers.all_peers()[name].temporaries + 1.01) * size + 20_000, name


def test_a_whole_measurement(monkeypatch):
    def never(problem: Problem) -> None:
        raise Unavailable("not on this machine")

    chosen = [*peers.find(["eager", "level2", "copy_"]), Peer("never", never)]
    flushes: list[int] = []
    monkeypatch.setattr(measure.CacheFlush, "__call__", lambda self: flushes.append(1))
    said: list[str] = []
    result = measure.measure(Problem(SMALL), chosen, 2, said.append)
    assert len(flushes) == 3 * 3
    assert said[0] == "checking 4 peers"
    assert [peer.name for peer in result.peers] == ["eager", "level2", "copy_"]
    assert result.skipped == {"never": "not on this machine"}
    assert (result.parameters, result.tensors, result.rounds) == (88, 2, 2)
    assert (result.dtype, result.fisher_dtype, result.device) == ("float32", "float32", "cpu")
    as_json = measure.as_dict(result)
    assert json.loads(json.dumps(as_json)) == as_json
    for peer in as_json["peers"]:
        assert 0 < peer["p10_ms"] <= peer["median_ms"] <= peer["p90_ms"]
        assert peer["warm_us"] > 0 and peer["gb_per_s"] > 0 and peer["percent_of_copy"] > 0 and peer["ratio"] > 0
    by_name = {peer["name"]: peer for peer in as_json["peers"]}
    assert by_name["level2"]["ratio"] == 1 and by_name["copy_"]["percent_of_copy"] == pytest.approx(100)


def test_a_wrong_peer_stops_the_measurement():
    with pytest.raises(AssertionError, match="nothing: wrong gradient of p0"):
        measure.measure(Problem(SMALL), [Peer("nothing", lambda problem: None)], 1)


def test_large_models_are_not_timed_warm(monkeypatch):
    monkeypatch.setattr(measure, "WARM_NUMEL", 87)
    result = measure.measure(Problem(SMALL), peers.find(["level2"]), 1)
    assert result.peers[0].warm_us is None


def test_at_least_one_round():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure.measure(Problem(SMALL), [], 0)


def test_the_flush_is_larger_than_the_cache():
    flush = measure.CacheFlush(CPU)
    assert flush._buffer.numel() * 4 == 2 * measure.cache_bytes(CPU)
    before = float(flush._buffer[-1])
    flush()
    assert float(flush._buffer[-1]) == before + 1


def test_cache_sizes_as_the_system_writes_them(tmp_path):
    for index, size in enumerate(["32K", "1024K", "32768K\n"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert measure.cache_bytes(CPU, tmp_path) == 32 << 20
    assert measure.cache_bytes(CPU, tmp_path / "nothing") == 32 << 20
    (tmp_path / "index2" / "size").write_text("1M")
    (tmp_path / "index1" / "size").write_text("512K")
    assert measure.cache_bytes(CPU, tmp_path) == 1 << 20


def test_memory_that_is_free(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 100 kB\nMemAvailable:   2048 kB\n")
    assert measure.available_bytes(CPU, file) == 2 << 20
    file.write_text("MemTotal: 100 kB\n")
    assert measure.available_bytes(CPU, file) is None
    assert measure.available_bytes(CPU, tmp_path / "nothing") is None


def test_memory_to_measure():
    keeps = Peer("a", lambda problem: None, keeps=1.5, temporaries=1)
    makes = Peer("b", lambda problem: None, keeps=1, temporaries=3)
    assert measure.models_held([]) == 5
    assert measure.models_held([keeps, makes]) == 5 + 2.5 + 3
    assert measure.bytes_to_measure(1000, torch.bfloat16, [keeps, makes]) == 21_000


@pytest.mark.gpu
def test_on_a_gpu():
    names = ["eager", "loop", "foreach", "level1", "level2", "level2_bf16_fisher", "op_penalty_accumulate_", "copy_"]
    result = measure.measure(Problem(LARGE, "cuda"), peers.find(names), 2)
    by_name = {peer.name: peer for peer in result.peers}
    assert all((peer.graph_ms is not None) == peers.all_peers()[name].capturable for name, peer in by_name.items())
    assert by_name["level2"].peak_bytes < 1 << 20 < by_name["foreach"].peak_bytes
