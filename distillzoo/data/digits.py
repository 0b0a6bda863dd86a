"""scikit-learn's digits: 1,797 handwritten digits of 8x8 pixels that come with the package."""

from __future__ import annotations

import torch

from distillzoo.data.arrays import Augment, Split
from distillzoo.data.base import DATASETS, ResidentDataSet, SplitName, training_spec
from distillzoo.data.splits import hold_out, keep_first, set_aside
from distillzoo.errors import MissingDependencyError, OptionError

__all__ = ["digits"]

_TRAIN_PER_CLASS = 120  # 1,200 of the 1,797 images; the other 597 are the test set
_HELD_OUT_PER_CLASS = 30
_MEAN, _STD = (0.306,) * 3, (0.376,) * 3  # of the 1,200 training images


@DATASETS.register("digits")
def digits(*, split: SplitName = "test", labels_per_class: int | None = None) -> ResidentDataSet:
    """Load scikit-learn's digits as 8x8 images of three equal channels.

    E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.

    120 images of every class train and the other 597 test, chosen once. The images that ``split="heldout"`` holds out do not
    depend on ``labels_per_class``, and with it both splits train on the very same images.

    Args:
        split: What networks are evaluated on; ``"heldout"`` holds 30 training images of every class out.
        labels_per_class: Training images to keep of every class, 1 .. 120 (90 with ``"heldout"``); ``None`` keeps all.
    Raises:
        MissingDependencyError: If scikit-learn is not installed.
        OptionError: If ``labels_per_class`` is out of range.
    """
    most = _TRAIN_PER_CLASS - (_HELD_OUT_PER_CLASS if split == "heldout" else 0)
    if labels_per_class is not None and (type(labels_per_class) is not int or not 1 <= labels_per_class <= most):
        raise OptionError(
            f"labels_per_class of digits must be 1 to {most} with split {split!r}, or None for all; got {labels_per_class!r}; "
            "choose a number in that range."
        )
    everything = _read()
    others = torch.bincount(everything.targets) - _TRAIN_PER_CLASS
    train, evaluation = map(everything.take, set_aside(everything.targets, others, "digits", "test"))
    full = train
    if split == "heldout":
        train, evaluation = hold_out(full, _HELD_OUT_PER_CLASS, "digits", "heldout")
    if labels_per_class is not None:
        train = keep_first(full, labels_per_class, "digits", "heldout")
    return ResidentDataSet(
        name="digits",
        title="scikit-learn digits",
        split=split,
        class_names=tuple("0123456789"),
        spec=training_spec(train, 10, _MEAN, _STD),
        augment=Augment(pad=1, flip=False),
        train=train,
        evaluation=evaluation,
    )


def _read() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "The data set 'digits' comes with scikit-learn, which is not installed; "
            'run pip install "distillzoo[benchmarks]", or choose the data set synthetic.'
        ) from error
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)  # values come as 0..16
    return Split(grey.unsqueeze(-1).expand(-1, -1, -1, 3), torch.from_numpy(bunch.target).to(torch.int64))
