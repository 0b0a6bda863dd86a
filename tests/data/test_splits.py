"""Held-out splits: balanced, disjoint, fixed."""

from __future__ import annotations

import pytest
import torch

from distillzoo.data.arrays import Split
from distillzoo.data.splits import class_ranks, hold_out, keep_first, set_aside
from distillzoo.errors import DataError


def numbered(targets: torch.Tensor) -> Split:
    """Images whose first two channels spell their own position."""
    images = torch.zeros(len(targets), 2, 2, 3, dtype=torch.uint8)
    position = torch.arange(len(targets))
    images[..., 0] = (position // 256).to(torch.uint8)[:, None, None]
    images[..., 1] = (position % 256).to(torch.uint8)[:, None, None]
    return Split(images, targets)


def positions(split: Split) -> list[int]:
    return (split.images[:, 0, 0, 0].long() * 256 + split.images[:, 0, 0, 1].long()).tolist()


TARGETS = torch.arange(600) * 7 % 5 + (torch.arange(600) % 11 == 0).long()  # six uneven classes


def test_held_out_images_are_balanced_disjoint_and_in_order():
    stays, held = hold_out(numbered(TARGETS), 6, "test")
    assert torch.bincount(held.targets).tolist() == [6] * 6
    assert sorted(positions(stays) + positions(held)) == list(range(600))
    assert positions(stays) == sorted(positions(stays))
    for part in (stays, held):
        assert torch.equal(part.targets, TARGETS[positions(part)])


def test_the_choice_is_fixed_and_the_name_decides():
    first = positions(hold_out(numbered(TARGETS), 6, "test")[1])
    torch.manual_seed(5)
    assert positions(hold_out(numbered(TARGETS), 6, "test")[1]) == first
    assert positions(hold_out(numbered(TARGETS), 6, "other")[1]) != first
    assert set(first) < set(positions(hold_out(numbered(TARGETS), 8, "test")[1]))


def test_what_is_held_out_does_not_follow_the_files_order():
    _, held = hold_out(numbered(torch.zeros(1000).long()), 500, "test")
    assert abs(sum(positions(held)) / 500 - 499.5) < 40  # sd of the mean about 9


def test_images_kept_and_images_held_out_are_disjoint():
    _, held = hold_out(numbered(TARGETS), 6, "test")
    kept = keep_first(numbered(TARGETS), 4, "test")
    assert torch.bincount(kept.targets).tolist() == [4] * 6
    assert not set(positions(kept)) & set(positions(held))
    assert set(positions(kept)) < set(positions(keep_first(numbered(TARGETS), 5, "test")))


def test_ranks_number_every_class_from_zero():
    ranks = class_ranks(TARGETS, "test")
    for label in range(6):
        mine = ranks[label == TARGETS]
        assert torch.equal(mine.sort().values, torch.arange(len(mine)))


def test_classes_can_give_different_numbers():
    number = torch.arange(1, 7)
    stays, aside = set_aside(TARGETS, number, "test")
    assert torch.equal(torch.bincount(TARGETS[aside]), number)
    assert torch.equal(torch.cat([stays, aside]).sort().values, torch.arange(600))


@pytest.mark.parametrize("per_class", [0, 10, 11])
def test_too_many_held_out_are_refused(per_class):
    with pytest.raises(DataError, match=f"Cannot hold {per_class} images of every class out: the smallest class has 10"):
        hold_out(numbered(torch.arange(20) % 2), per_class, "test")
