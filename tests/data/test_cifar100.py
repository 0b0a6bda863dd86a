"""CIFAR-100's files: digests first, arrays only, and a sentence for everything that can be wrong with a data root."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from distillzoo.data import cifar100 as module
from distillzoo.data import cifar_files as files
from distillzoo.data import load_dataset
from distillzoo.errors import DataError, OptionError

NUMBER = {"train": 600, "test": 200}
REAL = os.environ.get("DISTILLZOO_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="DISTILLZOO_DATA does not name the folder that holds cifar-100-python")


class Executes:
    """What a malicious pickle looks like: it runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def fake_files() -> dict[str, bytes]:
    """Small files in CIFAR-100's format; protocol 3 is the oldest with bytes, and names the same numpy functions."""
    random = np.random.default_rng(0)
    contents = {}
    for part, number in NUMBER.items():
        data = random.integers(0, 256, (number, 3072), dtype=np.uint8)
        contents[part] = pickle.dumps({b"data": data, b"fine_labels": [i % 100 for i in range(number)]}, protocol=3)
    contents["meta"] = pickle.dumps({b"fine_label_names": [f"name {i}".encode() for i in range(100)]}, protocol=3)
    return contents


def pack(contents: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def contents(monkeypatch) -> dict[str, bytes]:
    """Fake contents whose digests pass for the published ones."""
    made = fake_files()
    monkeypatch.setattr(files, "MD5", {name: md5(content) for name, content in made.items()})
    monkeypatch.setattr(module, "_HELD_OUT_PER_CLASS", 2)
    return made


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def refused(root: Path, message: str, **options) -> str:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("cifar100", root=root, **options)
    return str(caught.value)


LAYOUT = r"DIR/cifar-100-python/train, test and meta, or with DIR/cifar-100-python\.tar\.gz"


def test_digests_are_torchvisions():
    assert {**dict(map(tuple, CIFAR100.train_list + CIFAR100.test_list)), "meta": CIFAR100.meta["md5"]} == files.MD5
    assert CIFAR100.tgz_md5 == files.ARCHIVE_MD5
    assert (CIFAR100.base_folder, CIFAR100.filename, CIFAR100.url) == (files.FOLDER, files.ARCHIVE, module._URL)


def test_a_folder_is_read(tmp_path, contents):
    write(tmp_path / "cifar-100-python", contents)
    data = load_dataset("cifar100", root=str(tmp_path))
    expected = pickle.loads(contents["train"])[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert torch.equal(data.train.images, torch.from_numpy(expected))
    assert data.train.targets.tolist() == [i % 100 for i in range(600)]
    assert data.description == "CIFAR-100, 600 training and 200 test images"
    assert data.class_names[7] == "name 7"
    assert data.spec.mean == (0.5071, 0.4867, 0.4408)
    assert data.spec.std == (0.2675, 0.2565, 0.2761)
    assert (data.augment.pad, data.augment.flip) == (4, True)


def test_an_archive_is_read_without_extraction(tmp_path, contents, monkeypatch):
    packed = pack(contents)
    monkeypatch.setattr(files, "ARCHIVE_MD5", md5(packed))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(packed)
    archive = load_dataset("cifar100", root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-100-python.tar.gz"]
    write(tmp_path / "cifar-100-python", contents)
    assert load_dataset("cifar100", root=tmp_path).digest == archive.digest


def test_held_out_images_are_training_images(tmp_path, contents):
    write(tmp_path / "cifar-100-python", contents)
    data, whole = load_dataset("cifar100", root=tmp_path, split="heldout"), load_dataset("cifar100", root=tmp_path)
    assert torch.bincount(data.evaluation.targets).tolist() == [2] * 100
    assert data.spec.num_samples == len(data.spec.targets) == 400
    parts = [{image.numpy().tobytes() for image in part.planes} for part in (data.train, data.evaluation, whole.train)]
    assert parts[0] | parts[1] == parts[2]
    assert not parts[0] & parts[1]
    assert data.digest != whole.digest


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_file_is_refused_before_it_is_unpickled(tmp_path, contents, monkeypatch, name, damage):
    whole = contents[name]
    damaged = {"truncated": whole[:-10], "altered": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], "empty": b""}[damage]
    write(tmp_path / "cifar-100-python", {**contents, name: damaged})
    monkeypatch.setattr(files, "restricted_load", lambda *_: pytest.fail("it was unpickled"))
    message = refused(tmp_path, "damaged, truncated or not CIFAR-100's")
    assert f"/{name}'" in message
    assert f"{len(damaged):,} bytes" in message
    assert "download it again" in message


def test_a_damaged_archive_is_refused_before_it_is_unpacked(tmp_path, contents, monkeypatch):
    packed = pack(contents)
    monkeypatch.setattr(files, "ARCHIVE_MD5", md5(packed))
    monkeypatch.setattr(files, "_unpack", lambda *_: pytest.fail("it was unpacked"))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(packed[:-1])
    refused(tmp_path, r"cifar-100-python\.tar\.gz' is damaged, truncated")


@pytest.mark.parametrize("packed", [b"not an archive", pack({"train": b""})], ids=["garbage", "members missing"])
def test_an_archive_without_the_files_is_refused(tmp_path, contents, monkeypatch, packed):
    monkeypatch.setattr(files, "ARCHIVE_MD5", md5(packed))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(packed)
    refused(tmp_path, "cannot be unpacked")


def test_a_member_of_the_archive_is_checked_too(tmp_path, contents, monkeypatch):
    packed = pack({**contents, "test": b"other"})
    monkeypatch.setattr(files, "ARCHIVE_MD5", md5(packed))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(packed)
    refused(tmp_path, r"cifar-100-python\.tar\.gz/test' is damaged")


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_malicious_pickle_is_refused_even_with_a_matching_digest(tmp_path, contents, monkeypatch, name):
    mark = tmp_path / "executed"
    evil = pickle.dumps({b"data": Executes(f"touch {mark}")}, protocol=3)
    monkeypatch.setitem(files.MD5, name, md5(evil))
    write(tmp_path / "cifar-100-python", {**contents, name: evil})
    message = refused(tmp_path, "not a pickle of numpy arrays")
    assert ".system, allowed are numpy arrays" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "wanted",
    [
        "builtins eval",
        "builtins getattr",
        "numpy load",
        "numpy.core.multiarray scalar",
        "torch load",
        "_codecs encode",
        "numpy.ndarray tofile",
    ],
)
def test_the_unpickler_knows_arrays_and_nothing_else(wanted):
    content = f"c{wanted.replace(' ', chr(10))}\n.".encode()
    with pytest.raises(DataError, match="allowed are numpy arrays"):
        files.restricted_load(content, Path("train"))


@pytest.mark.parametrize("place", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_older_and_newer_numpy_are_read(place):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps({b"data": array}, protocol=3)
    for written in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        content = content.replace(b"c" + written + b"\n", b"c" + place + b"\n")
    assert b"c" + place + b"\n_reconstruct" in content
    assert np.array_equal(files.restricted_load(content, Path("train"))[b"data"], array)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2])], ids=["empty", "garbage", "list"])
