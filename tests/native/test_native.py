"""The CUDA kernels, executed on the CPU: built with the host emulation beside this file and run with a fresh seed."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER} is missing")


def compile_cpp(source: Path, program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    include = [f"-I{path}" for path in (HERE / "emulation", CSRC, CSRC / "cuda")]
    command = [
        COMPILER,
        "-std=c++17",
        "-g1",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        *include,
        *flags,
    ]
    return subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True)


def sanitizers_work(tmp_path: Path) -> bool:
    source = tmp_path / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    return compile_cpp(source, tmp_path / "empty", *SANITIZE).returncode == 0


def run_kernels(tmp_path: Path, *flags: str) -> None:
    program = tmp_path / "test_kernels"
    built = compile_cpp(HERE / "test_kernels.cpp", program, *flags)
    assert built.returncode == 0, built.stderr
    assert not built.stderr, built.stderr  # not a single warning
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    ran = subprocess.run([str(program), str(seed)], capture_output=True, text=True)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}{ran.stderr}"
    print(ran.stdout)


def test_kernels_with_the_32_kb_table(tmp_path: Path) -> None:
    run_kernels(tmp_path, "-O1")


def test_kernels_with_the_4_kb_table_and_sanitizers(tmp_path: Path) -> None:
    """Many launches are cheap with this table, so it is the one that runs under the sanitizers, which are slow."""
    run_kernels(tmp_path, "-DEWC_FAST_SMALL_TABLE", *(SANITIZE if sanitizers_work(tmp_path) else ["-O1"]))


def test_misuse_of_the_device_is_noticed(tmp_path: Path) -> None:
    """The emulation stops where a device would hang or fault; else the tests above could not fail on it."""
    source = tmp_path / "misuse.cpp"
    program = tmp_path / "misuse"
    source.write_text(
        """
        #include <cuda_runtime.h>
        void kernel(int what) {
          alignas(16) static char memory[32];
          if (what == 0) __ldcs(reinterpret_cast<const uint4*>(memory + 4));
          if (what == 1 && threadIdx.x != 5) __shfl_down_sync(0xffffffffu, 1.0, 1);
          if (what == 2) { if (threadIdx.x == 7) __syncthreads(); else __shfl_down_sync(0xffffffffu, 1.0, 1); }
          if (what == 3) __shfl_down_sync(0xffffu, 1.0, 1);
        }
        int main(int argc, char** argv) {
          int what = argc > 1 ? std::atoi(argv[1]) : -1;
          void* parameters[] = {&what};
          cudaLaunchKernel(kernel, dim3(2), dim3(64), parameters, 0, nullptr);
          return 0;
        }
        """
    )
    built = compile_cpp(source, program)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([str(program)]).returncode == 0
    messages = ["misaligned word", "lacks lanes", "lacks lanes", "only whole warps"]
    for what, message in enumerate(messages):
        ran = subprocess.run([str(program), str(what)], capture_output=True, text=True)
        assert ran.returncode != 0 and message in ran.stderr, (what, ran.stderr)
