from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.recipe import Pair, Recipe, apply_override, make_recipe
from distillzoo.bench.rows import load_table, select_rows
from distillzoo.build import describe_distiller
from distillzoo.data import DataSet
from distillzoo.errors import OptionError, UnknownNameError
from tests.bench.conftest import TINY

Load = Callable[[Recipe], DataSet]


def plan_of(load: Load, checkpoint: Path | None = None, **changes: object) -> Plan:
    return make_plan(make_recipe({**TINY, **changes}), load_table("digits"), load, teacher_checkpoint=checkpoint)


def ids(plan: Plan) -> dict[tuple[str, str, int], str]:
    return {(str(cell.pair), cell.row.name, cell.seed): cell.run.id for cell in plan.cells}


def test_pairs_rows_and_seeds_become_groups(tiny_data: Load) -> None:
    plan = plan_of(tiny_data, pairs=["tinycnn_32:tinycnn_8", "resnet14:resnet8"])
    groups = plan.groups()
    assert [(str(group.pair), group.seed, [run.row.name for run in group.runs]) for group in groups] == [
        ("tinycnn_32:tinycnn_8", 0, ["vanilla", "kd"]),
        ("tinycnn_32:tinycnn_8", 1, ["vanilla", "kd"]),
        ("resnet14:resnet8", 0, ["vanilla", "kd"]),
        ("resnet14:resnet8", 1, ["vanilla", "kd"]),
    ]
    assert len(plan.runs) == 8
    assert all(re.fullmatch("[0-9a-f]{16}", run_id) for run_id in plan.runs)
    assert len({group.teacher.id for group in groups if group.teacher}) == 2


def test_finished_runs_leave_their_groups(tiny_data: Load) -> None:
    plan = plan_of(tiny_data)
    found = ids(plan)
    kd = [found["tinycnn_32:tinycnn_8", "kd", seed] for seed in (0, 1)]
    assert [[run.row.name for run in group.runs] for group in plan.groups(kd)] == [["vanilla"], ["vanilla"]]
    assert all(group.teacher is None for group in plan.groups(kd)), "nobody is left who reads a teacher"
    assert plan.groups(plan.runs) == []


def test_a_student_alone_trains_once_whatever_its_teachers(tiny_data: Load) -> None:
    plan = plan_of(tiny_data, pairs=["tinycnn_32:tinycnn_8", "resnet14:tinycnn_8"], seeds=[0])
    found = ids(plan)
    assert found["tinycnn_32:tinycnn_8", "vanilla", 0] == found["resnet14:tinycnn_8", "vanilla", 0]
    assert found["tinycnn_32:tinycnn_8", "kd", 0] != found["resnet14:tinycnn_8", "kd", 0]
    assert [[run.row.name for run in group.runs] for group in plan.groups()] == [["vanilla", "kd"], ["kd"]]


@pytest.mark.parametrize(
    ("name", "options", "reads"),
    [("gpd", {}, True), ("gpd_reduced", {"static": "kd"}, True), ("gpd", {"static": None}, False), ("gpd+sp", {}, True)],
)
def test_a_method_that_can_do_without_a_teacher_gets_the_pairs(
    name: str, options: dict[str, object], reads: bool, tiny_data: Load
) -> None:
    """GPD's static loss reads one where there is one; what is recorded must be what trains."""
    plan = plan_of(tiny_data, methods=[name], seeds=[0], options={name: options})
    (cell,) = plan.cells
    assert (cell.run.teacher is not None) is reads
    assert (cell.run.identity["teacher"] is not None) is reads
    assert any(term.rpartition(".")[2].startswith("static_") for term in cell.run.identity["weights"]) is reads