def test_what_is_no_dictionary_is_refused(content):
    with pytest.raises(DataError, match=r"not a pickle of numpy arrays|holds a list"):
        files.restricted_load(content, Path("train"))


def test_no_root_is_refused():
    with pytest.raises(OptionError, match=r"needs a data root, none was given; name the folder that holds .*--data-root DIR"):
        load_dataset("cifar100")


def test_a_missing_root_is_refused(tmp_path):
    refused(tmp_path / "nowhere", f"nowhere' does not exist; expected is a data root DIR with {LAYOUT}")


def test_a_root_that_is_a_file_is_refused(tmp_path):
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.write_bytes(b"")
    for options in ({}, {"download": True}):
        assert f"name the folder that holds it, '{tmp_path}'" in refused(archive, "is a file, not a folder", **options)


def test_an_empty_or_foreign_root_is_refused(tmp_path):
    refused(tmp_path, f"has no CIFAR-100: it is empty; expected is a data root DIR with {LAYOUT}")
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    refused(tmp_path, "has no CIFAR-100: it holds train, val;")


def test_a_root_one_level_too_deep_names_the_right_one(tmp_path, contents, monkeypatch):
    folder = write(tmp_path / "cifar-100-python", contents)
    assert f"; name '{tmp_path}'." in refused(folder, "one level too deep")
    monkeypatch.chdir(folder)
    assert f"; name '{tmp_path}'." in refused(Path(), "one level too deep")
    renamed = write(tmp_path / "cifar", contents)
    assert f"rename it to 'cifar-100-python' and name '{tmp_path}'." in refused(renamed, "one level too deep")


