"""Builds ewc_fast and its extension ``ewc_fast._C``; metadata is in pyproject.toml, the switches in CONTRIBUTING.md.

What is built is decided by :func:`build_parameters` alone, from the environment and what :func:`detect` found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ((8, 0), (9, 0), (10, 0))  # when no GPU is visible; PTX of the newest runs on later ones
TORCH_MISSING = """\
ewc_fast: torch is needed to build the extension, and it is not installed here{cause}.

The extension must be compiled against the torch that it will run with, so install that first, and build
without isolation (an isolated build does not see it):

    pip install torch==2.13.0 "setuptools>=77" wheel ninja
    pip install --no-build-isolation .

torch 2.6 to 2.13 will do. Without a compiler, EWC_FAST_BUILD=none installs the pure Python package."""


@dataclass(frozen=True)
class Toolchain:
    """What was found on this machine.

    Attributes:
        torch: version of torch, as in ``torch.__version__``.
        torch_cuda: CUDA version that torch was built with, None for a CPU build.
        torch_openmp: whether ``at::parallel_for`` runs on OpenMP.
        compiler: first line of the C++ compiler's ``--version``, "" if there is none.
        python_headers: whether Python.h is there.
        nvcc: CUDA version of nvcc, None if there is no nvcc (or torch has no use for it).
        nvcc_architectures: compute capabilities that nvcc compiles for.
        gpus: compute capabilities of the visible GPUs.
        libstdcxx: file of the C++ library that torch runs with, "" where it is another one or cannot be told.
    """

    torch: str
    torch_cuda: str | None = None
    torch_openmp: bool = True
    compiler: str = ""
    python_headers: bool = True
    nvcc: str | None = None
    nvcc_architectures: tuple[tuple[int, int], ...] = ()
    gpus: tuple[tuple[int, int], ...] = ()
    libstdcxx: str = ""


@dataclass(frozen=True)
class BuildParameters:
    """All that a build depends on.

    Attributes:
        kind: "cuda" (kernels for CPU and CUDA), "cpu" or "none" (pure Python).
        reason: why it is not "cuda"; "" if it is.
        cuda: version of nvcc if kind is "cuda", else None.
        cuda_arch_list: as in TORCH_CUDA_ARCH_LIST, "" without CUDA.
    """

    kind: str
    reason: str = ""
    cuda: str | None = None
    cuda_arch_list: str = ""
    sources: list[str] = field(default_factory=list)
    include_dirs: list[str] = field(default_factory=list)
    cxx_flags: list[str] = field(default_factory=list)
    nvcc_flags: list[str] = field(default_factory=list)
    link_args: list[str] = field(default_factory=list)

    def info(self, torch_version: str) -> dict[str, Any]:
        """What ewc_fast must know before it loads the extension; see ewc_fast/ops/extension.py."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "torch": torch_version,
            "cuda": self.cuda,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        }


class BuildError(Exception):
    """What was asked for cannot be built; the message says why and what to do."""


def detect() -> Toolchain:
    """Looks at torch, the C++ compiler and nvcc.

    Raises:
        BuildError: torch cannot be imported.
    """
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        raise BuildError(TORCH_MISSING.format(cause="" if missing else f" in working order ({error})")) from error

    compiler = ""
    if path := shutil.which(os.environ.get("CXX", "c++").split()[0]):
        compiler = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.partition("\n")[0].strip()

    nvcc_version: str | None = None
    architectures: list[tuple[int, int]] = []
    if torch.version.cuda and cpp_extension.CUDA_HOME:
        nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
        if nvcc.exists():
            nvcc_version, architectures = ask_nvcc(nvcc)

    # Only a build for CUDA needs to know the GPUs, and none is needed for it.
    count = torch.cuda.device_count() if nvcc_version and not os.environ.get("TORCH_CUDA_ARCH_LIST") else 0
    return Toolchain(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_openmp="OpenMP" in torch.__config__.parallel_info().partition("ATen parallel backend:")[2],
        compiler=compiler,
        python_headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
        nvcc=nvcc_version,
        nvcc_architectures=tuple(architectures),
        gpus=tuple(sorted({torch.cuda.get_device_capability(i) for i in range(count)})),
        libstdcxx=loaded_libstdcxx(),
    )


def loaded_libstdcxx(maps: Path = Path("/proc/self/maps")) -> str:
    """The libstdc++ in this process, which torch has brought."""
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = {line.split(maxsplit=5)[5] for line in lines if re.search(r"/libstdc\+\+\.so[.\d]*$", line)}
    return found.pop() if len(found) == 1 else ""


