"""From results to text, files and the README's section."""

from __future__ import annotations

import copy
import csv
import importlib.util
import io
from pathlib import Path

import pytest

from ewc_fast.bench import environment, report, step

ROOT = Path(__file__).resolve().parents[2]


def test_json_round_trip(results, tmp_path):
    report.write_json(results, tmp_path / "results.json")
    assert report.read_json(tmp_path / "results.json") == results


@pytest.mark.parametrize("text", ["[]", "{}", '{"workloads": []}'])
def test_other_json_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is no result"):
        report.read_json(tmp_path / "x.json")


def test_csv_round_trip(results):
    rows = list(csv.DictReader(io.StringIO(report.to_csv(results))))
    expected = [
        (section, workload, peer)
        for section in ("workloads", "growth")
        for workload in results[section]
        for peer in workload["peers"]
    ]
    assert len(rows) == len(expected)
    for row, (section, workload, peer) in zip(rows, expected, strict=True):
        assert (row["section"], row["workload"], row["name"]) == (section, workload["name"], peer["name"])
        assert int(row["parameters"]) == workload["parameters"]
        for key in ("median_ms", "p10_ms", "p90_ms", "ratio", "gb_per_s", "percent_of_copy"):
            assert float(row[key]) == peer[key]
        assert row["graph_ms"] == ""


def test_csv_of_nothing():
    assert report.to_csv({"workloads": [], "growth": []}) == "section\n"


def test_table_of_a_workload(results):
    workload = copy.deepcopy(results["workloads"][0])
    eager = workload["peers"][0]
    eager |= {"median_ms": 12.3456, "ratio": 3.456, "peak_bytes": 3 << 20, "percent_of_copy": 56.4, "gb_per_s": None}
    told = report.format_workload(workload)
    (row,) = [line for line in told.splitlines() if line.startswith("eager ")]
    assert "12.346" in row and "3.46" in row and "3.0 MiB" in row and "56" in row.split()
    assert "70 parameters in 3 tensors, float32, cpu, 2 rounds" in told
    assert "compile_eager  skipped: no compiler" in told
    assert "warm us" in told and "graph ms" not in told
    workload["fisher_dtype"] = "bfloat16"
    assert "float32, Fisher bfloat16, cpu" in report.format_workload(workload)
    for peer in workload["peers"]:
        peer["graph_ms"] = 0.1234
    assert "graph ms" in report.format_workload(workload) and "0.123" in report.format_workload(workload)


def test_table_of_the_growth(results):
    told = report.format_growth(results["growth"]).splitlines()
    assert told[1].startswith("600,011") and told[0].split()[2:4] == ["eager", "loop"]


def test_predictions_are_called_predictions(results):
    told = report.format_predicted(results["predicted"])
    assert "llama_7b (on paper only): 6,738,415,616 parameters, 100.4 GiB" in told
    assert "predicted: level2 3712 ms" in told
    results = [{**results["predicted"][0], "predicted_ms": {}}]
    assert "no bandwidth was measured" in report.format_predicted(results)


def with_times(results, **milliseconds):
    """The same results with other medians on the first workload."""
    results = copy.deepcopy(results)
    for peer in results["workloads"][0]["peers"]:
        if peer["name"] in milliseconds:
            peer["median_ms"] = milliseconds[peer["name"]]
            peer["gb_per_s"] = peer["bytes_per_parameter"] / milliseconds[peer["name"]]
    return results


def test_bars(results):
    results = with_times(results, eager=30.0, loop=8.0, level1=12.0, level2=4.0, copy_=2.0)
    found = {(bar.peer, bar.than): (bar.bar, factor) for bar, _, factor in report.bars(results)}
    assert found["level2", "eager"] == (5, 7.5)
    assert found["level1", "eager"] == (3, 2.5)
    assert found["level2", "loop"] == (1.6, 2.0)
    assert found["level2", "copy_"] == (1.2, pytest.approx(20 / 4 / (8 / 2)))  # bytes per second
    assert ("level2", "compile_eager") not in found  # it was skipped
    assert "level 2 against eager" in report.format_bars(results) and "7.50x" in report.format_bars(results)
    half = copy.deepcopy(results)
    half["workloads"][0]["dtype"] = "bfloat16"  # the bars are about fp32
    assert report.bars(half) == [] and report.format_bars(half) == ""


