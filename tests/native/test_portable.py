"""The C++ sources with other compilers, for another processor, and in the builds that have one version of each loop."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from ewc_fast.ops import extension
from tests.native import cpu_program

AARCH64 = "aarch64-linux-gnu-g++"
COMPILERS = ("g++-11", "clang++", AARCH64)

VERSIONS = {"g++-11": {"avx512f", "avx2", "default"}}  # it has no names for the levels, and refuses those of GCC 12


def check(program: Path, seed: int, *emulator: str) -> None:
    """Runs the kernels against the formula."""
    cpu_program.run(*emulator, program, "check", str(seed))


def versions(program: Path) -> set[str]:
    """The names that the compiler gave to a loop's versions; empty where there is but one."""
    symbols = cpu_program.run("nm", "-C", program)
    return set(re.findall(r"penalty_block<.*\[clone \.(default|a(?:vx|rch)\w+)(?:\.\d+)?\]$", symbols, re.MULTILINE))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_kernels_are_right(compiler: str, tmp_path: Path, seed: int) -> None:
    cpu_program.need(compiler)
    cpu_program.need("nm")
    machine = "aarch64" if compiler == AARCH64 else platform.machine()
    foreign = machine != platform.machine()
    program = cpu_program.build(compiler, tmp_path / "kernels", *(["-static"] if foreign else []))
    assert versions(program) == (VERSIONS.get(compiler, set()) if machine == "x86_64" else set())
    if foreign:
        cpu_program.need(f"qemu-{machine}")
    check(program, seed, *([f"qemu-{machine}"] if foreign else []))


@pytest.mark.parametrize("build", ["-O0", "no OpenMP, not glibc"])
def test_a_build_with_one_version_is_right(build: str, tmp_path: Path, seed: int) -> None:
    """Unoptimised code has no use for more, and no other C library is known to choose between versions."""
    cpu_program.need("g++")
    cpu_program.need("nm")
    source, flags = cpu_program.SOURCE, [build]
    if build != "-O0":
        source, flags = tmp_path / "not_glibc.cpp", ["-O2", "-fno-openmp"]
        source.write_text(f'#include <cstdint>\n#undef __GLIBC__\n#include "{cpu_program.SOURCE}"\n')
    program = cpu_program.build("g++", tmp_path / "kernels", *flags, source=source)
    assert not versions(program)
    check(program, seed)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """Of all sources but the CUDA ones, in one go: reading torch's headers takes most of the time."""
    sources = sorted([*cpu_program.CSRC.glob("*.cpp"), *cpu_program.CSRC.glob("cpu/*.cpp")])
    everything = tmp_path_factory.mktemp("extension") / "everything.cpp"
    everything.write_text("".join(f'#include "{source}"\n' for source in sources))
    standard = extension.status().build["cpp_standard"] // 100 % 100  # 201703 is C++17
    system = [flag for path in [*include_paths(), sysconfig.get_path("include")] for flag in ("-isystem", path)]
    flags = [f"-std=c++{standard}", *system, "-fsyntax-only"]

    def compile_with(compiler: str) -> None:
        cpu_program.compile_without_warning(compiler, *cpu_program.build_flags(compiler), *flags, everything)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {compiler: pool.submit(compile_with, compiler) for compiler in COMPILERS if shutil.which(compiler)}


@pytest.mark.native  # for a torch whose headers fit
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_whole_extension_compiles(compiler: str, compilations: dict[str, Future[None]]) -> None:
    cpu_program.need(compiler)
    compilations[compiler].result()
