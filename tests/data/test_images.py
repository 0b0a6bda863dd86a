"""Image files: every kind becomes RGB, and those that cannot be used are named or left out."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillzoo.data import images as images_module
from distillzoo.data import load_dataset
from distillzoo.data.images import read_image
from distillzoo.errors import DataError, OptionError
from tests.data.pictures import SMALL, images_of, make_tree, picture, refused


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "photos")


BAD = {
    "text.jpg": (lambda path: path.write_text("this is no image"), "no image of a known format"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "no image of a known format"),
    "float.tif": (lambda path: Image.fromarray(np.zeros((30, 30), np.float32)).save(path), "floating-point"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_file_is_named_and_can_be_left_out(tree, name):
    make, reason = BAD[name]
    file = tree / "train" / "bee" / name
    make(file)
    refused(tree, repr(str(file)), reason, "skip_bad=True")
    with pytest.warns(UserWarning, match=name):
        data = load_dataset("folder", root=tree, skip_bad=True, **SMALL)
    assert len(data.train) == 12
    assert "without 1 unusable file" in data.description
    assert len(images_of(data.train_loader(4, seed=0).epoch(0))) == 12


def test_several_bad_files_are_counted(tree):
    for number in range(3):
        (tree / "train" / "bee" / f"x{number}.jpg").write_text("no")
    refused(tree, "x0.jpg", "and 2 others")


def broken_off(tree: Path) -> Path:
    file = tree / "train" / "bee" / "zz.jpg"
    picture(5, 200, 200).save(file)
    file.write_bytes(file.read_bytes()[:-800])
    return file


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_off_is_named_when_its_turn_comes(tree, workers):
    file = broken_off(tree)
    loader = load_dataset("folder", root=tree, crop=16, workers=workers).train_loader(4, seed=0)
    with pytest.raises(DataError) as caught:
        list(loader.epoch(0))
    assert repr(str(file)) in str(caught.value)
    assert "truncated" in str(caught.value)
    assert "skip_bad=True" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_file_that_breaks_off_is_left_out_beforehand(tree):
    broken_off(tree)
    with pytest.warns(UserWarning, match=r"zz\.jpg"):
        data = load_dataset("folder", root=tree, skip_bad=True, **SMALL)
    assert len(data.train) == 12


def test_a_class_of_bad_files_alone_is_refused(tree):
    for file in (tree / "val" / "cow").iterdir():
        file.write_text("no image")
    with pytest.raises(DataError, match=r"No image of the class folder .*cow"):
        load_dataset("folder", root=tree, skip_bad=True, **SMALL)


def test_huge_images_are_refused(tree, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 10_000)
    picture(1, 101, 100).save(tree / "train" / "ant" / "huge.png")
    refused(tree, "huge.png", "100 x 101 pixels", "skip_bad")


def test_pillows_own_limit_is_a_sentence_too(tree, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    picture(1, 101, 100).save(tree / "train" / "ant" / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(tree, "bomb.png", "decompression bomb")


def test_a_file_without_permission_is_named(tree, monkeypatch):
    file = tree / "train" / "ant" / "000.png"
    file.chmod(0)
    try:
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        refused(tree, "000.png", "permission denied")
    finally:
        file.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_a_file_that_vanishes_or_changes_while_training_is_named(tree):
    loader = load_dataset("folder", root=tree, **SMALL).train_loader(4, seed=0)
    file = tree / "train" / "ant" / "000.png"
    picture(1, 99, 99).save(file)
    with pytest.raises(DataError, match=r"000\.png.*another size"):
        list(loader.epoch(0))
    file.unlink()
    with pytest.raises(DataError, match=r"000\.png.*no such file"):
        list(loader.epoch(0))


def saved(path: Path, image: Image.Image) -> np.ndarray:
    image.save(path)
    return np.asarray(read_image(path)).astype(int)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    colour = picture(2)
    original = np.asarray(colour).astype(int)
    grey = np.asarray(colour.convert("L")).astype(int)
    assert np.array_equal(saved(tmp_path / "a.png", colour.convert("L")), np.stack([grey] * 3, 2))
    assert np.array_equal(saved(tmp_path / "b.png", colour.convert("RGBA")), original)
    assert np.array_equal(saved(tmp_path / "c.png", Image.fromarray(grey.astype(np.uint16) * 257)), np.stack([grey] * 3, 2))
    assert np.array_equal(saved(tmp_path / "d.pgm", Image.fromarray(grey.astype(np.uint16) * 257)), np.stack([grey] * 3, 2))
    assert abs(saved(tmp_path / "e.jpg", colour.convert("CMYK")) - original).mean() < 6
    assert abs(saved(tmp_path / "f.png", colour.quantize(200)) - original).mean() < 12
    transparent = colour.quantize(16)
    transparent.info["transparency"] = bytes(range(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved(tmp_path / "g.png", transparent).shape == original.shape
    assert set(np.unique(saved(tmp_path / "h.png", colour.convert("1")))) == {0, 255}


def test_content_decides_and_not_the_name(tmp_path):
    picture(2).save(tmp_path / "really_a_png.jpg", format="PNG")
    assert np.array_equal(np.asarray(read_image(tmp_path / "really_a_png.jpg")), np.asarray(picture(2)))


@pytest.mark.parametrize("workers", [-1, 1.5, True])
def test_wrong_numbers_of_workers(tree, workers):
    with pytest.raises(OptionError, match="workers must be a whole number"):
        load_dataset("folder", root=tree, crop=16, workers=workers)


def test_a_worker_that_dies_is_a_sentence(tree, monkeypatch):
    monkeypatch.setattr("distillzoo.data.file_loader._Batches.__getitem__", lambda self, number: os._exit(9))
    loader = load_dataset("folder", root=tree, crop=16, workers=1).train_loader(4, seed=0)
    with pytest.raises(DataError, match="workers=0"):
        list(loader.epoch(0))
