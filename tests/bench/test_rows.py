"""Rows of table files: what they have for single pairs, presets, and what a user sets over both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distillzoo.bench.changes import changes
from distillzoo.bench.options import parse_options
from distillzoo.bench.plan import make_plan
from distillzoo.bench.recipe import Pair, Recipe, make_recipe
from distillzoo.bench.rows import Row, load_table, select_rows
from distillzoo.bench.sweep import method_override, sweep_points
from distillzoo.bench.table import make_table
from distillzoo.data import DataSet
from distillzoo.errors import OptionError
from tests.bench.conftest import TINY

Load = Callable[[Recipe], DataSet]
PAIR, OTHER = Pair("resnet56", "resnet20"), Pair("vgg13", "vgg8")
SPECIAL = Row(
    "kd",
    "KD",
    "kd",
    options={"temperature": 4.0},
    weights={"kd": 0.9},
    pairs={str(PAIR): {"options": {"temperature": 2.0}, "weights": {"kd": 0.5, "ce": 0.5}}},
)


def settings(row: Row, pair: Pair) -> tuple[float, dict[str, float]]:
    found = row.describe(pair)
    return found["options"]["temperature"], found["weights"]


def test_a_pair_has_what_the_table_says_of_it() -> None:
    assert settings(SPECIAL, PAIR) == (2.0, {"ce": 0.5, "kd": 0.5})
    assert settings(SPECIAL, OTHER) == (4.0, {"ce": 0.1, "kd": 0.9})


def test_what_a_user_sets_holds_for_every_pair() -> None:
    made = SPECIAL.override({"temperature": 8.0}, {"kd": 3.0})
    assert settings(made, PAIR) == (8.0, {"ce": 0.5, "kd": 3.0}), "what is not set stays as it was"
    assert settings(made, OTHER) == (8.0, {"ce": 0.1, "kd": 3.0})
    assert settings(SPECIAL.override({}, "imagenet"), PAIR) == (2.0, {"ce": 0.5, "kd": 0.5})
    assert settings(SPECIAL.override({}), PAIR) == settings(SPECIAL, PAIR)


@pytest.mark.parametrize(("path", "value"), [("weights.kd", 3.0), ("temperature", 8.0), ("weights", "imagenet")])
def test_swept_values_hold_for_every_pair(path: str, value: object) -> None:
    made = method_override(SPECIAL, path, value)
    for pair in (PAIR, OTHER):
        temperature, weights = settings(made, pair)
        found = {"temperature": temperature, "weights.kd": weights["kd"], "weights": "imagenet" if weights["kd"] == 0.5 else ""}
        assert found[path] == value


def test_a_term_over_a_preset_keeps_the_other_terms_of_the_preset() -> None:
    row = Row("kd", "KD", "kd", weights="imagenet")  # ce 0.5, kd 0.5; the default preset has ce 0.1
    assert row.override({}, {"kd": 0.7}).describe(PAIR)["weights"] == {"ce": 0.5, "kd": 0.7}
    assert method_override(row, "weights.kd", 0.7).describe(PAIR)["weights"] == {"ce": 0.5, "kd": 0.7}
    single = Row("kd", "KD", "kd", weights="imagenet", pairs={str(PAIR): {"weights": {"kd": 0.7}}})
    assert single.describe(PAIR)["weights"] == {"ce": 0.5, "kd": 0.7}


def test_the_command_line_is_stronger_than_the_table_and_says_so(tiny_data: Load) -> None:
    """The published pair for which the table has ReviewKD's own weight."""
    recipe = parse_options(["--dataset", "cifar100", "--pairs", "resnet56:resnet20", "--reviewkd.weights.review", "3"]).recipe
    assert recipe is not None
    plan = make_plan(recipe, load_table("cifar100"), lambda _: tiny_data(make_recipe(TINY)))
    weights = [cell.run.identity["weights"] for cell in plan.cells if cell.row.name == "reviewkd"]
    assert {each["review"] for each in weights} == {3.0}
    assert any(text.startswith("reviewkd.weights.review 3 ") for text in changes(plan))


