"""Packed images: equal evaluation, replayable crops near Pillow's, files that are half written or damaged, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distillzoo import __main__ as command_line
from distillzoo.data import load_dataset
from distillzoo.data import packing as packing_module
from distillzoo.data.file_loader import resize_short_side
from distillzoo.data.images import read_image
from distillzoo.data.packing import INDEX, pack_folder, read_index
from distillzoo.errors import DataError, OptionError
from tests.data.pictures import fill, images_of, make_tree, picture

CROP = {"crop": 16}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images and the same packed at a short side of 20 pixels."""
    source = make_tree(tmp_path_factory.mktemp("packed") / "photos", per_class=10)
    Image.fromarray(np.full((30, 90), 7, np.uint8)).save(source / "train" / "ant" / "grey_and_wide.png")
    target = source.parent / "photos_packed"
    pack_folder(source, target, short_side=20)
    return source, target


def both(places, **options):
    source, target = places
    files = load_dataset("folder", root=source, resize=20, workers=0, **CROP, **options)
    return files, load_dataset("packed", root=target, **CROP, **options)


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_evaluation_and_labels_are_those_of_the_files(places, split):
    files, packed = both(places, split=split)
    assert torch.equal(images_of(packed.eval_loader(4).epoch(0)), images_of(files.eval_loader(7).epoch(0)))
    assert torch.equal(packed.evaluation.targets, files.evaluation.targets)
    assert torch.equal(packed.spec.targets, files.spec.targets)
    assert packed.class_names == files.class_names
    assert packed.eval_loader(4).spec.num_samples is None


def test_the_record_says_that_it_is_another_protocol(places):
    files, packed = both(places)
    assert packed.name == "packed"
    assert "packed at short side 20: another protocol than image files" in packed.description
    assert "31 training and 6 test images" in packed.description
    assert "packed at short side 20" in repr(packed.augment)
    assert repr(packed.augment) != repr(files.augment)
    assert packed.digest != files.digest


