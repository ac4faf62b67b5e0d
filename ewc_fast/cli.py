"""The command line: ``python -m ewc_fast``, also installed as ``ewc-fast``.

Commands: ``info`` (what is installed, what is in use, what is missing), ``demo`` and ``bench``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import ewc_fast
from ewc_fast.ops import extension

_DEMO_PACKAGES = ("sklearn", "matplotlib")


def collect_info() -> dict[str, Any]:
    """What ``ewc-fast info`` tells, as JSON-compatible values.

    Returns:
        "versions"; "extension" (an :class:`~ewc_fast.ops.extension.ExtensionStatus` as a dict); "kernels" (device type
        -> "native", "reference", or None where torch has no such device); "cpu" (instruction set, threads); "cuda"
        (names of the devices); "advice" (sentences; empty if all is well).
    """
    status = extension.status()
    cuda = torch.cuda.is_available()
    advice: list[str] = []
    if not status.loaded:
        advice.append(f"No native kernels: {status.reason}. To get them, {status.remedy}")
    elif cuda and not extension.has_kernel("cuda"):
        reason, remedy = extension.explain("cuda")
        advice.append(f"A GPU, but no CUDA kernels: {reason}. To get them, {remedy}")

    cpu: dict[str, Any] = {"torch_threads": torch.get_num_threads(), "instruction_set": None, "kernel_threads": None}
    if status.loaded:
        module = importlib.import_module("ewc_fast._C")
        threads = module.openmp_threads()
        cpu |= {"instruction_set": module.cpu_capability(), "kernel_threads": threads or 1}
        if threads is None and torch.get_num_threads() > 1:
            advice.append("The kernels run in one thread: they were compiled without OpenMP. Build them with GCC")
        elif threads is not None and threads != torch.get_num_threads():
            advice.append(
                f"torch uses {torch.get_num_threads()} threads and the kernels {threads}: two OpenMP runtimes are "
                "loaded. Look for one that LD_PRELOAD or another package brings"
            )
    return {
        "versions": {
            "ewc_fast": ewc_fast.__version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "extension": {
            "loaded": status.loaded,
            "reason": status.reason,
            "remedy": status.remedy,
            "build": status.build,
        },
        "kernels": {
            "cpu": "native" if extension.has_kernel("cpu") else "reference",
            "cuda": None if not cuda else "native" if extension.has_kernel("cuda") else "reference",
        },
        "cpu": cpu,
        "cuda": [_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "advice": advice,
    }


def _device_name(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def format_info(info: dict[str, Any]) -> str:
    """Lays out :func:`collect_info` for reading."""
    versions, build, cpu = info["versions"], info["extension"]["build"], info["cpu"]
    rows = [
        ("ewc_fast", versions["ewc_fast"]),
        ("torch", f"{versions['torch']} (CUDA {versions['torch_cuda'] or 'no'})"),
        ("Python", f"{versions['python']} on {versions['platform']}"),
    ]
    if info["extension"]["loaded"]:
        standard = build["cpp_standard"] // 100 % 100  # 201703 is C++17
        compiled = f"{build['compiler']}, C++{standard}, OpenMP {'yes' if build['openmp'] else 'no'}"
        rows.append(("extension", "loaded" + (", debug build" if build["debug"] else "")))
        rows.append(("  compiled by", compiled))
        cuda = f"{build['cuda']} for {build['cuda_arch_list']}" if build["cuda"] else f"no: {build['reason']}"
        rows.append(("  CUDA", cuda))
        threads = f"{cpu['kernel_threads']} threads (torch: {cpu['torch_threads']})"
        rows.append(("CPU kernels", f"native, {cpu['instruction_set']}, {threads}"))
    else:
        rows.append(("extension", f"not loaded: {info['extension']['reason']}"))
        rows.append(("CPU kernels", f"none: PyTorch reference, {cpu['torch_threads']} threads"))
    rows.append(("CUDA kernels", info["kernels"]["cuda"] or "not applicable: torch sees no CUDA device"))
    rows += [("CUDA device", name) for name in info["cuda"]]
    lines = [f"{name:<14} {value}" for name, value in rows]
    if info["advice"]:
        lines += ["", *(f"-> {sentence}" for sentence in info["advice"])]
    return "\n".join(lines)


def run_demo(arguments: Sequence[str]) -> int:
    """Runs ``ewc_fast.demo``, which needs the extra ``demo``."""
    try:
        demo = importlib.import_module("ewc_fast.demo")
        return int(demo.main(list(arguments)))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_PACKAGES:
            raise
        remedy = 'in a checkout, pip install --no-build-isolation ".[demo]"'
        print(f"ewc-fast demo needs {package}: {remedy}", file=sys.stderr)
        return 1


def run_bench(arguments: Sequence[str]) -> int:
    """Runs ``ewc_fast.bench``."""
    bench = importlib.import_module("ewc_fast.bench")
    return int(bench.main(list(arguments)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="ewc-fast", description="Elastic Weight Consolidation for PyTorch, in one pass over memory."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, what is compiled and in use, what to do about what is missing")
    info.add_argument("--json", action="store_true", help="print JSON")
    # These have parsers of their own, which also answer --help.
    commands.add_parser("demo", add_help=False, help="fine-tune on one task after the other, with and without EWC")
    commands.add_parser("bench", add_help=False, help="what the penalty costs here, beside what one would write")
    options, rest = parser.parse_known_args(argv)
    if options.command in ("demo", "bench"):
        return run_demo(rest) if options.command == "demo" else run_bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    collected = collect_info()
    print(json.dumps(collected, indent=2) if options.json else format_info(collected))
    return 0
