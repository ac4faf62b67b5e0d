"""benchmarks/gpu_check.sh as far as it goes without a GPU: with tools on the PATH that only pretend."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
GPU_STAGES = (
    "tests-gpu",
    "bench",
    "bench-optimizers",
    "sanitizer-memcheck",
    "sanitizer-racecheck",
    "sanitizer-initcheck",
)
STAGES = ("build", *GPU_STAGES, "ncu")

NVIDIA_SMI = """
for argument in "$@"; do
  case $argument in
    --query-gpu=name) echo 'NVIDIA "Fake" X100 80GB';;
    --query-gpu=driver_version) echo 600.1;;
    --query-gpu=compute_cap) echo 12.3;;
    --query-gpu=memory.total) echo 81920 MiB;;
  esac
done
"""
# What the script asks of python, with FAKE_<stage> to make it fail or hang. It notes what it was called with.
PYTHON = """
echo "$PWD|${EWC_FAST_BUILD-}|$*" >>"$FAKE_LOG"
act() { case ${1:-} in fail) echo "it broke \\"here\\""; exit 3;; hang) sleep 30;; esac; }
case "$*" in
  *torch.__version__*) echo "${FAKE_TORCH-2.99.0+cu999}";;
  *is_available*) echo "${FAKE_CUDA-True}";;
  *"import numpy, pytest"*) exit "${FAKE_NO_PYTEST-0}";;
  *"import xdist"*) exit "${FAKE_NO_XDIST-0}";;
  "setup.py egg_info build_ext --inplace") act "${FAKE_BUILD-}";;
  "-m ewc_fast bench"*) act "${FAKE_BENCH-}"; while [ "$1" != --out ]; do shift; done; echo "{}" >"$2/results.json";;
  *--collect-only*) echo "33/900 tests collected";;
  *pytest*) act "${FAKE_TESTS-}"; echo "33 passed in 9s";;
  benchmarks/gpu/penalty_passes.py*) echo 131072.0;;
  *) echo "not expected: $*"; exit 99;;
esac
"""
RUN_THE_REST = 'while [ "${1##*/}" != python3 ]; do shift; done; "$@" || exit 1\n'
SANITIZER = 'echo "[$PYTORCH_NO_CUDA_MEMORY_CACHING] $*" >>"$FAKE_LOG"\n' + RUN_THE_REST
NCU = 'case ${FAKE_NCU-} in denied) echo "==ERROR== ERR_NVGPUCTRPERM"; exit 1;; esac\n' + RUN_THE_REST

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")


def install(folder: Path, **tools: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, body in tools.items():
        path = folder / name.replace("_", "-")
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of tools that make a machine with a GPU, first on the PATH."""
    folder = tmp_path / "tools"
    install(
        folder, nvidia_smi=NVIDIA_SMI, python3=PYTHON, compute_sanitizer=SANITIZER, ncu=NCU, nvcc="echo release 9.9,"
    )
    return folder


