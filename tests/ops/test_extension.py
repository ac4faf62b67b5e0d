"""Every state in which the extension can be found, without building it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import types

import pytest
import torch

from ewc_fast.ops import extension
from ewc_fast.ops.extension import BUILD_COMMAND, ExtensionStatus, diagnose, load

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
BUILT = {"kind": "cpu", "reason": "no nvcc was found", "torch": "2.9.1+cpu", "cuda": None, "python": PYTHON}
MODULE = types.SimpleNamespace(build_info=lambda: {"compiler": "GCC 12", "cuda": None})


@pytest.mark.parametrize(
    ("build", "torch_version", "cuda_version"),
    [
        ({}, "2.9.1+cpu", None),
        ({}, "2.9.0", None),
        ({}, "2.9.0a0+gitabc", None),
        ({}, "2.9.1+cu130", "13.0"),  # a CPU extension runs under a torch with CUDA
        ({"torch": "2.10.0+cu128", "cuda": "12.9"}, "2.10.2+cu128", "12.8"),
    ],
)
def test_what_fits(build, torch_version, cuda_version):
    assert diagnose({**BUILT, **build}, torch_version, cuda_version) == ("", "")


@pytest.mark.parametrize(
    ("build", "torch_version", "cuda_version", "named"),
    [
        ({}, "2.10.0+cpu", None, ["2.9.1+cpu", "2.10.0+cpu"]),
        ({}, "2.91.0", None, ["2.9.1+cpu", "2.91.0"]),  # equal in the first three characters
        ({}, "3.9.1", None, ["2.9.1+cpu", "3.9.1"]),
        ({"cuda": "12.8"}, "2.9.1+cu130", "13.0", ["CUDA 12.8", "CUDA 13.0"]),
        ({"cuda": "12.8"}, "2.9.1+cpu", None, ["CUDA 12.8", "2.9.1+cpu", "no CUDA"]),
        ({"cuda": "12.8"}, "2.9.1+cu118", "1.2", ["CUDA 12.8", "CUDA 1.2"]),
    ],
)
def test_what_does_not_fit_is_named_with_both_versions(build, torch_version, cuda_version, named):
    reason, remedy = diagnose({**BUILT, **build}, torch_version, cuda_version)
    assert all(text in reason for text in named)
    assert BUILD_COMMAND in remedy


def test_a_build_without_extension_tells_why():
    reason, remedy = diagnose({**BUILT, "kind": "none", "reason": "no C++ compiler was found"}, "2.9.1", None)
    assert "no C++ compiler was found" in reason and BUILD_COMMAND in remedy


def never() -> types.ModuleType:
    raise AssertionError("must not be loaded")


def write(tmp_path, build) -> None:
    (tmp_path / "_build_info.json").write_text(json.dumps(build))


def test_load(tmp_path):
    write(tmp_path, BUILT)
    status = load(tmp_path, lambda: MODULE, "2.9.0", None)
    assert status == ExtensionStatus(True, "", "", {**BUILT, "compiler": "GCC 12"})


@pytest.mark.parametrize("build", [None, {**BUILT, "kind": "none"}])
def test_what_was_not_built_is_no_news_at_import(tmp_path, build):
    if build is not None:
        write(tmp_path, build)
    status = load(tmp_path, never, "2.9.1", None)
    assert not status.loaded and "built" in status.reason and BUILD_COMMAND in status.remedy


def test_a_mismatch_is_one_warning_and_nothing_is_loaded(tmp_path):
    write(tmp_path, BUILT)
    with pytest.warns(RuntimeWarning, match="built for torch 2.9.1.*this is torch 2.10.0.*pip install") as caught:
        status = load(tmp_path, never, "2.10.0", None)
    assert len(caught) == 1
    assert not status.loaded and status.build == BUILT


def test_an_import_error_is_reported_with_its_text(tmp_path):
    def broken() -> types.ModuleType:
        raise ImportError("undefined symbol: _ZN2at4sumE")

    write(tmp_path, BUILT)
    with pytest.warns(RuntimeWarning, match="undefined symbol: _ZN2at4sumE"):
        status = load(tmp_path, broken, "2.9.1", None)
    assert "undefined symbol: _ZN2at4sumE" in status.reason and BUILD_COMMAND in status.remedy


def test_another_python_is_named(tmp_path):
    def absent() -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'ewc_fast._C'")

    write(tmp_path, {**BUILT, "python": "3.9"})
    with pytest.warns(RuntimeWarning, match=f"No module named.*built for Python 3.9, this is {PYTHON}"):
        load(tmp_path, absent, "2.9.1", None)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"kind": "cpu", "torch": "unknown", "cuda": null}', '{"kind": "cpu"}']
)
def test_damaged_build_information_is_reported(tmp_path, text):
    (tmp_path / "_build_info.json").write_text(text)
    with pytest.warns(RuntimeWarning, match="_build_info.json is damaged"):
        status = load(tmp_path, never, "2.9.1", None)
    assert not status.loaded and BUILD_COMMAND in status.remedy


NOT_BUILT = ExtensionStatus(False, "the extension was not built", "run make")
CPU_ONLY = ExtensionStatus(True, build={**BUILT, "kind": "cpu"})
WITH_CUDA = ExtensionStatus(True, build={**BUILT, "kind": "cuda", "reason": "", "cuda": "13.0"})


@pytest.fixture
def found(monkeypatch):
    """Sets the status that the module found at import, and forgets what has been warned of."""

    def set_status(status: ExtensionStatus) -> None:
        monkeypatch.setattr(extension, "_status", status)
        monkeypatch.setattr(extension, "_warned", set())

    return set_status


@pytest.mark.parametrize(("status", "kernels"), [(NOT_BUILT, set()), (CPU_ONLY, {"cpu"}), (WITH_CUDA, {"cpu", "cuda"})])
def test_kernels(found, status, kernels):
    found(status)
    assert extension.status() is status
    for device in ("cpu", "cuda", "mps", "meta"):
        assert extension.has_kernel(device) == (device in kernels)
        if device in kernels:
            extension.require(device)
            extension.warn_missing(device)  # any warning would be an error here
            assert extension.explain(device) == ("", "")
        else:
            with pytest.raises(RuntimeError, match=f'backend="native".* {device}'):
                extension.require(device)


def test_require_gives_reason_and_remedy(found):
    found(NOT_BUILT)
    with pytest.raises(RuntimeError, match="the extension was not built.*run make"):
        extension.require("cpu")
    found(CPU_ONLY)
    with pytest.raises(RuntimeError, match=r"without CUDA: no nvcc was found.*EWC_FAST_BUILD=cuda"):
        extension.require("cuda")


def test_the_fall_back_is_told_once_per_device(found):
    found(NOT_BUILT)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            extension.warn_missing("cpu")
            extension.warn_missing("cuda")
            extension.warn_missing("mps")
    assert [re.findall("on (cpu|cuda|mps)", str(warning.message)) for warning in caught] == [["cpu"], ["cuda"]]
    assert all("the extension was not built" in str(warning.message) for warning in caught)
    assert all("run make" in str(warning.message) for warning in caught)


def test_the_extension_of_this_installation_is_in_use():
    status = extension.status()
    assert status.loaded or status.build.get("kind") == "none", f"{status.reason}: {status.remedy}"


needs_extension = pytest.mark.skipif(
    extension.status().build.get("kind") == "none", reason="installed without the extension"
)


@needs_extension
def test_the_extension_describes_itself():
    module = importlib.import_module("ewc_fast._C")
    info = module.build_info()
    assert info["compiler"] and info["cpp_standard"] >= 201703
    assert info["cuda"] == extension.status().build["cuda"]
    assert (info["cuda"] is None) == (info["cuda_arch_list"] == "")
    assert module.cpu_capability() in ("x86-64-v4", "x86-64-v3", "default")


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernels_run_in_torchs_threads(threads):
    """A second OpenMP runtime in the process would not hear torch.set_num_threads."""
    module = importlib.import_module("ewc_fast._C")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert module.openmp_threads() in ([threads] if module.build_info()["openmp"] else [None])
    finally:
        torch.set_num_threads(before)


def test_importing_leaves_cuda_alone_and_prints_nothing():
    code = "import ewc_fast, torch; assert not torch.cuda.is_initialized()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
