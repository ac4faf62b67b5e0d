"""What finished tasks leave behind: one anchor and one Fisher diagonal, flat, and the rules by which tasks merge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc_fast.layout import Group, Slot, check_materialised, check_whole, make_groups
from ewc_fast.ops.memory import same_memory_order
from ewc_fast.ops.types import STATE_DTYPES

MODES = ("separate", "online", "latest")
FORMAT = 1


class SlotMapping(Mapping[str, Tensor]):
    """A read-only mapping from names to views into flat buffers, shaped like the parameters."""

    def __init__(self, views: dict[str, Tensor]) -> None:
        self._views = views

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._views)})"


@dataclass
class GroupState:
    """A group's flat buffers.

    Attributes:
        group: Which parameters, and where they lie.
        anchor: theta*, flat.
        fisher: The Fisher diagonal, flat.
        constant: C of each parameter, fp64 (see :meth:`EWCState.consolidate`).
    """

    group: Group
    anchor: Tensor
    fisher: Tensor
    constant: Tensor


def check_state_dtype(dtype: torch.dtype | None, name: str) -> torch.dtype | None:
    """A dtype that state may be kept in, or None.

    Raises:
        ValueError: It is not; fp16 is refused by name.
    """
    if dtype == torch.float16:
        raise ValueError(f"{name}=torch.float16 zeroes small Fisher entries and overflows: use bfloat16 or float32")
    if dtype is not None and dtype not in STATE_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float64, got {dtype}")
    return dtype


class EWCState:
    """Anchor and Fisher diagonal of the tasks so far.

    Args:
        mode: ``"separate"``, ``"online"`` or ``"latest"``.
        gamma: How much of the old Fisher stays at a merge, online mode only (Schwarz et al. 2018).
        fisher_dtype: None for the parameters' own (fp32 for fp16), or fp64, fp32 or bf16.
        anchor_dtype: None for the parameters' own (fp32 for fp16, and for bf16 once two tasks were merged in separate
            mode: a merged anchor is no bf16 number), or fp64, fp32 or bf16.

    Raises:
        ValueError: A mode, gamma or dtype that does not exist.
    """

    def __init__(
        self,
        mode: str = "separate",
        gamma: float = 1.0,
        fisher_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        if gamma != 1.0 and mode != "online":
            raise ValueError(f"gamma={gamma} has a meaning in mode='online' only; mode is {mode!r}")
        self.mode = mode
        self.gamma = gamma
        self.fisher_dtype = check_state_dtype(fisher_dtype, "fisher_dtype")
        self.anchor_dtype = check_state_dtype(anchor_dtype, "anchor_dtype")
        self.groups: list[GroupState] = []
        self.num_tasks = 0
        self.info: dict[str, Any] | None = None  # how the newest Fisher was estimated

    # ---- reading ----

    def _views(self, which: Callable[[GroupState], Tensor]) -> SlotMapping:
        return SlotMapping({s.name: s.view(which(g)) for g in self.groups for s in g.group.slots})

    @property
    def fisher(self) -> SlotMapping:
        """The Fisher diagonal by name, as views."""
        return self._views(lambda g: g.fisher)

    @property
    def anchor(self) -> SlotMapping:
        """theta* by name, as views."""
        return self._views(lambda g: g.anchor)

    @property
    def constants(self) -> dict[str, float]:
        """C by name. Synchronises."""
        return {s.name: c for g in self.groups for s, c in zip(g.group.slots, g.constant.tolist(), strict=True)}

    def mean_fisher(self) -> float:
        """The mean of the Fisher diagonal over all protected elements. Synchronises."""
        total, count = 0.0, 0
        for g in self.groups:
            for slot in g.group.slots:
                total += float(slot.view(g.fisher).sum(dtype=torch.float64))
                count += slot.numel
        return total / count if count else 0.0

    # ---- following the model ----

    def matches(self, params: Mapping[str, Tensor]) -> bool:
        """Whether the buffers still fit the tensors: the same names, devices, dtypes, shapes and memory order."""
        slots = {s.name: (s, g.group) for g in self.groups for s in g.group.slots}
        return slots.keys() == params.keys() and all(
            p.device == group.device
            and p.dtype == group.dtype
            and p.shape == slot.shape
            and same_memory_order(p, slot.strides)
            for p, (slot, group) in ((p, slots[name]) for name, p in params.items())
        )

    def follow(self, params: Mapping[str, Tensor]) -> None:
        """Lays the state anew for tensors that moved, changed their dtype or memory order, or went away.

        Args:
            params: The protected part of each parameter by name; shapes as in the state.
        """
        self._relay(params, widen_anchor=False)

    def _relay(self, params: Mapping[str, Tensor], *, widen_anchor: bool) -> None:
        """New buffers for ``params``, filled from the old ones where a name is known; new elements have no Fisher."""
        old = {s.name: (s, g, i) for g in self.groups for i, s in enumerate(g.group.slots)}
        groups = []
        for group in make_groups(params):
            known = [old[s.name][1] for s in group.slots if s.name in old]
            fisher = self._allocate(group, self.fisher_dtype, [g.fisher.dtype for g in known])
            kept = [g.anchor.dtype for g in known]
            if widen_anchor and self.anchor_dtype is None and group.dtype != torch.float64:
                kept = [torch.promote_types(d, torch.float32) for d in kept]
            anchor = self._allocate(group, self.anchor_dtype, kept)
            constant = torch.zeros(len(group.slots), dtype=torch.float64, device=group.device)
            for i, slot in enumerate(group.slots):
                if slot.name not in old:
                    continue
                source, g, j = old[slot.name]
                for flat, target in ((g.fisher, fisher), (g.anchor, anchor)):
                    whole = slot.view(target)
                    part = whole[: source.shape[0]] if source.shape else whole  # a parameter may have grown
                    part.copy_(source.view(flat))
                constant[i] = g.constant[j]
            groups.append(GroupState(group, anchor, fisher, constant))
        self.groups = groups

    @staticmethod
    def _allocate(group: Group, wanted: torch.dtype | None, kept: list[torch.dtype]) -> Tensor:
        """A zeroed flat buffer: in the dtype asked for, else the widest of the group's own and its content's so far."""
        dtype = wanted
        if dtype is None:
            dtype = torch.float32 if group.dtype == torch.float16 else group.dtype
            for other in kept:
                dtype = torch.promote_types(dtype, other)
        return torch.zeros(group.numel, dtype=dtype, device=group.device)

    # ---- merging ----

    def lay_first(self, params: Mapping[str, Tensor]) -> SlotMapping | None:
        """Before the first task: its Fisher's place, so that it can be estimated there, without a copy of it beside.

        None if there have been tasks, or the state is kept in other dtypes than an estimate is made in. ``groups`` is
        another list after it, to be put back if the task fails.
        """
        if self.num_tasks:
            return None
        if any(self.fisher_dtype not in (None, torch.promote_types(p.dtype, torch.float32)) for p in params.values()):
            return None
        if self.fisher_dtype is None and any(p.dtype == torch.bfloat16 for p in params.values()):
            return None
        self._relay(params, widen_anchor=False)
        return self.fisher

    @torch.no_grad()
    def consolidate(
        self,
        params: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Folds a finished task in.

        ``separate``: the sum of one quadratic per task is again one quadratic plus a constant, so it is kept exactly:
        ``F = Fa + Fb``, ``theta* = (Fa ta + Fb tb) / F`` (``tb`` where F is 0), and C grows by
        ``sum Fa Fb / F (ta - tb)^2``. ``online`` (Schwarz et al. 2018): ``F = gamma F + Fb``, ``theta* = tb``.
        ``latest``: ``F = Fb``, ``theta* = tb``.

        Args:
            params: The parameters by name, as they are now: their shapes, devices and memory order.
            fisher: The new task's Fisher diagonal, for every name in ``params``.
            anchor: The weights at the end of the new task, likewise.
            frozen: Parameters that the new task could not change: what is known of them stays. In ``latest`` mode,
                which knows the newest task alone, they are dropped.

        Raises:
            ValueError: A shape does not fit or changed by more than added rows, a Fisher entry is negative, NaN or
                infinite, or an anchor is not finite. Nothing has been written then.
        """
        known = self.fisher if self.num_tasks else {}  # once: it is made anew at every access
        for name, p in params.items():
            if name in known:
                protected_part(name, p, known[name].shape)
            _check_entry("Fisher", name, fisher[name], p, non_negative=True)
            _check_entry("anchor", name, anchor[name], p, non_negative=False)
            self._check_range(name, p, fisher[name], anchor[name], known.get(name))
        laid = dict(params)
        for name, p in (frozen or {}).items() if self.mode != "latest" else ():
            if name in known:
                laid[name] = protected_part(name, p, known[name].shape)
        merging = self.mode == "separate" and self.num_tasks > 0
        if merging or not self.matches(laid):
            self._relay(laid, widen_anchor=merging)
        for g in self.groups:
            for i, slot in enumerate(g.group.slots):
                if slot.name in params:
                    self._fold(g, i, slot, fisher[slot.name], anchor[slot.name])
                elif self.mode == "online":
                    slot.view(g.fisher).mul_(self.gamma)
        self.num_tasks += 1

    def _check_range(self, name: str, p: Tensor, fisher: Tensor, anchor: Tensor, old_fisher: Tensor | None) -> None:
        """Raises where the state's dtypes would overflow. A sum of Fishers is bounded by the sum of their maxima."""
        if not p.numel():
            return
        own = torch.float32 if p.dtype == torch.float16 else p.dtype
        largest = float(fisher.max())
        if self.mode != "latest" and old_fisher is not None and old_fisher.numel():
            largest += self.gamma * float(old_fisher.max())
        for what, wanted, value in (
            ("Fisher", self.fisher_dtype, largest),
            ("anchor", self.anchor_dtype, float(anchor.abs().max())),
        ):
            if value > torch.finfo(wanted or own).max:
                raise ValueError(
                    f"{what} of {name!r} reaches {value:g}, more than {wanted or own} holds: rescale it, or set "
                    f"{what.lower()}_dtype=torch.float64"
                )

    def _fold(self, g: GroupState, i: int, slot: Slot, new_fisher: Tensor, new_anchor: Tensor) -> None:
        f, a = slot.view(g.fisher), slot.view(g.anchor)
        if self.mode == "online" and self.num_tasks:
            f.copy_(self.gamma * f.double() + new_fisher.to(f.device, torch.float64))  # may be f itself
            a.copy_(new_anchor)
        elif self.mode != "separate" or self.num_tasks == 0:
            if f.data_ptr() != new_fisher.data_ptr() or f.dtype != new_fisher.dtype:
                f.copy_(new_fisher)
            elif f.stride() != new_fisher.stride():  # a transposed view of itself
                f.copy_(new_fisher.clone())
            a.copy_(new_anchor)
        else:
            fa, ta = f.double(), a.double()
            fb, tb = new_fisher.to(f.device, torch.float64), new_anchor.to(f.device, torch.float64)
            total = fa + fb
            share = torch.where(total > 0, fb / total, torch.ones_like(total))  # of the newer task
            g.constant[i] += (fa * share * (ta - tb).square()).sum()  # first: fp64 state is fa and ta themselves
            f.copy_(total)
            a.copy_(torch.lerp(ta, tb, share))  # exactly tb where share is 1

    # ---- as plain data ----

    def state_dict(self) -> dict[str, Any]:
        """Tensors (row-major copies) and plain values; loads with ``torch.load(weights_only=True)``."""
        return {
            "format": FORMAT,
            "mode": self.mode,
            "gamma": self.gamma,
            "num_tasks": self.num_tasks,
            "info": self.info,
            "constant": self.constants,
            "fisher": {name: t.clone(memory_format=torch.contiguous_format) for name, t in self.fisher.items()},
            "anchor": {name: t.clone(memory_format=torch.contiguous_format) for name, t in self.anchor.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Replaces the state by a saved one.

        Args:
            state: What :meth:`state_dict` returned.
            params: The parameters by name, as they are now, that the state may be about.

        Raises:
            ValueError: It is no such state, was made in another mode or with another gamma, or does not fit the model.
                Nothing has been written then.
        """
        _check_saved(state, self.mode, self.gamma)
        fisher, anchor, constant = state["fisher"], state["anchor"], state["constant"]
        protected = {}
        for name in fisher:
            if name not in params:
                raise ValueError(
                    f"the state protects {name!r}, which is not among the parameters to protect here "
                    f"({', '.join(list(params)[:3])} ...): load it into the model it was saved from"
                )
            for what, t in (("Fisher", fisher[name]), ("anchor", anchor[name])):
                if not isinstance(t, Tensor) or t.dtype not in STATE_DTYPES:
                    kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
                    raise ValueError(f"the state's {what} of {name!r} is {kind}; float64, float32 or bfloat16 expected")
            p = protected_part(name, params[name], fisher[name].shape)
            _check_entry("Fisher", name, fisher[name], p, non_negative=True)
            _check_entry("anchor", name, anchor[name], p, non_negative=False)
            protected[name] = p
        groups = []
        for group in make_groups({name: protected[name] for name in params if name in protected}):
            names = [s.name for s in group.slots]
            loaded = GroupState(
                group,
                self._allocate(group, self.anchor_dtype, [anchor[n].dtype for n in names]),
                self._allocate(group, self.fisher_dtype, [fisher[n].dtype for n in names]),
                torch.tensor([float(constant[n]) for n in names], dtype=torch.float64, device=group.device),
            )
            for slot in group.slots:
                slot.view(loaded.fisher).copy_(fisher[slot.name])
                slot.view(loaded.anchor).copy_(anchor[slot.name])
            groups.append(loaded)
        self.groups, self.num_tasks, self.info = groups, state["num_tasks"], state["info"]


def protected_part(name: str, p: Tensor, shape: torch.Size) -> Tensor:
    """The part of a parameter that the state protects: all of it, or the old rows of one that has grown.

    Raises:
        ValueError: The shape changed otherwise, or the parameter is sharded or on the meta device.
    """
    check_materialised(name, p)
    if p.shape == shape:
        return p
    if p.dim() > 0 and p.dim() == len(shape) and p.shape[1:] == shape[1:] and p.shape[0] > shape[0]:
        return p.detach()[: shape[0]]
    check_whole(name, p)
    raise ValueError(
        f"{name} has shape {tuple(p.shape)}, its anchor {tuple(shape)}: only rows may be added; for a new layer, give "
        "it another name"
    )


def _check_entry(what: str, name: str, t: Tensor, p: Tensor, *, non_negative: bool) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{what} of {name!r} is a {type(t).__name__}, expected a tensor")
    if t.shape != p.shape:
        raise ValueError(f"{what} of {name!r} has shape {tuple(t.shape)}, the parameter {tuple(p.shape)}")
    if what == "Fisher" and t.dtype == torch.float16:
        raise ValueError(f"Fisher of {name!r} is float16, which zeroes small entries: estimate it in float32")
    if not t.is_floating_point() or t.layout != torch.strided or t.itemsize < 2:
        raise ValueError(f"{what} of {name!r} must be a dense floating point tensor, got {t.dtype}, {t.layout}")
    check_materialised(f"{what} of {name!r}", t)
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"{what} of {name!r} has NaN or infinite entries: was the training or the estimate unstable?")
    if non_negative and bool((t < 0).any()):
        raise ValueError(f"{what} of {name!r} has negative entries; a Fisher diagonal is a mean of squares")


def _check_saved(state: Mapping[str, Any], mode: str, gamma: float) -> None:
    keys = {"format", "mode", "gamma", "num_tasks", "info", "constant", "fisher", "anchor"}
    if not isinstance(state, Mapping) or not keys <= state.keys():
        missing = sorted(keys - set(state)) if isinstance(state, Mapping) else sorted(keys)
        raise ValueError(f"this is no EWC state: {', '.join(missing)} missing")
    if state["format"] != FORMAT:
        raise ValueError(f"the state has format {state['format']}, this version reads {FORMAT}: update ewc_fast")
    for name, mine, saved in (("mode", mode, state["mode"]), ("gamma", gamma, state["gamma"])):
        if mine != saved:
            raise ValueError(f"the state was made with {name}={saved!r}, this EWCLoss has {mine!r}: make it the same")
    named = [state[key] for key in ("fisher", "anchor", "constant")]
    if not all(isinstance(m, Mapping) for m in named) or not named[0].keys() == named[1].keys() == named[2].keys():
        raise ValueError("the state's Fisher, anchor and constants name different parameters: the file is damaged")
    if type(state["num_tasks"]) is not int or state["num_tasks"] < (1 if named[0] else 0):
        raise ValueError(f"the state's num_tasks is {state['num_tasks']!r}: the file is damaged")
    if state["info"] is not None and not isinstance(state["info"], Mapping):
        raise ValueError(f"the state's info is {state['info']!r}: the file is damaged")
    for name, c in state["constant"].items():
        if not isinstance(c, (int, float)) or not 0.0 <= c <= sys.float_info.max:
            raise ValueError(f"the state's constant of {name!r} is {c!r}: the file is damaged")
