"""What an estimate returns: the diagonal by parameter name, and the facts that give its numbers a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class FisherInfo:
    """How a Fisher diagonal was made.

    Attributes:
        kind: Where the labels came from, e.g. ``"sampled"``; or which other importance it is.
        loss: Whose Fisher it is, e.g. ``"cross_entropy"``.
        unit: The term of the mean loss that one unit of the Fisher belongs to: ``"sample"``, ``"label"``, ``"token"``;
            ``"term"`` where the optimizer's own is not known, ``"none"`` where the unit is lost.
        num_samples: Number of samples used; 0 where that is not known.
        num_terms: Number of terms of the mean that were counted: equal to ``num_samples`` where the unit is the sample.
        batch_size: Samples in the largest batch; 0 where that is not known.
        method: How the gradients were taken: ``"hooks"``, ``"vmap"`` or ``"loop"`` (all per sample, equal up to
            rounding; the slowest that a parameter needed), ``"batch"`` (one gradient per batch), ``"optimizer"``,
            ``"path"``, ``"constant"``; then what was done to it, e.g. ``"+clip"``.
        is_fisher: False for other importances (negated logits, constant ones, path integrals): a forgetting predicted
            from those has no unit.
    """

    kind: str
    loss: str
    unit: str
    num_samples: int
    num_terms: int
    batch_size: int
    method: str
    is_fisher: bool = True

    def to_dict(self) -> dict[str, str | int | bool]:
        """The same as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FisherInfo:
        """Builds the record from what :meth:`to_dict` gave.

        Raises:
            ValueError: A field is missing, unknown or of the wrong type.
        """
        types = {field.name: {"str": str, "int": int, "bool": bool}[str(field.type)] for field in fields(cls)}
        if set(values) - {"is_fisher"} != set(types) - {"is_fisher"}:
            raise ValueError(f"Fisher info must have the fields {sorted(types)}, got {sorted(values)}")
        for name, value in values.items():
            if type(value) is not types[name]:
                raise ValueError(f"Fisher info: {name} must be {types[name].__name__}, got {value!r}")
        return cls(**values)


class FisherDiagonal(Mapping[str, Tensor]):
    """A read-only mapping from parameter name to Fisher diagonal.

    Args:
        tensors: Diagonals by the model's own parameter names, each shaped like its parameter.
        info: How they were made; None where that is not known.
    """

    def __init__(self, tensors: Mapping[str, Tensor], info: FisherInfo | None = None) -> None:
        self._tensors = dict(tensors)
        self._info = info

    @property
    def info(self) -> FisherInfo | None:
        """How the diagonals were made; None where that is not known."""
        return self._info

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        values = sum(tensor.numel() for tensor in self._tensors.values())
        return f"{type(self).__name__}({len(self)} tensors, {values} values, info={self._info})"
