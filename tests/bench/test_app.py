"""The command line: what is chosen, measured, printed and written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ewc_fast.bench import app, environment, main, measure, peers, report, step, workloads
from ewc_fast.bench.app import Unmeasured
from ewc_fast.bench.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_without_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--workloads", "many_tiny", "--peers", "eager", "--rounds", "1"]) == 0
    told = capsys.readouterr().out
    rows = [line.split()[0] for line in told.splitlines() if line]
    assert ["eager", "level2", "copy_"] == [row for row in rows if row in peers.all_peers()]
    assert "many_tiny: 20 tensors of 100, 2,000 parameters" in told and "1 rounds" in told
    assert "Nothing written: --out DIR" in told and not list(tmp_path.iterdir())
    assert torch.__version__ in told and "GB/s" in told


def test_a_run_with_files(capsys, tmp_path, threads):
    pytest.importorskip("matplotlib")
    command = [
        "--workloads",
        "many_tiny,mlp",
        "--peers",
        "loop",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--dtype",
        "bfloat16",
    ]
    command += ["--fisher-dtype", "float32", "--backend", "reference", "--out", str(tmp_path / "{machine}")]
    assert main(command) == 0
    (folder,) = tmp_path.iterdir()
    results = report.read_json(folder / "results.json")
    assert folder.name == environment.machine_name(results["machine"])
    assert results["machine"]["threads"] == 1
    assert results["command"].startswith("python -m ewc_fast bench --workloads many_tiny,mlp --peers loop")
    assert [w["name"] for w in results["workloads"]] == ["many_tiny", "mlp"]
    for workload in results["workloads"]:
        assert (workload["dtype"], workload["fisher_dtype"], workload["rounds"]) == ("bfloat16", "float32", 2)
        assert [peer["name"] for peer in workload["peers"]] == ["loop", "level2", "copy_"]
    assert (folder / "results.csv").read_text() == report.to_csv(results)
    assert sorted(path.name for path in folder.glob("*.png")) == ["roofline.png", "time_by_peer.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("roofline.png", "time_by_peer.png"))
    assert "results.csv" in capsys.readouterr().out
    report.performance_section(results)


def test_without_matplotlib_the_numbers_are_written(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    written = app.write(results, tmp_path)
    assert [path.name for path in written] == ["results.json", "results.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    assert 'matplotlib is missing: pip install --no-build-isolation ".[bench]"' in capsys.readouterr().err


def test_without_workloads_there_is_no_picture(results, tmp_path):
    written = app.write({**results, "workloads": [], "growth": []}, tmp_path)
    assert [path.name for path in written] == ["results.json", "results.csv"]


def recorded(monkeypatch, tmp_path, *argv: str) -> dict:
    """A run of which nothing is measured; its results name what would have been."""

    def measured(problem, chosen, rounds, progress):
        progress("measuring")
        return measure.WorkloadResult(
            problem.name, "", problem.numel, problem.tensors, "float32", "float32", "cpu", rounds, list(chosen), {}
        )

    def as_dict(result):
        return {
            "name": result.name,
            "parameters": result.parameters,
            "rounds": result.rounds,
            "peers": [{"name": p.name, "bytes_per_parameter": 8, "gb_per_s": 2.0} for p in result.peers],
            "skipped": {},
        }

    seen: dict = {}
    monkeypatch.setattr(app, "Problem", lambda workload, *rest: workload)
    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "as_dict", as_dict)
    for name in ("format_workload", "format_growth"):
        monkeypatch.setattr(report, name, lambda results: "")
    monkeypatch.setattr(report, "bars", lambda results: [])
    monkeypatch.setattr(step, "measure_steps", lambda config, *rest, **how: [(config.name, *rest)])
    monkeypatch.setattr(step, "table", lambda rows: f"steps: {len(rows)}")
    monkeypatch.setattr(app, "write", lambda results, folder: seen.update(results) or [])
    assert main([*argv, "--out", str(tmp_path)]) == 0
    return seen


def names(results: list[dict]) -> list[str]:
    return [workload["name"] for workload in results]


def test_default(monkeypatch, tmp_path):
    results = recorded(monkeypatch, tmp_path)
    assert names(results["workloads"]) == list(app.DEFAULT_WORKLOADS)
    assert results["workloads"][0]["rounds"] == 25
    assert [peer["name"] for peer in results["workloads"][0]["peers"]] == list(peers.all_peers())
    assert not results["growth"] and not results["steps"] and not results["predicted"]


def test_quick(monkeypatch, tmp_path, capsys):
    results = recorded(monkeypatch, tmp_path, "--quick")
    assert names(results["workloads"]) == list(app.QUICK_WORKLOADS)
    measured = [peer["name"] for peer in results["workloads"][0]["peers"]]
    assert set(peers.all_peers()) - set(measured) == {"compile_eager", "compile_loop"}
    assert len(results["growth"]) == len(app.QUICK_GROWTH) and results["workloads"][0]["rounds"] == 5
    assert [s[0] for s in results["steps"]] == ["gpt2_mini"] and "steps: 1" in capsys.readouterr().out


def test_all_that_fits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 22 << 30)
    results = recorded(monkeypatch, tmp_path, "--all", "--rounds", "3")
    fitting = [n for n in WORKLOADS if n not in ("llama_1b", "llama_7b")]
    assert names(results["workloads"]) == [*fitting, "gpt2_48m"]  # at last in bf16
    assert names(results["workloads"][-1]["peers"]) == [p.name for p in peers.find(app.HALF_PEERS)]
    assert json.loads((tmp_path / "results.json").read_text())["workloads"][0]["name"] == fitting[0]  # as it goes on
    assert len(results["growth"]) == len(workloads.GROWTH)
    assert [s[0] for s in results["steps"]] == ["gpt2_small"] and results["steps"][0][-1] == 3
    llama_1b, llama_7b = results["predicted"]
    assert (llama_1b["name"], llama_7b["name"]) == ("llama_1b", "llama_7b")
    assert "GiB, 22.0 GiB are free" in llama_1b["reason"] and llama_7b["reason"] == "on paper only"
    assert llama_1b["bytes_needed"] == 16 * WORKLOADS["llama_1b"].numel
    assert llama_7b["predicted_ms"]["level2"] == pytest.approx(8 * WORKLOADS["llama_7b"].numel / 2e9 * 1e3)
    assert "times predicted from the bytes" in capsys.readouterr().out


def test_growth_that_does_not_fit_is_predicted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 4 << 30)
    results = recorded(monkeypatch, tmp_path, "--workloads", "mlp", "--growth", "--steps")
    assert names(results["growth"]) == ["gpt2_1m", "gpt2_3m", "gpt2_10m", "gpt2_30m", "gpt2_100m"]
    assert names(results["predicted"]) == ["gpt2_300m", "gpt2_500m"]
    assert results["predicted"][0]["predicted_from"] == "gpt2_100m"
    assert results["steps"] == [] and "no training steps: they take 10 GiB, 4.0" in capsys.readouterr().err


def test_7b_is_measured_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "available_bytes", lambda device: None)
    assert names(recorded(monkeypatch, tmp_path, "--workloads", "llama_7b")["workloads"]) == ["llama_7b"]


def test_predictions_count_bytes_with_the_speed_on_the_largest():
    workload = Workload("w", "", ((1000, 1000),))
    small = {"name": "s", "parameters": 1, "peers": [{"name": "level2", "bytes_per_parameter": 20, "gb_per_s": 1.0}]}
    large = {
        "name": "l",
        "parameters": 2,
        "peers": [
            {"name": "level2", "bytes_per_parameter": 20, "gb_per_s": 40.0},
            {"name": "op_scale_", "bytes_per_parameter": 8, "gb_per_s": 40.0},
            {"name": "eager", "bytes_per_parameter": None, "gb_per_s": None},
        ],
    }
    (predicted,) = app.predict([Unmeasured(workload, "why")], [large, small], torch.float32, torch.bfloat16)
    assert predicted["predicted_ms"] == {"level2": pytest.approx(0.5)}  # 20 MB at 40 GB/s
    assert predicted["bytes_needed"] == 14_000_000 and predicted["reason"] == "why"
    assert app.predict([Unmeasured(workload, "why")], [], torch.float32, None)[0]["predicted_ms"] == {}


def test_peers_that_take_most_are_left_out_first():
    def fitting(free: int | None) -> tuple[list[str], dict[str, str]]:
        every = list(peers.all_peers().values())
        kept, dropped = app.those_that_fit(every, 1 << 28, torch.float32, free)
        return [peer.name for peer in kept], dropped

    assert fitting(None) == fitting(1 << 40) == (list(peers.all_peers()), {})
    kept, dropped = fitting(10 << 30)  # ten models of 1 GiB
    assert {"level1", "level2", "loop", "copy_"} < set(kept) and {"eager_flat", "mammoth_statements"} < set(dropped)
    assert set(kept) | set(dropped) == set(peers.all_peers()) and not set(kept) & set(dropped)
    assert measure.bytes_to_measure(1 << 28, torch.float32, peers.find(kept)) <= 9 << 30
    assert "GiB, 10.0 GiB are free" in dropped["eager_flat"]
    kept, dropped = fitting(5 << 30)  # five are needed, and nine tenths of the memory given
    assert kept == [] and list(dropped) == list(peers.all_peers())


def test_left_out_peers_are_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 10 * WORKLOADS["mlp"].numel * 4)
    (workload,) = recorded(monkeypatch, tmp_path, "--workloads", "mlp")["workloads"]
    measured = [peer["name"] for peer in workload["peers"]]
    assert "eager_flat" in workload["skipped"] and "level2" in measured
    assert set(measured) == set(peers.all_peers()) - set(workload["skipped"])


def test_the_command_says_what_is_measured_not_where_to():
    assert app._without_out(["--all", "--out", "x", "--rounds", "3"]) == ["--all", "--rounds", "3"]
    assert app._without_out(["--out=x", "--quick"]) == ["--quick"]


@pytest.mark.parametrize(("rounds", "large"), [(25, 8), (9, 5), (3, 3)])
def test_large_models_get_fewer_rounds(rounds, large):
    assert app.rounds_for(WORKLOADS["gpt2_48m"].numel, rounds) == rounds
    assert app.rounds_for(WORKLOADS["gpt2_small"].numel, rounds) == large


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quick", "--all"], "one of the two"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--workloads", "gpt5"], "no workload gpt5; there are many_tiny"),
        (["--peers", "sonic"], "no peer sonic; there are eager"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "no such device here"),
        (["--fisher-dtype", "float16"], "invalid choice"),
        (["--nothing"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "torch has no such device here; use cpu" in capsys.readouterr().err


def test_it_says_when_the_reference_runs(monkeypatch):
    told = app._introduction(
        {
            "date": "2025-01-01",
            "machine": {"cpu": "x", "threads": 1, "cores": 2, "system": "Linux"},
            "versions": {"torch": "2.6"},
            "kernels": {"backend": "reference", "reason": "the extension was not built"},
        }
    )
    assert "runs on its PyTorch reference here: the extension was not built" in told


def test_pytest_benchmark_cases():
    """They run, once each and untimed, and every peer in them is right."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "--workloads", "many_tiny", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_json_has_no_numbers_that_json_lacks(results):
    json.loads(json.dumps(results, allow_nan=False))