def run(tools: Path, out: Path | None, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs the script; what it said, and what the tools were called with."""
    log = tools / "log"
    log.write_text("")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAX_JOBS", "CUDA_VISIBLE_DEVICES")}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [str(SCRIPT), *([str(out)] if out else [])],
        env={**clean, "PATH": path, "FAKE_LOG": str(log), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran, log.read_text()


def summary(out: Path) -> dict[str, dict[str, Any]]:
    """The stages of summary.json by name, in their order."""
    return {stage["name"]: stage for stage in json.loads((out / "summary.json").read_text())["stages"]}


def outcomes(out: Path) -> dict[str, str]:
    return {name: stage["outcome"] for name, stage in summary(out).items()}


def test_all_stages_pass(tools: Path, tmp_path: Path) -> None:
    out = tmp_path / "some folder"
    ran, log = run(tools, out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert outcomes(out) == dict.fromkeys(STAGES, "passed") and tuple(outcomes(out)) == STAGES
    machine = json.loads((out / "summary.json").read_text())["machine"]
    assert machine["card"] == 'NVIDIA "Fake" X100 80GB' and machine["torch"] == "2.99.0+cu999"
    assert (machine["driver"], machine["compute_capability"], machine["nvcc"]) == ("600.1", "12.3", "9.9")
    assert summary(out)["tests-gpu"]["detail"] == "33 passed in 9s"
    text = (out / "summary.txt").read_text()
    assert all(name in text for name in STAGES)
    assert (out / "results.json").exists() and (out / "sanitizer-racecheck.log").exists()
    assert "|cuda|setup.py egg_info build_ext --inplace" in log
    assert re.search(r"-p no:benchmark -m gpu .*tests/ops/test_devices\.py.* -n 4$", log, re.MULTILINE)
    assert "bench --optimizers --device cuda --workload llama_1b" in log
    assert "--device cuda --workloads gpt2_small,llama_1b --steps" in log
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"[1] --tool {tool} --error-exitcode 9" in log


def test_without_xdist_the_tests_run_one_by_one(tools: Path, tmp_path: Path) -> None:
    _, log = run(tools, tmp_path, FAKE_NO_XDIST="1")
    assert outcomes(tmp_path)["tests-gpu"] == "passed" and " -n 4" not in log


def test_the_checkout_is_not_built_in(tools: Path, tmp_path: Path) -> None:
    _, log = run(tools, tmp_path / "out")
    (built_in,) = {line.split("|")[0] for line in log.splitlines() if "build_ext" in line}
    assert Path(built_in) != ROOT and not Path(built_in).exists()  # it was a copy, and is gone


def test_the_folder_has_the_card_s_name(tools: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for part in ("csrc", "ewc_fast", "tests"):
        (checkout / part).mkdir(parents=True)
    for part in ("setup.py", "pyproject.toml", "README.md"):
        (checkout / part).write_text("")
    shutil.copytree(ROOT / "benchmarks" / "gpu", checkout / "benchmarks" / "gpu")
    shutil.copy(SCRIPT, checkout / "benchmarks")
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "FAKE_LOG": str(tools / "log")}
    subprocess.run([str(checkout / "benchmarks" / SCRIPT.name)], env=environment, check=True, capture_output=True)
    assert [path.name for path in (checkout / "benchmarks" / "results").iterdir()] == ["nvidia_fake_x100_80gb"]


def test_a_failed_stage_does_not_stop_the_others(tools: Path, tmp_path: Path) -> None:
    ran, _ = run(tools, tmp_path, FAKE_TESTS="fail")
    assert ran.returncode == 1
    assert outcomes(tmp_path) == {**dict.fromkeys(STAGES, "passed"), "tests-gpu": "failed"}
    assert summary(tmp_path)["tests-gpu"]["detail"] == 'exit status 3: it broke "here"'
    assert "it broke" in (tmp_path / "tests-gpu.log").read_text()


def test_a_failed_build_leaves_nothing_to_run(tools: Path, tmp_path: Path) -> None:
    ran, log = run(tools, tmp_path, FAKE_BUILD="fail")
    assert ran.returncode == 1 and outcomes(tmp_path)["build"] == "failed"
    for name in (*GPU_STAGES, "ncu"):
        assert outcomes(tmp_path)[name] == "skipped" and "not built" in summary(tmp_path)[name]["detail"]
    assert "penalty_passes" not in log


def test_a_stage_that_hangs_runs_out_of_time(tools: Path, tmp_path: Path) -> None:
    ran, _ = run(tools, tmp_path, FAKE_BENCH="hang", GPU_CHECK_LIMIT="1")
    assert ran.returncode == 1 and outcomes(tmp_path)["bench"] == "timed out"
    assert "more than 1 s" in summary(tmp_path)["bench"]["detail"] and outcomes(tmp_path)["ncu"] == "passed"


def test_the_budget_is_for_all_stages(tools: Path, tmp_path: Path) -> None:
    ran, _ = run(tools, tmp_path, GPU_CHECK_BUDGET="0")
    assert ran.returncode == 1 and outcomes(tmp_path)["build"] == "timed out"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FAKE_TORCH": ""}, "torch cannot be imported"),
        ({"FAKE_CUDA": "False"}, "torch 2.99.0+cu999 finds no CUDA device"),
    ],
)
def test_a_torch_without_cuda(tools: Path, tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    ran, log = run(tools, tmp_path, **environment)
    assert ran.returncode == 0 and "|cpu|setup.py" in log
    for name in (*GPU_STAGES, "ncu"):
        assert outcomes(tmp_path)[name] == "skipped" and reason in summary(tmp_path)[name]["detail"]


def test_without_a_gpu(tools: Path, tmp_path: Path) -> None:
    install(tools, nvidia_smi="echo 'NVIDIA-SMI has failed'; exit 9\n")
    ran, log = run(tools, tmp_path)
    assert ran.returncode == 0 and "|cpu|setup.py" in log
    assert outcomes(tmp_path) == {
        "build": "passed",
        "selection": "passed",
        **dict.fromkeys((*GPU_STAGES, "ncu"), "skipped"),
    }
    assert all(summary(tmp_path)[name]["detail"].startswith("no GPU") for name in (*GPU_STAGES, "ncu"))


@pytest.mark.parametrize("name", ["compute-sanitizer", "ncu"])
def test_a_missing_tool(tools: Path, tmp_path: Path, name: str) -> None:
    if shutil.which(name):
        pytest.skip(f"{name} is on this machine's PATH")
    (tools / name).unlink()
    ran, _ = run(tools, tmp_path)
    assert ran.returncode == 0
    skipped = {stage: entry["detail"] for stage, entry in summary(tmp_path).items() if entry["outcome"] == "skipped"}
    wanted = [stage for stage in STAGES if stage == name or (name != "ncu" and stage.startswith("sanitizer"))]
    assert skipped == dict.fromkeys(wanted, f"{name} was not found on the PATH")


def test_without_pytest(tools: Path, tmp_path: Path) -> None:
    ran, _ = run(tools, tmp_path, FAKE_NO_PYTEST="1")
    assert ran.returncode == 0
    for name in ("selection", "tests-gpu"):
        assert summary(tmp_path)[name]["detail"] == "pip install pytest numpy"


def test_counters_that_need_permission(tools: Path, tmp_path: Path) -> None:
    ran, _ = run(tools, tmp_path, FAKE_NCU="denied")
    assert ran.returncode == 0 and outcomes(tmp_path)["ncu"] == "skipped"
    assert "ERR_NVGPUCTRPERM" in summary(tmp_path)["ncu"]["detail"]


def test_the_selection_finds_the_gpu_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]
    ran = subprocess.run([*command, "tests/ops/test_devices.py"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("test_devices.py::") > 20


def test_the_passes_that_tools_look_at_run() -> None:
    command = [sys.executable, "benchmarks/gpu/penalty_passes.py", "--device", "cpu"]
    for options in (["--small"], ["--numel", "16384"]):
        ran = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        if "the extension was not built" in ran.stderr:
            pytest.skip("needs the compiled extension")
        assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == 16384 * 0.5 * 0.25  # lambda/2 F d^2
