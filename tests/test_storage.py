"""State files: whole or not at all, bit by bit, and nothing else is taken for one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ewc_fast import storage
from ewc_fast.state import EWCState
from ewc_fast.storage import load_state, save_state
from tests.ops.exact import bits


def make() -> dict[str, Any]:
    params = {
        "a.weight": torch.randn(5, 3),
        "fisher.anchor.odd": torch.randn(4, 2).t(),
        "half": torch.randn(33).bfloat16(),
        "wide": torch.randn(2, 2).double(),
        "scalar": torch.randn(()),
        "none": torch.randn(0, 3),
        "größe/ñ": torch.randn(2),
    }
    state = EWCState()
    for _ in range(2):
        fisher = {n: torch.rand(p.shape).to(p.dtype) for n, p in params.items()}
        state.consolidate(params, fisher, {n: torch.randn(p.shape).to(p.dtype) for n, p in params.items()})
    state.info = {"kind": "exact", "num_samples": 1234, "loss": "größe", "seconds": 0.1, "none": None}
    return state.state_dict()


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if key not in ("fisher", "anchor"):
            assert a[key] == b[key]
            continue
        assert a[key].keys() == b[key].keys()
        for name, t in a[key].items():
            other = b[key][name]
            assert t.dtype == other.dtype and t.shape == other.shape and torch.equal(bits(t), bits(other))


@pytest.mark.parametrize("as_path", [Path, str])
def test_round_trip_bit_by_bit(tmp_path: Path, as_path: Callable[[Any], Any]) -> None:
    state = make()
    path = as_path(tmp_path / "state.safetensors")
    save_state(state, path)
    assert_equal(load_state(path), state)
    assert os.listdir(tmp_path) == ["state.safetensors"]
    save_state(make(), path)  # over an old one
    save_state(state, path)
    assert_equal(load_state(path), state)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    state = make()
    save_state(state, tmp_path / "state.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert torch.equal(tensors["fisher.a.weight"], state["fisher"]["a.weight"])
    assert len(tensors) == 2 * len(state["fisher"])


def test_an_empty_state(tmp_path: Path) -> None:
    save_state(EWCState().state_dict(), tmp_path / "empty")
    assert_equal(load_state(tmp_path / "empty"), EWCState().state_dict())


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_file_has_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    save_state(make(), tmp_path / "state")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_nothing_stays_mapped(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = make()
    save_state(state, path)
    loaded = load_state(path)
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place: a mapping would see it
    assert_equal(loaded, state)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


# ---- writes that fail ----


class Crash(Exception):
    pass


def half_written(tensors: Any, path: Any, **_: Any) -> None:
    Path(path).write_bytes(b"half")
    raise Crash


def crash(*_: Any, **__: Any) -> None:
    raise Crash


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("ewc_fast.storage.save_file", half_written),
        ("ewc_fast.storage.save_file", crash),
        ("os.fsync", crash),
        ("os.replace", crash),
    ],
    ids=["half written", "not written", "fsync", "rename"],
)
@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "new"])
def test_a_failed_write_leaves_the_old_file_whole_and_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: Callable[..., None], old: bool
) -> None:
    path = tmp_path / "state.safetensors"
    state = make()
    if old:
        save_state(state, path)
    with monkeypatch.context() as patched:
        patched.setattr(where, failure)
        with pytest.raises(Crash):
            save_state(make(), path)
    assert os.listdir(tmp_path) == ([path.name] if old else [])
    if old:
        assert_equal(load_state(path), state)


def test_the_old_file_is_there_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    first, second = make(), make()
    save_state(first, path)
    events = []

    def fsync(descriptor: int) -> None:
        events.append("flushed")
        if len(events) == 1:
            assert_equal(load_state(path), first)

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("renamed"), replace(a, b)))
    save_state(second, path)
    assert events[:2] == ["flushed", "renamed"]
    assert_equal(load_state(path), second)


def test_info_that_cannot_be_written_is_noticed_before_anything_is(tmp_path: Path) -> None:
    state = {**make(), "info": {"loss": object()}}
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(state, tmp_path / "state")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such"):
        save_state(make(), tmp_path / "no such" / "state")


# ---- files that are none ----


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no state file '{path}'"):
            load_state(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    save_state(make(), whole)
    content = whole.read_bytes()
    for size in {0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1}:
        part.write_bytes(content[:size])
        with pytest.raises(ValueError, match="part' is damaged, truncated or no safetensors file"):
            load_state(part)


@pytest.mark.parametrize(
    "content",
    [b"\x00" * 64, b"\xff" * 64, b"{}", os.urandom(1000), pickle.dumps({"fisher": {}}), b"\x02" + b"\x00" * 7 + b"[]"],
    ids=["zeros", "ones", "json", "random", "pickle", "list"],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "garbage").write_bytes(content)
    with pytest.raises(ValueError, match="garbage' is damaged, truncated or no safetensors file"):
        load_state(tmp_path / "garbage")


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"fisher": Bomb()}, tmp_path / "state")
    with pytest.raises(ValueError, match="damaged"):
        load_state(tmp_path / "state")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"kind": "something.else"}])
def test_somebody_elses_safetensors_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"fisher.w": torch.ones(2)}, tmp_path / "other", metadata=metadata)
    with pytest.raises(ValueError, match="other' is no state file of ewc_fast"):
        load_state(tmp_path / "other")


@pytest.mark.parametrize(
    ("tensors", "state"),
    [
        ({"momentum.w": torch.ones(2)}, "{}"),
        ({"fisher.w": torch.ones(2)}, "{"),
        ({"fisher.w": torch.ones(2)}, "[1]"),
        ({"fisher.w": torch.ones(2)}, "3"),
        ({"fisher.w": torch.ones(2)}, None),
    ],
    ids=["unknown tensor", "broken json", "list", "number", "no json"],
)
def test_damaged_contents(tmp_path: Path, tensors: dict[str, torch.Tensor], state: str | None) -> None:
    metadata = {"kind": storage._KIND} | ({} if state is None else {"state": state})
    safetensors.torch.save_file(tensors, tmp_path / "damaged", metadata=metadata)
    with pytest.raises(ValueError, match="damaged' is damaged"):
        load_state(tmp_path / "damaged")


def test_missing_entries_are_noticed_where_the_state_is_loaded(tmp_path: Path) -> None:
    metadata = {"kind": storage._KIND, "state": json.dumps({"format": 1})}
    safetensors.torch.save_file({"fisher.w": torch.ones(2)}, tmp_path / "state", metadata=metadata)
    with pytest.raises(ValueError, match="constant, gamma, info, mode, num_tasks missing"):
        EWCState().load_state_dict(load_state(tmp_path / "state"), {"w": torch.ones(2)})
