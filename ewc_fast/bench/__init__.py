"""``python -m ewc_fast bench``: what the penalty costs, beside everything one would otherwise write."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Runs the benchmark.

    Args:
        argv: Its arguments, without the program's name; ``--help`` lists them.

    Returns:
        The exit code.
    """
    from ewc_fast.bench import app  # here, so that importing one of the parts does not load them all

    return app.main(argv)
