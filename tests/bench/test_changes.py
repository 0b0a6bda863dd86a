"""What captions say of the recipe: what was changed, from which value to which, and what else is not the recipe's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distillzoo.bench.captions import protocol_note, seeds_text
from distillzoo.bench.changes import changes
from distillzoo.bench.options import parse_options
from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.recipe import Recipe
from distillzoo.bench.recorded import RecordedDataSet
from distillzoo.bench.rows import load_table
from distillzoo.data import DataSet

Load = Callable[[Recipe], DataSet]
CIFAR = ("--dataset", "cifar100", "--methods", "vanilla,kd")


def planned(*arguments: str) -> Plan:
    recipe = parse_options(arguments).recipe
    assert recipe is not None
    nothing = RecordedDataSet(recipe.dataset, recipe.split, "", "no images", None)
    return make_plan(recipe, load_table(recipe.table or recipe.dataset), lambda _: nothing)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "cpu"), []),
        (("--recipe", "cpu", "--epochs", "3"), ["student.epochs 3 (recipe: 8)"]),
        (("--recipe", "cpu", "--epochs", "8", "--student.lr", "0.40"), []),
        (("--recipe", "cpu", "--student.milestones", "[2, 3]"), ["student.milestones [2, 3] (recipe: [150, 180, 210])"]),
        (("--recipe", "cpu", "--student.clip_norm", "1"), ["student.clip_norm 1 (recipe: none)"]),
        (("--recipe", "cpu", "--student.channels_last", "false"), ["student.channels_last false (recipe: true)"]),
        (("--recipe", "cpu", "--split", "heldout"), ["split heldout (recipe: test)"]),
        (("--recipe", "cpu", "--kd.temperature", "2"), ["kd.temperature 2 (table: 4)"]),
        (("--recipe", "cpu", "--options.kd.temperature", "2"), ["kd.temperature 2 (table: 4)"]),
        (("--recipe", "paper", "--kd.weights.kd", "0.5"), ["kd.weights.kd 0.5 (table: 0.9)"]),
        (("--recipe", "paper", "--kd.weights", "{kd: 2}"), ["kd.weights {kd: 2} (table: {ce: 0.1, kd: 0.9})"]),
        (("--recipe", "cpu", "--table", "digits"), ["the table digits"]),
        (("--recipe", "cpu", "--table", "cifar100_cpu"), []),
        (("--recipe", "paper", "--table", "cifar100"), []),
        (
            ("--recipe", "paper", "--student.lr", "0.05"),
            ["student.lr 0.05 (recipe: 0.05, 0.01 for mobilenetv2, 0.01 for shufflenetv1, 0.01 for shufflenetv2)"],
        ),
    ],
)
def test_every_change_is_said_with_its_value_and_the_one_before(arguments: tuple[str, ...], said: list[str]) -> None:
    assert changes(planned(*CIFAR, *arguments)) == said


def test_an_option_that_the_recipe_sets_has_the_value_of_the_recipe_before(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, dataset: digits, pairs: ['tinycnn_32:tinycnn_8'], teacher: {}, student: {}, options: {kd: {temperature: 3}}}"
    )
    found = changes(planned("--recipe", str(tmp_path / "mine.yaml"), "--kd.temperature", "2"))
    assert found == ["kd.temperature 2 (recipe: 3)"]


def test_what_the_table_has_for_a_pair_is_what_was_before() -> None:
    """The general value, set by hand, changes the pair for which the table has another."""
    usual = "{kind: linear_warmup, value: 5.0, epochs: 20}"
    given = ["--dataset", "cifar100", "--methods", "kd,reviewkd", "--reviewkd.weights.review", usual]
    shown = "{kind: linear_warmup, value: 5, epochs: 20}"
    special = shown.replace("5", "0.6")
    assert changes(planned(*given, "--pairs", "vgg13:vgg8")) == []
    assert changes(planned(*given, "--pairs", "resnet56:resnet20")) == [f"reviewkd.weights.review {shown} (table: {special})"]
    assert changes(planned(*given, "--pairs", "vgg13:vgg8,resnet56:resnet20")) == [
        f"reviewkd.weights.review {shown} (table: {shown} for vgg13:vgg8, {special} for resnet56:resnet20)"
    ]


def test_a_method_that_is_no_row_has_its_own_defaults_before() -> None:
    arguments = ("--dataset", "cifar100", "--recipe", "cpu", "--methods", "dkd,vid+kd", "--dkd.temperature", "2")
    assert changes(planned(*arguments, "--vid+kd.kd.temperature", "1")) == [
        "dkd.temperature 2 (table: 4)",
        "vid+kd.kd.temperature 1 (table: 4)",
    ]


def test_a_table_file_and_a_checkpoint_are_named_and_do_not_compare(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rows: {kd: {}}")
    (tmp_path / "theirs.pth").write_bytes(b"weights")
    arguments = ("--dataset", "cifar100", "--recipe", "paper", "--pairs", "vgg13:vgg8")
    recipe = parse_options([*arguments, "--table", str(tmp_path / "mine.yaml")]).recipe
    assert recipe is not None
    nothing = RecordedDataSet("cifar100", "test", "", "no images", None)
    checkpoint = tmp_path / "theirs.pth"
    plan = make_plan(recipe, load_table(str(recipe.table)), lambda _: nothing, teacher_checkpoint=checkpoint)
    assert protocol_note(plan, [3]) == (
        "paper recipe with the table mine and the teacher of the file theirs.pth, n = 3 seeds: not comparable with published "
        "figures. Students train 240 epochs in batches of 64."
    )


def test_the_note_says_how_many_seeds_are_there_and_how_long_they_train() -> None:
    trained = "Students train 240 epochs in batches of 64, teachers train 240 epochs in batches of 64."
    paper = planned(*CIFAR, "--recipe", "paper")
    assert protocol_note(paper, [3, 3]) == f"Recipe paper, n = 3 seeds. {trained}"
    assert protocol_note(paper, [0, 1]) == f"Recipe paper, n = 0 to 1 of 3 seeds. {trained}"
    short = protocol_note(planned(*CIFAR, "--recipe", "paper", "--epochs", "10"), [1])
    assert short.startswith("paper recipe with student.epochs 10 (recipe: 240), n = 1 of 3 seeds: not comparable with published")
    assert "Students train 10 epochs" in short
    cpu = protocol_note(planned(*CIFAR, "--recipe", "cpu", "--seeds", "0", "--epochs", "1"), [1])
    assert cpu.startswith("CPU recipe with student.epochs 1 (recipe: 8), n = 1 seed: not comparable with published figures.")
    assert "Students train 1 epoch in batches of 128, teachers train 15 epochs" in cpu


def test_epochs_that_differ_between_networks_are_all_said() -> None:
    plan = planned(*CIFAR, "--recipe", "fast", "--student_overrides.mobilenetv2.epochs", "30")
    assert "Students train 30 or 60 epochs in batches of 256" in protocol_note(plan, [0])


def test_seeds() -> None:
    assert [seeds_text(counts, 1) for counts in ([1], [0], [0, 1], [])] == [
        "n = 1 seed",
        "n = 0 of 1 seed",
        "n = 0 to 1 of 1 seed",
        "n = 0 of 1 seed",
    ]
