"""What the CPU kernels cost, counted: the loops that the compiler made, and the instructions that they run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

import ewc_fast
from ewc_fast.ops import extension
from tests.native import cpu_program
from tests.native.assembly import Instruction, functions, innermost_loops

COMPILER = os.environ.get("CXX", "g++")
BF16 = "ewc::bf16"
F16 = "ewc::f16"
BYTES = {"float": 4, BF16: 2, F16: 2}
MODES = ("value", "write", "accumulate")
TYPES = {  # of parameter, gradient, anchor and Fisher
    "fp32": ("float", "float", "float", "float"),
    "fp32, bf16 Fisher": ("float", "float", "float", BF16),
    "fp32, bf16 state": ("float", "float", BF16, BF16),
    "bf16": (BF16, BF16, BF16, BF16),
}
GRADIENTS = {"fp32": "float", "bf16": BF16, "fp16": F16}  # of the Fisher's loops
ROWS = {"fisher of 1 row": 1, "fisher of 4 rows": 4}
STEPS = {  # the function, and bytes read and written for an fp32 element
    "adamw": ("adamw_block<(ewc::Coupling)0, false, float, float>", 16, 12),
    "adamw coupled": ("adamw_block<(ewc::Coupling)1, false, float, float>", 24, 12),
    "adamw coupled, bf16 Fisher": (f"adamw_block<(ewc::Coupling)1, false, float, {BF16}>", 22, 12),
    "adamw proximal": ("adamw_block<(ewc::Coupling)2, false, float, float>", 24, 12),
    "adamw proximal, bf16 Fisher": (f"adamw_block<(ewc::Coupling)2, false, float, {BF16}>", 22, 12),
    "amsgrad proximal": ("adamw_block<(ewc::Coupling)2, true, float, float>", 28, 16),
    "sgd coupled": ("sgd_block<(ewc::Coupling)1, (ewc::Momentum)0, false, float, float>", 16, 4),
    "nesterov proximal": ("sgd_block<(ewc::Coupling)2, (ewc::Momentum)2, true, float, float>", 20, 8),
    "proximal": ("proximal_block<(ewc::Metric)2, float, float>", 16, 4),
    "proximal, constant": ("proximal_block<(ewc::Metric)0, float, float>", 12, 4),
}
KERNELS = [(mode, types) for mode in MODES for types in TYPES]
KERNELS += [(rows, types) for rows in ROWS for types in ("fp32", "bf16")]
COUNTED = [*KERNELS, *((rows, "fp16") for rows in ROWS)]  # whose conversion is long, and spills without AVX2
# The versions of each loop, as GCC 12 and GCC 11 call them, and the narrowest vectors that each may use, in bytes: GCC
# takes 32 or 64 where it has 64.
V4, V3, DEFAULT = ("arch_x86_64_v4", "avx512f"), ("arch_x86_64_v3", "avx2"), ("default",)
VERSIONS = {V4: 32, V3: 32, DEFAULT: 16}
# A turn takes 16 elements of everything, for which 16 registers are few: so many are spilled, which the cache hides.
SPILLED = {
    ("write, bf16", DEFAULT): 2,
    ("accumulate, bf16", DEFAULT): 2,
    ("adamw coupled", V3): 1,
    ("adamw coupled", DEFAULT): 11,
    ("adamw coupled, bf16 Fisher", V3): 2,
    ("adamw coupled, bf16 Fisher", DEFAULT): 11,
    ("adamw proximal", DEFAULT): 12,
    ("adamw proximal, bf16 Fisher", V3): 4,
    ("adamw proximal, bf16 Fisher", DEFAULT): 14,
    ("amsgrad proximal", DEFAULT): 15,
    ("nesterov proximal", DEFAULT): 10,
    ("proximal", DEFAULT): 3,
    ("proximal, constant", DEFAULT): 1,
}

# Instructions per element of the x86-64-v3 version, which is the one that valgrind can run, as GCC 12 makes them.
INSTRUCTIONS = {
    ("value", "fp32"): 1.25,
    ("value", "fp32, bf16 Fisher"): 1.57,
    ("value", "fp32, bf16 state"): 1.94,
    ("value", "bf16"): 2.19,
    ("write", "fp32"): 1.88,
    ("write", "fp32, bf16 Fisher"): 2.2,
    ("write", "fp32, bf16 state"): 2.57,
    ("write", "bf16"): 4.08,
    ("accumulate", "fp32"): 2.01,
    ("accumulate", "fp32, bf16 Fisher"): 2.26,
    ("accumulate", "fp32, bf16 state"): 2.64,
    ("accumulate", "bf16"): 4.45,
    ("fisher of 1 row", "fp32"): 0.95,
    ("fisher of 1 row", "bf16"): 1.14,
    ("fisher of 1 row", "fp16"): 3.46,
    ("fisher of 4 rows", "fp32"): 1.46,
    ("fisher of 4 rows", "bf16"): 2.58,
    ("fisher of 4 rows", "fp16"): 11.7,
}
HEAD_ROOM = 1.15  # for other versions of GCC; what needs more is worth a look at the loop


def kernel_name(mode: str, types: str) -> str:
    if mode in ROWS:
        return f"fisher_block<{ROWS[mode]}, {GRADIENTS[types]}, float>"
    return f"penalty_block<(ewc::Mode){MODES.index(mode)}, {', '.join(TYPES[types])}>"


def find(names: Iterable[str], mode: str, types: str, version: tuple[str, ...]) -> list[str]:
    """The names of a kernel's version."""
    return find_function(names, kernel_name(mode, types), version)


