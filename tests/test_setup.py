"""What setup.py decides to build, and what it leaves in a wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("ewc_fast_setup", ROOT / "setup.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build  # dataclasses look their module up
_spec.loader.exec_module(build)

NVCC_13 = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
CPU = build.Toolchain(torch="2.13.0+cpu", compiler="c++ (Debian 12.2.0) 12.2.0")
CUDA = replace(CPU, torch="2.13.0+cu130", torch_cuda="13.0", nvcc="13.0", nvcc_architectures=NVCC_13)


@pytest.mark.parametrize(
    ("mode", "tools", "kind", "reason"),
    [
        ("", CUDA, "cuda", ""),
        ("cuda", CUDA, "cuda", ""),
        ("cuda", replace(CUDA, nvcc="13.2"), "cuda", ""),
        ("cpu", CUDA, "cpu", "EWC_FAST_BUILD=cpu"),
        ("none", None, "none", "EWC_FAST_BUILD=none"),
        ("", CPU, "cpu", "without CUDA"),
        ("", replace(CUDA, nvcc=None), "cpu", "no nvcc was found"),
        ("", replace(CUDA, nvcc="12.4"), "cpu", "nvcc is of CUDA 12.4 and torch 2.13.0+cu130 of CUDA 13.0"),
        ("", replace(CPU, compiler=""), "none", "no C++ compiler"),
        ("", replace(CPU, python_headers=False), "none", "python3-dev"),
    ],
)
def test_what_is_built(mode, tools, kind, reason):
    parameters = build.build_parameters({"EWC_FAST_BUILD": mode}, tools)
    assert parameters.kind == kind
    assert reason in parameters.reason
    assert bool(parameters.reason) == (kind != "cuda")
    assert (parameters.cuda is not None) == (kind == "cuda")


@pytest.mark.parametrize(
    ("mode", "tools", "message"),
    [
        ("cuda", CPU, "without CUDA"),
        ("cuda", replace(CUDA, nvcc=None), "no nvcc was found"),
        ("cuda", replace(CUDA, nvcc="12.4"), "same major version"),
        ("cuda", replace(CUDA, compiler=""), "no C++ compiler"),
        ("cpu", replace(CPU, compiler=""), "no C++ compiler"),
        ("cpu", replace(CPU, python_headers=False), "python3-dev"),
        ("gpu", CUDA, "use cpu, cuda or none"),
    ],
)
def test_what_was_asked_for_but_is_impossible_is_an_error(mode, tools, message):
    with pytest.raises(build.BuildError, match=f"EWC_FAST_BUILD={mode}.*{re.escape(message)}"):
        build.build_parameters({"EWC_FAST_BUILD": mode}, tools)


def test_a_debug_switch_without_meaning_is_an_error():
    with pytest.raises(build.BuildError, match="EWC_FAST_DEBUG=yes"):
        build.build_parameters({"EWC_FAST_DEBUG": "yes"}, CPU)


def test_sources_follow_the_device(tmp_path):
    files = ["csrc/schema.cpp", "csrc/cpu/penalty.cpp", "csrc/cuda/penalty.cu", "csrc/cuda/launch.cpp", "csrc/checks.h"]
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    cpu = build.build_parameters({}, CPU, tmp_path)
    cuda = build.build_parameters({}, CUDA, tmp_path)
    assert cpu.sources == ["csrc/cpu/penalty.cpp", "csrc/schema.cpp"]
    assert sorted(cuda.sources) == sorted(files[:4])
    assert cpu.include_dirs == [str(tmp_path / "csrc")]


@pytest.mark.parametrize("tools", [CPU, CUDA])
def test_one_build_runs_on_every_machine(tools):
    parameters = build.build_parameters({}, tools)
    flags = " ".join(parameters.cxx_flags + parameters.nvcc_flags)
    assert "-O3" in parameters.cxx_flags and "-fno-math-errno" in parameters.cxx_flags
    assert "-march" not in flags and "fast-math" not in flags and "fast_math" not in flags


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is used on Linux")
def test_openmp_follows_torch_and_the_compiler():
    assert "-fopenmp" in build.build_parameters({}, CPU).cxx_flags
    assert "-fopenmp" not in build.build_parameters({}, replace(CPU, torch_openmp=False)).cxx_flags
    assert "-fopenmp" not in build.build_parameters({}, replace(CPU, compiler="Ubuntu clang version 18.1")).cxx_flags


@pytest.mark.parametrize(("value", "debug"), [("1", True), ("0", False), ("", False)])
def test_debug(value, debug):
    parameters = build.build_parameters({"EWC_FAST_DEBUG": value}, CUDA)
    for flags in (parameters.cxx_flags, parameters.nvcc_flags):
        assert ("-O0" in flags, "-UNDEBUG" in flags, "-O3" in flags) == (debug, debug, not debug)


@pytest.mark.parametrize(
    ("gpus", "known", "arch_list"),
    [
        ((), NVCC_13, "8.0;9.0;10.0+PTX"),
        ((), ((7, 0), (7, 5), (8, 0), (9, 0)), "8.0;9.0+PTX"),  # CUDA 12.4
        (((7, 5), (12, 0)), NVCC_13, "7.5;12.0+PTX"),
        (((12, 1),), NVCC_13, "12.0+PTX"),  # newer than nvcc
    ],
)
def test_architectures_without_torch_cuda_arch_list(gpus, known, arch_list):
    tools = replace(CUDA, gpus=gpus, nvcc_architectures=known)
    parameters = build.build_parameters({}, tools)
    assert parameters.cuda_arch_list == arch_list
    generated = [flag for flag in parameters.nvcc_flags if flag.startswith("-gencode")]
    names = arch_list.removesuffix("+PTX").replace(".", "").split(";")
    expected = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    assert generated == [*expected, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


@pytest.mark.parametrize(
    ("arch_list", "small"), [("6.1;9.0", True), ("5.0+PTX", True), ("7.0;8.6", False), ("9.0", False)]
)
def test_old_architectures_get_the_small_table(arch_list, small):
    parameters = build.build_parameters({"TORCH_CUDA_ARCH_LIST": arch_list}, CUDA)
    for flags in (parameters.cxx_flags, parameters.nvcc_flags):
        assert ("-DEWC_FAST_SMALL_TABLE" in flags) is small


def test_torch_cuda_arch_list_is_left_to_torch():
    parameters = build.build_parameters({"TORCH_CUDA_ARCH_LIST": "8.6;9.0a"}, CUDA)
    assert parameters.cuda_arch_list == "8.6;9.0a"
    assert not any("arch" in flag for flag in parameters.nvcc_flags)
    assert "-DEWC_FAST_CUDA_ARCHITECTURES=8.6;9.0a" in parameters.cxx_flags


def test_torch_s_libstdcxx_is_linked(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fd:00 1 /opt/my libs/libstdc++.so.6.0.30\n7f01-7f02 rw-p 00000000 00:00 0\n"
        "7f02-7f03 r--p 00000000 fd:00 1 /opt/my libs/libstdc++.so.6.0.30\n"
        "7f03-7f04 r--p 00000000 fd:00 2 /lib/libc.so.6\n"
    )
    assert build.loaded_libstdcxx(maps) == "/opt/my libs/libstdc++.so.6.0.30"
    with maps.open("a") as file:
        file.write("7f04-7f05 r-xp 00000000 fd:00 3 /usr/lib/libstdc++.so.6\n")
    assert build.loaded_libstdcxx(maps) == ""  # two: which is torch's cannot be told
    assert build.loaded_libstdcxx(tmp_path / "none") == ""
    assert build.build_parameters({}, replace(CPU, libstdcxx="/lib/libstdc++.so.6")).link_args == [
        "/lib/libstdc++.so.6"
    ]
    assert build.build_parameters({}, CPU).link_args == []


def test_a_gpu_too_old_for_nvcc_is_an_error():
    with pytest.raises(build.BuildError, match=r"none of the compute capabilities 6\.1"):
        build.build_parameters({}, replace(CUDA, gpus=((6, 1),)))


def test_nvcc_is_asked(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.8, V12.8.93"\n'
        "else echo compute_75; echo compute_100; echo compute_121; fi\n"
    )
    nvcc.chmod(0o755)
    assert build.ask_nvcc(nvcc) == ("12.8", [(7, 5), (10, 0), (12, 1)])


def test_what_is_built_is_announced(capsys):
    build.announce(build.build_parameters({}, replace(CUDA, nvcc="13.2")), replace(CUDA, nvcc="13.2"))
    build.announce(build.build_parameters({}, CPU), CPU)
    told = capsys.readouterr().err
    assert "kernels for CPU and CUDA" in told and "WARNING: nvcc is of CUDA 13.2, torch of 13.0" in told
    assert "kernels for the CPU" in told and "torch 2.13.0+cpu was built without CUDA" in told


def test_detect_agrees_with_the_running_torch():
    import torch

    tools = build.detect()
    assert (tools.torch, tools.torch_cuda) == (torch.__version__, torch.version.cuda)
    assert tools.torch_openmp == torch.backends.openmp.is_available()


def run_setup(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environ}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def test_without_torch_the_message_gives_the_commands(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = run_setup("--version", PYTHONPATH=str(tmp_path), EWC_FAST_BUILD="")
    assert result.returncode == 1
    assert "pip install torch==" in result.stderr and "pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr

    pure = run_setup("--version", PYTHONPATH=str(tmp_path), EWC_FAST_BUILD="none")
    assert pure.returncode == 0, pure.stderr


def test_a_broken_torch_is_not_called_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    result = run_setup("--version", PYTHONPATH=str(tmp_path), EWC_FAST_BUILD="")
    assert result.returncode == 1
    assert "libcudart.so.13" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("mode", ["none", "cpu"])
def test_a_wheel_holds_what_the_build_was(mode, tmp_path):
    """The real thing, but for the kernels: of the extension only the bindings are compiled."""
    tree = tmp_path / "tree"
    leftovers = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "ewc_fast", tree / "ewc_fast", ignore=leftovers)
    (tree / "ewc_fast" / "_build_info.json").write_text('{"kind": "left by an earlier build"}')
    files = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
    for name in (*files, "csrc/bindings.cpp", "csrc/direct.h", "csrc/cpu/clones.h"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "csrc" / "direct.cpp").write_text(
        '#include "direct.h"\nPyMethodDef ewc::direct_ops[] = {{nullptr, nullptr, 0, nullptr}};\n'
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        tmp_path,
        ".",
    ]
    environ = {**os.environ, "EWC_FAST_BUILD": mode}
    result = subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = json.loads(archive.read("ewc_fast/_build_info.json"))
    assert info["kind"] == mode
    assert [name.startswith("ewc_fast/_C") for name in names].count(True) == (1 if mode == "cpu" else 0)
    assert wheel.name.endswith("-py3-none-any.whl") == (mode == "none")
    assert "ewc_fast/py.typed" in names and "ewc_fast/ops/extension.py" in names
    assert {name.split("/")[0] for name in names} == {
        "ewc_fast",
        wheel.name.split("-py3")[0].split("-cp")[0] + ".dist-info",
    }