def ask_nvcc(nvcc: Path) -> tuple[str, list[tuple[int, int]]]:
    """nvcc's CUDA version and the compute capabilities that it compiles for."""

    def output(option: str) -> str:
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout

    version = re.search(r"release (\d+\.\d+)", output("--version"))
    if version is None:
        raise BuildError(f"ewc_fast: {nvcc} does not tell its version; is it an nvcc?")
    found = re.findall(r"compute_(\d+)(\d)\b", output("--list-gpu-arch"))
    return version[1], sorted({(int(major), int(minor)) for major, minor in found})


def build_parameters(environ: Mapping[str, str], tools: Toolchain | None, root: Path = ROOT) -> BuildParameters:
    """Decides what is built, and how.

    Args:
        environ: EWC_FAST_BUILD, EWC_FAST_DEBUG and TORCH_CUDA_ARCH_LIST are read from it.
        tools: what :func:`detect` found; None if EWC_FAST_BUILD=none, which needs nothing.
        root: folder of setup.py.

    Raises:
        BuildError: a switch has no meaning, or asks for what cannot be built here.
    """
    mode = environ.get("EWC_FAST_BUILD", "")
    if mode not in ("", "cpu", "cuda", "none"):
        raise BuildError(f"ewc_fast: EWC_FAST_BUILD={mode} has no meaning; use cpu, cuda or none, or leave it unset")
    debug = environ.get("EWC_FAST_DEBUG", "")
    if debug not in ("", "0", "1"):
        raise BuildError(f"ewc_fast: EWC_FAST_DEBUG={debug} has no meaning; use 1 or 0")
    if mode == "none" or tools is None:
        return BuildParameters("none", "EWC_FAST_BUILD=none")

    if problem := _obstacle_to_cpp(tools):
        if mode:
            raise BuildError(f"ewc_fast: EWC_FAST_BUILD={mode}, but {problem}")
        return BuildParameters("none", problem)
    problem = "EWC_FAST_BUILD=cpu" if mode == "cpu" else _obstacle_to_cuda(tools)
    if problem and mode == "cuda":
        raise BuildError(f"ewc_fast: EWC_FAST_BUILD=cuda, but {problem}")

    # No -std: torch's BuildExtension adds the one that its own headers need. No -march=native, which crashes on other
    # machines, and no fast-math: without errno and traps, which nobody here asks for, results are the same, and loops
    # are vectorised. -fno-wrapv and -g0 undo what some Pythons add.
    cxx_flags = ["-fno-math-errno", "-fno-trapping-math", "-fvisibility-inlines-hidden", "-fno-wrapv"]
    cxx_flags += ["-O0", "-g", "-UNDEBUG"] if debug == "1" else ["-O3", "-g0", "-DNDEBUG"]
    # Compiled with OpenMP but not linked with it: the symbols are then found in the runtime that torch brings, the
    # only one in the process, so that torch.set_num_threads holds here too. Clang needs another runtime.
    if tools.torch_openmp and sys.platform == "linux" and "clang" not in tools.compiler.lower():
        cxx_flags.append("-fopenmp")
    else:
        cxx_flags.append("-fopenmp-simd")  # no threads, but the loops' pragmas: without them sums are not vectorised
    folders = ["csrc/*.cpp", "csrc/cpu/*.cpp"]
    nvcc_flags: list[str] = []
    arch_list = ""
    if not problem:
        folders += ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
        nvcc_flags = ["-lineinfo", "--expt-relaxed-constexpr"]
        nvcc_flags += ["-O0", "-g", "-UNDEBUG"] if debug == "1" else ["-O3", "-DNDEBUG"]
        arch_list = environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not arch_list:  # else torch turns it into flags
            architectures = choose_architectures(tools.gpus or DEFAULT_ARCHITECTURES, tools.nvcc_architectures)
            arch_list = ";".join(f"{major}.{minor}" for major, minor in architectures) + "+PTX"
            nvcc_flags += gencode(architectures)
        if re.search(r"(?<![\d.])[56]\.\d", arch_list):  # kernel parameters of 32 KB need compute capability 7.0
            cxx_flags.append("-DEWC_FAST_SMALL_TABLE")
            nvcc_flags.append("-DEWC_FAST_SMALL_TABLE")
        cxx_flags += [f"-DEWC_FAST_CUDA={tools.nvcc}", f"-DEWC_FAST_CUDA_ARCHITECTURES={arch_list}"]
    return BuildParameters(
        kind="cpu" if problem else "cuda",
        reason=problem,
        cuda=None if problem else tools.nvcc,
        cuda_arch_list=arch_list,
        sources=sorted(str(path.relative_to(root)) for pattern in folders for path in root.glob(pattern)),
        include_dirs=[str(root / "csrc")],
        cxx_flags=cxx_flags,
        nvcc_flags=nvcc_flags,
        # A compiler that links a libstdc++ of its own into the extension makes two in one process, and a stream with
        # parts of both crashes in the first error message.
        link_args=[tools.libstdcxx] if tools.libstdcxx else [],
    )


