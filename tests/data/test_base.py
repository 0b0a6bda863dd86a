"""Loading by name, and what a resident data set says about itself."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pytest
import torch

from distillzoo.data import DATASETS, Augment, DataSet, ResidentDataSet, Split, load_dataset, takes_root, training_spec
from distillzoo.errors import DataError, MissingDependencyError, OptionError, UnknownNameError
from distillzoo.types import Loader


def tiny(**changes) -> ResidentDataSet:
    train = Split(torch.arange(6 * 48, dtype=torch.int32).remainder(251).to(torch.uint8).view(6, 4, 4, 3), torch.tensor([0, 1] * 3))
    evaluation = Split(torch.full((4, 4, 4, 3), 9, dtype=torch.uint8), torch.tensor([1, 1, 0, 0]))
    values = {"train": train, "evaluation": evaluation, "class_names": ("cat", "dog"), **changes}
    spec = training_spec(values["train"], 2, (0.5,) * 3, (0.2,) * 3)
    return ResidentDataSet("tiny", "Tiny", "test", spec=spec, augment=Augment(1, flip=False), **values)


def test_a_resident_data_set_follows_the_protocol():
    data: DataSet = tiny()
    loaders: list[Loader] = [data.train_loader(4, seed=0), data.eval_loader(3)]
    assert [len(loader) for loader in loaders] == [2, 2]


def test_spec_and_index_count_within_the_training_subset():
    data = tiny()
    assert data.spec.num_samples == 6
    loader = data.train_loader(4, seed=0)
    assert loader.spec is data.spec
    for batch in loader.epoch(0):
        assert torch.equal(data.spec.targets[batch.index], batch.targets)


def test_evaluation_is_in_order_without_augmentation_and_claims_no_training_samples():
    data = tiny()
    loader = data.eval_loader(3, channels_last=True)
    batches = list(loader.epoch(0))
    assert torch.cat([batch.targets for batch in batches]).tolist() == [1, 1, 0, 0]
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.full((4, 3, 4, 4), 9.0).div_(255).sub_(0.5).div_(0.2))
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert loader.spec.num_samples is None
    assert loader.spec.targets is None
    assert loader.spec.mean == data.spec.mean


def test_description_names_what_is_evaluated_on():
    assert tiny().description == "Tiny, 6 training and 4 test images"
    assert replace(tiny(), split="heldout").description == "Tiny, 6 training and 4 held-out training images"


def test_the_digest_changes_with_any_image_or_label_and_with_nothing_else():
    data = tiny()
    planes = data.train.planes.permute(0, 2, 3, 1)  # same images, other strides
    assert tiny(train=Split(planes, data.train.targets)).digest == data.digest
    assert len(data.digest) == 12
    image = data.train.images.clone()
    image[5, 3, 3, 2] ^= 1
    label = data.evaluation.targets.clone()
    label[0] = 0
    others = [
        tiny(train=Split(image, data.train.targets)),
        tiny(evaluation=Split(data.evaluation.images, label)),
        tiny(train=data.evaluation, evaluation=data.train),
    ]
    assert len({data.digest, *(other.digest for other in others)}) == 4


def test_a_label_without_a_class_is_refused():
    wrong = Split(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 2]))
    with pytest.raises(DataError, match="labels from 0 to 2, allowed are 0 to 1"):
        tiny(evaluation=wrong)


def test_a_missing_class_name_is_refused():
    with pytest.raises(DataError, match="2 classes but 1 class names"):
        tiny(class_names=("cat",))


def test_unknown_names_get_near_matches():
    with pytest.raises(UnknownNameError, match=r"Unknown data set 'digit'\. Did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(OptionError, match=r"Unknown split 'held-out'\. Did you mean 'heldout'"):
        load_dataset("digits", split="held-out")
    with pytest.raises(OptionError, match=r"'labels_per_clas'\. Did you mean 'labels_per_class'"):
        load_dataset("digits", labels_per_clas=3)


def test_who_reads_files_is_known():
    assert {name: takes_root(name) for name in ("cifar100", "folder", "digits", "synthetic")} == {
        "cifar100": True, "folder": True, "digits": False, "synthetic": False,
    }  # fmt: skip
    with pytest.raises(UnknownNameError):
        takes_root("digit")


def test_a_root_or_download_that_would_be_ignored_is_refused():
    with pytest.raises(OptionError, match="'digits' reads no files, but root 'here' was given"):
        load_dataset("digits", root="here")
    with pytest.raises(OptionError, match="'synthetic' reads no files, but download was given"):
        load_dataset("synthetic", download=True)
    for name in ("folder", "packed", "imagenet100"):
        with pytest.raises(OptionError, match=f"'{name}' cannot be downloaded here.*name a folder that holds it"):
            load_dataset(name, root="here", download=True)


def test_root_and_download_reach_a_data_set_that_takes_them(monkeypatch):
    seen = {}

    def probe(*, root, split, download, depth=1):
        seen.update(root=root, split=split, download=download, depth=depth)
        return tiny()

    monkeypatch.setitem(DATASETS._items, "probe", probe)
    load_dataset("probe", root="here", split="heldout", download=True, depth=4)
    assert seen == {"root": "here", "split": "heldout", "download": True, "depth": 4}


def test_digits_is_balanced_fixed_and_eight_bits():
    data = load_dataset("digits")
    assert torch.bincount(data.train.targets).tolist() == [120] * 10
    assert len(data.evaluation) == 597
    assert data.train.images.shape == (1200, 8, 8, 3)
    assert int(data.train.images.max()) == 255
    assert torch.equal(data.train.images[..., 0], data.train.images[..., 2])
    assert data.description == "scikit-learn digits, 1,200 training and 597 test images"
    assert data.digest == load_dataset("digits").digest
    pixels = data.train.images.float() / 255
    assert abs(pixels.mean() - data.spec.mean[0]) < 1e-3
    assert abs(pixels.std() - data.spec.std[0]) < 1e-3


def test_digits_values_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    data = load_dataset("digits")
    seen = torch.cat([data.train.images[..., 0], data.evaluation.images[..., 0]]).flatten(1)
    expected = torch.from_numpy((sklearn.load_digits().data * 255 / 16).round()).to(torch.uint8)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, expected.tolist()))


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.planes}


def test_digits_held_out_images_do_not_depend_on_labels_per_class():
    plain, few = load_dataset("digits", split="heldout"), load_dataset("digits", split="heldout", labels_per_class=7)
    assert plain.description == "scikit-learn digits, 900 training and 300 held-out training images"
    assert torch.equal(plain.evaluation.images, few.evaluation.images)
    assert torch.bincount(plain.evaluation.targets).tolist() == [30] * 10
    assert torch.bincount(few.train.targets).tolist() == [7] * 10
    assert few.spec.num_samples == 70
    for data in (plain, few):
        assert not rows(data.train) & rows(data.evaluation)
    full = load_dataset("digits")
    assert rows(plain.train) | rows(plain.evaluation) == rows(full.train)
    assert torch.equal(load_dataset("digits", labels_per_class=7).train.images, few.train.images)


@pytest.mark.parametrize(("split", "labels"), [("test", 0), ("test", 121), ("heldout", 91), ("test", 5.0), ("test", True)])
def test_digits_refuses_impossible_label_counts(split, labels):
    with pytest.raises(OptionError, match=f"labels_per_class of digits must be 1 to (120|90).*got {labels!r}"):
        load_dataset("digits", split=split, labels_per_class=labels)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r'pip install "distillzoo\[benchmarks\]"'):
        load_dataset("digits")


def test_synthetic_is_equal_on_every_machine():
    assert load_dataset("synthetic", num_train=20, num_test=10, size=8).digest == "fc585cb2b1d4"


def test_synthetic_has_the_sizes_asked_for_and_distinct_parts():
    data = load_dataset("synthetic", num_classes=4, size=12, num_train=41, num_test=9)
    assert data.train.images.shape == (41, 12, 12, 3)
    assert data.evaluation.images.shape == (9, 12, 12, 3)
    assert set(data.train.targets.tolist()) == {0, 1, 2, 3}
    assert not rows(data.train) & rows(data.evaluation)
    more = load_dataset("synthetic", num_classes=4, size=12, num_train=1500, num_test=9)
    assert torch.equal(more.train.images[:41], data.train.images)  # chunks do not show


def test_synthetic_held_out_takes_a_tenth():
    data = load_dataset("synthetic", split="heldout", num_classes=4, num_train=80, size=8)
    assert torch.bincount(data.evaluation.targets).tolist() == [2] * 4
    assert data.spec.num_samples == 72


def test_synthetic_is_learned_in_a_few_steps():
    data = load_dataset("synthetic", num_train=200, num_test=100, size=8)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(5):
        for batch in data.train_loader(20, seed=0).epoch(epoch):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(batch.images), batch.targets).backward()
            optimiser.step()
    (batch,) = data.eval_loader(100).epoch(0)
    assert (net(batch.images).argmax(1) == batch.targets).float().mean() > 0.6


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 1}, {"size": 3}, {"num_train": 9}, {"num_test": 0}, {"num_train": 19, "split": "heldout"}, {"size": 8.0}],
    ids=str,
)
def test_synthetic_refuses_impossible_sizes(options):
    name = next(iter(options))
    with pytest.raises(OptionError, match=f"{name} of synthetic must be a whole number, at least"):
        load_dataset("synthetic", **options)
