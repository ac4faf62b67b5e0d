"""Diagonals of the Fisher information, and other importances: how much the loss depends on each weight."""

from ewc_fast.fisher.diagonal import FisherDiagonal, FisherInfo
from ewc_fast.fisher.estimate import estimate_fisher
from ewc_fast.fisher.estimator import FisherEstimator
from ewc_fast.fisher.from_optimizer import fisher_from_optimizer
from ewc_fast.fisher.importances import PathImportance, mas_importance, uniform_importance
from ewc_fast.fisher.transforms import average, clip, damp, normalize

__all__ = [
    "FisherDiagonal",
    "FisherEstimator",
    "FisherInfo",
    "PathImportance",
    "average",
    "clip",
    "damp",
    "estimate_fisher",
    "fisher_from_optimizer",
    "mas_importance",
    "normalize",
    "uniform_importance",
]