def test_a_sweep_of_what_decides_nothing_is_refused(tiny_data: Load, tmp_path: Path) -> None:
    (tmp_path / "teacher.pt").write_bytes(b"weights")

    def plan(*options: str, checkpoint: Path | None = None) -> int:
        parsed = parse_options(["--dataset", "cifar100", "--seeds", "0", "--pairs", "resnet56:resnet20", *options])
        assert parsed.recipe is not None
        table, data = load_table("cifar100"), tiny_data(make_recipe(TINY))
        points = sweep_points(parsed.axes, table, parsed.recipe)
        return len(make_plan(parsed.recipe, table, lambda _: data, points=points, teacher_checkpoint=checkpoint).runs)

    assert plan("--methods", "reviewkd", "--sweep", "reviewkd.weights.review=1,5,8") == 3
    assert plan("--methods", "vanilla,kd", "--sweep", "teacher.lr=0.1,0.2") == 3, "the student alone is a level line"
    layers = ["--methods", "kdiffusion,kdiffusion_multi", "--sweep", "kdiffusion.layers=last,all"]
    assert plan(*layers) == 2, "another row may be one of the points: it stands beside them as a reference"
    with pytest.raises(
        OptionError, match=r"teacher\.lr=0\.1 and teacher\.lr=0\.2 make one and the same run of KD on resnet56:resnet20"
    ):
        plan("--methods", "vanilla,kd", "--sweep", "teacher.lr=0.1,0.2", checkpoint=tmp_path / "teacher.pt")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({"resnet56:resnet20": {"weight": {"kd": 1.0}}}, "Did you mean 'weights'"),
        ({"resnet56": {"weights": {"kd": 1.0}}}, "written teacher:student"),
        ({"resnet56:resnet20": 3}, "must be a mapping"),
        ({"resnet56:resnet20": {"options": 3}}, "must be a mapping of names to values; got 3"),
    ],
)
def test_settings_of_pairs_are_checked(pairs: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"rows": {"kd": {"pairs": pairs}}}))
    with pytest.raises(OptionError, match=words):
        load_table(str(tmp_path / "table.yaml"))


def test_an_empty_entry_of_a_pair_says_nothing_and_spaces_are_no_part_of_a_name(tmp_path: Path) -> None:
    pairs = {"vgg13:vgg8": None, "resnet56 : resnet20": {"options": None, "weights": {"kd": 3.0}}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"rows": {"kd": {"pairs": pairs}}}))
    (row,) = load_table(str(tmp_path / "table.yaml")).rows
    made = row.override({"temperature": 2.0})
    assert settings(made, PAIR) == (2.0, {"ce": 0.1, "kd": 3.0})
    assert settings(made, OTHER) == (2.0, {"ce": 0.1, "kd": 0.9})


def test_a_term_over_a_preset_brings_in_no_term_that_the_method_does_not_have() -> None:
    """A preset names every term that a method may have; without a guide there is none of its weight."""
    row = Row("kdiffusion", "KDiffusion", "kdiffusion", weights="default")
    assert row.override({}, {"progressive": 3.0}).settings(PAIR)[1] == {"progressive": 3.0}


def test_reserved_names_are_no_options() -> None:
    row = Row("kd", "KD", "kd", options={"weights": 3}, weights="imagenet")
    with pytest.raises(OptionError, match="'weights' is no option of 'kd'"):
        row.override({}, {"kd": 1.0})
    with pytest.raises(OptionError, match="'weights' is no option of 'kd'"):
        row.settings(PAIR)


def test_rows_of_a_recipe_keep_the_tables_pairs() -> None:
    recipe = make_recipe({**TINY, "methods": ["reviewkd"], "table": "cifar100"})
    (row,) = select_rows(load_table("cifar100"), recipe)
    assert row.describe(PAIR)["weights"]["review"]["value"] == 0.6


def test_a_table_of_photographs_takes_no_settings_of_small_images() -> None:
    for table in ("imagenet100", "folder"):
        rows = {row.name: row for row in load_table(table).rows}
        assert {name: row.describe(PAIR)["weights"] for name, row in rows.items() if name in ("ofd", "dkd")} == {
            "ofd": {"ce": 1.0, "feature": 1e-4},
            "dkd": {"ce": 1.0, "tckd": 1.0, "nckd": 0.5},
        }
        assert rows["dkd"].describe(PAIR)["options"] == {"temperature": 1.0}


def test_dkd_has_its_published_weights_by_pair() -> None:
    row = next(row for row in load_table("cifar100").rows if row.name == "dkd")
    pairs = ("resnet56:resnet20", "vgg13:mobilenetv2", "wrn_40_2:wrn_40_1", "resnet32x4:shufflenetv1", "wrn_40_2:shufflenetv1")
    found = [row.describe(Pair.parse(pair))["weights"]["nckd"]["value"] for pair in pairs]
    assert found == [2.0, 6.0, 6.0, 8.0, 8.0]


def test_settings_of_rows_that_a_table_does_not_list_are_said(tiny_data: Load) -> None:
    plan = make_plan(make_recipe({**TINY, "methods": ["kd", "sp", "at+kd"]}), load_table("digits"), tiny_data)
    caption = make_table(plan, {}, lambda _: None).caption
    assert "Settings of SP, AT + KD: from the methods' defaults." in caption
