"""Diagonals of the Fisher information: how much the loss depends on each weight."""

from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.fisher.estimate import estimate_fisher

__all__ = ["FisherDiagonal", "FisherInfo", "estimate_fisher"]
