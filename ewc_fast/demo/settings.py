"""The three methods' settings: the best that examples/search_digits.py found for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

METHODS = ("plain", "l2sp", "ewc")
TITLES = {"plain": "plain fine-tuning", "l2sp": "L2-SP", "ewc": "EWC"}

# Factors of the learning rate over a task, by the share of the task that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
}


@dataclass(frozen=True)
class Settings:
    """How one method is run.

    Attributes:
        method: ``"plain"``, ``"l2sp"`` or ``"ewc"``.
        lr: Adam's learning rate, at a task's start.
        schedule: A key of ``SCHEDULES``.
        ewc_lambda: The penalty's weight; 0 for ``"plain"``.
        damping: Of EWC: the isotropic part, in units of the mean Fisher.
    """

    method: str
    lr: float
    schedule: str = "constant"
    ewc_lambda: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def __str__(self) -> str:
        text = f"lr {self.lr:g}, {self.schedule}"
        if self.method != "plain":
            text += f", lambda {self.ewc_lambda:g}"
        if self.method == "ewc":
            text += f", damping {self.damping:g}"
        return text


# By the schedule and the method. The demo runs "constant" unless told otherwise.
BEST = {
    "constant": {
        "plain": Settings("plain", 4e-5),
        "l2sp": Settings("l2sp", 3e-3, "constant", 0.03),
        "ewc": Settings("ewc", 7e-3, "constant", 60.0, 0.1),
    },
    "linear": {
        "plain": Settings("plain", 8e-5, "linear"),
        "l2sp": Settings("l2sp", 9e-3, "linear", 0.02),
        "ewc": Settings("ewc", 7e-3, "linear", 200.0, 0.05),
    },
}