def _obstacle_to_cpp(tools: Toolchain) -> str:
    if not tools.compiler:
        return "no C++ compiler was found ($CXX, c++): install g++ 11 or later"
    if not tools.python_headers:
        return f"Python.h is not in {sysconfig.get_path('include')}: install python3-dev"
    return ""


def _obstacle_to_cuda(tools: Toolchain) -> str:
    if tools.torch_cuda is None:
        return f"torch {tools.torch} was built without CUDA: install a CUDA build of torch"
    if tools.nvcc is None:
        return f"no nvcc was found ($CUDA_HOME, $PATH, /usr/local/cuda): install CUDA {tools.torch_cuda}'s compiler"
    if tools.nvcc.split(".")[0] != tools.torch_cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {tools.nvcc} and torch {tools.torch} of CUDA {tools.torch_cuda}: point CUDA_HOME at a "
            f"toolkit of the same major version, or install a torch built with CUDA {tools.nvcc}"
        )
    return ""


def choose_architectures(
    wanted: tuple[tuple[int, int], ...], known: tuple[tuple[int, int], ...]
) -> list[tuple[int, int]]:
    """Of the wanted compute capabilities those that nvcc knows; for newer ones, the newest that it knows below."""
    chosen = set()
    for capability in wanted:
        if candidates := [k for k in known if k == capability] or [k for k in known if k < capability]:
            chosen.add(max(candidates))
    if not chosen:
        names = ", ".join(f"{major}.{minor}" for major, minor in wanted)
        raise BuildError(f"ewc_fast: nvcc compiles for none of the compute capabilities {names}; use an older CUDA")
    return sorted(chosen)


def gencode(architectures: list[tuple[int, int]]) -> list[str]:
    """nvcc's flags: machine code for each, and PTX of the newest."""
    flags = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in architectures]
    major, minor = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}"]


def announce(parameters: BuildParameters, tools: Toolchain | None) -> None:
    """Says what is built, and why not more."""
    what = {"none": "no extension (pure Python)", "cpu": "kernels for the CPU", "cuda": "kernels for CPU and CUDA"}
    lines = [f"ewc_fast: building {what[parameters.kind]}"]
    if parameters.reason:
        lines.append(f"ewc_fast: not more, because {parameters.reason}")
    if parameters.kind == "cuda" and tools and tools.nvcc != tools.torch_cuda:
        lines.append(f"ewc_fast: WARNING: nvcc is of CUDA {tools.nvcc}, torch of {tools.torch_cuda}; this mostly works")
    if parameters.kind != "none" and "-fopenmp" not in parameters.cxx_flags:
        lines.append("ewc_fast: WARNING: no OpenMP (it takes GCC and a torch that uses it): kernels run in one thread")
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def main() -> None:
    """Runs setuptools."""
    tools = None if os.environ.get("EWC_FAST_BUILD") == "none" else detect()
    parameters = build_parameters(os.environ, tools)

    def write_info(folder: str | Path) -> None:
        path = Path(folder, "ewc_fast", "_build_info.json")
        path.write_text(json.dumps(parameters.info(tools.torch if tools else ""), indent=2) + "\n")

    class BuildPython(build_py):
        """Writes the build information where no extension is built."""

        def run(self) -> None:
            super().run()
            if parameters.kind == "none":
                announce(parameters, tools)
                write_info(ROOT if self.editable_mode else self.build_lib)

    arguments: dict[str, Any] = {"cmdclass": {"build_py": BuildPython}}
    if tools and parameters.kind != "none":
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

        torch_version = tools.torch

        class BuildExt(BuildExtension):
            """Writes the build information beside the extension, once that is built."""

            def finalize_options(self) -> None:
                super().finalize_options()
                if self.inplace:  # keep the objects, so that ninja compiles only what changed
                    self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch_version}")

            def run(self) -> None:
                announce(parameters, tools)
                super().run()
                write_info(self.build_lib)
                if self.inplace:
                    write_info(ROOT)

        extension = CppExtension if parameters.kind == "cpu" else CUDAExtension
        arguments["cmdclass"]["build_ext"] = BuildExt
        arguments["ext_modules"] = [
            extension(
                "ewc_fast._C",
                parameters.sources,
                include_dirs=parameters.include_dirs,
                extra_compile_args={"cxx": parameters.cxx_flags, "nvcc": parameters.nvcc_flags},
                extra_link_args=parameters.link_args,
                depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))],
            )
        ]
    setup(**arguments)


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(str(error))
