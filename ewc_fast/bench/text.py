"""Cells, tables and files of results, for whoever writes them; names on a command line."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def number(value: float | None, digits: int) -> str:
    """With so many digits after the point; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def size(count: int) -> str:
    """Bytes, in the largest unit that gives 1 or more."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """The results as they are."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def read_results(path: Path, part: str, command: str) -> dict[str, Any]:
    """What :func:`write_json` wrote: results of a machine, with a ``part`` that only that command's have.

    Raises:
        ValueError: The file is no result of the command.
    """
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or part not in results or "machine" not in results:
        raise ValueError(f"{path} is no result of {command}")
    return results


def check_names(what: str, names: Sequence[str], known: Collection[str]) -> None:
    """Names on a command line.

    Raises:
        ValueError: There is none of a name; lists those there are.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")