def test_bars_of_a_gpu(results):
    results = copy.deepcopy(results)
    results["workloads"][0] |= {"device": "cuda", "name": "llama_1b"}
    assert [(bar.peer, bar.than) for bar, _, _ in report.bars(results)] == [("level2", "eager"), ("level2", "copy_")]


def test_section(results):
    results = with_times(results, eager=30.0, level2=4.0)
    told = report.performance_section(results)
    assert "`python -m ewc_fast bench --all`" in told and results["date"] in told and "medians of 2 rounds" in told
    assert results["machine"]["cpu"] in told and results["versions"]["torch"] in told
    assert "(`eager`) | 30.0 (" in told and "(`op_penalty`)" not in told
    assert "| `compile_eager` | skipped: no compiler |" in told
    assert "| gpt2_48m: level 2 against eager | 7.50x | 5x | 12x |" in told
    larger = copy.deepcopy(results)
    larger["workloads"][1]["rounds"] = 1
    assert "medians of 2 rounds, 1 for larger models (in" in report.performance_section(larger)
    assert "| another, 600k in 2 |" in told  # other models
    assert "| 600k |" in told  # growth
    assert "Llama 2 7B, 6.7B in 291 | 100.4 GiB | 3712 |" in told and "predicted" in told
    for line in told.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_section_of_little(results):
    little = {**results, "workloads": results["workloads"][1:], "growth": [], "predicted": []}
    told = report.performance_section(little)
    assert "**another: 600k float32 parameters in 2 tensors**" in told
    assert "How cost grows" not in told and "Other models" not in told and "Against the bars" not in told


def test_section_with_training_steps(results, monkeypatch):
    monkeypatch.setattr(step, "markdown", lambda rows: f"{len(rows)} rows of steps")
    assert "**A whole training step**\n\n2 rows of steps" in report.performance_section({**results, "steps": [{}, {}]})


def test_section_of_a_gpu(results):
    results = copy.deepcopy(results)
    results["machine"]["gpu"] = "NVIDIA H200"
    results["workloads"][0]["device"] = "cuda"
    told = report.performance_section(results)
    assert "on NVIDIA H200, Linux" in told and "x86-64" not in told.partition("with `")[0]
    assert "is a measured yardstick" not in told  # which is about a CPU's stores


