"""Top-1 accuracy and cross-entropy of several predictors on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from distillzoo.engine.config import TrainConfig
from distillzoo.errors import OptionError
from distillzoo.types import Batch, Loader

__all__ = ["evaluate", "evaluate_all"]

Predictor = Callable[[Tensor], Tensor]


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of a configuration (switched off for float32)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def evaluate_all(
    predictors: Mapping[str, Predictor],
    loader: Loader,
    config: TrainConfig,
    device: torch.device,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Evaluate several predictors on the same batches.

    Args:
        predictors: Functions from images to logits by name; networks must be in eval mode.
        loader: The evaluation images, in order and without augmentation.
        config: Whose precision is used.
        device: Where the sums are kept; they reach the host once.
        failed: Told the name of a predictor that raised, and what: it is left out, and the others go on. ``None``: it is raised.
    Returns:
        By name: top-1 accuracy in per cent, and mean cross-entropy.
    Raises:
        OptionError: If the loader has no images.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in predictors}
    count = 0
    for batch in loader.epoch(0):
        count += len(batch.images)
        for name in tuple(sums):
            try:
                sums[name] += _scores(predictors[name], batch, config, device)
            except Exception as error:
                if failed is None:
                    raise
                del sums[name]
                failed(name, error)
    if not count:
        raise OptionError("The evaluation loader is empty: an epoch had no batch.")
    figures = {name: value.tolist() for name, value in sums.items()}
    return {name: (100.0 * correct / count, loss / count) for name, (correct, loss) in figures.items()}


def _scores(predict: Predictor, batch: Batch, config: TrainConfig, device: torch.device) -> Tensor:
    """Return the number of hits and the sum of the cross-entropy of a batch, float64."""
    with autocast(config, device):
        logits = predict(batch.images)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    correct = (logits.argmax(1) == batch.targets).sum()
    return torch.stack([correct.double(), F.cross_entropy(logits, batch.targets, reduction="sum").double()])


def evaluate(module: torch.nn.Module, loader: Loader, config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Evaluate one network in eval mode; the training flag of every part of it is put back.

    Args:
        module: A classifier on ``device``.
        loader: The evaluation images.
        config: Whose precision is used.
        device: The device.
    Returns:
        Top-1 accuracy in per cent, and mean cross-entropy.
    """
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        return evaluate_all({"module": module}, loader, config, device)["module"]
    finally:
        for part, training in flags:
            part.training = training
