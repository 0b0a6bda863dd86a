"""What is far from the published figures, which orders hold, and the page that says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from docutils.statemachine import StringList

from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.recipe import Pair, Recipe, find_recipe, load_recipe, make_recipe
from distillzoo.bench.reproduction import Comparison, comparisons, deviations, orders, read_explanations, recorded_table
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import Table, make_table
from distillzoo.data import DataSet
from distillzoo.errors import OptionError
from tests.bench.conftest import TINY

Load = Callable[[Recipe], DataSet]
ROOT = Path(__file__).resolve().parents[2]
PAIR = "vgg13:mobilenetv2"
LAST = {  # published: 67.37, 69.73, 70.37, 69.14, 69.91, 70.49
    "kd": (66.0, 66.2, 66.4),
    "crd": (69.5, 69.7, 69.9),
    "reviewkd": (66.0, 69.0, 72.0),
    "kdiffusion": (69.0, 69.1, 69.2),
    "kdiffusion_multi": (68.0, 68.2, 68.1),
    "kdiffusion_guide": (70.0,),
}


@pytest.fixture
def made(tiny_data: Load) -> tuple[Plan, Table]:
    recipe = make_recipe(
        {**TINY, "pairs": [PAIR], "methods": [*LAST, "kdiffusion_average"], "seeds": [0, 1, 2], "table": "cifar100"}
    )
    plan = make_plan(recipe, load_table("cifar100"), tiny_data)
    results = {
        cell.run.id: {"status": "done", "last_accuracy": LAST[cell.row.name][cell.seed], "best_accuracy": 80.0}
        for cell in plan.cells
        if cell.row.name in LAST and cell.seed < len(LAST[cell.row.name])
    }
    return plan, make_table(plan, results, lambda _: None)


def test_far_is_more_than_half_a_point_and_two_standard_errors(made: tuple[Plan, Table]) -> None:
    found = {each.line.row.name: each for each in deviations(made[1])}
    assert set(found) == {"kd", "kdiffusion_multi"}, "ReviewKD is 1.37 off with a standard error of 1.73, the guide 0.49 with none"
    assert found["kd"].difference == pytest.approx(66.2 - 67.37)
    assert found["kd"].sources == ("CRD paper",)


@pytest.mark.parametrize(
    ("distance", "deviation", "far"),
    [
        (1.5, 2.0, False),  # between one standard error, 1.15, and two
        (1.5, 1.0, True),  # beyond two standard errors, 1.15, though within two standard deviations
        (0.51, 0.01, True),
        (0.49, 0.01, False),
    ],
)
def test_far_goes_by_standard_errors_of_the_mean(distance: float, deviation: float, far: bool, made: tuple[Plan, Table]) -> None:
    table = made[1]
    line = replace(table.blocks[0].lines[0], last={seed: 70.0 + (seed - 1) * deviation for seed in range(3)})
    for published in (70.0 - distance, 70.0 + distance):
        own = replace(line, published=(("someone", published),))
        found = deviations(replace(table, blocks=(replace(table.blocks[0], lines=(own,)),)))
        assert [each.published for each in found] == ([published] if far else [])


def test_figures_that_two_sources_share_count_once(tiny_data: Load) -> None:
    recipe = make_recipe({**TINY, "pairs": [PAIR], "methods": ["at"], "seeds": [0], "table": "cifar100"})
    plan = make_plan(recipe, load_table("cifar100"), tiny_data)
    table = make_table(plan, {plan.cells[0].run.id: {"last_accuracy": 50.0}}, lambda _: None)
    assert [each.sources for each in deviations(table)] == [("CRD paper", "Yao et al.")]


def test_orders_are_met_or_not_or_not_there_with_what_is_to_be_doubted(made: tuple[Plan, Table]) -> None:
    found = {(each.other.row.name, each.row.row.name): each for each in orders(*made)}
    assert {names: each.verdict for names, each in found.items()} == {
        ("kdiffusion_average", "kdiffusion"): "not there yet",
        ("kdiffusion", "kdiffusion_multi"): "not met",
        ("kdiffusion_multi", "kdiffusion_guide"): "met, one seed",
        ("reviewkd", "kdiffusion_guide"): "met, one seed",
        ("crd", "kdiffusion_guide"): "met, one seed",
        ("kd", "kdiffusion_guide"): "met, one seed",
    }
    review = found["reviewkd", "kdiffusion_guide"]
    assert review.differences.values == (4.0,), "only the seed that both have"


@pytest.mark.parametrize(
    ("differences", "doubt"),
    [
        ((), ""),
        ((3.0,), "one seed"),
        ((0.1, -0.1), "inside the spread"),
        ((0.0, 0.0), "inside the spread"),
        ((51.87 - 46.0, 51.88 - 46.01), "inside the spread"),
        ((0.5, 0.5), "inside the spread"),  # of values all alike it is not known
        ((1.4, 2.4, 3.4), "inside the spread"),  # 2.4 against 4.30 x 1 / sqrt(3) = 2.48
        ((1.6, 2.6, 3.6), ""),
        ((-1.6, -2.6, -3.6), ""),
        ((1.0, 1.2), "inside the spread"),  # 1.1 against 12.71 x 0.1
        ((1.3, 1.5), ""),
        ((0.3, 2.3, 0.3, 2.3, 0.3, 2.3), ""),  # 1.3 against 2.57 x 1.10 / sqrt(6) = 1.15
        ((0.1, 2.1, 0.1, 2.1, 0.1, 2.1), "inside the spread"),
    ],
)
def test_a_mean_whose_interval_by_students_t_holds_zero_is_inside_the_spread(
    differences: tuple[float, ...], doubt: str, made: tuple[Plan, Table]
) -> None:
    block = made[1].blocks[0]
    row = replace(block.lines[0], last=dict(enumerate(differences)))
    other = replace(block.lines[1], last=dict.fromkeys(range(9), 0.0))
    assert Comparison(block, row, other).doubt == doubt
    verdict = Comparison(block, row, other).verdict
    assert verdict.endswith(doubt)
    assert verdict.startswith("met" if sum(differences) > 0 else "not met" if differences else "not there yet")


def test_each_row_of_kdiffusion_is_compared_with_each_of_the_others(made: tuple[Plan, Table]) -> None:
    found = {(each.row.row.name, each.other.row.name): each for each in comparisons(*made)}
    rows, others = ("kdiffusion", "kdiffusion_multi", "kdiffusion_guide"), ("kdiffusion_average", "kd", "crd", "reviewkd")
    assert [*found] == [(row, other) for row in rows for other in others]
    assert found["kdiffusion", "kd"].text() == "+2.90 ± 0.10, n = 3"
    assert found["kdiffusion", "crd"].text() == "-0.60 ± 0.10, n = 3", "below is shown as well"
    assert found["kdiffusion", "reviewkd"].text() == "+0.10 ± 2.90, n = 3, inside the spread"
    assert found["kdiffusion_guide", "kd"].text() == "+4.00 ± -, n = 1, one seed"
    assert found["kdiffusion", "kdiffusion_average"].text() == "not there yet"


def test_rows_of_two_trainings_of_the_teacher_are_not_paired(made: tuple[Plan, Table]) -> None:
    block = made[1].blocks[0]
    one = replace(block.lines[0], last={0: 60.0, 1: 61.0}, teachers={0: "a", 1: "a"})
    two = replace(block.lines[1], last={0: 65.0, 1: 62.0}, teachers={0: "b", 1: "a"})
    assert Comparison(block, two, one).text() == "+1.00 ± -, n = 1, one seed"
    other = replace(two, teachers={0: "b", 1: "b"})
    assert Comparison(block, other, one).text() == "of different trainings of the teacher, devices or numbers of threads"
    assert Comparison(block, other, one).verdict == "of different trainings of the teacher, devices or numbers of threads"
    assert replace(other, teachers={}).less(one) == {0: 5.0, 1: 1.0}, (
        "of rows without a teacher, and of old records, nothing is known"
    )


def test_the_table_pairs_with_the_baseline_of_the_same_teacher_alone(tiny_data: Load) -> None:
    plan = make_plan(make_recipe({**TINY, "methods": ["vanilla", "kd", "at"], "seeds": [0, 1]}), load_table("digits"), tiny_data)
    results = {
        cell.run.id: {
            "last_accuracy": {"vanilla": 50.0, "kd": 60.0, "at": 70.0}[cell.row.name],
            **({} if cell.row.name == "vanilla" else {"teacher": {"id": "t", "sha256": f"{cell.row.name == 'at'}{cell.seed}"}}),
        }
        for cell in plan.cells
    }
    for cell in plan.cells:
        if (cell.row.name, cell.seed) == ("at", 1):
            results[cell.run.id]["teacher"] = {"id": "t", "sha256": "False1", "accuracy": 1.0, "name": "t"}
        elif cell.row.name != "vanilla":
            results[cell.run.id]["teacher"] |= {"accuracy": 1.0, "name": "t"}  # type: ignore[operator]
    lines = {line.row.name: line for line in make_table(plan, results, lambda _: None).blocks[0].lines}
    assert lines["vanilla"].against == {0: -10.0, 1: -10.0}
    assert lines["at"].against == {1: 10.0}, "seed 0 was taught by another training"


def test_what_diverged_is_not_awaited(made: tuple[Plan, Table]) -> None:
    block = made[1].blocks[0]
    row = replace(block.lines[0], last={0: 60.0, 1: 61.0}, asked=3, ended={2: "diverged"})
    other = replace(block.lines[1], last={0: 50.0, 1: 50.0, 2: 50.0}, asked=3)
    assert Comparison(block, row, other).text().endswith(f", n = 2, {row.row.title}: seed 2 diverged")
    assert Comparison(block, row, other).verdict == f"met, {row.row.title}: seed 2 diverged"
    gone = replace(row, last={}, ended=dict.fromkeys(range(3), "diverged"))
    assert Comparison(block, gone, other).text() == f"{row.row.title}: seeds 0, 1 and 2 diverged"
    assert Comparison(block, other, gone).verdict == f"{row.row.title}: seeds 0, 1 and 2 diverged"
    assert Comparison(block, replace(gone, ended={}, applies=False), other).text() == f"{row.row.title}: not applicable"
    far = replace(made[1], blocks=(replace(block, lines=(replace(row, published=(("someone", 90.0),)),)),))
    assert "(2 seeds; seed 2 diverged, so that the mean of the others flatters), published 90.00" in "".join(
        page_module()._far(far, {})
    )


def test_a_table_without_these_rows_has_no_comparisons(tiny_data: Load) -> None:
    for table, methods in (("cifar100", ["vanilla", "kd"]), ("digits", ["vanilla", "kd"])):
        recipe = make_recipe({**TINY, "methods": methods, "table": table})
        plan = make_plan(recipe, load_table(table), tiny_data)
        made = make_table(plan, {}, lambda _: None)
        assert comparisons(plan, made) == []
        assert page_module()._compared(plan, made) == []


def test_the_published_figures_have_the_orders_that_are_expected_of_ours() -> None:
    table = load_table("cifar100")
    for text in load_recipe(find_recipe("paper", "cifar100")).pairs:
        pair = Pair.parse(text)
        for source in table.published:
            for below, above in source.get("orders", ()):
                values = [[value for _, value in table.published_figures(name, pair)] for name in (below, above)]
                assert max(values[0]) < min(values[1]), (text, below, above)


def test_explanations_are_texts_of_rows_that_there_are(made: tuple[Plan, Table], tmp_path: Path) -> None:
    path = tmp_path / "reproduction.yaml"
    assert read_explanations(path, made[0]) == {}
    path.write_text(f"'{PAIR}':\n  kd: Seeds were few.\n")
    assert read_explanations(path, made[0]) == {(PAIR, "kd"): "Seeds were few."}
    for text, words in {
        f"'{PAIR}': {{kdd: x}}": "Did you mean 'kd'",
        "'vgg13:mobilenetv1': {kd: x}": "Did you mean 'vgg13:mobilenetv2'",
        f"'{PAIR}': {{kd: 1}}": "must be a text",
        "- 1": "mapping",
    }.items():
        path.write_text(text)
        with pytest.raises(OptionError, match=words):
            read_explanations(path, made[0])


@pytest.mark.parametrize("name", ["paper", "fast"])
def test_the_five_pairs_without_any_record(name: str, tmp_path: Path) -> None:
    plan, table = recorded_table(load_recipe(find_recipe(name, "cifar100")), tmp_path / "nothing", [], pytest.fail)
    assert "0 of 60 cells are there (0 of 174 runs)." in table.text()
    assert deviations(table) == []
    assert {order.verdict for order in orders(plan, table)} == {"not there yet"}
    assert not list(tmp_path.iterdir())


def test_committed_records_make_their_table(tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "results" / "digits"
    _, table = recorded_table(load_recipe(find_recipe("digits", None)), folder, [], pytest.fail)
    assert [line.count() for line in table.blocks[0].lines] == ["3"] * 5
    assert "Training took" in table.text()


def page_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduction_page", ROOT / "docs" / "_ext" / "reproduction.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_read_again_at_every_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source stays as it is when records come."""
    module = page_module()
    asked: list[str] = []
    parsed: list[str] = []
    monkeypatch.setattr(module, "page", lambda name: [name])
    env = SimpleNamespace(note_reread=lambda: asked.append("again"))
    state = SimpleNamespace(
        document=SimpleNamespace(settings=SimpleNamespace(env=env)), nested_parse=lambda lines, *_: parsed.extend(lines)
    )
    machine = SimpleNamespace(reporter=None)
    module.Reproduction("reproduction", ["digits"], {}, StringList(), 1, 0, "", state, machine).run()
    assert (asked, parsed) == (["again"], ["digits"])


