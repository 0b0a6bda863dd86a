"""The resident loader: views equal to torchvision's per-image ones, replay, what a batch holds."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor

from distillzoo.data import Augment, ResidentLoader, Split, crop_flip, normalise
from distillzoo.data import loader as loader_module
from distillzoo.errors import DataError, OptionError, ShapeError
from distillzoo.streams import Stream
from distillzoo.types import Batch, DataSpec
from tests.data.pictures import images_of

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def make_split(number: int, height: int = 12, width: int = 10) -> Split:
    pixels = torch.arange(number * height * width * 3)
    images = Stream.named(0, "test", "pixels").integers(0, pixels, 256).to(torch.uint8).view(number, height, width, 3)
    return Split(images, torch.arange(number) % 7)


def make_loader(number: int = 50, batch_size: int = 16, seed: int = 3, **options) -> ResidentLoader:
    split = make_split(number)
    spec = DataSpec(7, (12, 10), MEAN, STD, num_samples=number, targets=split.targets)
    options.setdefault("augment", Augment(pad=2, flip=True))
    return ResidentLoader(split, spec, batch_size=batch_size, seed=seed, **options)


def torchvision_view(image: Tensor, top: int, left: int, flip: int, pad: int) -> Tensor:
    """The usual transforms on a PIL image: pad with zeros, crop, mirror, scale, normalise."""
    picture = tv.to_pil_image(image.permute(2, 0, 1))
    height, width = image.shape[:2]
    picture = tv.crop(tv.pad(picture, [pad], fill=0), top, left, height, width)
    if flip:
        picture = tv.hflip(picture)
    return tv.normalize(tv.to_tensor(picture), MEAN, STD)


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_every_crop_and_flip_equals_torchvision_per_image(pad):
    places = [(top, left, flip) for top in range(2 * pad + 1) for left in range(2 * pad + 1) for flip in (0, 1)]
    split = make_split(len(places))
    top, left, flip = torch.tensor(places).unbind(1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    views = normalise(crop_flip(split.planes, top, left, flip, pad), mean, std)
    expected = torch.stack([torchvision_view(image, *place, pad) for image, place in zip(split.images, places, strict=True)])
    assert torch.equal(views, expected)


def test_crop_without_flip_mirrors_nothing():
    planes = make_split(9).planes
    offsets = torch.arange(9)
    assert torch.equal(crop_flip(planes, offsets, offsets, None, 4), crop_flip(planes, offsets, offsets, torch.zeros(9).long(), 4))


def test_views_of_an_epoch_equal_torchvision_at_the_drawn_places():
    loader = make_loader(batch_size=7)
    split = make_split(50)
    index = torch.arange(50)
    draws = [
        Stream.named(3, "views", "first", what, "main").integers(5, index, high).tolist()
        for what, high in (("top", 5), ("left", 5), ("flip", 2))
    ]
    expected = torch.stack([torchvision_view(split.images[i], draws[0][i], draws[1][i], draws[2][i], 2) for i in range(50)])
    assert torch.equal(images_of(loader.epoch(5)), expected)


def test_without_augmentation_images_are_normalised_and_in_order():
    loader = make_loader(augment=None, shuffle=False)
    batches = list(loader.epoch(0))
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(50))
    expected = torch.stack([torchvision_view(image, 0, 0, 0, 0) for image in make_split(50).images])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_batches_cover_every_image_once_and_keep_the_last():
    loader = make_loader()
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 4
    assert [len(batch.targets) for batch in batches] == [16, 16, 16, 2]
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index.sort().values, torch.arange(50))
    assert not torch.equal(index, torch.arange(50))
    for batch in batches:
        assert batch.images.shape == (len(batch.index), 3, 12, 10)
        assert batch.images.dtype == torch.float32
        assert batch.index.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.targets, batch.index % 7)
        assert batch.second_view is None


def test_a_batch_larger_than_the_data_holds_all_of_it():
    (batch,) = make_loader(batch_size=1000).epoch(0)
    assert batch.images.shape[0] == 50


def test_views_do_not_depend_on_batch_size_order_or_restart():
    reference = images_of(make_loader().epoch(2, second_view=True), "second_view")
    loader = make_loader(batch_size=1)
    list(loader.epoch(0))
    for other in (loader, make_loader(batch_size=50), make_loader(shuffle=False), loader):
        assert torch.equal(images_of(other.epoch(2, second_view=True), "second_view"), reference)


def test_order_does_not_depend_on_batch_size_views_or_the_global_generator():
    def order(loader: ResidentLoader, **options) -> Tensor:
        return torch.cat([batch.index for batch in loader.epoch(1, **options)])

    reference = order(make_loader())
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    for loader in (make_loader(batch_size=5), make_loader(augment=None), make_loader(channels_last=True)):
        assert torch.equal(order(loader), reference)
    assert torch.equal(order(make_loader(), second_view=True), reference)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_first_view_is_the_same_with_and_without_a_second():
    assert torch.equal(images_of(make_loader().epoch(1)), images_of(make_loader().epoch(1, second_view=True)))


def test_interleaved_epochs_do_not_disturb_each_other():
    loader = make_loader()
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert torch.equal(images_of(first for first, _ in pairs), images_of(loader.epoch(0)))
    assert torch.equal(images_of(second for _, second in pairs), images_of(loader.epoch(1)))


@pytest.mark.parametrize(
    ("other_seed", "other_epoch", "other_phase"), [(4, 0, "main"), (3, 1, "main"), (3, 0, "first")], ids=["seed", "epoch", "phase"]
)
def test_order_and_views_change_with(other_seed, other_epoch, other_phase):
    here = list(make_loader().epoch(0))
    there = list(make_loader(seed=other_seed).epoch(other_epoch, phase=other_phase))
    assert not torch.equal(torch.cat([b.index for b in here]), torch.cat([b.index for b in there]))
    same = (images_of(here) == images_of(there)).flatten(1).all(1).float().mean()
    assert same < 0.2  # one in fifty by chance


def test_the_second_view_is_another_one():
    batches = list(make_loader().epoch(0, second_view=True))
    same = (images_of(batches) == images_of(batches, "second_view")).flatten(1).all(1).float().mean()
    assert same < 0.2


def places(images: Tensor) -> Tensor:
    """Which of the 5 x 5 x 2 views each image shows: the bright pixel stands right of the grey one, or left of it if mirrored."""
    bright = images.flatten(1).argmax(1)
    grey = images.where(images < 1, 0).flatten(1).argmax(1)
    flipped = (bright < grey).long()
    column = torch.where(flipped.bool(), 8 - grey % 9, grey % 9)
    return ((grey // 9 - 2) * 5 + column - 2) * 2 + flipped


def test_offsets_are_uniform_flips_are_half_and_views_independent():
    number, pad = 8000, 2
    images = torch.zeros(number, 9, 9, 1, dtype=torch.uint8)
    images[:, 4, 4], images[:, 4, 5] = 100, 255
    spec = DataSpec(2, (9, 9), (0.0,), (1.0,))
    loader = ResidentLoader(Split(images, torch.zeros(number).long()), spec, batch_size=512, augment=Augment(pad, flip=True))
    batches = list(loader.epoch(0, second_view=True))
    first, second = (places(images_of(batches, view)) for view in ("images", "second_view"))
    for place in (first, second):
        counts = torch.bincount(place, minlength=50).double()
        assert ((counts - number / 50) ** 2 / (number / 50)).sum() < 100  # 49 degrees of freedom: mean 49, sd 10
    counts = torch.bincount(first * 50 + second, minlength=2500).double()
    assert ((counts - number / 2500) ** 2 / (number / 2500)).sum() < 2499 + 5 * 71  # mean 2499, sd 71


def test_channels_last_changes_the_layout_and_nothing_else():
    plain, last = list(make_loader().epoch(0)), list(make_loader(channels_last=True).epoch(0))
    for one, other in zip(plain, last, strict=True):
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert one.images.is_contiguous()
        assert torch.equal(one.images, other.images)


def test_batches_made_ahead_are_the_same_batches():
    plain, ahead = make_loader(), make_loader()
    ahead._ahead = 3  # what a GPU does to save launches
    for one, other in zip(plain.epoch(4, second_view=True), ahead.epoch(4, second_view=True), strict=True):
        for name in ("images", "targets", "index", "second_view"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert other.images.is_contiguous()


def test_the_number_of_threads_is_the_callers(monkeypatch):
    used = []
    monkeypatch.setattr(loader_module, "normalise", lambda *args: used.append(torch.get_num_threads()) or normalise(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = [torch.get_num_threads() for _ in make_loader().epoch(0)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}
    assert set(used) == {1}


@pytest.mark.gpu
def test_a_gpu_makes_the_same_batches():
    split = make_split(50)
    on_gpu = split.to(torch.device("cuda"))
    spec = DataSpec(7, (12, 10), MEAN, STD)
    loaders = [ResidentLoader(data, spec, batch_size=16, augment=Augment(2, flip=True)) for data in (split, on_gpu)]
    for one, other in zip(*(loader.epoch(1, second_view=True) for loader in loaders), strict=True):
        for name in ("images", "targets", "index", "second_view"):
            assert torch.equal(getattr(one, name), getattr(other, name).cpu())


def test_a_consumer_that_writes_into_a_batch_harms_no_later_epoch():
    loader = make_loader(augment=None, shuffle=False)
    before = images_of(loader.epoch(0))
    for batch in loader.epoch(0):
        batch.images.zero_()
        batch.targets.zero_()
    assert torch.equal(images_of(loader.epoch(0)), before)
    assert torch.equal(torch.cat([batch.targets for batch in loader.epoch(0)]), make_split(50).targets)


def test_grey_images_keep_their_one_channel():
    split = Split(torch.full((3, 4, 4, 1), 51, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    (batch,) = ResidentLoader(split, DataSpec(2, (4, 4), (0.0,), (0.5,)), batch_size=4).epoch(0)
    assert isinstance(batch, Batch)
    assert torch.equal(batch.images, torch.full((3, 1, 4, 4), 51.0) / 255 / 0.5)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_a_wrong_batch_size_is_refused(batch_size):
    with pytest.raises(OptionError, match=f"batch_size must be a whole number.*got {batch_size!r}"):
        make_loader(batch_size=batch_size)


def test_a_negative_seed_is_refused():
    with pytest.raises(OptionError, match="seed must be a non-negative integer"):
        make_loader(seed=-1)


@pytest.mark.parametrize("epoch", [-1, 0.0])
def test_a_wrong_epoch_is_refused_at_once(epoch):
    with pytest.raises(OptionError, match="epoch must be a whole number"):
        make_loader().epoch(epoch)


def test_a_second_view_without_augmentation_is_refused_at_once():
    with pytest.raises(OptionError, match="second view"):
        make_loader(augment=None).epoch(0, second_view=True)


def test_a_spec_that_counts_other_samples_is_refused():
    with pytest.raises(OptionError, match="num_samples is 9 but the loader has 50 images"):
        ResidentLoader(make_split(50), DataSpec(7, (12, 10), num_samples=9), batch_size=4)


@pytest.mark.parametrize("spec", [DataSpec(7, (10, 12)), DataSpec(7, (12, 10), (0.5,), (0.5,))], ids=["size", "channels"])
def test_a_spec_of_other_images_is_refused(spec):
    with pytest.raises(ShapeError, match="Images are 12x10 with 3 channels, but spec says"):
        ResidentLoader(make_split(5), spec, batch_size=4)


@pytest.mark.parametrize("pad", [-1, 1.5, True])
def test_a_wrong_pad_is_refused(pad):
    with pytest.raises(OptionError, match=r"Augment\.pad must be a whole number"):
        Augment(pad, flip=False)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (torch.zeros(2, 4, 4, 3), torch.zeros(2).long(), "uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), "channels last"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3).long(), "one label an image"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2), "int64"),
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), torch.zeros(0).long(), "at least one image"),
    ],
)
def test_a_malformed_split_is_refused(images, targets, message):
    with pytest.raises(DataError, match=message):
        Split(images, targets)
