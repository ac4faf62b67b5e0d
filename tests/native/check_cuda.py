"""Compiles the CUDA code for every supported architecture, without a GPU, and reads what the compiler says of it.

    python tests/native/check_cuda.py

Prints registers, stack frame, spills and the bytes that a multiprocessor requests at once, and fails where

- a kernel has a stack frame or a spill, or takes so many registers that fewer blocks fit than its grid is sized for;
- too few bytes are in flight to keep the memory busy;
- one lacks the 16-byte accesses that it is written for (a compiler may split them in silence), or the hint by which
  anchor and Fisher leave the cache first;
- the bindings do not compile against the installed torch (a CPU build will do).

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

# As in csrc/cuda/multi_tensor.cuh and steps.cuh.
THREADS = 256
BYTES_IN_FLIGHT = 128
MOST_BYTES_OF_A_STEP = 144
SIZES = {"double": 8, "float": 4, "bf16": 2, "f16": 2}
# Little's law: what the memory of an H100 wants under load, see multi_tensor.cuh.
LEAST_IN_FLIGHT = 40 * 1024


@dataclass(frozen=True)
class Accesses:
    """16-byte accesses of a thread, for all that it requests before it waits."""

    loads: int
    streamed: int  # loads that leave the cache first
    stores: int

    def lacks(self, wanted: Accesses) -> bool:
        return self.loads < wanted.loads or self.streamed < wanted.streamed or self.stores < wanted.stores


def fisher_loads(name: str) -> tuple[int, int]:
    """16-byte loads of the Fisher, and of one of the two rows that are loaded at once; 0 where they are narrower."""
    grad, fisher = (SIZES[storage] for storage in name.partition("<")[2].rstrip(">").split(", "))
    vector, turns = (2, 4) if fisher == 8 else (16 // grad, 2)
    return turns * (vector * fisher // 16), turns * (vector * grad // 16)


@dataclass(frozen=True)
class StepMoves:
    """How a kernel of the optimizer steps moves, as in steps.cuh; 16-byte accesses for a turn of each operand."""

    vector: int
    turns: int
    param: int
    grad: int  # 0 where the op has none
    state: int
    anchor: int
    fisher: int
    states: int  # lists of the optimizer's own
    usual_states: int

    @classmethod
    def of(cls, name: str) -> StepMoves:
        optimizer, _, *storages = name.partition("<")[2].rstrip(">").split(", ")
        states, usual = {"AdamW": (3, 2), "Sgd": (1, 1), "Proximal": (1, 1)}[optimizer]
        param, grad, state, anchor, fisher = (SIZES[storage] for storage in storages)
        grad = 0 if optimizer == "Proximal" else grad
        of_element = param + grad + usual * state + anchor + fisher
        vector = 16 // min(param, state, anchor, fisher)
        vector //= 2 if vector * of_element > MOST_BYTES_OF_A_STEP else 1
        turns = max(BYTES_IN_FLIGHT // (vector * of_element), 1)
        accesses = [turns * (vector * size // 16) for size in (param, grad, state, anchor, fisher)]
        return cls(vector, turns, *accesses, states, usual)

    @property
    def writes_state(self) -> bool:
        return self.grad > 0


def wanted_accesses(name: str) -> Accesses:
    """What a kernel is written to do; asserted of its PTX."""
    arguments = name.partition("<")[2].rstrip(">").split(", ")
    if name.startswith("scale_kernel"):
        return Accesses(4, 0, 4)
    if name.startswith("fisher_kernel"):
        of_fisher, of_row = fisher_loads(name)
        return Accesses(of_fisher + 2 * of_row, 2 * of_row, of_fisher)
    sums = 1  # a store at the end of a chunk
    if name.startswith("step_kernel"):
        move = StepMoves.of(name)
        states = move.states * move.state
        streamed = states + move.anchor + move.fisher
        written = move.param + (move.grad + states if move.writes_state else 0)
        return Accesses(move.param + move.grad + streamed, streamed, sums + written)
    mode = int(arguments[0])  # 0: value, 1: write, 2: accumulate
    vector = 16 // min(SIZES[storage] for storage in arguments[2:])
    param, grad, anchor, fisher = (vector * SIZES[storage] // 16 for storage in arguments[2:])
    loads = param + anchor + fisher + (grad if mode == 2 else 0)
    turns = max(BYTES_IN_FLIGHT // (16 * loads), 1)
    return Accesses(turns * loads, turns * (anchor + fisher), sums + (turns * grad if mode > 0 else 0))


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture, as ptxas describes it; sizes in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that the kernel's grid is sized for."""
        wide = self.name.startswith("penalty_kernel") and ("Any" in self.name or "double" in self.name)
        wide |= self.name.startswith("fisher_kernel") and self.name.endswith("double>")
        wide |= self.name.startswith("step_kernel") and ("Any" in self.name or StepMoves.of(self.name).vector > 4)
        return 2 if wide else 3

    @property
    def fitting_blocks(self) -> int:
        """Blocks that a multiprocessor's 65,536 registers suffice for; a thread gets a multiple of 8."""
        return 65536 // (-(-self.registers // 8) * 8 * THREADS)

    @property
    def in_flight(self) -> int | None:
        """Bytes that a multiprocessor requests at once, None for combinations of types that are narrower on purpose."""
        if "Any" in self.name:
            return None
        loads = wanted_accesses(self.name).loads
        if self.name.startswith("fisher_kernel"):
            if self.name.count("double") == 1:
                return None
            # Of one row, or of many, beside which the Fisher's are few.
            of_fisher, of_row = fisher_loads(self.name)
            loads = min(of_fisher + of_row, 2 * of_row)
        if self.name.startswith("step_kernel"):
            move = StepMoves.of(self.name)
            loads -= (move.states - move.usual_states) * move.state
            narrow = move.turns * 8 if move.fisher == 0 else 0  # the Fisher's bytes, in words of 8
            return (16 * loads + narrow) * THREADS * self.blocks
        return 16 * loads * THREADS * self.blocks

    def faults(self) -> list[str]:
        """What is wrong with it."""
        lines = []
        if self.stack or self.spills:
            lines.append(f"a stack of {self.stack} bytes, {self.spills} bytes spilled")
        if self.fitting_blocks < self.blocks:
            lines.append(f"{self.registers} registers leave room for {self.fitting_blocks} of {self.blocks} blocks")
        if self.in_flight is not None and self.in_flight < LEAST_IN_FLIGHT:
            lines.append(f"{self.in_flight} bytes in flight, fewer than {LEAST_IN_FLIGHT}")
        return [f"{self.name}, {self.architecture}: {line}" for line in lines]


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
    """What kernels lack of 16-byte accesses and of hints, a line for each."""
    ptx = folder / f"{source.stem}.ptx"
    run([nvcc, "-std=c++17", "-O3", "-ptx", f"-arch={ARCHITECTURES[-1]}", f"-I{CSRC}", str(source), "-o", str(ptx)])
    entries = re.split(r"\.entry (\w+)\(", ptx.read_text())
    wide = r"\.global(?:\.\w+)*\.v(?:4\.\w32|2\.\w64)"
    lines = []
    for name, body in zip(map(shorten, demangle(entries[1::2])), entries[2::2], strict=True):
        if "Any" in name:  # narrower on purpose
            continue
        loads = [word for word in re.findall("ld" + wide, body) if not word.startswith("ld.global.cg")]  # sums
        streamed = [word for word in loads if word.startswith("ld.global.cs")]
        found = Accesses(len(loads), len(streamed), len(re.findall("st" + wide, body)))
        if found.lacks(wanted_accesses(name)):
            lines.append(f"{name}: {found}, expected at least {wanted_accesses(name)}")
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
        flight = "  ?" if kernel.in_flight is None else f"{kernel.in_flight / 1024:3.0f}"
        print(f"{kernel.architecture:6} {numbers} {kernel.blocks} blocks {flight} KB in flight  {kernel.name}")
    faults = [line for kernel in found for line in kernel.faults()] + split
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(found)} kernels in {len(kernels)} files, {len(bindings)} bindings; {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
