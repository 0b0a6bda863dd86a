"""Data sets and their loaders."""

from distillzoo.data import cifar100, digits, folder, imagenet100, packed, synthetic  # noqa: F401 - this registers them
from distillzoo.data.arrays import Augment, Split, crop_flip, normalise
from distillzoo.data.base import DATASETS, SPLITS, DataSet, ResidentDataSet, SplitName, load_dataset, takes_root, training_spec
from distillzoo.data.class_lists import CLASS_LISTS, ClassList, find_class_list, imagenet_rows, imagenet_wnids
from distillzoo.data.crops import CropViews, resize_each
from distillzoo.data.folder import FolderDataSet, folder_from_tree
from distillzoo.data.loader import ResidentLoader
from distillzoo.data.packed import PackedDataSet
from distillzoo.data.packing import pack_folder
from distillzoo.data.tree import read_tree

__all__ = [
    "CLASS_LISTS",
    "DATASETS",
    "SPLITS",
    "Augment",
    "ClassList",
    "CropViews",
    "DataSet",
    "FolderDataSet",
    "PackedDataSet",
    "ResidentDataSet",
    "ResidentLoader",
    "Split",
    "SplitName",
    "crop_flip",
    "find_class_list",
    "folder_from_tree",
    "imagenet_rows",
    "imagenet_wnids",
    "load_dataset",
    "normalise",
    "pack_folder",
    "read_tree",
    "resize_each",
    "takes_root",
    "training_spec",
]