def test_ids_are_stable() -> None:
    # A pinned id: it must change only together with RESULTS_VERSION, or every record ever made is orphaned.
    class Data:
        name, digest, split, augment = "fixed", "0123456789ab", "test", None

    recipe = make_recipe({**TINY, "methods": ["kd"], "seeds": [0], "weights": {"kd": {"kd": 0.9}}})
    plan = make_plan(recipe, load_table("digits"), lambda _: Data())  # type: ignore[arg-type, return-value]
    assert plan.cells[0].teacher.id == "76f64b52975ed06b"
    assert plan.cells[0].run.id == "537505f48cbb3a53"


def test_what_changes_a_result_changes_the_id(tiny_data: Load, tiny: Recipe) -> None:
    key = ("tinycnn_32:tinycnn_8", "kd", 0)
    base = ids(plan_of(tiny_data))[key]
    for path, value in {
        "student.lr": 0.06,
        "student.precision": "bf16",
        "teacher.epochs": 3,
        "teacher_seed": 1,
        "teacher_storage": "float32",
        "data.num_train": 30,
        "split": "heldout",
        "options.kd.temperature": 2,
        "weights.kd": {"kd": 0.5},
        "taps.tinycnn_8": ["stage1"],
    }.items():
        changed = make_plan(apply_override(tiny, path, value), load_table("digits"), tiny_data)
        assert ids(changed)[key] != base, path
    assert len(set(ids(plan_of(tiny_data)).values())) == 4


def test_what_does_not_change_a_result_does_not_change_the_id(tiny_data: Load, tiny: Recipe) -> None:
    key = ("tinycnn_32:tinycnn_8", "kd", 0)
    base = ids(plan_of(tiny_data))[key]
    own = next(row.weights for row in load_table("digits").rows if row.name == "kd")
    for path, value in {"options.kd.temperature": 4, "note": "other", "weights.kd": own, "seeds": [0]}.items():
        changed = make_plan(apply_override(tiny, path, value), load_table("digits"), tiny_data)
        assert ids(changed)[key] == base, path
    vanilla = ("tinycnn_32:tinycnn_8", "vanilla", 0)
    other_teacher = make_plan(apply_override(tiny, "teacher.epochs", 3), load_table("digits"), tiny_data)
    assert ids(other_teacher)[vanilla] == ids(plan_of(tiny_data))[vanilla]


def test_a_given_checkpoint_is_the_teachers_identity(tiny_data: Load, tmp_path: Path) -> None:
    one, same, other = tmp_path / "one.pt", tmp_path / "elsewhere.pt", tmp_path / "other.pt"
    one.write_bytes(b"weights")
    same.write_bytes(b"weights")
    other.write_bytes(b"others")
    first, second, third = (plan_of(tiny_data, path) for path in (one, same, other))
    assert ids(first) == ids(second), "the path does not matter"
    assert first.cells[0].teacher.id != third.cells[0].teacher.id
    with pytest.raises(OptionError, match="does not exist"):
        plan_of(tiny_data, tmp_path / "missing.pt")
    with pytest.raises(OptionError, match="several"):
        plan_of(tiny_data, one, pairs=["tinycnn_32:tinycnn_8", "resnet14:resnet8"])


def test_rows_by_name_method_composition_and_all(tiny: Recipe) -> None:
    table = load_table("digits")

    def names(*methods: str) -> list[str]:
        return [row.name for row in select_rows(table, make_recipe({**TINY, "methods": list(methods)}))]

    assert names("vid+kd", "vanilla") == ["vid+kd", "vanilla"]
    assert names("all")[:2] == ["vanilla", "kd"]
    assert len(names("all")) == len(set(names("all"))) > 4
    assert select_rows(table, make_recipe({**TINY, "methods": ["vid+kd"]}))[0].title == "VID + KD"
    everything = make_recipe({key: value for key, value in TINY.items() if key != "methods"})
    assert [row.name for row in select_rows(table, everything)] == [row.name for row in table.rows]
    with pytest.raises(UnknownNameError, match=r"Unknown method 'vanila'. Did you mean 'vanilla'"):
        names("vanila")
    with pytest.raises(UnknownNameError, match="Unknown method in 'kd\\+vadi': 'vadi'"):
        names("kd+vadi")
    with pytest.raises(OptionError, match="composition"):
        names("kd+kd")


