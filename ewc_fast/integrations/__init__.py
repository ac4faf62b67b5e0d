"""EWC in training frameworks: a module each, which imports its framework; none is imported by ``import ewc_fast``."""


def install_command(extra: str) -> str:
    """How an extra of this package is installed, for the error of a module that misses it."""
    return f'in a checkout, pip install --no-build-isolation ".[{extra}]"'
