from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distillzoo.bench.captions import protocol_note
from distillzoo.bench.options import parse_options
from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.plot import plot_sweep
from distillzoo.bench.recipe import Recipe, make_recipe
from distillzoo.bench.rows import load_table
from distillzoo.bench.sweep import Axis, SweepView, parse_axis, sweep_points, sweep_rows
from distillzoo.data import DataSet
from distillzoo.errors import DistillZooError, OptionError
from tests.bench.conftest import TINY

Load = Callable[[Recipe], DataSet]


def plan_of(load: Load, *axes: str, methods: list[str] | None = None) -> tuple[Plan, tuple[Axis, ...]]:
    recipe = make_recipe({**{key: value for key, value in TINY.items() if key != "methods"}, "methods": methods})
    parsed = tuple(parse_axis(text) for text in axes)
    recipe = sweep_rows(parsed, recipe)
    table = load_table("digits")
    return make_plan(recipe, table, load, points=sweep_points(parsed, table, recipe)), parsed


def test_axes_are_read() -> None:
    assert parse_axis("kd.temperature=1,2.5") == Axis("kd.temperature", (1, 2.5))
    assert parse_axis("student.schedule=step, cosine") == Axis("student.schedule", ("step", "cosine"))
    assert parse_axis("crd+kd.kd.temperature=1,2").row == "crd+kd"
    assert parse_axis("student.lr=1e-2,1").of_recipe
    assert not parse_axis("kd.weights.kd=1,2").of_recipe


@pytest.mark.parametrize(
    "text", ["kd.temperature", "=1,2", "kd=1,2", "kd.temperature=", "kd.temperature=1,,2", "kd.temperature=2,2"]
)
def test_malformed_axes(text: str) -> None:
    with pytest.raises(OptionError, match="--sweep"):
        parse_axis(text)


def test_all_points_of_a_method_train_in_one_group(tiny_data: Load) -> None:
    plan, _ = plan_of(tiny_data, "kd.temperature=1,2,4,8")
    assert [len(group.runs) for group in plan.groups()] == [4, 4], "one group a seed"
    temperatures = [run.identity["options"]["temperature"] for run in plan.groups()[0].runs]
    assert temperatures == [1, 2, 4, 8]


def test_the_default_value_is_the_run_of_the_plain_table(tiny_data: Load) -> None:
    plain = make_plan(make_recipe(TINY), load_table("digits"), tiny_data)
    swept, _ = plan_of(tiny_data, "kd.temperature=1,4")
    assert set(swept.runs) & set(plain.runs)


def test_a_recipe_field_makes_groups_of_its_own(tiny_data: Load) -> None:
    plan, _ = plan_of(tiny_data, "student.lr=0.1,0.2", methods=["vanilla", "kd"])
    assert [(group.config.lr, len(group.runs)) for group in plan.groups()] == [(0.1, 2), (0.1, 2), (0.2, 2), (0.2, 2)]


def test_two_axes_make_a_grid(tiny_data: Load) -> None:
    plan, _ = plan_of(tiny_data, "kd.temperature=1,2", "kd.weights.kd=0.5,0.7,0.9")
    points = [dict(run.row.point) for run in plan.groups()[0].runs]
    assert len(points) == 6
    assert {"kd.temperature": 2, "kd.weights.kd": 0.7} in points
    mixed, _ = plan_of(tiny_data, "kd.temperature=1,2", "student.lr=0.1,0.2")
    assert len(mixed.runs) == 2 * 2 * 2


def test_a_row_that_an_axis_does_not_belong_to_stays_one_row(tiny_data: Load) -> None:
    plan, axes = plan_of(tiny_data, "kd.temperature=1,2", methods=["vanilla", "kd"])
    assert [run.row.name for run in plan.groups()[0].runs] == ["vanilla", "kd", "kd"]
    _, _, lines = SweepView(plan, axes, {}).series()
    assert set(lines) == {"student alone", "KD"}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["kd.temperatur=1,2"], "Did you mean 'temperature'"),
        (["kdd.temperature=1,2"], "Unknown method 'kdd'"),
        (["student.lrr=1,2"], "Did you mean 'lr'"),
        (["kd.temperature=1,2", "kd.temperature=3,4"], "twice"),
        (["kd.temperature=1,2", "student.lr=1,2", "student.momentum=0.1,0.2"], "one or two"),
    ],
)
def test_wrong_axes(axes: list[str], words: str, tiny_data: Load) -> None:
    with pytest.raises(DistillZooError, match=words):
        plan_of(tiny_data, *axes)
    with pytest.raises(OptionError, match="leaves out"):
        plan_of(tiny_data, "kd.temperature=1,2", methods=["vanilla"])


