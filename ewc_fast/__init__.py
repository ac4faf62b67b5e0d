"""Fused CUDA/C++ Elastic Weight Consolidation (EWC) for PyTorch."""

from importlib.metadata import version

from ewc_fast.budget import EWCBudget
from ewc_fast.conventions import ConvertedLambda, convert_lambda
from ewc_fast.fisher import FisherDiagonal, FisherEstimator, FisherInfo, estimate_fisher
from ewc_fast.forgetting import ForgettingProbe
from ewc_fast.functional import ewc_loss, ewc_penalty
from ewc_fast.loss import EWCLoss
from ewc_fast.optim.adamw import EWCAdamW
from ewc_fast.optim.sgd import EWCSGD
from ewc_fast.sequences import sample_sequences
from ewc_fast.training import train

__version__ = version("ewc-fast")

__all__ = [
    "ConvertedLambda",
    "EWCAdamW",
    "EWCBudget",
    "EWCLoss",
    "EWCSGD",
    "FisherDiagonal",
    "FisherEstimator",
    "FisherInfo",
    "ForgettingProbe",
    "convert_lambda",
    "estimate_fisher",
    "ewc_loss",
    "ewc_penalty",
    "sample_sequences",
    "train",
]