def test_options_and_weights_of_rows(tiny: Recipe) -> None:
    recipe = make_recipe({**TINY, "options": {"kd": {"temperature": 2}}, "weights": {"kd": {"kd": 0.5}}})
    described = select_rows(load_table("digits"), recipe)[1].describe(Pair("a", "b"))
    assert described == {"options": {"temperature": 2}, "weights": {"ce": 0.1, "kd": 0.5}}
    for field, value in {"options": {"kd": {"temperatur": 2}}, "weights": {"kdd": {"kd": 1}}}.items():
        with pytest.raises((OptionError, UnknownNameError), match="Did you mean"):
            select_rows(load_table("digits"), make_recipe({**TINY, field: value}))


def test_a_table_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "rows:\n  cold: {method: kd, title: cold KD, options: {temperature: 1.0},"
        " pairs: {'a:b': {options: {temperature: 3.0}, weights: {kd: 1.0}}}}\n"
    )
    (row,) = load_table(str(path)).rows
    assert row.settings(Pair("x", "y")) == ({"temperature": 1.0}, None)
    assert row.settings(Pair("a", "b")) == ({"temperature": 3.0}, {"kd": 1.0})
    path.write_text("rows:\n  cold: {metod: kd}\n")
    with pytest.raises(OptionError, match=r"'metod'. Did you mean 'method'"):
        load_table(str(path))
    with pytest.raises(UnknownNameError, match=r"Unknown table 'digts'. Did you mean 'digits'"):
        load_table("digts")


def test_published_figures_stand_beside_rows() -> None:
    table = load_table("cifar100")
    assert dict(table.published_figures("kd", Pair("resnet56", "resnet20"))) == {"CRD paper": 70.66}
    assert dict(table.published_figures("vanilla", Pair("vgg13", "mobilenetv2"))) == {"CRD paper": 64.6, "Yao et al.": 64.6}
    assert table.published_figures("kd", Pair("resnet20", "resnet8")) == []
    assert dict(table.published_figures("kdiffusion_guide", Pair("vgg13", "mobilenetv2"))) == {"Yao et al.": 70.49}
    assert "best epoch" in table.published_protocols("ofd")["Yao et al."]
    assert table.published_protocols("kd") == {}


def test_the_twelve_rows_of_cifar100() -> None:
    table = load_table("cifar100")
    recipe = make_recipe({key: value for key, value in TINY.items() if key != "methods"})
    rows = select_rows(table, recipe)
    assert [row.title for row in rows] == [
        "student alone",
        *("KD", "AT", "VID", "CRD", "OFD", "ReviewKD", "DiffKD"),
        *("Average", "KDiffusion single", "KDiffusion multiple", "KDiffusion multiple + guide"),
    ]
    options = {row.name: row.describe(Pair("", ""))["options"] for row in rows if row.method == "kdiffusion"}
    assert {name: (each["objective"], each["layers"], each["guide"]) for name, each in options.items()} == {
        "kdiffusion_average": ("average", "last", False),
        "kdiffusion": ("progressive", "last", False),
        "kdiffusion_multi": ("progressive", "all", False),
        "kdiffusion_guide": ("progressive", "all", True),
    }
    assert describe_distiller("kdiffusion")["options"] == options["kdiffusion"], "the plain name is the single-layer row"


def test_an_extra_row_waits_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rows: {kd: {}, fitnet: {title: hints, extra: true}}")
    table = load_table(str(path))
    plain = {key: value for key, value in TINY.items() if key != "methods"}
    assert [row.name for row in select_rows(table, make_recipe(plain))] == ["kd"]
    assert [row.title for row in select_rows(table, make_recipe({**plain, "methods": ["fitnet"]}))] == ["hints"]
    path.write_text("rows: {kd: {extra: 1}}")
    with pytest.raises(OptionError, match=r"extra of row 'kd' .* true or false; got 1"):
        load_table(str(path))
