"""Class lists, and ImageNet's layout: whole and partial copies, packed and not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.imagenet_info import ImageNetInfo

from distillzoo import __main__ as commands
from distillzoo.data import CLASS_LISTS, class_lists, find_class_list, imagenet_rows, imagenet_wnids, load_dataset
from distillzoo.data.class_lists import ClassList, name_class
from distillzoo.errors import DataError, OptionError, UnknownNameError
from tests.data.pictures import SMALL, fill

WNIDS = ("n01443537", "n02107142", "n01440764")  # not sorted: so that the order of the list shows


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "three.txt"
    path.write_text("# ours\n" + "".join(f"{wnid} a name\n" for wnid in WNIDS))
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of ImageNet with the classes of the list and one more."""
    folders = (*WNIDS, "n13037406")
    fill(tmp_path / "imagenet" / "train", 4, folders)
    fill(tmp_path / "imagenet" / "val", 2, folders, first=5000)
    return tmp_path / "imagenet"


def test_the_lists_that_are_shipped():
    index = ImageNetInfo("imagenet-1k").label_names()
    assert list(imagenet_wnids()) == index == sorted(index)
    lists = {name: find_class_list(name) for name in CLASS_LISTS}
    assert {name: len(set(found.wnids) & set(index)) for name, found in lists.items()} == dict.fromkeys(CLASS_LISTS, 100)
    assert lists["cmc"].wnids[:2] == ("n02869837", "n01749939")
    assert lists["cmc"].counts == (126_689, 5_000)
    assert lists["first100"].wnids == tuple(index[:100])
    order = list(range(1000))
    np.random.RandomState(1993).shuffle(order)  # as it is done where this list comes from
    assert lists["seed1993"].wnids == tuple(index[row] for row in order[:100])
    assert len({found.digest for found in lists.values()}) == 3
    assert lists["cmc"].describe()["wnids"] == list(lists["cmc"].wnids)
    lines = class_lists._CMC.read_text().split("\n")
    assert (len(lines), lines[-1]) == (101, "")


def test_the_digest_is_of_the_order_too():
    assert ClassList("a", WNIDS).digest == ClassList("b", WNIDS).digest != ClassList("a", WNIDS[::-1]).digest


def test_rows_of_a_network_of_1000_classes():
    rows = imagenet_rows(WNIDS)
    assert [imagenet_wnids()[row] for row in rows] == list(WNIDS)
    with pytest.raises(OptionError, match=r"1 of the 2 classes are none of ImageNet-1k \(the first is 'ant'\).*--teacher-head own"):
        imagenet_rows(["n01440764", "ant"])