def find_function(names: Iterable[str], function: str, version: tuple[str, ...]) -> list[str]:
    """Likewise, of any function."""
    ending = re.compile(rf"\[clone \.({'|'.join(version)})(\.\d+)?\]$")  # GCC 11 adds a number
    return [name for name in names if function in name and ending.search(name)]


def check_loop(
    function: Sequence[Instruction],
    mode: str,
    types: str,
    vector_bytes: int,
    spilled: int = 0,
    asked: int | None = None,
) -> None:
    """The loop that does the work is packed and moves the bytes that it must."""
    if mode in ROWS:
        written = BYTES["float"]
        read = written + ROWS[mode] * BYTES[GRADIENTS[types]]
    else:
        p, g, a, f = (BYTES[name] for name in TYPES[types])
        read = p + a + f + (g if mode == "accumulate" else 0)
        written = 0 if mode == "value" else g
    check_bytes(function, f"{mode}, {types}", read, written, vector_bytes, spilled, asked)


def check_bytes(
    function: Sequence[Instruction],
    what: str,
    read: int,
    written: int,
    vector_bytes: int,
    spilled: int = 0,
    asked: int | None = None,
) -> None:
    """The hot loop is packed, reads and writes so many bytes for an element, and asks for so many lines in a turn."""
    loops = innermost_loops(function)
    assert loops, "there is no loop"
    hot = max(loops, key=lambda loop: loop.loaded)  # others are for what is left over
    elements, rest = divmod(hot.loaded, read)
    print(
        f"{what}: {len(hot.body)} instructions, {hot.loaded} bytes read and {hot.stored} written for "
        f"{elements} elements, vectors of {hot.narrowest_arithmetic()} bytes"
    )
    spills = [line for line in hot.unwelcome() if "(%rsp)" in line]
    others = [line for line in hot.unwelcome() if "(%rsp)" not in line]
    assert not others and len(spills) <= spilled, f"not packed: {hot.unwelcome()[:5]}"
    assert hot.narrowest_arithmetic() >= vector_bytes, "narrow vectors"
    assert rest == 0 and elements % (vector_bytes // 4) == 0, f"{hot.loaded} bytes read, where {read} are an element"
    assert hot.stored == written * elements, f"{hot.stored} bytes written"
    if asked is not None:
        assert elements == 16, "a turn is a line of fp32"
        assert sum(i.mnemonic == "prefetcht0" for i in hot.body) == asked


@pytest.fixture(scope="module")
def built() -> dict[str, list[Instruction]]:
    """The code of the extension in use."""
    if not extension.has_kernel("cpu"):
        pytest.skip(": ".join(extension.explain("cpu")))
    build = extension.status().build
    if build["debug"] or not build["compiler"].startswith("GCC") or platform.libc_ver()[0] != "glibc":
        pytest.skip(f"the extension has one version of each loop ({build['compiler']}, debug {build['debug']})")
    if platform.machine() != "x86_64":
        pytest.skip("the loops are looked at on x86-64")
    cpu_program.need("objdump")
    (library,) = Path(ewc_fast.__file__).parent.glob("_C*.so")
    return functions(library)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda names: names[0])
