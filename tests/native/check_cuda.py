"""Compiles the CUDA code for every supported architecture, without a GPU, and reads what the compiler says of it.

    python tests/native/check_cuda.py

Prints registers, stack frame and spills of each kernel, and fails where a kernel has a stack frame or a spill, where
one lacks the 16-byte accesses that it is written for (a compiler may split them in silence), or where the bindings do
not compile against the installed torch (a CPU build will do).

Environment: ``NVCC`` (default: on the PATH, else in ``CUDA_HOME``, else in /usr/local/cuda), ``MAX_JOBS`` (2), and
``EWC_FAST_REQUIRE_NVCC=1`` to fail where there is no nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# 16-byte loads and stores in the PTX of a kernel, at least: one for each operand, and a penalty's slot takes a store.
# Kernels for types known only at run time are left out: theirs are narrower on purpose.
WIDE = {"penalty_kernel<0": (3, 1), "penalty_kernel<1": (3, 2), "penalty_kernel<2": (4, 2), "scale_kernel": (1, 1)}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture, as ptxas describes it; sizes in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int


def find_nvcc() -> str | None:
    if "NVCC" in os.environ:
        return os.environ["NVCC"]
    candidates = [shutil.which("nvcc")]
    candidates += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((path for path in candidates if path and shutil.which(path)), None)


def run(command: list[str]) -> str:
    """Runs a compiler and returns what it printed; raises RuntimeError with that where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None or not names:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def shorten(name: str) -> str:
    """``void ewc::(anonymous namespace)::penalty_kernel<(ewc::Mode)2, float>(...)`` to ``penalty_kernel<2, float>``."""
    name = name.replace("(anonymous namespace)::", "").replace("ewc::", "").replace("(Mode)", "")
    return re.sub(r"^void |\((?:[^()]|\([^()]*\))*\)$", "", name)


def parse(log: str, architecture: str) -> list[Kernel]:
    """Kernels in the output of ``nvcc -Xptxas -v``."""
    pattern = re.compile(
        r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
        r"ptxas info\s*: Used (?P<registers>\d+) registers"
    )
    found = list(pattern.finditer(log))
    names = demangle([match["name"] for match in found])
    return [
        Kernel(shorten(name), architecture, int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for name, m in zip(names, found, strict=True)
    ]


def compile_kernels(nvcc: str, source: Path, architecture: str, folder: Path) -> list[Kernel]:
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "--Werror", "all-warnings", f"-arch={architecture}", f"-I{CSRC}"]
    log = run([nvcc, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.{architecture}.o")])
    kernels = parse(log, architecture)
    if not kernels or len(kernels) != log.count("Compiling entry function"):
        raise RuntimeError(f"{source.name}, {architecture}: the compiler's report was not understood\n{log}")
    return kernels


def narrow_kernels(nvcc: str, source: Path, folder: Path) -> list[str]:
    """What kernels lack of 16-byte accesses, a line for each."""
    ptx = folder / f"{source.stem}.ptx"
    run([nvcc, "-std=c++17", "-O3", "-ptx", f"-arch={ARCHITECTURES[-1]}", f"-I{CSRC}", str(source), "-o", str(ptx)])
    entries = re.split(r"\.entry (\w+)\(", ptx.read_text())
    wide = r"\.global(?:\.\w+)*\.v(?:4\.\w32|2\.\w64)"
    lines = []
    for name, body in zip(map(shorten, demangle(entries[1::2])), entries[2::2], strict=True):
        loads = len(re.findall("ld" + wide, body)) - len(re.findall(r"ld\.global\.cg", body))  # .cg reads the slots
        stores = len(re.findall("st" + wide, body))
        least = next((numbers for prefix, numbers in WIDE.items() if name.startswith(prefix)), (0, 0))
        if "Any" not in name and (loads < least[0] or stores < least[1]):
            lines.append(f"{name}: {loads} loads and {stores} stores of 16 bytes, expected {least[0]} and {least[1]}")
    return lines


def compile_binding(nvcc: str, source: Path, folder: Path) -> None:
    import torch.utils.cpp_extension as extension

    includes = [f"-I{CSRC}"]
    for path in extension.include_paths():
        includes += ["-isystem", path]
    # nvcc hands a .cpp to the host's compiler and knows where CUDA's headers are. A CPU torch lacks the header in which
    # a CUDA build says how it was configured.
    flags = ["-std=c++17", "-O1", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    run([nvcc, *flags, *includes, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("check_cuda: no nvcc found, so nothing was checked; set NVCC or CUDA_HOME to the CUDA toolkit")
        return 1 if os.environ.get("EWC_FAST_REQUIRE_NVCC") == "1" else 0
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    bindings = sorted((CSRC / "cuda").glob("*.cpp"))
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool,
    ):
        folder = Path(name)
        compiled = [
            pool.submit(compile_kernels, nvcc, source, architecture, folder)
            for source in kernels
            for architecture in ARCHITECTURES
        ]
        bound = [pool.submit(compile_binding, nvcc, source, folder) for source in bindings]
        narrow = [pool.submit(narrow_kernels, nvcc, source, folder) for source in kernels]
        try:
            found = [kernel for kernel_job in compiled for kernel in kernel_job.result()]
            for binding in bound:
                binding.result()
            split = [line for job in narrow for line in job.result()]
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            print(error, file=sys.stderr)
            return 1
    for kernel in sorted(found, key=lambda k: (k.name, k.architecture)):
        numbers = f"{kernel.registers:3} registers {kernel.stack:4} B stack {kernel.spills:4} B spilled"
        print(f"{kernel.architecture:6} {numbers}  {kernel.name}")
    bad = [kernel for kernel in found if kernel.stack or kernel.spills]
    print(*split, sep="\n", end="\n" if split else "")
    print(f"{len(found)} kernels in {len(kernels)} files, {len(bindings)} bindings; {len(bad)} with a stack or spills")
    return 1 if bad or split else 0


if __name__ == "__main__":
    sys.exit(main())