def test_a_root_one_level_too_high_names_the_right_one(tmp_path, contents):
    write(tmp_path / "sets" / "cifar-100-python", contents)
    assert f"; name '{tmp_path / 'sets'}'." in refused(tmp_path, "one level too high")


def test_a_folder_within_a_folder_of_the_same_name_names_the_right_one(tmp_path, contents):
    outer = tmp_path / "cifar-100-python"
    write(outer / "cifar-100-python", contents)
    assert f"; name '{outer}' as the data root." in refused(tmp_path, "a second cifar-100-python is there")


@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz", "data_batch_1"])
def test_cifar_10_in_its_place_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "holds CIFAR-10, not CIFAR-100")


def test_cifar_10_in_the_folder_is_named(tmp_path):
    write(tmp_path / "cifar-100-python", {"data_batch_1": b""})
    refused(tmp_path, "train' is missing, CIFAR-10 is there in its place")


def test_a_missing_file_is_named(tmp_path, contents):
    contents.pop("meta")
    write(tmp_path / "cifar-100-python", contents)
    refused(tmp_path, "meta' is missing, the data set is incomplete")


def test_a_file_that_cannot_be_read_is_named(tmp_path, contents):
    folder = write(tmp_path / "cifar-100-python", contents)
    (folder / "test").unlink()
    (folder / "test").mkdir()  # the one unreadable file that root cannot read either
    refused(tmp_path, r"Cannot read .*test' \(Is a directory\).*check the permissions")


def test_a_root_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    def denied(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    refused(tmp_path, r"Cannot read .* \(Permission denied\).*check the permissions")


def test_nothing_is_downloaded_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *_: pytest.fail("it was downloaded"))
    refused(tmp_path, "it is empty")


def test_a_download_fetches_the_archive_and_keeps_it_under_its_name(tmp_path, contents, monkeypatch):
    packed = pack(contents)
    monkeypatch.setattr(files, "ARCHIVE_MD5", md5(packed))
    calls = []

    def fetch(url, root, filename, digest):
        calls.append((url, digest))
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / filename).write_bytes(packed)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    for _ in range(2):
        assert len(load_dataset("cifar100", root=tmp_path / "new", download=True).train) == 600
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", md5(packed))]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar-100-python.tar.gz"]


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    refused(tmp_path, r"Cannot download CIFAR-100 from https://.*no network.*by other means and put it there", download=True)


@needs_data
def test_the_real_data_loads():
    data = load_dataset("cifar100", root=REAL)
    assert data.description == "CIFAR-100, 50,000 training and 10,000 test images"
    assert torch.bincount(data.train.targets).tolist() == [500] * 100
    assert torch.bincount(data.evaluation.targets).tolist() == [100] * 100
    assert data.class_names[:2] == ("apple", "aquarium_fish")
    reference = CIFAR100(REAL, train=False)
    assert np.array_equal(data.evaluation.images.numpy(), reference.data)
    assert data.evaluation.targets.tolist() == reference.targets
    assert list(data.class_names) == reference.classes
    assert data.digest == "26907d6addf4"


@needs_data
def test_the_real_held_out_split_is_fixed_and_balanced():
    data = load_dataset("cifar100", root=REAL, split="heldout")
    assert data.description == "CIFAR-100, 45,000 training and 5,000 held-out training images"
    assert torch.bincount(data.evaluation.targets).tolist() == [50] * 100
    assert data.spec.num_samples == len(data.spec.targets) == 45_000
    assert data.digest == "de9018534b7a"


@needs_data
def test_one_changed_byte_of_the_real_data_is_refused(tmp_path):
    source, folder = Path(REAL) / "cifar-100-python", tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "meta"):
        (folder / name).symlink_to(source / name)
    content = bytearray((source / "test").read_bytes())
    content[20_000_000] ^= 1
    (folder / "test").write_bytes(content)
    refused(tmp_path, "test' is damaged")
