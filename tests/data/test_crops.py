"""Random resized crops: the windows' law, and resizing against Pillow and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from distillzoo.data.crops import CropViews, centre_box, resize_each, resize_windows
from distillzoo.errors import OptionError
from distillzoo.streams import Stream
from tests.data.pictures import picture


def sizes_of(*pairs, times: int = 1):
    return torch.tensor(pairs * times)


def slow_window(views: CropViews, seed: int, index: int, epoch: int, height: int, width: int) -> list[int]:
    """The law of a window, one image at a time, in plain Python."""

    def uniform(what: str, at: int) -> float:
        return float(Stream.named(seed, "views", "first", what, "main").uniform(epoch, torch.tensor([at])))

    def integer(what: str, high: int) -> int:
        return int(Stream.named(seed, "views", "first", what, "main").integers(epoch, torch.tensor([index]), high))

    flip = integer("flip", 2)
    for number in range(10):
        area = height * width * (views.scale[0] + uniform("area", 10 * index + number) * (views.scale[1] - views.scale[0]))
        low, high = map(math.log, views.ratio)
        aspect = math.exp(low + uniform("aspect", 10 * index + number) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [integer("top", height - h + 1), integer("left", width - w + 1), h, w, flip]
    h, w = height, width
    if width / height < views.ratio[0]:
        h = round(width / views.ratio[0])
    elif width / height > views.ratio[1]:
        w = round(height * views.ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w, flip]


@pytest.mark.parametrize("views", [CropViews(), CropViews(scale=(0.9, 1.0), ratio=(0.5, 0.6)), CropViews(scale=(1.0, 1.0))])
def test_windows_follow_the_law(views):
    sizes = sizes_of((300, 400), (256, 256), (40, 700), (700, 40), (1, 1), (3, 2), times=4)
    index = torch.arange(len(sizes)) + 5
    drawn = views.draw(3, "first", "main", 2, index, sizes)
    expected = [slow_window(views, 3, int(i), 2, h, w) for i, (h, w) in zip(index, sizes.tolist(), strict=True)]
    assert drawn.tolist() == expected


def test_windows_are_distributed_as_torchvisions():
    """Mean and spread of area, shape and place over many draws, against torchvision's own sampler."""
    number, height, width = 4000, 300, 400
    drawn = CropViews().draw(0, "first", "main", 0, torch.arange(number), torch.tensor([[height, width]]).expand(number, 2))
    transform = v2.RandomResizedCrop(224)
    image = torch.empty(3, height, width, device="meta")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([image]) for _ in range(number)]
    theirs = torch.tensor([[each[key] for key in ("top", "left", "height", "width")] for each in theirs]).double()
    ours = drawn[:, :4].double()
    error = theirs.std(0) / math.sqrt(number)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()
    assert ((ours.std(0) / theirs.std(0) - 1).abs() < 0.06).all()
    assert abs(float(drawn[:, 4].double().mean()) - 0.5) < 0.04


def test_a_window_does_not_depend_on_the_others():
    sizes = sizes_of((50, 60), (70, 30), (64, 64))
    index = torch.tensor([4, 9, 2])
    whole = CropViews().draw(1, "first", "main", 0, index, sizes)
    for row in range(3):
        alone = CropViews().draw(1, "first", "main", 0, index[row : row + 1], sizes[row : row + 1])
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("change", [{"seed": 2}, {"view": "second"}, {"phase": "first"}, {"epoch": 1}])
def test_windows_change_with(change):
    sizes = torch.tensor([[200, 300]]).expand(50, 2)
    asked = {"seed": 1, "view": "first", "phase": "main", "epoch": 0}
    one, two = (CropViews().draw(index=torch.arange(50), sizes=sizes, **each) for each in (asked, asked | change))
    assert (one == two).all(1).float().mean() < 0.1


def cut(image: Image.Image, box) -> Image.Image:
    top, left, height, width = box
    return image.crop((left, top, left + width, top + height))


BOXES = [(0, 0, 300, 400), (10, 20, 31, 50), (5, 7, 224, 224), (0, 100, 280, 33), (299, 399, 1, 1), (2, 3, 290, 160)]


def both(size: int):
    """Windows of one image as Pillow resizes them, and as ours do."""
    image = picture(3, 300, 400)
    flips = [0, 1, 0, 1, 0, 1]
    pillow = []
    for box, flip in zip(BOXES, flips, strict=True):
        resized = cut(image, box).resize((size, size), Image.Resampling.BILINEAR)
        pillow.append(np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized))
    pixels = torch.from_numpy(np.array(image))
    windows = [pixels[t : t + h, left : left + w] for t, left, h, w in BOXES]
    padded = torch.randint(0, 256, (len(BOXES), 300, 400, 3), dtype=torch.uint8)  # what is beyond a window must not be read
    for row, window in enumerate(windows):
        padded[row, : window.shape[0], : window.shape[1]] = window
    height, width = torch.tensor(BOXES)[:, 2:].unbind(1)
    pillow = torch.from_numpy(np.stack(pillow)).permute(0, 3, 1, 2).int()
    return pillow, resize_each(windows, flips, size).int(), resize_windows(padded, height, width, torch.tensor(flips), size).int()


@pytest.mark.parametrize("size", [32, 224])
def test_resizing_deviates_from_pillow_by_at_most_one_level(size, record_property):
    pillow, each, windows = both(size)
    for name, ours in (("8-bit kernel", each), ("matrix products", windows)):
        difference = (ours - pillow).abs()
        record_property(name, f"largest {int(difference.max())}, mean {float(difference.double().mean()):.4f} of 255")
        assert difference.max() <= 1
        assert difference.double().mean() < 0.25
    assert (each - pillow).abs().double().mean() < 0.02  # the same arithmetic as Pillow's but for rounding


def test_without_antialiasing_the_comparison_would_fail():
    """The images of this file tell an antialiased resize from one that is not."""
    pillow, *_ = both(32)
    pixels = torch.from_numpy(np.array(picture(3, 300, 400))).permute(2, 0, 1).unsqueeze(0).float()
    plain = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear")[0]
    assert (plain - pillow[0]).abs().max() > 8


def test_the_middle_is_torchvisions():
    for height, width in [(32, 32), (33, 40), (35, 33), (101, 64)]:
        image = torch.arange(height * width).view(1, height, width)
        top, left = centre_box(height, width, 32)
        assert torch.equal(image[:, top : top + 32, left : left + 32], v2.functional.center_crop(image, [32, 32]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop": 0}, "crop must be a whole number"),
        ({"crop": 32.0}, "crop must be a whole number"),
        ({"crop": 300}, "resize must be at least crop"),
        ({"scale": (0.5, 1.5)}, "at most 1"),
        ({"ratio": (2.0, 1.0)}, "two rising numbers"),
        ({"mean": (0.5,)}, "3 numbers"),
        ({"mean": 0.5}, r"3 numbers, one a channel, as \(0\.5, 0\.5, 0\.5\); got 0\.5"),
        ({"mean": "abc"}, "got 'abc'"),
        ({"mean": "123"}, "got '123'"),
        ({"std": (0.5, "x", 0.5)}, "'x'"),
        ({"std": (0.5, float("nan"), 0.5)}, "nan"),
        ({"std": (0.5, 0.5, 0.0)}, "above 0"),
    ],
)
def test_wrong_numbers_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        CropViews(**options)
