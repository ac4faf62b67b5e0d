"""The demo from end to end, as small as it gets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from ewc_fast.demo import app, cost, experiment, main, metrics, report  # noqa: E402
from ewc_fast.demo.data import permuted_digits  # noqa: E402
from ewc_fast.demo.settings import BEST, METHODS, Settings  # noqa: E402
from ewc_fast.ops import extension  # noqa: E402

PICTURES = ("accuracy_over_time.png", "accuracy_over_lambda.png", "predicted_forgetting.png")


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a demo of two tasks, two seeds and one epoch writes."""
    out = tmp_path_factory.mktemp("demo") / "not" / "there"
    arguments = ["--tasks", "2", "--seeds", "2", "--epochs", "1", "--processes", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "FISHER_SAMPLES", 8)
        assert main(arguments) == 0
    yield out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_results_hold_each_methods_metrics(results: dict[str, Any]) -> None:
    assert list(results["methods"]) == list(METHODS)
    for method, summary in results["methods"].items():
        settings = BEST["constant"][method]
        runs = [experiment.run(settings, seed, 2, 1) for seed in (0, 1)] if method != "ewc" else []
        assert summary["settings"]["lr"] == settings.lr and summary["settings"]["ewc_lambda"] == settings.ewc_lambda
        for seed, run in enumerate(runs):
            assert summary["mean_accuracy_by_seed"][seed] == metrics.mean_accuracy(run.accuracy)
            assert summary["backward_transfer_by_seed"][seed] == metrics.backward_transfer(run.accuracy)
        for name in ("mean_accuracy", "accuracy_when_learnt", "backward_transfer", "forgetting"):
            first, second = summary[f"{name}_by_seed"]
            assert summary[name] == pytest.approx((first + second) / 2)
            assert summary[f"{name}_spread"] == pytest.approx(abs(first - second) / 2**0.5)
        assert [len(row) for row in summary["accuracy_matrix"]] == [2, 2, 2]


def test_results_say_what_they_were_measured_with(results: dict[str, Any]) -> None:
    assert results["num_tasks"] == 2 and results["seeds"] == [0, 1] and results["epochs"] == 1
    assert results["versions"]["torch"] == torch.__version__
    assert results["machine"]["cpu"] and results["threads_per_process"] == 1
    assert results["backend"] == ("native" if extension.status().loaded else "reference")
    assert results["penalty_cost"]["plain_ms"] > 0 and results["seconds"] > 0


def test_lambda_curve_has_the_best_and_its_surroundings(results: dict[str, Any]) -> None:
    for method in ("l2sp", "ewc"):
        best = BEST["constant"][method].ewc_lambda
        lambdas = [p["ewc_lambda"] for p in results["lambda_curve"] if p["method"] == method]
        assert sorted(lambdas) == pytest.approx(sorted(best * f for f in (1.0, *app.LAMBDA_FACTORS)))
    assert {p["method"] for p in results["lambda_curve"]} == {"l2sp", "ewc"}


def test_rises_are_of_the_methods_that_have_a_fisher(results: dict[str, Any]) -> None:
    assert list(results["rise_of_old_losses"]) == ["plain", "ewc"]
    for rise in results["rise_of_old_losses"].values():
        assert [len(values) for values in rise["true"]] == [len(values) for values in rise["predicted"]] == [1, 1]


def test_csv_files(folder: Path, results: dict[str, Any]) -> None:
    with (folder / "summary.csv").open() as file:
        summary = {row["method"]: row for row in csv.DictReader(file)}
    assert float(summary["ewc"]["mean_accuracy"]) == results["methods"]["ewc"]["mean_accuracy"]
    with (folder / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * 2 * 3 * 2
    chosen = [r for r in rows if (r["method"], r["after_task"], r["on_task"]) == ("l2sp", "2", "1")]
    expected = results["methods"]["l2sp"]["accuracy_matrix"][2][0]
    assert sum(float(r["accuracy"]) for r in chosen) / 2 == pytest.approx(expected)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 200_000


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "FISHER_SAMPLES", 2)
    monkeypatch.setattr(app, "LAMBDA_FACTORS", ())
    arguments = ["--tasks", "2", "--seeds", "1", "--epochs", "1", "--processes", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--schedule", "linear"]) == 0
    output = capsys.readouterr().out
    for text in ("own best settings", "before training", "after task 2", "backward transfer", "forgetting"):
        assert text in output
    assert "±" not in output  # one seed has no spread
    for settings in BEST["linear"].values():
        assert str(settings) in output
    kernels = "native kernels" if extension.status().loaded else "PyTorch reference"
    assert kernels in output


def test_processes_give_the_same_numbers_in_the_same_order() -> None:
    # The first takes longer, and is done last.
    jobs = [app.Job(Settings("plain", lr), 0, 2, epochs, False) for lr, epochs in ((1e-3, 12), (1e-5, 1))]
    alone = app._run_all(jobs, processes=1)
    together = app._run_all(jobs, processes=2)
    assert [r.settings.lr for r in together] == [1e-3, 1e-5]
    assert [r.accuracy for r in together] == [r.accuracy for r in alone]


def test_the_number_of_threads_is_given_back() -> None:
    torch.set_num_threads(2)
    with app._one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("arguments", [["--tasks", "1"], ["--seeds", "0"], ["--schedule", "cosine"], ["--unknown"]])
def test_bad_arguments_are_refused_before_anything_runs(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def test_cost_tells_the_reference_from_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "FISHER_SAMPLES", 2)
    task = permuted_digits(1, 0)[0]
    make_penalty = cost.make_penalty

    def on_reference(*args: Any) -> Any:
        ewc = make_penalty(*args)
        ewc.backend = "reference"
        return ewc

    monkeypatch.setattr(cost, "make_penalty", on_reference)
    measured = cost.measure(BEST["constant"]["ewc"], task, num_steps=10)
    assert measured["backend"] == "reference"
    assert measured["share"] == pytest.approx(1 - measured["plain_ms"] / measured["ewc_ms"])


def test_the_summary_has_a_spread_over_several_seeds() -> None:
    summary = {key: 0.5 for name in report.METRICS for key in (name, f"{name}_spread")}
    assert "0.500 ± 0.500" in report.format_summary({"plain": summary}, 3)
