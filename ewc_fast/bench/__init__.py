"""``python -m ewc_fast bench``: what the penalty costs, beside everything one would otherwise write; with ``--fisher``
first, what a Fisher diagonal costs, with ``--optimizers`` first, what EWC adds to an optimizer's step."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Runs the benchmark.

    Args:
        argv: Its arguments, without the program's name; ``--help`` lists them.

    Returns:
        The exit code.
    """
    if argv[:1] == ["--fisher"]:
        from ewc_fast.bench import fisher

        return fisher.main(argv[1:])
    if argv[:1] == ["--optimizers"]:
        from ewc_fast.bench import optimizers

        return optimizers.main(argv[1:])
    from ewc_fast.bench import app  # here, so that importing one of the parts does not load them all

    return app.main(argv)