def levels(loader, epoch: int):
    """Training images of an epoch as they were before normalisation, in data-set order."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loader.spec.mean, loader.spec.std))
    return ((images_of(loader.epoch(epoch)) * std + mean) * 255).round().int()


def test_a_view_is_pillows_crop_of_the_packed_image(places):
    source, target = places
    data = load_dataset("packed", root=target, **CROP)
    ours = levels(data.train_loader(5, seed=3), 2)
    windows = data.augment.draw(3, "first", "main", 2, torch.arange(31), data.train.sizes).tolist()
    names = read_index(target).train.names
    assert len({window[4] for window in windows}) == 2
    for row, (top, left, height, width, flip) in enumerate(windows):
        image = resize_short_side(read_image(source / "train" / names[row]), 20)
        view = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BILINEAR)
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view
        expected = torch.from_numpy(np.array(view)).permute(2, 0, 1).int()
        assert (ours[row] - expected).abs().max() <= 1


def test_the_way_of_a_gpu_gives_the_same_images(places):
    data = load_dataset("packed", root=places[1], **CROP)
    loader = data.train_loader(5, seed=3)
    plan = loader._plan(0, "main", second_view=False)
    one, other = loader._one_by_one(plan.rows, plan.windows[0]), loader._all_at_once(plan.rows, plan.windows[0])
    assert other.shape == (31, 3, 16, 16)
    assert (one.int() - other.int()).abs().max() <= 1


def test_views_replay_whatever_the_batch_size(places):
    data = load_dataset("packed", root=places[1], **CROP)
    state = torch.random.get_rng_state()
    reference = list(data.train_loader(7, seed=1).epoch(1, second_view=True))
    assert [len(batch.targets) for batch in reference] == [7, 7, 7, 7, 3]
    for view in ("images", "second_view"):
        again = data.train_loader(100, seed=1).epoch(1, second_view=True)
        assert torch.equal(images_of(reference, view), images_of(again, view))
    assert not torch.equal(images_of(reference), images_of(reference, "second_view"))
    assert not torch.equal(images_of(reference), images_of(data.train_loader(7, seed=2).epoch(1)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_last_image_of_the_file_can_be_cut_to_its_edge(places):
    images = load_dataset("packed", root=places[1], **CROP).train
    rows = torch.tensor([0, len(images) - 1])  # the first is wider: its width is read beyond the last one too
    sizes = images.sizes[rows]
    assert sizes[0, 1] != sizes[1, 1]
    boxes = torch.cat([torch.zeros_like(sizes), sizes], 1)
    boxes[1] = torch.tensor([sizes[1, 0] - 1, sizes[1, 1] - 1, 1, 1])
    cut = images.windows(rows, boxes)
    assert torch.equal(cut[1, 0, 0], images.window(len(images) - 1, *boxes[1].tolist())[0, 0])
    assert torch.equal(cut[0, : boxes[0, 2], : boxes[0, 3]], images.window(0, *boxes[0].tolist()))


def test_one_tree_is_split_as_the_files_are(tmp_path):
    source = fill(tmp_path / "all", per_class=10)
    pack_folder(source, tmp_path / "packed", short_side=20)
    files, packed = both((source, tmp_path / "packed"))
    assert torch.equal(images_of(packed.eval_loader(4).epoch(0)), images_of(files.eval_loader(4).epoch(0)))
    assert "a fifth split off" in packed.description


def test_the_digest_follows_pixels_and_labels(places, tmp_path):
    digest = load_dataset("packed", root=places[1], **CROP).digest
    source = make_tree(tmp_path / "photos", per_class=10)
    Image.fromarray(np.full((30, 90), 7, np.uint8)).save(source / "train" / "ant" / "grey_and_wide.png")
    pack_folder(source, tmp_path / "same", short_side=20)
    assert load_dataset("packed", root=tmp_path / "same", **CROP).digest == digest
    assert load_dataset("packed", root=tmp_path / "same", split="heldout", **CROP).digest != digest
    picture(4321).save(source / "val" / "ant" / "000.png")
    pack_folder(source, tmp_path / "other", short_side=20)
    assert load_dataset("packed", root=tmp_path / "other", **CROP).digest != digest


# ------------------------------------------------------------------ what is refused


def test_a_folder_that_exists_is_not_written_over(places):
    with pytest.raises(DataError, match="exists; packing writes a new folder only"):
        pack_folder(*places, short_side=20)


def test_an_interrupted_call_leaves_no_folder_and_begins_anew_on_request(places, tmp_path, monkeypatch):
    target = tmp_path / "packed"
    real, calls = packing_module.read_image, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(packing_module, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(places[0], target, short_side=20)
    monkeypatch.undo()
    assert not target.exists()
    for root in (target, tmp_path / "packed.partial"):
        with pytest.raises(DataError, match="half written"):
            load_dataset("packed", root=root, **CROP)
    with pytest.raises(DataError, match="--restart"):
        pack_folder(places[0], target, short_side=20)
    pack_folder(places[0], target, short_side=20, restart=True)
    assert (target / "train.bin").read_bytes() == (places[1] / "train.bin").read_bytes()
    assert not (tmp_path / "packed.partial").exists()


def damaged(places, tmp_path, change) -> Path:
    pack_folder(places[0], tmp_path / "packed", short_side=20)
    change(tmp_path / "packed")
    return tmp_path / "packed"


def shorten(root: Path) -> None:
    (root / "train.bin").write_bytes((root / "train.bin").read_bytes()[:-1])


def shift(root: Path) -> None:
    index = json.loads((root / INDEX).read_text())
    index["train"]["offsets"][3] += 10**9
    (root / INDEX).write_text(json.dumps(index))


def renumber(root: Path) -> None:
    (root / INDEX).write_text(json.dumps(json.loads((root / INDEX).read_text()) | {"version": 99}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorten, "train.bin has"),
        (shift, "do not agree"),
        (renumber, "version 99"),
        (lambda root: (root / INDEX).write_text("{"), "damaged"),
        (lambda root: (root / "val.bin").unlink(), "val.bin"),
        (lambda root: (root / INDEX).unlink(), "has no index.json"),
    ],
)
def test_damaged_folders_are_refused(places, tmp_path, change, words):
    root = damaged(places, tmp_path, change)
    with pytest.raises(DataError, match=words) as caught:
        load_dataset("packed", root=root, **CROP)
    assert "pack the images again" in str(caught.value)


def test_changed_bytes_are_found_on_request(places, tmp_path):
    def flip_a_bit(root: Path) -> None:
        content = bytearray((root / "val.bin").read_bytes())
        content[100] ^= 1
        (root / "val.bin").write_bytes(content)

    root = damaged(places, tmp_path, flip_a_bit)
    load_dataset("packed", root=root, **CROP)
    with pytest.raises(DataError, match=r"val\.bin.*digest"):
        load_dataset("packed", root=root, verify=True, **CROP)
    load_dataset("packed", root=places[1], verify=True, **CROP)


def test_wrong_options(places, tmp_path):
    with pytest.raises(OptionError, match="only 20 is possible"):
        load_dataset("packed", root=places[1], crop=16, resize=24)
    with pytest.raises(OptionError, match=r"Crops of \d+ pixels do not fit .* short side of 20; .*--data.crop 20"):
        load_dataset("packed", root=places[1], crop=224)
    with pytest.raises(OptionError, match="--data-root"):
        load_dataset("packed")
    with pytest.raises(OptionError, match="short_side"):
        pack_folder(places[0], tmp_path / "x", short_side=2)
    with pytest.raises(DataError, match="does not exist"):
        load_dataset("packed", root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="data set 'packed'"):
        load_dataset("folder", root=places[1])


# ------------------------------------------------------------------ the command


def test_the_command_packs(places, tmp_path, capsys):
    assert command_line._main(["pack", str(places[0]), str(tmp_path / "out"), "--short-side", "20"]) == 0
    assert "31 training and 6 evaluation images of 3 classes, short side 20 pixels" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.bin").read_bytes() == (places[1] / "train.bin").read_bytes()


def test_the_command_names_a_bad_file_and_how_to_go_on(tmp_path, capsys):
    source = make_tree(tmp_path / "photos")
    bad = source / "train" / "bee" / "broken.jpg"
    picture(5, 200, 200).save(bad)
    bad.write_bytes(bad.read_bytes()[:-800])
    assert command_line._main(["pack", str(source), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert "broken.jpg" in said.splitlines()[-1]
    assert "--skip-bad" in said.splitlines()[-1]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert command_line._main(["pack", str(source), str(tmp_path / "out"), "--skip-bad"]) == 0
    assert "broken.jpg" in capsys.readouterr().err
    assert read_index(tmp_path / "out").skipped == [str(bad)]
    assert "without 1 unusable file" in load_dataset("packed", root=tmp_path / "out").description


def test_the_command_line_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distillzoo", "pack", str(tmp_path / "nowhere"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "does not exist" in done.stderr
