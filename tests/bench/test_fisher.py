"""The Fisher benchmark: every way computes what it says, and the results say what was measured."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
from functools import partial

import pytest
import torch
from torch import nn

from ewc_fast.bench import environment, main
from ewc_fast.bench.fisher import app, language, measure, nets, packages, report
from ewc_fast.bench.fisher.nets import CLASSES, NETS, Net
from ewc_fast.bench.fisher.ways import OURS, PUBLISHED, WAYS, Way
from ewc_fast.bench.measure import peak_bytes
from ewc_fast.bench.peers import Unavailable

TINY = Net("tiny", "a tiny one", lambda: nets.mlp(6, 5, CLASSES), lambda n: torch.randn(n, 6), 4, 3)
TINY_CONV = Net("tiny_conv", "two convolutions", nets.convolutions, lambda n: torch.rand(n, 1, 28, 28), 3, 2)
LLAMA = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
BY_NAME = {way.name: way for way in (*WAYS, *packages.PACKAGE_WAYS)}


def softmax_regression():
    """A model whose Fisher is a formula: logits W x."""
    return nn.Linear(4, CLASSES, bias=False)


def formula(kind, weight, batches, drawn):
    """Of log softmax(W x)[c] the gradient is (e_c - p) x^T."""
    total, count = 0, 0
    for (x, given), labels in zip(batches, drawn, strict=True):
        x = x.double()
        p = (x @ weight.double().T).softmax(-1)
        chosen = labels if kind == "sampled" else given
        g = nn.functional.one_hot(chosen, CLASSES).double() - p
        if kind == "exact":
            total = total + (p * (1 - p)).T @ x**2
        elif kind == "batch":
            total = total + (g.T @ x) ** 2
        else:
            total = total + (g**2).T @ x**2
        count += len(x)
    return total / count


@pytest.fixture
def seed():
    value = torch.seed() % 2**31
    print("seed", value)
    torch.manual_seed(value)
    return value


# ---- values ----


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical", "batch"])
def test_reference_is_the_definition(kind, seed):
    model = softmax_regression()
    batches = [(torch.randn(n, 4), torch.randint(CLASSES, (n,))) for n in (3, 5)]
    drawn = measure.drawn_labels(model, batches, seed)
    assert [len(labels) for labels in drawn] == [3, 5]
    found = measure.reference(kind, model, batches, seed)
    wanted = formula(kind, model.weight.detach(), batches, drawn)
    torch.testing.assert_close(found["weight"], wanted, rtol=1e-6, atol=1e-9)
    assert model.weight.grad is None and model.weight.dtype == torch.float32


@pytest.mark.parametrize("net", [TINY, TINY_CONV], ids=lambda net: net.name)
@pytest.mark.parametrize("way", [w for w in WAYS if w.kind and not w.differs], ids=lambda way: way.name)
def test_ways_compute_their_kind(way, net, seed):
    assert measure.check(way, net.model(seed), net.data(seed=seed), seed) < measure.TOLERANCE


@pytest.mark.parametrize("net", [TINY, TINY_CONV], ids=lambda net: net.name)
@pytest.mark.parametrize("way", packages.PACKAGE_WAYS, ids=lambda way: way.name)
@pytest.mark.filterwarnings("ignore")  # those packages' own
def test_packages_compute_their_kind(way, net, seed):
    if packages.versions()[way.package] is None:
        pytest.skip(f"{way.package} is not installed")  # an optional peer of the benchmark
    model, batches = net.model(seed), net.data(seed=seed)
    before = copy.deepcopy(model.state_dict())
    assert measure.check(way, model, batches, seed) < measure.TOLERANCE
    run = way.make(model)
    torch.manual_seed(seed)
    first = run(batches)
    torch.manual_seed(seed)
    assert measure.difference(run(batches), {name: f.double() for name, f in first.items()}) < 1e-6  # not added up
    assert not any(inputs.requires_grad for inputs, _ in batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_vmap_is_right_past_a_chunk(seed):
    way = BY_NAME["vmap"]
    assert measure.check(way, TINY.model(seed), TINY.data(batch=33, batches=2, seed=seed)) < measure.TOLERANCE


def test_batch_squared_is_what_published_code_does(seed):
    model, batches = softmax_regression(), [(torch.randn(n, 4), torch.randint(CLASSES, (n,))) for n in (3, 5)]
    wanted = 0
    for x, labels in batches:
        g = nn.functional.one_hot(labels, CLASSES).double() - (x.double() @ model.weight.double().T).softmax(-1)
        wanted = wanted + ((g.T @ x.double()) / len(x)) ** 2 / len(batches)
    found = BY_NAME["batch_squared"].make(model)(batches)["weight"]
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-8)
    assert BY_NAME["batch_squared"].differs


def test_a_wrong_way_is_refused(seed):
    right = BY_NAME["loop"]

    def make(model, factor=1 + 2 * measure.TOLERANCE):
        run = right.make(model)
        return lambda batches: {name: f * factor for name, f in run(batches).items()}

    wrong = dataclasses.replace(right, name="wrong", make=make)
    with pytest.raises(AssertionError, match="wrong: off the empirical Fisher by 0.0004"):
        measure.check(wrong, TINY.model(seed), TINY.data(seed=seed))
    nothing = dataclasses.replace(right, name="nan", make=partial(make, factor=float("nan")))
    with pytest.raises(AssertionError, match="nan"):
        measure.check(nothing, TINY.model(seed), TINY.data(seed=seed))
    told = dataclasses.replace(wrong, differs="a factor")
    assert measure.check(told, TINY.model(seed), TINY.data(seed=seed)) == pytest.approx(4e-4, rel=0.01)
    with pytest.raises(AssertionError, match="on one side only"):
        measure.difference({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(AssertionError, match="a has shape"):
        measure.difference({"a": torch.ones(1)}, {"a": torch.ones(2)})


# ---- nets ----


def test_nets_are_what_their_descriptions_say():
    for name, parameters in (("mlp", 669_706), ("mlp_85k", 85_002), ("conv", 20_490), ("encoder", 5_014_026)):
        net = NETS[name]
        model = net.model()
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert not any(module.training for module in model.modules())
    for net in NETS.values():
        (inputs, labels), second = net.data(2, 2)
        assert labels.shape == (2,) and not torch.equal(inputs, second[0])
        assert net.model()(inputs).shape == (2, CLASSES)
        assert net.samples == net.batch * net.batches
    relu, gelu = NETS["encoder"].model(), NETS["encoder"].model(smooth=True)
    assert relu.state_dict().keys() == gelu.state_dict().keys()
    with pytest.raises(ValueError, match="no net what; there are mlp"):
        nets.find(["mlp", "what"])


def test_models_and_data_are_drawn_apart_from_the_global_state():
    before = torch.random.get_rng_state()
    one, two = TINY.model(3), TINY.model(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(TINY.data(seed=5)[2][0], TINY.data(seed=5)[2][0])
    assert not torch.equal(TINY.data(seed=5)[2][0], TINY.data(seed=6)[2][0])
    assert torch.equal(before, torch.random.get_rng_state())


# ---- packages that are missing ----


@pytest.mark.parametrize("way", packages.PACKAGE_WAYS, ids=lambda way: way.name)
def test_a_missing_package_is_named(way, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(packages, "import_module", missing)
    with pytest.raises(Unavailable, match=f"pip install {packages.DISTRIBUTIONS[way.package]}"):
        way.make(TINY.model())


# ---- measuring ----


def test_summarise_takes_the_faster_number_of_threads():
    found = measure.summarise({1: [4.0, 6.0, 5.0], 2: [3.0, 2.0, 9.0]}, samples=1000)
    assert (found["threads"], found["median_ms"], found["us_per_sample"]) == (2, 3.0, 3.0)
    assert found["times"] == {"1": [4.0, 6.0, 5.0], "2": [3.0, 2.0, 9.0]}
    assert found["p10_ms"] == pytest.approx(2.2) and found["p90_ms"] == pytest.approx(7.8)


def test_measuring_a_net():
    threads = torch.get_num_threads()
    seen = []

    def make(model):
        def run(batches):
            seen.append((torch.get_num_threads(), len(batches)))
            return {name: torch.zeros_like(p) for name, p in model.named_parameters()}

        return run

    spy = Way("spy", "exact", "a spy", PUBLISHED, make, differs="nothing")
    absent = dataclasses.replace(packages.PACKAGE_WAYS[0], package="absent")
    told = []
    chosen = [*measure.find(["loop", "exact", "batch_squared"]), spy, absent]
    found = measure.measure(TINY, chosen, 2, (1, 2), told.append)
    assert torch.get_num_threads() == threads
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == ["plain", "loop", "batch_squared", "exact", "spy"]
    assert found["skipped"] == {"backpack_sgs": "absent does not cover all of its layers"}
    # a check and the traces, a warm-up and two rounds at two numbers of threads, one batch for the memory
    assert len(seen) == 2 + 2 * 3 + 1 and seen[-1][1] == 1
    assert sorted(n for n, _ in seen[2:-1]) == [1, 1, 1, 2, 2, 2]
    assert ways["plain"]["off"] is None and ways["plain"]["trace"] is None
    assert ways["exact"]["off"] < measure.TOLERANCE and ways["exact"]["trace"] == 1
    assert ways["spy"]["trace"] == 0 and ways["spy"]["off"] == pytest.approx(1)
    assert ways["loop"]["trace"] is None  # nothing of ours to compare with
    assert all(len(way["times"][n]) == 2 for way in ways.values() for n in ("1", "2"))
    parameters = 6 * 5 + 5 + 5 * CLASSES + CLASSES
    assert found["parameters"] == parameters and found["fisher_bytes"] == 4 * parameters
    assert ways["loop"]["minus_fisher"] == ways["loop"]["peak_bytes"] - 4 * parameters
    assert ways["plain"]["minus_fisher"] == ways["plain"]["peak_bytes"] >= 4 * parameters
    assert told and json.loads(json.dumps(found)) == found
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure.measure(TINY, chosen, 0, (1,))


def test_ways_are_found_by_name():
    assert [way.name for way in measure.find(["exact"])] == ["plain", "exact"]
    assert len(measure.find(None)) == len(BY_NAME)
    with pytest.raises(ValueError, match="no way what; there are plain"):
        measure.find(["what"])


def test_memory_that_is_allowed():
    model = nets.mlp(64, 256, CLASSES)
    assert measure.largest_layer_bytes(model) == 4 * (64 * 256 + 256)
    batch = torch.rand(32, 64), torch.randint(CLASSES, (32,))
    found = measure.activation_bytes(model, batch)
    hidden = 4 * 32 * 256
    assert 2 * hidden <= found < 4 * hidden  # before and after the ReLU, which autograd keeps once
    assert all(p.grad is None for p in model.parameters())


SMALL_ENCODER = Net(
    "small_encoder",
    "a transformer encoder",
    lambda: nets.Encoder(2, 64, 2, 256),
    lambda n: torch.randint(nets.VOCABULARY, (n, nets.TOKENS)),
    32,
    1,
)


@pytest.mark.parametrize("net", [NETS["mlp"], NETS["conv"], SMALL_ENCODER], ids=lambda net: net.name)
@pytest.mark.parametrize(("kind", "share"), [("empirical", 1.01), ("sampled", 1.01), ("exact", 0.8)])
def test_an_estimate_takes_no_more_memory_than_that(net, kind, share):
    """``exact`` keeps its graph and adds up gradients; it is below because it takes large batches in parts."""
    model, batches = net.model(), net.data(batches=1)
    run = BY_NAME[kind].make(model)
    run(batches)
    allowed = measure.activation_bytes(model, batches[0]) + measure.largest_layer_bytes(model)
    fisher = sum(p.nbytes for p in model.parameters())
    assert peak_bytes(partial(run, batches), torch.device("cpu")) - fisher < share * allowed


# ---- the language model ----


def test_language_model_ways_agree(seed):
    pytest.importorskip("transformers")
    model = language.LanguageModel(LLAMA, sequences=3, tokens=7, autocast=False, seed=seed)
    update, result = model.loop()
    update(model.sequences[:1])
    update(model.sequences[1:])
    found = result()
    plain = copy.deepcopy(model.model).double()
    names, params = zip(*plain.named_parameters(), strict=True)
    wanted = [torch.zeros_like(p) for p in params]
    for tokens in model.sequences:
        log_probs = plain(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        total = sum(log_probs[t, tokens[t + 1]] for t in range(6))
        for sums, g in zip(wanted, torch.autograd.grad(total, params), strict=True):
            sums += g**2 / (3 * 6)
    wanted = dict(zip(names, wanted, strict=True))
    assert measure.difference(found, wanted) < measure.TOLERANCE
    for batch in (1, 2, 3):
        update, result = model.ours()
        for part in model.sequences.split(batch):
            update(part)
        assert measure.difference(result(), wanted) < measure.TOLERANCE
    before = copy.deepcopy(model.model.state_dict())
    update, result = model.step()
    update(model.sequences)
    assert result() == {} and all(p.grad is None for p in model.model.parameters())
    assert any(not torch.equal(before[name], value) for name, value in model.model.state_dict().items())


def test_measuring_the_language_model():
    pytest.importorskip("transformers")
    found = language.measure(LLAMA, sequences=4, tokens=6, batches=(1, 2), rounds=2)
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == ["step", "loop", "empirical_1", "empirical_2", "sampled_2"]
    assert (ways["step"]["batch"], ways["loop"]["batch"], ways["empirical_2"]["batch"]) == (2, 1, 2)
    for name in ("empirical_1", "empirical_2"):
        assert ways[name]["off"] < 0.05 and ways[name]["trace"] == pytest.approx(1, abs=0.05)  # bf16
    assert ways["sampled_2"]["off"] > 0.05
    assert ways["step"]["start_seconds"] is None and isinstance(ways["loop"]["start_seconds"], float)
    assert all(way["peak_bytes"] > found["model_bytes"] for way in found["ways"])  # gradients, or the diagonal
    assert ways["step"]["off"] is None and all(len(way["times"]) == 2 for way in ways.values())
    assert json.loads(json.dumps(found)) == found
    assert [w["name"] for w in language.measure(LLAMA, 2, 4, (2,), 1, names=())["ways"]] == ["step", "loop"]
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        language.measure(LLAMA, rounds=0)


def test_the_language_model_needs_transformers(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(language, "import_module", missing)
    with pytest.raises(Unavailable, match="pip install transformers"):
        language.measure(LLAMA)


# ---- reports ----


def way_result(name, kind, group, times, threads=1, **more):
    fields = {"note": name.title(), "differs": "", "off": None, "trace": None, "peak_bytes": 0, "minus_fisher": 0}
    summary = measure.summarise({threads: times}, 100)
    return {"name": name, "kind": kind, "group": group, **fields, **summary, **more}


@pytest.fixture
def results():
    mlp = {
        "name": nets.MAIN,
        "description": "an MLP",
        "parameters": 10,
        "samples": 100,
        "batch": 10,
        "rounds": 2,
        "activation_bytes": 1000,
        "largest_layer_bytes": 200,
        "fisher_bytes": 40,
        "ways": [
            way_result("plain", "", "plain training", [2.0, 4.0]),
            way_result("loop", "empirical", "plain PyTorch", [30.0, 60.0], trace=1.0),
            way_result("bad", "empirical", "plain PyTorch", [3.0, 5.0], differs="no Fisher", off=0.9, trace=0.1),
            way_result("empirical", "empirical", OURS, [3.0, 5.0], 2, minus_fisher=1000, off=1e-7, trace=1.0),
            way_result("exact", "exact", OURS, [8.0, 8.0], minus_fisher=3000),
            way_result("slow", "empirical", PUBLISHED, [60.0, 60.0]),
            way_result("fast", "empirical", PUBLISHED, [2.0, 4.0]),
            way_result("other", "exact", PUBLISHED, [16.0, 16.0]),
        ],
        "skipped": {"absent": "not installed"},
    }
    encoder = {**mlp, "name": "encoder", "description": "an encoder", "ways": [mlp["ways"][0], mlp["ways"][3]]}

    def sequence(name, batch, times):
        seconds = measure.median(times)
        p10, p90 = (measure.percentile(times, p) for p in (10, 90))
        own = dict(seconds=seconds, p10=p10, p90=p90, off=0.01, trace=1.0, peak_bytes=1 << 30, start_seconds=1.25)
        return {"name": name, "note": name.title(), "batch": batch, "times": times, **own}

    llama = {
        "description": "a Llama",
        "parameters": 7,
        "model_bytes": 28,
        "sequences": 8,
        "tokens": 128,
        "autocast": True,
        "threads": 2,
        "rounds": 2,
        "ways": [
            sequence("step", 8, [0.2, 0.2]),
            sequence("loop", 1, [0.4, 0.6]),
            sequence("empirical_1", 1, [0.5, 0.5]),
            sequence("empirical_8", 8, [0.2, 0.2]),
            sequence("sampled_8", 8, [0.1, 0.1]),
        ],
    }
    described = environment.describe(torch.device("cpu"))
    described["versions"] |= {"backpack": "1.7", "asdl": None, "nngeometry": None}
    return {**described, "command": "bench --fisher", "nets": [mlp, encoder], "language": llama}


def test_bars(results):
    found = {bar.what: bar for bar in report.bars(results)}
    plain = found["mlp, empirical: time over that of a plain forward and backward"]
    assert plain.found == pytest.approx(1.375) and not plain.met and plain.bar == 1.3
    assert (plain.low, plain.high) == pytest.approx((1.25 + 0.025, 1.5 - 0.025))
    assert found["encoder, empirical: time over that of a plain forward and backward"].met
    loop = found["mlp, empirical: times as fast as the loop of batch size 1"]
    assert loop.found == pytest.approx(11) and loop.met and loop.high == pytest.approx(11.8)
    package = found["mlp, empirical: times as fast as the fastest package, Fast"]
    assert package.found == pytest.approx((2 / 3 + 0.8) / 2) and not package.met
    assert found["mlp, exact: times as fast as the fastest package, Other"].found == 2
    assert found["mlp, empirical: memory over that of activations and largest layer"].found == pytest.approx(1 / 1.2)
    assert "mlp, exact: memory over that of activations and largest layer" in found
    loop = "times as fast as the loop of batch size 1"
    llama = found[f"Llama, empirical, batches of 8: {loop}"]
    assert llama.found == pytest.approx(2.5) and llama.met and llama.low == pytest.approx(2.1)
    assert found[f"Llama, empirical, batches of 1: {loop}"].found == pytest.approx(1)
    assert found[f"Llama, sampled, batches of 8: {loop}"].found == pytest.approx(5)
    assert len(found) == len(report.bars(results)) == 11  # none for what was not measured
    b32 = {**results["nets"][0], "name": "mlp_b32"}
    names = {bar.what for bar in report.bars({**results, "nets": [b32], "language": None})}
    assert {
        "mlp_b32, empirical: time over that of a plain forward and backward",
        f"mlp_b32, empirical: {loop}",
    } <= names
    assert len(report.bars({**results, "nets": [], "language": None})) == 0


def test_tables_say_what_the_results_say(results):
    text = report.section(results)
    row = next(line for line in text.splitlines() if "`empirical`" in line)
    assert "| 4.0 (3.2 to 4.8) | 2 | 40.0 | 1.38 (1.27 to 1.48) | 11.0 | 1000 B | 1.000 | 1e-07 |" in row
    assert "| none: no Fisher |" in next(line for line in text.splitlines() if "`bad`" in line)
    assert "Not measured: `absent`: not installed." in text
    assert "backpack 1.7, asdl not installed" in text
    row = next(line for line in text.splitlines() if "`empirical_8`" in line)
    assert "| 200.0 (200.0 to 200.0) | 1.00 | 2.50 (2.10 to 2.90) | 1.2 | 1.0 GiB | 1.000 | 1e-02 |" in row
    assert "**no**" in text and "bf16 autocast, 2 threads, 2 rounds" in text
    assert "Llama" not in report.section({**results, "language": None})


def test_summary_has_the_bars_and_where_the_rest_is(results):
    text = report.summary(results, "../there")
    assert report.bars_table(report.bars(results)) in text
    assert results["date"] in text and "(../there/results.md)" in text


def test_csv_has_a_row_per_way(results):
    rows = list(csv.DictReader(io.StringIO(report.to_csv(results))))
    assert len(rows) == 8 + 2 + 5
    ours = next(row for row in rows if row["name"] == "empirical")
    assert float(ours["median_ms"]) == pytest.approx(0.04) and float(ours["times_plain"]) == pytest.approx(1.375)
    assert float(rows[-1]["median_ms"]) == pytest.approx(100) and rows[-1]["net"] == "llama"


def test_results_are_kept_and_merged(results, tmp_path):
    report.write_json(results, tmp_path / "results.json")
    assert report.read_json(tmp_path / "results.json") == json.loads(json.dumps(results))
    (tmp_path / "other.json").write_text('{"workloads": []}')
    with pytest.raises(ValueError, match="no result of python -m ewc_fast bench --fisher"):
        report.read_json(tmp_path / "other.json")
    new = {**results, "nets": [{**results["nets"][1], "rounds": 9}, {**results["nets"][0], "name": "new"}]}
    both = report.merged(results, {**new, "language": None})
    assert [(net["name"], net["rounds"]) for net in both["nets"]] == [("mlp", 2), ("encoder", 9), ("new", 2)]
    assert both["language"] == results["language"]
    with pytest.raises(ValueError, match="another versions"):
        report.merged({**results, "versions": {}}, new)


def test_picture(results):
    pictures = pytest.importorskip("ewc_fast.bench.fisher.pictures", reason="matplotlib is not installed")
    figure = pictures.time_by_way(results, ["mlp"], "a caption")
    first, second = (axis for axis in figure.axes if axis.axison)
    assert [label.get_text() for label in first.get_yticklabels()][:2] == ["plain", "fast"]
    assert [bar.get_width() for bar in first.containers[1]][:2] == [1, 1]
    assert first.get_title() == "an MLP" and second.get_title() == "a Llama"
    widths = {label.get_text(): bar.get_width() for label, bar in zip(second.get_yticklabels(), second.containers[1],
                                                                      strict=True)}  # fmt: skip
    assert widths["loop"] == pytest.approx(2.5) and widths["sampled_8"] == pytest.approx(0.5)
    assert {text.get_text() for text in first.get_legend().get_texts()} >= {OURS, PUBLISHED}
    assert figure.get_supxlabel() == "a caption"
    assert len(pictures.time_by_way({**results, "language": None}).axes) == 2


# ---- the command line ----


@pytest.fixture
def tiny(monkeypatch):
    for name in ("tiny", "tiny_conv"):
        monkeypatch.setitem(NETS, name, {"tiny": TINY, "tiny_conv": TINY_CONV}[name])


def test_a_run_with_files(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MALLOC_SPECIAL_", "17")
    command = [
        "--fisher",
        "--ways",
        "empirical",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "{machine}"),
    ]
    assert main([*command, "--nets", "tiny"]) == 0
    told = capsys.readouterr().out
    assert "a tiny one (95 parameters), 12 samples in batches of 4, 1 rounds" in told
    (folder,) = tmp_path.iterdir()
    names = {"results.json", "results.csv", "results.md", "time_by_way.png"}
    assert {file.name for file in (folder / "fisher").iterdir()} == names
    results = report.read_json(folder / "fisher" / "results.json")
    assert folder.name == environment.machine_name(results["machine"])
    assert [net["name"] for net in results["nets"]] == ["tiny"] and "backpack" in results["versions"]
    assert results["machine"]["malloc"] == "MALLOC_SPECIAL_=17"
    assert "(MALLOC_SPECIAL_=17)" in (folder / "fisher" / "results.md").read_text()
    assert main([*command, "--nets", "tiny_conv", "--add"]) == 0
    results = report.read_json(folder / "fisher" / "results.json")
    assert [net["name"] for net in results["nets"]] == ["tiny", "tiny_conv"]
    assert main([*command, "--nets", "tiny_conv"]) == 0
    assert [net["name"] for net in report.read_json(folder / "fisher" / "results.json")["nets"]] == ["tiny_conv"]


def test_a_run_without_files(tiny, tmp_path, monkeypatch, capsys):
    def missing(**_):
        raise Unavailable("transformers is not installed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language, "measure", missing)
    monkeypatch.setattr(app, "packages", packages)
    assert main(["--fisher", "--nets", "tiny,llama", "--ways", "loop", "--rounds", "1", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert "Nothing written: --out DIR" in told.out and not list(tmp_path.iterdir())
    assert "llama: not measured: transformers is not installed" in told.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--nets", "what"], "no net what"),
        (["--ways", "what"], "no way what"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "0,1"], "--threads must be at least 1"),
        (["--threads", "x"], "invalid literal"),
        (["--device", "what", "--nets", "llama"], "--device what: "),
        (["--device", "cuda"], "--device cuda measures the llama alone: add --nets llama"),
    ],
)
def test_bad_arguments(arguments, reason, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--fisher", *arguments])
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit):
        main(["--fisher", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in [*NETS, *BY_NAME, "llama"])
