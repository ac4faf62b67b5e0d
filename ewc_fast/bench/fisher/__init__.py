"""``python -m ewc_fast bench --fisher``: what a Fisher diagonal costs, beside a plain training pass, the loops that one
would otherwise write, and other packages."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Runs the benchmark.

    Args:
        argv: Its arguments, without the program's name and ``--fisher``; ``--help`` lists them.

    Returns:
        The exit code.
    """
    from ewc_fast.bench.fisher.app import main as run  # here, so that importing one of the parts does not load them all

    return run(argv)