WRONG = {
    "n01440764\nn01440764\n": "names n01440764 twice",
    "n01440764\ntench\n": "holds 'tench', which is no WordNet identifier .*, as n01440764, which has this name",
    "English springer # a dog": "holds 'English springer', .* as n02102040, which has this name",
    "crane\n": "holds 'crane', which is no WordNet identifier .n and 8 digits, as n0[0-9]{7}.; write",
    "n01440764\nn0144353\n": r"holds 'n0144353'.*as n01443537",
    "n01440764\n": "has 1 classes, at least 2",
    "# nothing\n": "has 0 classes",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_lists(text: str, tmp_path: Path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=WRONG[text]):
        find_class_list(tmp_path / "list.txt")


def test_a_list_that_does_not_exist(tmp_path: Path):
    with pytest.raises(UnknownNameError, match=r"Unknown class list 'cmcc'. Did you mean 'cmc'"):
        find_class_list("cmcc")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        find_class_list(tmp_path / "binary.txt")
    with pytest.raises(DataError, match="is a folder; name a text file"):
        find_class_list(tmp_path)


def test_a_list_as_other_systems_write_it(tmp_path: Path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfn01443537\r\nn01440764\r\n")
    assert find_class_list(tmp_path / "list.txt").wnids == ("n01443537", "n01440764")


def test_labels_are_positions_in_the_list(copy: Path, classes: Path):
    data = load_dataset("imagenet100", root=copy, class_list=classes, **SMALL)
    assert data.class_names == WNIDS
    assert (data.spec.num_classes, len(data.train), len(data.evaluation)) == (3, 12, 6)
    assert [name.split("/")[0] for name in data.train.names[::4]] == list(WNIDS)
    digest = ClassList("", WNIDS).digest
    assert data.description == (
        f"ImageNet, class list three.txt, 3 classes, labels as listed, digest {digest}, 12 training and 6 test images"
    )
    assert data.class_list.describe() == {"name": "three.txt", "order": "as listed", "digest": digest, "wnids": list(WNIDS)}
    assert next(iter(data.train_loader(4, seed=0).epoch(0))).images.shape == (4, 3, 16, 16)


def test_a_copy_of_these_classes_alone_is_the_same_data(copy: Path, classes: Path):
    whole = load_dataset("imagenet100", root=copy, class_list=classes, **SMALL)
    for part in ("train", "val"):
        shutil.rmtree(copy / part / "n13037406")
    alone = load_dataset("imagenet100", root=copy, class_list=classes, **SMALL)
    assert alone.digest == whole.digest


def test_missing_classes_are_named_counted_and_refused(copy: Path, classes: Path):
    shutil.rmtree(copy / "val" / WNIDS[0])
    shutil.rmtree(copy / "train" / WNIDS[2])
    (copy / "train" / WNIDS[2]).mkdir()  # an empty folder is as good as none
    with pytest.raises(DataError) as caught:
        load_dataset("imagenet100", root=copy, class_list=classes, **SMALL)
    said = str(caught.value)
    assert "lacks 2 of the 3 classes of the class list 'three.txt' (train has 2, val has 2)" in said
    assert "n01443537 (goldfish" in said
    assert "n01440764 (tench)" in said
    with pytest.raises(DataError, match="another folder"):
        load_dataset("imagenet100", root=copy, class_list=classes, allow_missing_classes=True, **SMALL)


@pytest.mark.parametrize("hidden", [".trash/000.jpg", "._000.jpg"])
def test_hidden_images_make_no_class(hidden: str, copy: Path, classes: Path):
    folder = copy / "val" / WNIDS[0]
    shutil.rmtree(folder)
    (folder / hidden).parent.mkdir(parents=True)
    (folder / hidden).write_bytes(b"another program's")
    with pytest.raises(DataError, match=r"lacks 1 of the 3 classes .* \(train has 3, val has 2\): n01443537 \(goldfish\)"):
        load_dataset("imagenet100", root=copy, class_list=classes, **SMALL)


def test_missing_classes_that_are_allowed(copy: Path, classes: Path):
    shutil.rmtree(copy / "val" / WNIDS[0])
    with pytest.warns(UserWarning, match=r"lacks 1 of the 3 classes .* goes without: n01443537 \(goldfish\)\.$"):
        data = load_dataset("imagenet100", root=copy, class_list=classes, allow_missing_classes=True, **SMALL)
    assert data.class_names == WNIDS[1:]
    assert "class list three.txt without 1, 2 classes" in data.description
    assert data.class_list.digest == ClassList("", WNIDS[1:]).digest


def test_all_missing_classes_are_named(copy: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"lacks 98 of the 100 classes .*'first100' \(train has 2, val has 2\)") as caught:
        load_dataset("imagenet100", root=copy, class_list="first100", **SMALL)
    first = find_class_list("first100").wnids
    assert [wnid for wnid in first if name_class(wnid) in str(caught.value)] == [wnid for wnid in first if wnid not in WNIDS]
    (tmp_path / "odd.txt").write_text("\n".join((*WNIDS, "n99999999")))
    with pytest.raises(DataError, match=r"n99999999 \(1 of them, such as n99999999, no class of ImageNet-1k\)"):
        load_dataset("imagenet100", root=copy, class_list=tmp_path / "odd.txt", **SMALL)


def test_a_copy_with_none_of_the_classes(copy: Path, classes: Path, tmp_path: Path):
    deep = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    deep.parent.mkdir(parents=True)
    notes = tmp_path / "kaggle" / "ILSVRC" / "Annotations" / "CLS-LOC" / "train" / WNIDS[0]
    notes.mkdir(parents=True)
    (notes / "0.xml").touch()
    copy.rename(deep)
    listed = r"\(n01443537 \(goldfish.*"
    found = rf"none of the 3 classes of the class list 'three.txt' {listed}; it holds 'ILSVRC'; .* name '{deep}'\.$"
    with pytest.raises(DataError, match=found):
        load_dataset("imagenet100", root=tmp_path / "kaggle", class_list=classes, allow_missing_classes=True, **SMALL)
    fill(tmp_path / "pets" / "train", 1, [f"pet{number}" for number in range(9)])
    fill(tmp_path / "pets" / "val", 1, [f"pet{number}" for number in range(9)])
    with pytest.raises(DataError, match=r"it holds 'pet0', .*'pet7' and others; .*name another folder \(--data-root\)"):
        load_dataset("imagenet100", root=tmp_path / "pets", class_list=classes, **SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it holds nothing; expected is DIR/train/WNID/IMAGE"):
        load_dataset("imagenet100", root=tmp_path / "empty", class_list=classes, **SMALL)


def test_one_tree_is_not_the_whole_list(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distillzoo.data.imagenet100.find_class_list", lambda name: ClassList("cmc", WNIDS, counts=(12, 6)))
    with pytest.raises(DataError, match=r"is one tree of classes without evaluation images of its own.*name DIR"):
        load_dataset("imagenet100", root=copy / "train", **SMALL)
    with pytest.raises(DataError, match=r"holds images that lie in no class folder; .* name DIR"):
        load_dataset("imagenet100", root=copy / "train" / WNIDS[0], **SMALL)


def test_the_number_of_images_is_checked_where_it_is_known(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = ClassList("cmc", WNIDS, counts=(12, 6))
    monkeypatch.setattr("distillzoo.data.imagenet100.find_class_list", lambda name: whole)
    assert len(load_dataset("imagenet100", root=copy, **SMALL).train) == 12
    bad = next((copy / "train" / WNIDS[0]).iterdir())
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out"):
        assert len(load_dataset("imagenet100", root=copy, skip_bad=True, **SMALL).train) == 11, "it is there, if of no use"
    assert pack(copy, tmp_path / "packed", "--short-side", 18, "--skip-bad") == 0
    assert len(load_dataset("imagenet100", root=tmp_path / "packed", packed=True, crop=16).train) == 11
    bad.unlink()
    with pytest.raises(DataError, match=r"has 11 training and 6 evaluation images.*a whole copy has 12 and 6"):
        load_dataset("imagenet100", root=copy, **SMALL)
    with pytest.warns(UserWarning, match=r"has 11 training and 6 evaluation images .*a whole copy has 12 and 6\."):
        assert len(load_dataset("imagenet100", root=copy, allow_missing_classes=True, **SMALL).train) == 11


def test_a_flat_evaluation_folder_and_no_root(copy: Path, classes: Path):
    shutil.move(copy / "val" / WNIDS[0] / "000.png", copy / "val" / "ILSVRC2012_val_00000001.JPEG")
    for wnid in (*WNIDS, "n13037406"):
        shutil.rmtree(copy / "val" / wnid)
    with pytest.raises(DataError, match=r"images that lie in no class folder; expected is val/WNID/IMAGE"):
        load_dataset("imagenet100", root=copy, class_list=classes, **SMALL)
    with pytest.raises(OptionError, match="needs a data root"):
        load_dataset("imagenet100")
    with pytest.raises(DataError, match="does not exist"):
        load_dataset("imagenet100", root=copy / "nowhere", class_list=classes)


def pack(*arguments: object) -> int:
    return commands._main(["pack", *map(str, arguments)])


def test_packed_classes_are_those_of_the_files(copy: Path, classes: Path, tmp_path: Path):
    files = load_dataset("imagenet100", root=copy, class_list=classes, crop=16, resize=18, workers=0)
    assert pack(copy, tmp_path / "three", "--short-side", 18, "--class-list", classes) == 0
    assert pack(copy, tmp_path / "all", "--short-side", 18) == 0
    for place in ("three", "all"):
        data = load_dataset("imagenet100", root=tmp_path / place, class_list=classes, packed=True, crop=16)
        assert data.name == "imagenet100_packed"
        assert data.class_names == WNIDS
        assert "another protocol" in data.description
        assert "class list three.txt" in data.description
        assert torch.equal(data.train.targets, files.train.targets)
        for ours, theirs in zip(data.eval_loader(4).epoch(0), files.eval_loader(4).epoch(0), strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.targets, theirs.targets)
    held = [
        load_dataset("imagenet100", root=root, class_list=classes, split="heldout", crop=16, **options)
        for root, options in ((tmp_path / "all", {"packed": True}), (copy, {"resize": 18, "workers": 0}))
    ]
    for ours, theirs in zip(*(data.eval_loader(4).epoch(0) for data in held), strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_packing_classes_that_are_missing(
    copy: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(copy / "val" / WNIDS[0])
    assert pack(copy, tmp_path / "out", "--class-list", classes) == 2
    assert "lacks 1 of the 3 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert pack(copy, tmp_path / "out", "--short-side", 18, "--class-list", classes, "--allow-missing-classes") == 0
    said = capsys.readouterr().err
    assert "Note: " in said
    assert "goes without: n01443537 (goldfish)" in said
    other = ClassList("other", ("n13037406",))
    monkeypatch.setattr("distillzoo.data.imagenet100.find_class_list", lambda name: other)
    with pytest.raises(DataError, match=r"none of the 1 classes of the class list 'other'.*what python -m distillzoo pack wrote"):
        load_dataset("imagenet100", root=tmp_path / "out", class_list="other", packed=True, crop=16)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"lacks 1 of the 3 classes .* \(out has 2\)"):
        load_dataset("imagenet100", root=tmp_path / "out", class_list=classes, packed=True, crop=16)
