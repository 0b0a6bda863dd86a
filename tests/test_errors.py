from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from distillzoo import errors
from distillzoo.errors import DistillZooError, UnknownNameError, near_matches, unknown_name
from distillzoo.testing import ContractError


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("OptionError", ValueError),
        ("UnknownNameError", KeyError),
        ("ShapeError", ValueError),
        ("TapError", ValueError),
        ("UnsupportedPairError", ValueError),
        ("DataError", ValueError),
        ("RecordError", ValueError),
        ("MissingDependencyError", ImportError),
    ],
)
def test_every_error_is_also_the_builtin_a_caller_expects(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, DistillZooError)
    assert issubclass(kind, builtin)
    assert str(kind("a sentence with 'quotes'")) == "a sentence with 'quotes'"
    assert str(pickle.loads(pickle.dumps(kind("sent by a worker")))) == "sent by a worker"


def test_the_guide_names_every_error_and_its_builtin():
    guide = Path(__file__).resolve().parents[1] / "docs" / "guide" / "errors.rst"
    rows = dict(re.findall(r"^   \* - ``(\w+)``\n     - ``(\w+)``$", guide.read_text(encoding="utf-8"), re.MULTILINE))
    kinds = [*(getattr(errors, name) for name in errors.__all__ if name.endswith("Error")), ContractError]
    assert rows == {kind.__name__: kind.__bases__[1].__name__ for kind in kinds if kind is not DistillZooError}


def test_an_unknown_name_is_a_sentence_and_not_the_repr_of_one():
    assert str(UnknownNameError("Unknown x 'y'.")) == "Unknown x 'y'."
    assert str(UnknownNameError()) == ""


def test_near_matches_ignore_case_and_come_best_first():
    assert near_matches("ReviewKD", ["kd", "reviewkd", "review"])[0] == "reviewkd"
    assert near_matches("temperatur", ["temperature", "weight"]) == ["temperature"]
    assert near_matches("zzzz", ["kd", "at"]) == []
    assert len(near_matches("a", ["a1", "a2", "a3", "a4"], limit=2)) == 2


def test_the_sentence_names_what_came_the_near_and_all_that_is_allowed():
    assert unknown_name("model", "resnt8", ["wrn", "resnet8"], listed="Known") == (
        "Unknown model 'resnt8'. Did you mean 'resnet8'? Known: resnet8, wrn."
    )
    assert unknown_name("model", "x", []) == "Unknown model 'x'. Registered: none."