@pytest.mark.parametrize(("mode", "types"), KERNELS)
def test_the_loops_of_the_extension(
    built: dict[str, list[Instruction]], mode: str, types: str, version: tuple[str, ...]
) -> None:
    names = find(built, mode, types, version)
    assert len(names) == 1, f"{kernel_name(mode, types)}: {names}"
    asked = (2 if ROWS[mode] == 1 else 0) if mode in ROWS else 3 if mode == "value" else 4
    spilled = SPILLED.get((f"{mode}, {types}", version), 0)
    check_loop(built[names[0]], mode, types, VERSIONS[version], spilled, asked)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda names: names[0])
@pytest.mark.parametrize("name", STEPS)
def test_the_loops_of_the_optimizers(built: dict[str, list[Instruction]], name: str, version: tuple[str, ...]) -> None:
    function, read, written = STEPS[name]
    names = find_function(built, function, version)
    assert len(names) == 1, f"{function}: {names}"
    operands = -(-read // 4)
    spilled = SPILLED.get((name, version), 0)
    check_bytes(built[names[0]], name, read, written, VERSIONS[version], spilled, asked=operands)


def test_what_goes_past_the_caches(built: dict[str, list[Instruction]]) -> None:
    """The writing pass stores past the caches."""
    used = Counter(i.mnemonic for name, code in built.items() if "ewc::" in name for i in code)
    assert sum(n for name, n in used.items() if name.endswith("movntdq")) >= 1, used


BAD_LOOPS = """
#define ARGUMENTS float* __restrict g, const float* __restrict p, const float* __restrict a, const float* __restrict f
#define LOOP _Pragma("omp simd") for (long i = 0; i < n; ++i)
extern "C" {
void good(ARGUMENTS, long n) { LOOP g[i] += f[i] * (p[i] - a[i]); }
__attribute__((optimize("no-tree-vectorize"))) void scalar(ARGUMENTS, long n) {
  for (long i = 0; i < n; ++i) g[i] += f[i] * (p[i] - a[i]);
}
__attribute__((target("prefer-vector-width=128"))) void narrow(ARGUMENTS, long n) { LOOP g[i] += f[i] * (p[i] - a[i]); }
void wide(ARGUMENTS, long n) { LOOP g[i] += f[i] * (1.5 * p[i] - a[i]); }
void gathered(ARGUMENTS, const int* j, long n) { LOOP g[i] += f[i] * (p[j[i]] - a[i]); }
void one_more(ARGUMENTS, const float* b, long n) { LOOP g[i] += f[i] * (p[i] - a[i]) + b[i]; }
void one_less(ARGUMENTS, long n) { LOOP g[i] += p[i] - a[i]; }
void not_written(ARGUMENTS, float* h, long n) { LOOP { g[i] += f[i] * (p[i] - a[i]); h[i] = p[i]; } }
}
"""


def test_a_bad_loop_is_noticed(tmp_path: Path) -> None:
    """Else the tests above could not fail."""
    cpu_program.need(COMPILER)
    cpu_program.need("objdump")
    if platform.machine() != "x86_64" or not cpu_program.is_gcc(COMPILER):
        pytest.skip("the loops are written for GCC on x86-64")
    source, binary = tmp_path / "loops.cpp", tmp_path / "loops.o"
    source.write_text(BAD_LOOPS)
    cpu_program.compile_without_warning(
        COMPILER, "-O3", "-fopenmp-simd", "-mavx2", "-mfma", "-Wno-unused-parameter", "-c", source, "-o", binary
    )
    messages = {
        "scalar": "not packed",
        "narrow": "narrow vectors",
        "wide": "not packed",
        "gathered": "not packed",
        "one_more": "bytes read",
        "one_less": "bytes read|bytes written",
        "not_written": "bytes written",
    }
    code = functions(binary)
    check_loop(code.pop("good"), "accumulate", "fp32", 32)
    assert code.keys() == messages.keys()
    for name, function in code.items():
        with pytest.raises(AssertionError, match=messages[name]):
            check_loop(function, "accumulate", "fp32", 32)


def own_instructions(profile: str) -> Counter[str]:
    """Instructions of each function itself, without its callees, from callgrind's output."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    function, inclusive = "", False
    for line in profile.splitlines():
        if match := re.fullmatch(r"fn=(\(\d+\))(?: (.+))?", line):
            function = names.setdefault(match[1], match[2] or "")
        elif match := re.fullmatch(r"c?fn=(\(\d+\)) (.+)", line):  # a name is given where it is first met
            names[match[1]] = match[2]
        elif line.startswith("calls="):
            inclusive = True
        elif match := re.fullmatch(r"[+*\d-]\d* (\d+)", line):
            if not inclusive:
                counts[function] += int(match[1])
            inclusive = False
    return counts


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Instructions per element of each function, in the program that has the loops alone."""
    cpu_program.need(COMPILER)
    cpu_program.need("valgrind")
    if platform.machine() != "x86_64" or not cpu_program.is_gcc(COMPILER) or platform.libc_ver()[0] != "glibc":
        pytest.skip("instructions are counted with GCC and glibc on x86-64")
    folder, calls, block = tmp_path_factory.mktemp("counted"), 8, 2048
    program = cpu_program.build(COMPILER, folder / "kernels", "-g0")
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'profile'}", program, "count", calls]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counts = own_instructions((folder / "profile").read_text())
    return {name: count / (calls * block) for name, count in counts.items()}


