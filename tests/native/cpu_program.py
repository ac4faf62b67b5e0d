"""cpu_kernels.cpp, compiled as setup.py would: the CPU kernels' loops in a program that needs no torch."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
SOURCE = HERE / "cpu_kernels.cpp"


@cache
def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ewc_fast_setup_of_kernels", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def need(program: str) -> None:
    """Skips the test where a program is missing."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def run(*command: str | Path) -> str:
    """What a command writes to stdout.

    Raises:
        AssertionError: It failed; the message is what it wrote.
    """
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def build_flags(compiler: str) -> list[str]:
    """The flags that setup.py gives to a compiler."""
    setup = _setup()
    tools = setup.Toolchain(torch="2.13.0+cpu", compiler=run(compiler, "--version").partition("\n")[0])
    flags: list[str] = setup.build_parameters({"EWC_FAST_BUILD": "cpu"}, tools).cxx_flags
    return flags


def compile_without_warning(compiler: str, *arguments: str | Path) -> None:
    """Runs a compiler over the sources of csrc/.

    Raises:
        AssertionError: It failed, or said anything at all.
    """
    # The loops' pragma means nothing to a build without OpenMP; torch's own headers are left alone.
    command = [compiler, "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}", *map(str, arguments)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0 and not built.stderr, f"{' '.join(command)}\n{built.stderr}"


def build(compiler: str, program: Path, *flags: str, source: Path = SOURCE) -> Path:
    """The program, compiled with setup.py's flags and the given ones after them."""
    compile_without_warning(compiler, "-std=c++17", *build_flags(compiler), *flags, source, "-o", program)
    return program


def is_gcc(compiler: str) -> bool:
    """Whether a compiler is GCC, whatever its name is."""
    return "Free Software Foundation" in run(compiler, "--version")
