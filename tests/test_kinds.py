"""Whole numbers, numbers and words that come from outside."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from distillzoo.errors import OptionError
from distillzoo.kinds import check_choice, is_number, is_whole


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (3, True, True),
        (np.int64(3), True, True),
        (np.float32(0.5), False, True),
        (3.0, False, True),
        (True, False, False),
        (math.nan, False, False),
        (-math.inf, False, False),
        ("3", False, False),
        (None, False, False),
        ([3], False, False),
    ],
)
def test_kinds_of_numbers(value: object, whole: bool, number: bool):
    assert (is_whole(value), is_number(value)) == (whole, number)


@pytest.mark.parametrize("least", [-1, 0, 1])
def test_the_least_whole_number_will_do_and_one_below_will_not(least: int):
    assert is_whole(least, least)
    assert not is_whole(least - 1, least)


@pytest.mark.parametrize("value", ["C", "", None, 0, ["a"]])
def test_a_choice_is_one_of_the_words(value: object):
    assert check_choice("letter", "b", Literal["a", "b"]) == "b"
    with pytest.raises(OptionError, match="letter is one of a, b; got") as caught:
        check_choice("letter", value, Literal["a", "b"])
    assert repr(value) in str(caught.value)
