"""Diagonals of the Fisher information: how much the loss depends on each weight."""

from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.fisher.estimate import estimate_fisher
from ewc_fast.fisher.estimator import FisherEstimator

__all__ = ["FisherDiagonal", "FisherEstimator", "FisherInfo", "estimate_fisher"]
