"""Checks of arguments that several places share."""

from __future__ import annotations


def check_count(count: object, name: str) -> None:
    """Raises ``ValueError`` unless ``count``, the argument ``name``, is a positive integer."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a positive integer, got {count!r}")
