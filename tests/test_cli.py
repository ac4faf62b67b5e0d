"""``python -m ewc_fast``: what it tells, and how it starts the demo."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

from ewc_fast import cli
from ewc_fast.ops import extension
from ewc_fast.ops.extension import ExtensionStatus

BUILD = {
    "kind": "cpu",
    "reason": "no nvcc was found",
    "torch": torch.__version__,
    "cuda": None,
    "cuda_arch_list": "",
    "compiler": "GCC 12.2.0",
    "cpp_standard": 201703,
    "openmp": True,
    "debug": False,
}


def use(monkeypatch, status: ExtensionStatus, threads: int | None = None) -> None:
    """Lets the command line find another extension than the one of this installation."""
    monkeypatch.setattr(extension, "_status", status)
    module = types.SimpleNamespace(cpu_capability=lambda: "x86-64-v3", openmp_threads=lambda: threads)
    monkeypatch.setitem(sys.modules, "ewc_fast._C", module)


def test_info_of_this_installation():
    result = subprocess.run([sys.executable, "-m", "ewc_fast", "info"], capture_output=True, text=True, check=True)
    assert torch.__version__ in result.stdout
    assert ("loaded" in result.stdout) and ("not loaded" in result.stdout) == (not extension.status().loaded)


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["extension"]["loaded"] == extension.status().loaded
    assert info["kernels"]["cpu"] == ("native" if extension.has_kernel("cpu") else "reference")
    assert info["cpu"]["torch_threads"] == torch.get_num_threads()


def test_info_with_all_well(monkeypatch, capsys):
    use(monkeypatch, ExtensionStatus(True, build=BUILD), torch.get_num_threads())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "native, x86-64-v3" in told and "GCC 12.2.0" in told and "no: no nvcc was found" in told
    assert "->" not in told


def test_info_without_extension_says_what_to_do(monkeypatch, capsys):
    use(monkeypatch, ExtensionStatus(False, "the extension was not built", "run make"))
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "not loaded: the extension was not built" in told and "PyTorch reference" in told
    assert "-> No native kernels: the extension was not built. To get them, run make" in told


def test_info_on_a_gpu_without_cuda_kernels(monkeypatch, capsys):
    use(monkeypatch, ExtensionStatus(True, build=BUILD), torch.get_num_threads())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "H100 (sm_90)" in told and "-> A GPU, but no CUDA kernels" in told and "EWC_FAST_BUILD=cuda" in told


@pytest.mark.parametrize(("threads", "advice"), [(None, "compiled without OpenMP"), (5, "two OpenMP runtimes")])
def test_info_finds_kernels_with_other_threads_than_torch(monkeypatch, capsys, threads, advice):
    use(monkeypatch, ExtensionStatus(True, build=BUILD), threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["info"]) == 0
    assert advice in capsys.readouterr().out


def use_demo(monkeypatch, main) -> None:
    monkeypatch.setitem(sys.modules, "ewc_fast.demo", types.SimpleNamespace(main=main))


def test_demo_gets_its_arguments(monkeypatch):
    seen: list[list[str]] = []
    use_demo(monkeypatch, lambda argv: seen.append(argv) or 3)
    assert cli.main(["demo", "--tasks", "2", "--out", "there", "--help"]) == 3
    assert cli.main(["demo"]) == 3
    assert seen == [["--tasks", "2", "--out", "there", "--help"], []]


@pytest.mark.parametrize("name", ["sklearn", "matplotlib.pyplot"])
def test_demo_without_its_extra_names_it(monkeypatch, capsys, name):
    def main(argv: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    use_demo(monkeypatch, main)
    assert cli.main(["demo"]) == 1
    assert 'pip install --no-build-isolation ".[demo]"' in capsys.readouterr().err


def test_demo_hides_no_other_missing_module(monkeypatch):
    def main(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'ewc_fast.gone'", name="ewc_fast.gone")

    use_demo(monkeypatch, main)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        cli.main(["demo"])


def test_bench_gets_its_arguments(monkeypatch):
    seen: list[list[str]] = []
    bench = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 4)
    monkeypatch.setitem(sys.modules, "ewc_fast.bench", bench)
    assert cli.main(["bench", "--quick", "--out", "there", "--help"]) == 4
    assert seen == [["--quick", "--out", "there", "--help"]]


@pytest.mark.parametrize("argv", [[], ["info", "--nothing"], ["bogus"]])
def test_wrong_arguments_are_an_error(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