@pytest.mark.parametrize(("mode", "types"), COUNTED)
def test_instructions_per_element(counted: dict[str, float], mode: str, types: str) -> None:
    names = find(counted, mode, types, V3)
    if not names and find(counted, mode, types, DEFAULT):
        pytest.skip("valgrind has no AVX2 on this processor")
    assert len(names) == 1, f"{kernel_name(mode, types)}: {names}"
    print(f"{mode}, {types}: {counted[names[0]]:.3f} instructions per element")
    assert counted[names[0]] <= HEAD_ROOM * INSTRUCTIONS[mode, types]


def test_a_build_without_openmp_is_packed_too(tmp_path: Path) -> None:
    """Clang is given no OpenMP runtime; without the pragma its sums would be added one element at a time."""
    cpu_program.need("clang++")
    cpu_program.need("objdump")
    if platform.machine() != "x86_64":
        pytest.skip("the loops are looked at on x86-64")
    source, binary = tmp_path / "kernel.cpp", tmp_path / "kernel.o"
    arguments = ", ".join(TYPES["fp32"])
    source.write_text(
        f'#include "cpu/penalty_kernels.h"\nauto* kernel = &ewc::penalty_block<ewc::Mode::kAccumulate, {arguments}>;\n'
    )
    cpu_program.compile_without_warning(
        "clang++", "-std=c++17", *cpu_program.build_flags("clang++"), "-c", source, "-o", binary
    )
    (function,) = (code for name, code in functions(binary).items() if "penalty_block" in name)
    loops = innermost_loops(function)
    assert any(loop.narrowest_arithmetic() >= 16 and not loop.unwelcome() for loop in loops), "the sums are scalar"
