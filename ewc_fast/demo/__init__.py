"""``python -m ewc_fast demo``: forgetting on scikit-learn's handwritten digits, measured and reduced."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Runs the demo.

    Args:
        argv: Its arguments, without the program's name; ``--help`` lists them.

    Returns:
        The exit code.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is missing; before anything is computed.
    """
    from ewc_fast.demo import app  # here, so that the processes that only train do not load what only reports need

    return app.main(argv)
