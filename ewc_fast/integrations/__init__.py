"""EWC in training frameworks: a module each, which imports its framework; none is imported by ``import ewc_fast``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ewc_fast.budget import EWCBudget


def install_command(extra: str) -> str:
    """How an extra of this package is installed, for the error of a module that misses it."""
    return f'in a checkout, pip install --no-build-isolation ".[{extra}]"'


def check_budget(budget: EWCBudget | None, ewc: object, probe: object) -> None:
    """Raises unless a callback's budget is of its penalty, and has the only probe."""
    if budget is None:
        return
    if budget.ewc is not ewc:
        raise ValueError("budget: its EWCLoss is another one than ewc; make it with EWCBudget(ewc, ...)")
    if probe is not None and "ewc/measured_forgetting" in budget.logs():
        raise ValueError("probe: the budget has a probe of its own, which is logged: leave this one out")
