"""State files: safetensors, written whole or not at all, and never unpickled."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_KIND = "ewc_fast.state"


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes what ``EWCState.state_dict()`` returned.

    The file gets a temporary name, is flushed to disk and renamed, so that a crash leaves an old file whole.

    Args:
        state: Tensors under ``"fisher"`` and ``"anchor"``, plain values elsewhere.
        path: The file to write; by convention ``*.safetensors``.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    target = Path(os.path.realpath(path))  # through a link, to what it names
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {os.fspath(target.parent)!r} to save the state in")
    tensors = {
        f"{kind}.{name}": t.detach().cpu().contiguous()
        for kind in ("fisher", "anchor")
        for name, t in state[kind].items()
    }
    plain = {key: value for key, value in state.items() if key not in ("fisher", "anchor")}
    metadata = {"kind": _KIND, "state": json.dumps(plain)}
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask grants; safetensors may grant less
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # make the rename itself durable
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state file. Nothing stays mapped: the tensors are copies.

    Args:
        path: A file that :func:`save_state` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, truncated, or no state file of this package.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no state file {os.fspath(path)!r}")
    state: dict[str, Any] = {"fisher": {}, "anchor": {}}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise ValueError(f"{os.fspath(path)!r} is no state file of ewc_fast")
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition(".")
                state[kind][name] = file.get_tensor(key).clone()
            state.update(json.loads(metadata["state"]))
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged, truncated or no safetensors file: {error}") from error
    return state