def test_a_point_of_which_a_seed_diverged_says_so(tiny_data: Load) -> None:
    plan, axes = plan_of(tiny_data, "kd.temperature=1,2")
    gone = {"status": "diverged", "last_accuracy": None}
    results = {cell.run.id: gone if cell.seed or cell.row.point[0][1] == 2 else {"last_accuracy": 50.0} for cell in plan.cells}
    lines = SweepView(plan, axes, results).text().splitlines()
    assert lines[4].endswith("1  50.00 ± - (seed 1 diverged)  1 of 2")
    assert lines[5].endswith("2       seeds 0 and 1 diverged  0 of 2")


def test_points_that_two_trainings_of_a_teacher_taught_are_named(tiny_data: Load) -> None:
    plan, axes = plan_of(tiny_data, "kd.temperature=1,2")
    teacher = {"id": "t", "name": "tinycnn_32", "accuracy": 91.25, "sha256": "a" * 64}
    told = {"exported_accuracy": 50.0, "environment": {"commit": "c"}}
    results = {cell.run.id: {"last_accuracy": 50.0, "teacher": teacher, **told} for cell in plan.cells}
    whole = SweepView(plan, axes, results).caption
    last = max(plan.cells, key=lambda cell: (cell.row.point, cell.seed))
    results[last.run.id]["teacher"] = {**teacher, "sha256": "b" * 64}
    assert SweepView(plan, axes, results).caption == (
        f"{whole} The teacher tinycnn_32 was trained 2 times, and students of different ones are not paired: "
        "91.25 % (sha256 aaaaaaaa) taught KD [kd.temperature=1], KD [kd.temperature=2] seed 0; "
        "91.25 % (sha256 bbbbbbbb) taught KD [kd.temperature=2] seed 1."
    )


@pytest.mark.parametrize("axis", ["student.lr=0.05,0.1", "kd.temperature=2,4"])
@pytest.mark.parametrize("split", [None, "test"])
def test_a_sweep_of_the_published_protocol_does_not_compare_with_published_figures(
    axis: str, split: str | None, tiny_data: Load
) -> None:
    given = ["--split", split] if split else []
    options = parse_options(["--dataset", "cifar100", "--methods", "kd", "--sweep", axis, *given])
    assert options.recipe is not None
    table = load_table("cifar100")
    points = sweep_points(options.axes, table, options.recipe)
    note = protocol_note(make_plan(options.recipe, table, lambda _: tiny_data(make_recipe(TINY)), points=points), [3])
    changed = "" if split else "split heldout (recipe: test) and "
    path = axis.partition("=")[0]
    assert note.startswith(f"paper recipe with {changed}{path} swept, n = 3 seeds: not comparable with published figures.")


def test_the_caption_says_where_and_how_long_points_trained(tiny_data: Load) -> None:
    plan, axes = plan_of(tiny_data, "kd.temperature=1,2")
    where = {"group_seconds": 90.0, "group_size": 2, "group_images_per_second": 128.4, "threads": 1, "cpu": "A CPU", "gpu": None}
    results = {cell.run.id: {"last_accuracy": 50.0, "environment": where} for cell in plan.cells}
    assert "Training took 1.5 minutes for a group of 2 rows" in SweepView(plan, axes, results).caption
    last = max(plan.cells, key=lambda cell: (cell.row.point, cell.seed))
    results[last.run.id] = {"last_accuracy": 50.0, "environment": {**where, "threads": 2}}
    assert (
        "them are not paired: KD [kd.temperature=1] seed 1 on 1 thread of A CPU; "
        "KD [kd.temperature=2] seed 1 on 2 threads of A CPU."
    ) in SweepView(plan, axes, results).caption


def test_the_view_of_fixed_records(tiny_data: Load, tmp_path: Path) -> None:
    plan, axes = plan_of(tiny_data, "kd.temperature=1,2,4")
    accuracy = {1: 50.0, 2: 60.0}
    results = {
        cell.run.id: {"last_accuracy": accuracy[dict(cell.row.point)["kd.temperature"]] + cell.seed}
        for cell in plan.cells
        if dict(cell.row.point)["kd.temperature"] in accuracy
    }
    view = SweepView(plan, axes, results)
    assert [line.split()[2:] for line in view.text().splitlines()[4:7]] == [
        ["1", "50.50", "±", "0.71", "2"],
        ["2", "60.50", "±", "0.71", "2"],
        ["4", "missing", "0", "of", "2"],
    ]
    assert "n = 0 to 2 of 2 seeds" in view.caption
    assert "kd.temperature" in view.csv().splitlines()[0]
    assert "split: test" in view.caption
    path, values, lines = view.series()
    assert (path, values, [spread.mean for spread in lines["KD"]]) == ("kd.temperature", (1, 2, 4), [50.5, 60.5, None])
    plot_sweep(view.title, path, values, lines, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