def test_the_page(made: tuple[Plan, Table], tmp_path: Path) -> None:
    page = page_module()
    empty = "\n".join(page.page("cifar100_paper", tmp_path))
    assert "None of the 55 cells with a published figure is there yet" in empty
    assert empty.count("- not there yet") == 30 + 60
    assert "whichever way it falls: 0 of 60 comparisons are there." in empty
    far = "\n".join(page._far(made[1], {(PAIR, "kd"): "Seeds were\nfew."}))
    assert far.startswith("5 of the 7 cells with a published figure are there, 1 in part; 2 figures are farther")
    assert "**KD, vgg13 to mobilenetv2**: ours 66.20 ± 0.20 (3 seeds), published 67.37 (CRD paper), -1.17. Seeds were few." in far
    assert far.count("The reason is not known yet.") == 1
    expected = page._expected(*made)
    assert "     - Average below KDiffusion single" in expected
    assert expected[-6:-1] == [
        "   * - vgg13 to mobilenetv2",
        "     - KD below KDiffusion multiple + guide",
        "     - +4.00 ± -",
        "     - 1",
        "     - met, one seed",
    ]
    compared = page._compared(*made)
    assert compared[0].startswith(
        "KDiffusion single, KDiffusion multiple and KDiffusion multiple + guide, each against Average, KD, CRD and ReviewKD, "
        "whichever way it falls: 9 of 12 comparisons are there, 3 of them in part "
        "(2 above, 2 below, 2 inside the spread, 3 one seed)."
    )
    assert r"     - \-0.60 ± 0.10, n = 3" in compared, "a minus is no list"
