"""``EWCBudget``: lambda set by feedback, so that forgetting keeps to a budget in nats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ewc_fast.checks import check_count
from ewc_fast.functional import check_lambda
from ewc_fast.loss import EWCLoss

_SMALLEST_LAMBDA = 1e-12  # in effect 0; from 0 itself no factor leads away

# In units of e = log(forgetting / max_forgetting). Chosen on digits and a small language model, see docs/optimizers.md.
_INTEGRAL = 0.5  # d log lambda per measurement, for each unit of e
_PROPORTIONAL = 0.2  # d log lambda for each unit that e has changed by
_FAST = 0.5  # beyond this e the integral gain is 1: far above the budget every step forgets what the pull has to undo
_LOWEST, _HIGHEST = -1.0, 4.0  # e is cut to these: lambda falls slowly while there is no forgetting yet

_STUCK = 4  # measurements at the limit, none of them much lower, after which that is said
_LARGE_ERROR = 0.25  # of the budget: a standard error that is said


class Measurement(NamedTuple):
    """One look at the forgetting.

    Attributes:
        step: Optimizer steps since the last consolidate.
        forgetting: Since the last consolidate, nats per sample or token.
        ewc_lambda: What lambda was set to.
        measured: Whether the forgetting is what the probe, or without one the prediction, said; False where it is the
            prediction scaled to the probe's last measurement.
    """

    step: int
    forgetting: float
    ewc_lambda: float
    measured: bool = True


class EWCBudget:
    """Sets lambda by feedback, so that forgetting since the last consolidate keeps to a budget in nats.

    :meth:`step` is called after each optimizer step. At every ``every``-th, and at steps 1, 2, 4, 8, ... below the
    first of those, it measures the forgetting and moves lambda: up by about as much as the forgetting lies above the
    budget, down slowly where it lies below, so that a budget that the new task would exceed is used up, not undercut.
    On all other steps it counts, and neither reads the device nor launches anything.

    With e = log(forgetting / max_forgetting), which is cut to [-1, 4], log lambda moves by 0.5 e + 0.2 (e -
    previous e) (a proportional-integral controller in velocity form, Åström and Hägglund, "PID Controllers", 1995,
    section 3.5); what e exceeds 0.5 by counts 1 instead of 0.5. Well below the budget e is taken from where the
    forgetting will be at the next measurement if it goes on as since the last one, the distance to the anchor (the
    forgetting's root) growing linearly: so lambda rises before the budget is reached.

    With a probe the *measured* forgetting is kept to the budget, as far as the probe's samples stand for the old task.
    Without one it is ``predicted_forgetting`` at the present weights (one reading pass): that bounds the prediction and
    no more: on the digits it is hundreds of times too low. With ``probe_every`` above 1 a probe is asked less often; in
    between the prediction stands in, scaled so that it would have agreed with the last of its measurements.

    Use it with ``coupling="proximal"``, which is stable for every lambda. Coupled, or with the penalty in the loss, a
    large lambda diverges: set ``max_lambda`` below where it does. Whatever changes the learning rate may go on doing
    so; the forgetting of a constant, high rate fluctuates from step to step, which lambda cannot take away.

    Args:
        ewc: The penalty, in use with an optimizer or in the loss. Its ``ewc_lambda``, above 0, is where lambda starts;
            the budget finds the right one from any within a few powers of ten. Nothing is done before a consolidate.
        max_forgetting: The budget: nats per sample or token, above 0.
        probe: Returns the forgetting as a number or 0-dim tensor: a :class:`ewc_fast.ForgettingProbe`, made after the
            last consolidate and before training goes on, or any callable. None for the prediction alone.
        every: Steps between two measurements. A probe costs a forward pass over its samples.
        max_lambda: Where lambda ends. A budget that is not met there is said, once.
        probe_every: From step ``every`` on, the probe is asked at one in so many of these steps; a reading pass takes
            its place at the others. For a probe that costs much.

    Attributes:
        ewc: The penalty.
        max_forgetting: The budget; may be set at any time.
        every: Steps between two measurements.
        max_lambda: Where lambda ends.
        probe_every: Of how many measurements one asks the probe (in the frameworks' callbacks it counts steps).

    Raises:
        TypeError: ``ewc`` is no EWCLoss, ``probe`` cannot be called, a number is no number.
        ValueError: A number is out of range, lambda is 0, there is no probe and the importances are no Fisher, or
            ``probe_every`` without one.
    """

    def __init__(
        self,
        ewc: EWCLoss,
        max_forgetting: float,
        probe: Callable[[], Tensor | float] | None = None,
        every: int = 25,
        *,
        max_lambda: float = 1e9,
        probe_every: int = 1,
    ) -> None:
        if not isinstance(ewc, EWCLoss):
            raise TypeError(f"ewc must be the EWCLoss whose lambda is to be set, got {type(ewc).__name__}")
        check_count(every, "every")
        check_count(probe_every, "probe_every")
        if probe is None and probe_every != 1:
            raise ValueError(f"probe_every is {probe_every}, but there is no probe: give one, or leave probe_every out")
        self.ewc = ewc
        self.max_forgetting = max_forgetting
        self.every = every
        self.probe_every = probe_every
        self.max_lambda = _positive("max_lambda", max_lambda, "set the largest lambda that the training bears")
        if ewc.ewc_lambda == 0:
            raise ValueError("ewc_lambda is 0, from which no factor leads away: start from ewc_lambda=100")
        if ewc.ewc_lambda > self.max_lambda:
            raise ValueError(f"ewc_lambda is {ewc.ewc_lambda:g}, above max_lambda={self.max_lambda:g}: lower it")
        self._said: set[str] = set()
        self._measurements: list[Measurement] = []
        self._probe: Callable[[], Tensor | float] | None = None
        self.restart(probe)

    @property
    def max_forgetting(self) -> float:
        """The budget, nats per sample or token."""
        return self._max_forgetting

    @max_forgetting.setter
    def max_forgetting(self, value: float) -> None:
        self._max_forgetting = _positive("max_forgetting", value, "set what the old task may lose, in nats")

    @property
    def forgetting(self) -> float:
        """The newest measurement, no scaled prediction: since the last consolidate, nats; 0.0 before the first."""
        return next((m.forgetting for m in reversed(self._measurements) if m.measured), 0.0)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """All measurements since the last consolidate."""
        return tuple(self._measurements)

    def logs(self) -> dict[str, Tensor | float]:
        """What to log: that of :meth:`ewc_fast.EWCLoss.logs`, ``ewc/lambda``, and with a probe the newest measurement,
        ``ewc/measured_forgetting``. Neither measures nor synchronises."""
        logs: dict[str, Tensor | float] = {**self.ewc.logs(), "ewc/lambda": self.ewc.ewc_lambda}
        if self._probe is not None:
            logs["ewc/measured_forgetting"] = self.forgetting
        return logs

    def restart(self, probe: Callable[[], Tensor | float] | None = None) -> None:
        """Counts forgetting from the present weights on; lambda stays. For after a consolidate, before the next step.

        Without it :meth:`step` notices a consolidate by itself, but one step late, and asks the old probe.

        Args:
            probe: The new probe; None to go on with the present one, if there is one.

        Raises:
            TypeError: The probe cannot be called.
            ValueError: There is no probe, and the importances are no Fisher.
        """
        if probe is not None and not callable(probe):
            raise TypeError(
                f"probe must be callable without arguments, as ForgettingProbe(model, samples) is, or None; got "
                f"{type(probe).__name__}"
            )
        self._probe = self._probe if probe is None else probe
        info = self.ewc.info
        if self._probe is None and info is not None and not info.get("is_fisher", True):
            raise ValueError(
                f"the importances ({info.get('kind')}) are no Fisher, what they predict is not in nats: give a probe"
            )
        self._num_tasks = self.ewc.num_tasks
        self._steps = 0
        self._error: float | None = None
        self._per_predicted: float | None = None  # what the probe said last, for a nat of the prediction then
        self._measurements.clear()
        self._baseline = self._look() if self._num_tasks else 0.0
        if math.isinf(self._baseline):
            raise ValueError("the forgetting is infinite to start with: the probe does not fit the present weights")

    def step(self) -> float | None:
        """Counts an optimizer step; on some of them, measures and sets lambda.

        Returns:
            Lambda, where it was set; None on the other steps.

        Raises:
            ValueError: The forgetting is NaN.
        """
        if self.ewc.num_tasks != self._num_tasks:
            self.restart()
            return None
        if not self._num_tasks:
            return None
        self._steps += 1
        if self._steps % self.every and (self._steps > self.every or self._steps & (self._steps - 1)):
            return None
        measured = self._is_due()
        if measured:
            forgetting = self._look() - self._baseline
            if self.probe_every != 1:
                predicted = self._predicted()
                ratio = forgetting / predicted if predicted > 0 else 0.0
                self._per_predicted = ratio if 0 < ratio < math.inf else None
        else:
            assert self._per_predicted is not None
            forgetting = self._per_predicted * _not_nan(self._predicted())
        self.ewc.ewc_lambda = ewc_lambda = self._next_lambda(forgetting)
        self._measurements.append(Measurement(self._steps, forgetting, ewc_lambda, measured))
        self._say_what_is_wrong()
        return ewc_lambda

    def _is_due(self) -> bool:
        """Whether the probe is to be asked, if there is one."""
        number = self._steps // self.every
        return self._per_predicted is None or self._steps % self.every > 0 or (number - 1) % self.probe_every == 0

    def _look(self) -> float:
        """What the probe says, or the prediction at the present weights. Synchronises."""
        if self._probe is None:
            return _not_nan(self._predicted())
        said = self._probe()
        try:
            value = float(said)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"probe must return a number or 0-dim tensor, got {type(said).__name__}") from error
        return _not_nan(value)

    def _predicted(self) -> float:
        """At the present weights: what the optimizer's own pass predicts, is from before its pull."""
        with torch.no_grad():
            results = self.ewc._run(self.ewc._parts, lambda part: [(part, self.ewc._value(part))])
        return float(self.ewc._total([r.predicted for _, r in results])) if results else 0.0

    def _next_lambda(self, forgetting: float) -> float:
        aim = self.max_forgetting
        last = self._measurements[-1] if self._measurements else Measurement(0, 0.0, self.ewc.ewc_lambda)
        elapsed = self._steps - last.step
        to_next = self.every if self._steps >= self.every else min(self._steps, self.every - self._steps)
        root = math.sqrt(max(forgetting, 0.0))
        ahead = (root + max(root - math.sqrt(max(last.forgetting, 0.0)), 0.0) * to_next / elapsed) ** 2
        expected = max(forgetting, ahead) if forgetting < 0.8 * aim else forgetting
        error = math.log(expected / aim) if expected > 0 else _LOWEST
        error = min(max(error, _LOWEST), _HIGHEST)
        if error < 0:
            move = _INTEGRAL * error * min(elapsed / self.every, 1.0)
        else:
            move = _INTEGRAL * min(error, _FAST) + max(error - _FAST, 0.0)
        if self._error is not None:
            move += _PROPORTIONAL * (error - self._error)
        self._error = error
        return min(max(self.ewc.ewc_lambda, _SMALLEST_LAMBDA) * math.exp(move), self.max_lambda)

    def _say_what_is_wrong(self) -> None:
        if not self._measurements[-1].measured:
            return
        recent = [m for m in self._measurements if m.measured][-_STUCK:]
        lowest = min(m.forgetting for m in recent)
        if (
            len(recent) == _STUCK
            and all(m.ewc_lambda == self.max_lambda and m.forgetting > self.max_forgetting for m in recent)
            and recent[-1].forgetting > 0.95 * recent[0].forgetting
        ):
            self._say_once(
                "cannot",
                f"max_forgetting={self.max_forgetting:g} nats is not met by any lambda up to max_lambda="
                f"{self.max_lambda:g}, at which the forgetting is {lowest:.3g}: allow as much, lower the learning "
                "rate, protect more (damping, params), or raise max_lambda",
            )
        error = getattr(self._probe, "standard_error", None)
        if error is not None and recent[-1].forgetting < 1.5 * self.max_forgetting:
            share = float(error) / self.max_forgetting
            if share > _LARGE_ERROR:
                self._say_once(
                    "error",
                    f"the probe's standard error is {share:.0%} of max_forgetting={self.max_forgetting:g}, so that the "
                    f"budget is kept no better than that: {math.ceil((share / 0.1) ** 2)} times the samples would make "
                    "it 10%",
                )

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, UserWarning, stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Where the feedback stands, lambda included, as plain values; the arguments and the probe are no part of it.

        To go on exactly, a probe has to know what the model said then: make it anew at the old task's weights, or
        pickle it.
        """
        return {
            "ewc_lambda": self.ewc.ewc_lambda,
            "num_tasks": self._num_tasks,
            "steps": self._steps,
            "baseline": self._baseline,
            "error": self._error,
            "per_predicted": self._per_predicted,
            "measurements": [list(m) for m in self._measurements],
            "said": sorted(self._said),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave, and sets lambda; load the EWCLoss's own state too before :meth:`step`.

        Raises:
            ValueError: It is no state of a budget. Nothing has been changed then.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != expected:
            raise ValueError(f"this is no state of an EWCBudget, which has the entries {', '.join(expected)}")
        try:
            measurements = [
                Measurement(int(step), float(f), float(x), bool(measured))
                for step, f, x, measured in state["measurements"]
            ]
            num_tasks, steps, baseline = int(state["num_tasks"]), int(state["steps"]), float(state["baseline"])
            last_error, per_predicted = (
                None if state[key] is None else float(state[key]) for key in ("error", "per_predicted")
            )
            said = {str(what) for what in state["said"]}
            ewc_lambda = check_lambda(state["ewc_lambda"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"this is no state of an EWCBudget: {error}") from error
        self.ewc.ewc_lambda = ewc_lambda
        self._num_tasks, self._steps, self._baseline = num_tasks, steps, baseline
        self._error, self._measurements, self._said = last_error, measurements, said
        self._per_predicted = per_predicted

    def __repr__(self) -> str:
        what = "prediction" if self._probe is None else "probe"
        return (
            f"EWCBudget(max_forgetting={self.max_forgetting:g}, by the {what}, every={self.every}, "
            f"max_lambda={self.max_lambda:g}, forgetting={self.forgetting:.3g}, ewc_lambda={self.ewc.ewc_lambda:.3g})"
        )


def _not_nan(forgetting: float) -> float:
    if math.isnan(forgetting):
        raise ValueError(
            "the forgetting is NaN: the training has diverged. Lower the learning rate, or take "
            "coupling='proximal', which is stable for every lambda"
        )
    return forgetting


def _positive(name: str, value: float, remedy: str) -> float:
    try:
        if isinstance(value, (bool, str)):  # of which float() makes numbers
            raise TypeError
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} must be finite and above 0, got {value!r}: {remedy}")
    return number
