"""Folders of made-up images for tests, and what they are read with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distillzoo.data import load_dataset
from distillzoo.errors import DataError

CLASSES = ("ant", "bee", "cow")
SMALL = {"crop": 16, "workers": 0}


def picture(seed: int, height: int = 40, width: int = 52) -> Image.Image:
    """A smooth coloured image with an edge: so that a wrong window, size or order of channels shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    small.paste((250, 10, 90), (width // 3, height // 4, width // 2, height // 2))
    return small


def fill(root: Path, per_class: int = 4, classes=CLASSES, first: int = 0) -> Path:
    """Write one folder a class with images of different sizes."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            seed = first + 100 * label + number
            picture(seed, 36 + seed % 7, 40 + seed % 11).save(root / name / f"{number:03}.png")
    return root


def make_tree(root: Path, per_class: int = 4, evaluation: str = "val") -> Path:
    """Write train and evaluation folders."""
    fill(root / "train", per_class)
    fill(root / evaluation, 2, first=5000)
    return root


def images_of(batches, view: str = "images"):
    """The images of an epoch in data-set order."""
    batches = list(batches)
    index = torch.cat([batch.index for batch in batches])
    return torch.cat([getattr(batch, view) for batch in batches])[index.argsort()]


def refused(root: Path, *words: str, **options) -> None:
    """Expect one sentence with these words of a folder that cannot be loaded."""
    with pytest.raises(DataError) as caught:
        load_dataset("folder", root=root, **SMALL | options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
