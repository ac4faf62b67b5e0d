"""The benchmark of the optimizers: its ways step as their formulas say, and its tables say what was measured."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from ewc_fast.bench import main, optimizers
from ewc_fast.bench.optimizers import WAYS, Steps, check, ratio, section, table
from ewc_fast.bench.workloads import Workload
from ewc_fast.ops import extension

TINY = Workload("tiny", "two tensors", ((5, 7), (3,)))


@pytest.mark.parametrize("name", WAYS)
def test_steps_are_the_formulas(name: str, backend: str) -> None:
    check(WAYS[name], backend=backend)


@pytest.mark.gpu
@pytest.mark.native
@pytest.mark.parametrize("name", WAYS)
def test_steps_are_the_formulas_on_a_gpu(name: str) -> None:
    check(WAYS[name], "cuda")


@pytest.mark.parametrize("name", ["ewc_adamw_coupled", "ewc_sgd_proximal"])
def test_a_wrong_step_is_noticed(name: str) -> None:
    other = "proximal" if WAYS[name].coupling == "coupled" else "coupled"
    with pytest.raises(AssertionError, match="is off its formula"):
        check(dataclasses.replace(WAYS[name], coupling=other))
    with pytest.raises(AssertionError, match="is off its formula"):
        check(dataclasses.replace(WAYS[name], coupling=""))


@pytest.mark.filterwarnings("ignore:a parameter is penalised by two attached penalties")
def test_all_ways_step_the_same_tensors_from_the_same_state() -> None:
    steps = Steps(TINY, list(WAYS.values()))
    for name, optimizer in steps.optimizers.items():
        same = steps.optimizers[WAYS[name].than]
        assert optimizer.state is same.state
        assert [p for g in optimizer.param_groups for p in g["params"]] == steps.params


def test_what_attach_adds() -> None:
    for coupling in ("coupled", "proximal"):
        found = optimizers.overhead(coupling, rounds=2)
        assert found["with"] > found["without"] > 0 and math.isfinite(found["adds"])
        if extension.has_kernel("cpu"):
            assert 0 < found["kernel"] < found["with"] and found["python"] < found["adds"]
        found = optimizers.overhead(coupling, "reference", rounds=1)
        assert found["with"] > 0 and not found.keys() & {"kernel", "python"}  # there is no call to tell apart


def result(**times: list[float]) -> dict:
    ways = [
        {"name": w.name, "note": w.note, "than": w.than, "bytes_per_parameter": 36.0, "bar": w.bar, "aim": w.aim}
        | {"times": times[w.name]}
        for w in WAYS.values()
        if w.name in times
    ]
    return {"name": "x", "description": "d", "parameters": 1_000_000, "tensors": 2, "rounds": 3, "ways": ways}


def test_ratios_are_taken_within_a_round_and_bars_are_held() -> None:
    found = result(adamw=[10.0, 20.0, 40.0], ewc_adamw_coupled=[12.0, 26.0, 60.0])
    assert ratio(found, found["ways"][1]) == pytest.approx((1.3, 1.22, 1.46))
    told = table(found)
    assert "1.30 (1.22 to 1.46)" in told and "at most 1.35: met" in told and "| 1.4 |" in told
    assert "**missed**" in table(result(adamw=[10.0] * 3, ewc_adamw_coupled=[14.0] * 3))


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    some = {name: WAYS[name] for name in ("adamw", "ewc_adamw_proximal")}
    monkeypatch.setattr(optimizers, "WAYS", some)
    out = tmp_path / "{machine}"
    arguments = ["--optimizers", "--workload", "many_tiny", "--rounds", "2", "--no-steps", "--out", str(out)]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("*/optimizers/results.json")
    results = optimizers.read_json(path)
    assert [way["name"] for way in results["optimizers"]["ways"]] == list(some)
    told = section(results)
    assert told in capsys.readouterr().out and (path.parent / "results.md").read_text() == told + "\n"
    assert "What `attach` adds to a step of 20 small tensors" in told
    path.write_text(json.dumps({"machine": {}}))
    with pytest.raises(ValueError, match="is no result of python -m ewc_fast bench --optimizers"):
        optimizers.read_json(path)
    for bad in (["--rounds", "0"], ["--workload", "nothing"]):
        with pytest.raises(SystemExit):
            main(["--optimizers", *bad])


def test_the_whole_step_has_level_3() -> None:
    from ewc_fast.bench.step import GPTConfig, measure_steps

    tiny = GPTConfig("tiny", blocks=1, width=16, heads=2, vocabulary=11, positions=8)
    found = measure_steps(tiny, tokens=8, rounds=1, variants=optimizers.STEP_VARIANTS, accumulation=(1,))
    assert [row["variant"] for row in found] == list(optimizers.STEP_VARIANTS)
    assert all(torch.isfinite(torch.tensor(row["median_ms"])) for row in found)
