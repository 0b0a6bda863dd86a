"""The one training loop: a group of distillers, one teacher pass, exact resume."""

from distillzoo.engine.config import TrainConfig
from distillzoo.engine.evaluation import evaluate, evaluate_all
from distillzoo.engine.reports import EpochReport, MemberResult, Observer, StepReport
from distillzoo.engine.trainer import Trainer

__all__ = [
    "EpochReport",
    "MemberResult",
    "Observer",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "evaluate_all",
]
