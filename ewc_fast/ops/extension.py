"""The compiled extension ``ewc_fast._C``: whether it is there, what it was built for, and what to do if it is not.

Loading it registers the native kernels of ``torch.ops.ewc_fast``. A build leaves ``_build_info.json`` beside it, so
that one built for another torch is recognised before it is loaded: its undefined symbols would say nothing useful.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BUILD_COMMAND = (
    'pip install "setuptools>=77" wheel ninja && pip install --no-build-isolation --no-deps --force-reinstall .'
)
_PACKAGE = Path(__file__).resolve().parent.parent
_NATIVE_DEVICES = ("cpu", "cuda")  # on any other the reference is the implementation, not a fall-back


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the extension is in use.

    Attributes:
        loaded: True if its kernels are registered.
        reason: why it is not loaded; "" if it is.
        remedy: what to do about that; "" if it is loaded.
        build: what is known of the build: "kind" ("cuda", "cpu" or "none"), "reason" (why it is not "cuda"), "torch",
            "cuda" and "python" as versions, and, once loaded, what ``ewc_fast._C.build_info()`` tells. Empty if
            nothing was built.
    """

    loaded: bool
    reason: str = ""
    remedy: str = ""
    build: dict[str, Any] = field(default_factory=dict)


def _version(text: str) -> tuple[int, int]:
    """``"2.13.0+cu130"`` -> ``(2, 13)``."""
    match = re.match(r"(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    return int(match[1]), int(match[2] or 0)


def diagnose(build: Mapping[str, Any] | None, torch_version: str, cuda_version: str | None) -> tuple[str, str]:
    """Tells whether an extension fits the running torch.

    Args:
        build: content of ``_build_info.json``, None if there is none.
        torch_version: ``torch.__version__``.
        cuda_version: ``torch.version.cuda``.

    Returns:
        Reason and remedy; both "" if the extension can be loaded. torch must agree in major and minor version, CUDA in
        the major one; an extension without CUDA fits a torch with it.
    """
    remedy = f"in a checkout of ewc_fast: {BUILD_COMMAND}"
    if build is None:
        return "the extension was not built", remedy
    if build["kind"] == "none":
        remedy = f"unset EWC_FAST_BUILD, or install what is missing; then {remedy}"
        return f"ewc_fast was built without its extension: {build['reason']}", remedy
    if _version(build["torch"]) != _version(torch_version):
        return f"the extension was built for torch {build['torch']}, this is torch {torch_version}", remedy
    built_cuda = build["cuda"]
    if built_cuda is not None and cuda_version is None:
        return f"the extension was built for CUDA {built_cuda}, this torch ({torch_version}) has no CUDA", remedy
    if built_cuda is not None and cuda_version is not None and _version(built_cuda)[0] != _version(cuda_version)[0]:
        return f"the extension was built for CUDA {built_cuda}, this torch uses CUDA {cuda_version}", remedy
    return "", ""


def load(
    package: Path, import_extension: Callable[[], ModuleType], torch_version: str, cuda_version: str | None
) -> ExtensionStatus:
    """Loads the extension if it fits, and warns if there is one that cannot be used.

    Args:
        package: folder of the package, where ``_build_info.json`` lies.
        import_extension: imports ``ewc_fast._C``.
        torch_version: ``torch.__version__``.
        cuda_version: ``torch.version.cuda``.
    """
    build: dict[str, Any] | None = None
    try:
        build = json.loads((package / "_build_info.json").read_text())
        reason, remedy = diagnose(build, torch_version, cuda_version)
    except FileNotFoundError:
        reason, remedy = diagnose(None, torch_version, cuda_version)
    except (OSError, ValueError, KeyError, TypeError) as error:
        build = {}
        reason = f"{package / '_build_info.json'} is damaged ({error!r})"
        remedy = f"in a checkout of ewc_fast: {BUILD_COMMAND}"
    if not reason:
        try:
            return ExtensionStatus(True, build={**(build or {}), **import_extension().build_info()})
        except ImportError as error:
            reason = f"the extension could not be loaded: {error}"
            remedy = f"in a checkout of ewc_fast: {BUILD_COMMAND}"
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            if build and build.get("python") != python:
                reason += f" (it was built for Python {build.get('python')}, this is {python})"
    if build is not None and build.get("kind") != "none":
        warnings.warn(
            f"ewc_fast: {reason}. The PyTorch reference is used instead. To mend it, {remedy}", RuntimeWarning, 2
        )
    return ExtensionStatus(False, reason, remedy, build or {})


_status = load(_PACKAGE, lambda: importlib.import_module("ewc_fast._C"), torch.__version__, torch.version.cuda)
# Device types of which it has been said; a build that does not fit was reported just now, for all of them.
_warned = set(_NATIVE_DEVICES) if not _status.loaded and _status.build.get("kind", "none") != "none" else set()


def status() -> ExtensionStatus:
    """Whether the extension is in use; if not, why, and what to do."""
    return _status


def has_kernel(device_type: str) -> bool:
    """Whether there are native kernels for a device type such as "cpu" or "cuda"."""
    return _status.loaded and (device_type == "cpu" or (device_type == "cuda" and _status.build["cuda"] is not None))


def explain(device_type: str) -> tuple[str, str]:
    """Reason and remedy for a device type without native kernels; both "" where there are some."""
    if has_kernel(device_type):
        return "", ""
    if device_type not in _NATIVE_DEVICES:
        return f"there are none for {device_type}", 'use backend="auto" or backend="reference"'
    if not _status.loaded:
        return _status.reason, _status.remedy
    reason = f"the extension was built without CUDA: {_status.build.get('reason') or 'no reason recorded'}"
    return reason, f"remove the cause, then in a checkout of ewc_fast: export EWC_FAST_BUILD=cuda; {BUILD_COMMAND}"


def warn_missing(device_type: str) -> None:
    """Says, once per device type, that the slower PyTorch reference runs where a native kernel could.

    Quiet where there is a kernel, and on devices other than CPU and CUDA, for which none exists.
    """
    if device_type in _warned or device_type not in _NATIVE_DEVICES or has_kernel(device_type):
        return
    _warned.add(device_type)
    reason, remedy = explain(device_type)
    warnings.warn(
        f"ewc_fast: no native kernels on {device_type}, the slower PyTorch reference is used: {reason}. "
        f"To get them, {remedy}",
        RuntimeWarning,
        stacklevel=3,
    )


def require(device_type: str) -> None:
    """Checks that there are native kernels for a device type.

    Raises:
        RuntimeError: there are none; the message says why and what to do.
    """
    if not has_kernel(device_type):
        reason, remedy = explain(device_type)
        raise RuntimeError(f'backend="native" needs native kernels on {device_type}: {reason}. Remedy: {remedy}')
