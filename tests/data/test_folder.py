"""Image folders: layouts, views against torchvision's transforms, replay with any number of workers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from distillzoo.data import load_dataset
from distillzoo.data.tree import read_tree
from distillzoo.errors import DataError, OptionError
from tests.data.pictures import CLASSES, SMALL, fill, images_of, make_tree, picture, refused

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FINISH = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]  # the classic ones; v2's differ in the last bit of a float
EVALUATION = transforms.Compose([v2.Resize(18), v2.CenterCrop(16), *FINISH])


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "photos")


@pytest.mark.parametrize("evaluation", ["val", "validation", "test"])
def test_train_and_evaluation_folders_are_read_as_image_folder_reads_them(tmp_path, evaluation):
    root = make_tree(tmp_path, evaluation=evaluation)
    (root / "train" / "bee" / "more").mkdir()
    picture(77).save(root / "train" / "bee" / "more" / "x.JPG", format="JPEG")
    (root / "train" / "bee" / "notes.txt").write_text("no image")
    data = load_dataset("folder", root=root, **SMALL)
    theirs = ImageFolder(root / "train")
    assert data.class_names == tuple(theirs.classes) == CLASSES
    assert [
        (str(root / "train" / name), label) for name, label in zip(data.train.names, data.train.targets, strict=True)
    ] == theirs.samples
    assert (len(data.train), len(data.evaluation)) == (13, 6)
    assert data.spec.num_samples == 13
    assert data.spec.targets.tolist() == theirs.targets
    assert data.spec.input_size == (16, 16)
    assert data.description == f"{root.name} (image folder), 13 training and 6 test images"


def test_evaluation_equals_torchvisions_transforms(tree):
    data = load_dataset("folder", root=tree, **SMALL)
    theirs = ImageFolder(tree / "val", EVALUATION)
    batches = list(data.eval_loader(4).epoch(0))
    assert [len(batch.images) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack([image for image, _ in theirs]))
    assert torch.cat([batch.targets for batch in batches]).tolist() == theirs.targets
    assert data.eval_loader(4).spec.num_samples is None


def test_a_training_view_is_torchvisions_at_the_drawn_window(tree):
    data = load_dataset("folder", root=tree, **SMALL)
    images = images_of(data.train_loader(5, seed=3).epoch(2))
    windows = data.augment.draw(3, "first", "main", 2, torch.arange(12), data.train.sizes).tolist()
    assert len({window[4] for window in windows}) == 2
    for row, (top, left, height, width, flip) in enumerate(windows):
        with Image.open(tree / "train" / data.train.names[row]) as file:
            view = v2.functional.resized_crop(file.convert("RGB"), top, left, height, width, [16, 16])
        view = v2.functional.horizontal_flip(view) if flip else view
        assert torch.equal(images[row], transforms.Compose(FINISH)(view))


def test_views_do_not_depend_on_workers_batch_size_or_the_global_generator(tree):
    reference = None
    state = torch.random.get_rng_state()
    for workers, batch_size in [(0, 5), (1, 5), (2, 5), (2, 3), (0, 100)]:
        loader = load_dataset("folder", root=tree, crop=16, workers=workers).train_loader(batch_size, seed=1)
        batches = list(loader.epoch(1, second_view=True))
        found = [images_of(batches), images_of(batches, "second_view"), torch.cat([batch.index for batch in batches])]
        assert len(batches) == len(loader)
        reference = reference or found
        for ours, expected in zip(found, reference, strict=True):
            assert torch.equal(ours, expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(reference[0], reference[1])
    assert torch.equal(images_of(loader.epoch(1)), reference[0])


def test_epochs_cover_every_image_once_and_differ(tree):
    loader = load_dataset("folder", root=tree, **SMALL).train_loader(5, seed=1)
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert [len(batch.images) for batch in first] == [5, 5, 2]
    orders = [torch.cat([batch.index for batch in batches]) for batches in (first, second)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(12))
    assert not torch.equal(*orders)
    assert not torch.equal(images_of(first), images_of(second))
    for batch in first:
        assert torch.equal(batch.targets, load_dataset("folder", root=tree, **SMALL).spec.targets[batch.index])


def test_interleaved_epochs_do_not_disturb_each_other(tree):
    loader = load_dataset("folder", root=tree, crop=16, workers=1).train_loader(4, seed=1)
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for part, epoch in enumerate((0, 1)):
        assert torch.equal(images_of(pair[part] for pair in pairs), images_of(loader.epoch(epoch)))


def test_channels_last_changes_the_layout_alone(tree):
    data = load_dataset("folder", root=tree, **SMALL)
    batch = next(iter(data.train_loader(4, seed=0, channels_last=True).epoch(0)))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, next(iter(data.train_loader(4, seed=0).epoch(0))).images)


def test_one_tree_is_split_by_class_always_alike(tmp_path):
    root = fill(tmp_path / "all", per_class=10)
    data = load_dataset("folder", root=root, **SMALL)
    assert torch.bincount(data.train.targets).tolist() == [8, 8, 8]
    assert torch.bincount(data.evaluation.targets).tolist() == [2, 2, 2]
    assert not set(data.train.names) & set(data.evaluation.names)
    assert load_dataset("folder", root=root, **SMALL).evaluation.names == data.evaluation.names
    assert "a fifth split off" in data.description


def test_held_out_images_are_balanced_training_images(tmp_path):
    root = make_tree(tmp_path, per_class=20)
    for extra in range(15):
        picture(extra).save(root / "train" / "cow" / f"extra{extra}.png")
    data = load_dataset("folder", root=root, split="heldout", **SMALL)
    assert torch.bincount(data.evaluation.targets).tolist() == [2, 2, 2]
    assert torch.bincount(data.train.targets).tolist() == [18, 18, 33]
    assert data.evaluation.root == data.train.root == root / "train"
    assert not set(data.train.names) & set(data.evaluation.names)
    assert "held-out training" in data.description
    with pytest.raises(DataError, match="at least 2 are needed"):
        load_dataset("folder", root=make_tree(tmp_path / "one", per_class=1), split="heldout", **SMALL)


def test_the_digest_follows_content_and_not_place(tree, tmp_path):
    digest = load_dataset("folder", root=tree, **SMALL).digest
    assert len(digest) == 12
    moved = Path(shutil.copytree(tree, tmp_path / "elsewhere"))
    assert load_dataset("folder", root=moved, **SMALL).digest == digest
    file = moved / "val" / "cow" / "001.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert load_dataset("folder", root=moved, **SMALL).digest != digest
    shutil.copy(tree / "val" / "cow" / "001.png", file)
    (moved / "train" / "ant" / "003.png").rename(moved / "train" / "bee" / "0.png")
    assert load_dataset("folder", root=moved, **SMALL).digest != digest


def test_options_are_in_the_record_and_workers_are_not(tree):
    plain, other = (load_dataset("folder", root=tree, crop=16, **each) for each in ({"workers": 0}, {"workers": 2}))
    assert repr(plain.augment) == repr(other.augment)
    for change in ({"resize": 20}, {"mean": [0.5, 0.5, 0.5]}, {"std": [0.5, 0.5, 0.5]}):
        assert repr(load_dataset("folder", root=tree, crop=16, **change).augment) != repr(plain.augment)
    assert load_dataset("folder", root=tree, mean=[0.5] * 3, **SMALL).spec.mean == (0.5,) * 3


# ------------------------------------------------------------------ folders that are not as they should be


def test_wrong_roots(tmp_path, tree):
    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    refused(tree / "train" / "ant" / "000.png", "is a file")
    refused(tree.parent, "one level too high", str(tree))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no class folder")
    refused(tree / "train" / "ant", "no class folder", "4 images that lie in no class folder")
    with pytest.raises(OptionError, match="--data-root"):
        load_dataset("folder")


def test_train_without_evaluation_and_the_reverse(tmp_path):
    refused(fill(tmp_path / "a" / "train").parent, "none of val, validation, test", "/train'")
    refused(fill(tmp_path / "b" / "val").parent, "has val but no train")


def test_classes_that_differ(tree):
    (tree / "val" / "bee").rename(tree / "val" / "wasp")
    refused(tree, "only train has bee", "only val has wasp")
    assert read_tree(tree, classes=["cow", "ant"]).classes == ("cow", "ant")
    with pytest.raises(DataError, match=r"val.*lacks 1 of the 2 classes: bee"):
        read_tree(tree, classes=["bee", "ant"])
    with pytest.raises(OptionError, match="twice"):
        read_tree(tree, classes=["ant", "ant"])


def test_an_empty_class_folder_is_named(tree):
    for part in ("train", "val"):
        (tree / part / "dog").mkdir()
    refused(tree, "train/dog", "it is empty")
    (tree / "train" / "dog" / "rex.heic").write_bytes(b"x")
    refused(tree, "rex.heic", "rename")


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(tree, "bee", "Permission denied", "permissions")


def test_hidden_files_and_folders_are_other_programs_notes(tree):
    (tree / "train" / "ant" / "._000.png").write_bytes(b"not an image")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "ant" / ".thumbnails").mkdir()
    picture(1).save(tree / "train" / "ant" / ".thumbnails" / "000.png")
    assert len(load_dataset("folder", root=tree, **SMALL).train) == 12


def test_hidden_folders_are_not_even_looked_into(tree, monkeypatch):
    (tree / "train" / "ant" / ".cache").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith(".cache"):  # as where another program keeps it to itself
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(load_dataset("folder", root=tree, **SMALL).train) == 12


def test_folders_within_a_class_come_in_image_folders_order(tree):
    for name in ("b", "a-b", "a", "a/z", "B"):
        (tree / "train" / "ant" / name).mkdir(exist_ok=True)
        picture(1).save(tree / "train" / "ant" / name / "000.png")
    listed = load_dataset("folder", root=tree, **SMALL).train.names
    assert list(listed) == [os.path.relpath(path, tree / "train") for path, _ in ImageFolder(tree / "train").samples]


needs_photos = pytest.mark.skipif(
    not (Path(os.environ.get("DISTILLZOO_DATA", "/nonexistent")) / "photos10").is_dir(), reason="DISTILLZOO_DATA has no photos10"
)


@needs_photos
def test_real_photographs():
    root = Path(os.environ["DISTILLZOO_DATA"]) / "photos10"
    data = load_dataset("folder", root=root, workers=0)
    assert (len(data.train), len(data.evaluation), len(data.class_names)) == (1500, 500, 10)
    batch = next(iter(data.train_loader(16, seed=0).epoch(0)))
    assert batch.images.shape == (16, 3, 224, 224)
    theirs = ImageFolder(root / "val", transforms.Compose([v2.Resize(256), v2.CenterCrop(224), *FINISH]))
    ours = next(iter(data.eval_loader(8).epoch(0))).images
    assert torch.equal(ours, torch.stack([theirs[row][0] for row in range(8)]))