def test_machine_names():
    name = environment.machine_name
    assert name({"cpu": "AMD EPYC", "cores": 2}) == "amd_epyc_2core"
    assert name({"cpu": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "cores": 64}) == "intel_xeon_gold_6338_64core"
    assert name({"cpu": "AMD EPYC", "cores": 2, "gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia_h100_80gb_hbm3"


# ---- benchmarks/readme.py ----


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(results, tmp_path):
    path = tmp_path / "results" / "here" / "results.json"
    for folder in (path.parent, tmp_path / "docs"):
        folder.mkdir(parents=True)
    report.write_json(results, path)
    targets = [tmp_path / "README.md", tmp_path / "docs" / "cost.md", tmp_path / "docs" / "performance.md"]
    for target in targets:
        target.write_text(f"# before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return path, targets


@pytest.mark.parametrize("which", [0, 1, 2])
def test_texts_are_written_and_checked(readme, files, results, capsys, tmp_path, which):
    path, targets = files
    target = targets[which]
    arguments = [str(path), "--root", str(tmp_path)]
    before = target.read_text()
    assert readme.main([*arguments, "--check"]) == 1
    assert "without --check" in capsys.readouterr().err and target.read_text() == before
    assert readme.main(arguments) == 0
    sections = [
        report.readme_section(results, "docs/cost.md"),
        report.cost_section(results, "../results/here", "performance.md"),
        report.performance_section(results),
    ]
    section = sections[which]
    assert target.read_text() == f"# before\n\n{report.BEGIN}\n{section}\n{report.END}\n\nafter\n"
    assert readme.main([*arguments, "--check"]) == 0
    assert readme.main(arguments) == 0
    assert target.read_text().count(section) == 1
    target.write_text(target.read_text().replace("# before", "changed outside of the section"))
    assert readme.main([*arguments, "--check"]) == 0
    target.write_text(target.read_text().replace("parameters", "numbers"))
    assert readme.main([*arguments, "--check"]) == 1


def test_a_gpu_has_a_page_of_its_own(readme, results, tmp_path):
    results = copy.deepcopy(results)
    for workload in results["workloads"]:
        workload["device"] = "cuda"
        for peer in workload["peers"]:
            peer |= {"median_ms": 0.4567, "graph_ms": 0.1234}
    (tmp_path / "docs").mkdir()
    report.write_json(results, tmp_path / "results.json")
    page = tmp_path / "docs" / "gpu.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert readme.main([str(tmp_path / "results.json"), "--root", str(tmp_path)]) == 0
    assert "| 0.457 (" in page.read_text() and "| 0.123 |" in page.read_text()
    assert "as a CUDA graph" in page.read_text() and "page faults" not in page.read_text()
    assert not (tmp_path / "README.md").exists()


def test_the_section_on_cost(results):
    results = with_times(results, eager=30.0, level2=4.0)
    told = report.cost_section(results, "benchmarks/results/here", "docs/performance.md")
    assert "| 30.0 |" in told and "| 4.0 |" in told and "](benchmarks/results/here/time_by_peer.png)" in told
    assert "](docs/performance.md)" in told and "whole training step" not in told
    row = {"variant": "plain", "note": "no EWC", "parameters": 124e6, "batch": 1, "tokens": 128, "median_ms": 900.4}
    row |= {"micro_batches": 1, "ewc_percent": None}
    added = {"variant": "level2", "note": "with", "ewc_percent": 3.4, "ewc_percent_p10": -1.2, "ewc_percent_p90": 8.8}
    steps = [row, {**row, **added}, {**row, "micro_batches": 4}]
    told = report.cost_section({**results, "steps": steps}, "x", "y")
    assert "| no EWC | 900 |  |" in told and "| with | 900 | 3% (-1 to 9%) |" in told and told.count("no EWC") == 1


def test_the_readme_section(results):
    results = with_times(results, eager=30.0, level2=4.0)
    told = report.readme_section(results, "docs/cost.md")
    assert "| 30.0 |" in told and "| 4.0 |" in told and "](docs/cost.md)" in told and "training step" not in told
    step = {"variant": "eager", "parameters": 124e6, "batch": 1, "tokens": 128, "median_ms": 900.4, "micro_batches": 1}
    step |= {"ewc_percent": 165.5, "ewc_percent_p10": 123.3, "ewc_percent_p90": 193.9}
    added = {"variant": "level2", "ewc_percent": 3.4, "ewc_percent_p10": -1.2, "ewc_percent_p90": 8.8}
    told = report.readme_section({**results, "steps": [step, {**step, **added}, {**step, "micro_batches": 4}]}, "x")
    assert "124M parameters" in told and "adds 166% (123 to 194%), `ewc.attach(optimizer)` 3% (-1 to 9%)" in told


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}", 2 * (report.BEGIN + report.END)])
def test_readme_without_markers(readme, files, text, capsys):
    path, (target, *_) = files
    target.write_text(text)
    assert readme.main([str(path), "--root", str(target.parent)]) == 1
    assert "there must be one line" in capsys.readouterr().err
    assert target.read_text() == text
