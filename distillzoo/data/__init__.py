"""Data sets and their loaders."""

from distillzoo.data import cifar100 as _cifar100  # noqa: F401  registers itself
from distillzoo.data import digits as _digits  # noqa: F401
from distillzoo.data import folder as _folder  # noqa: F401
from distillzoo.data import packed as _packed  # noqa: F401
from distillzoo.data import synthetic as _synthetic  # noqa: F401
from distillzoo.data.arrays import Augment, Split, crop_flip, normalise
from distillzoo.data.base import DATASETS, SPLITS, DataSet, ResidentDataSet, SplitName, load_dataset, training_spec
from distillzoo.data.loader import ResidentLoader

__all__ = [
    "DATASETS",
    "SPLITS",
    "Augment",
    "DataSet",
    "ResidentDataSet",
    "ResidentLoader",
    "Split",
    "SplitName",
    "crop_flip",
    "load_dataset",
    "normalise",
    "training_spec",
]
