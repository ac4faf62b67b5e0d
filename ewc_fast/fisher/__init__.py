"""Diagonals of the Fisher information: how much the loss depends on each weight."""

from .diagonal import FisherDiagonal, FisherInfo
from .estimate import estimate_fisher

__all__ = ["FisherDiagonal", "FisherInfo", "estimate_fisher"]
