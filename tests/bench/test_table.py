from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.plot import fits_log_axis, plot_table
from distillzoo.bench.recipe import Recipe, find_recipe, load_recipe, make_recipe
from distillzoo.bench.render import Spread, as_markdown, as_text
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import make_table
from distillzoo.data import DataSet
from tests.bench.conftest import TINY

Load = Callable[[Recipe], DataSet]
LAST = {"vanilla": {0: 70.0, 1: 72.0, 2: 71.0}, "kd": {0: 72.0, 1: 73.0, 2: 74.0}, "at": {0: 75.0, 2: 73.0}, "vid": {}}
TEACHER = {"id": "t", "name": "tinycnn_32", "accuracy": 91.25, "parameters": 287843}


@pytest.fixture
def plan(tiny_data: Load) -> Plan:
    recipe = make_recipe({**TINY, "methods": list(LAST), "seeds": [0, 1, 2]})
    return make_plan(recipe, load_table("digits"), tiny_data)


def results_of(plan: Plan, last: dict[str, dict[int, float]]) -> dict[str, dict[str, Any]]:
    return {
        cell.run.id: {
            "status": "done",
            "last_accuracy": last[cell.row.name][cell.seed],
            "best_accuracy": last[cell.row.name][cell.seed] + 1.0,
            "parameters": 6179,
            "exported_accuracy": last[cell.row.name][cell.seed],
            "environment": {"commit": "c"},
        }
        for cell in plan.cells
        if cell.seed in last[cell.row.name]
    }


def test_the_text_of_fixed_records(plan: Plan) -> None:
    text = make_table(plan, results_of(plan, LAST), lambda _: TEACHER).text()
    assert text.split("\n\n")[:2] == [
        "synthetic: tinycnn_32 -> tinycnn_8",
        "method           last epoch    best epoch            vs KD       n\n"
        "-------------  ------------  ------------  ---------------  ------\n"
        "student alone  71.00 ± 1.00  72.00 ± 1.00  ns -2.00 ± 1.00       3\n"
        "KD             73.00 ± 1.00  74.00 ± 1.00                -       3\n"
        "AT             74.00 ± 1.41  75.00 ± 1.41  ns +1.00 ± 2.83  2 of 3\n"
        "VID                 missing             -                -  0 of 3",
    ]


def test_the_caption_says_what_must_be_known(plan: Plan) -> None:
    caption = make_table(plan, results_of(plan, LAST), lambda _: TEACHER).text().split("\n\n")[2]
    for words in (
        "synthetic, 24 training and 12 test images",
        "split: test",
        "last epoch",
        "(6,179 parameters); n = 0 to 3 of 3 seeds.",
        "Differences to KD are paired over seeds",
        "Teacher tinycnn_32 91.25 % (287,843 parameters)",
        "student tinycnn_8 (6,179 parameters)",
        "those marked ns are inside the spread (a 95 % interval of their mean by Student's t holds zero) and mean nothing.",
        "tiny recipe, n = 0 to 3 of 3 seeds: not comparable with published figures. Students train 3 epochs in batches of 12, "
        "teachers train 2 epochs in batches of 12.",
        "2 of 4 cells are there, 1 in part (8 of 12 runs).",
    ):
        assert words in caption


def test_differences_are_paired_over_seeds(plan: Plan) -> None:
    line = make_table(plan, results_of(plan, LAST), lambda _: None).blocks[0].lines[2]
    assert line.against == {0: 3.0, 2: -1.0}, "seed 1 of AT is missing, so KD's seed 1 must not count"


def test_runs_on_other_devices_or_threads_make_no_pair(plan: Plan) -> None:
    results = results_of(plan, LAST)
    ids = {(cell.row.name, cell.seed): cell.run.id for cell in plan.cells}
    for seed in (0, 1):
        for row in ("vanilla", "kd"):
            results[ids[row, seed]]["environment"] = {"commit": "c", "threads": 2, "cpu": "A CPU"}
    results[ids["kd", 0]]["environment"] = {"commit": "c", "threads": 1, "cpu": "A CPU"}
    line = make_table(plan, results, lambda _: None).blocks[0].lines[0]
    assert line.against == {1: -1.0, 2: -3.0}, "of seed 2 nothing is told"


def test_a_difference_outside_the_spread_is_not_marked_and_one_without_a_spread_neither(plan: Plan) -> None:
    def marks(kd: list[float]) -> tuple[str, str]:
        last = {"vanilla": {0: 70.0, 1: 72.0, 2: 71.0}, "kd": dict(enumerate(kd)), "at": {}, "vid": {}}
        table = make_table(plan, results_of(plan, last), lambda _: None)
        row = next(iter(csv.DictReader(io.StringIO(table.csv()))))
        return table.text().splitlines()[4].split("  ")[3].strip(), row["vs_kd_ns"]

    assert marks([75.0, 77.1, 76.0]) == ("-5.03 ± 0.06", "False")
    assert marks([75.0, 77.0, 76.0]) == ("ns -5.00 ± 0.00", "True"), "alike to the last image: their spread is not known"
    assert marks([75.13, 77.13, 76.13])[0] == "ns -5.13 ± 0.00", "rounding is no spread"
    assert marks([75.0]) == ("-5.00 ± -", "")


def test_a_seed_that_the_baseline_lacks_makes_no_difference(plan: Plan) -> None:
    last = {**LAST, "kd": {0: 72.0}}
    line = make_table(plan, results_of(plan, last), lambda _: None).blocks[0].lines[0]
    assert line.against == {0: -2.0}
    assert line.spreads()[0].n == 3


def test_one_seed_has_no_spread_and_ranks_nothing(tiny_data: Load) -> None:
    recipe = make_recipe({**TINY, "seeds": [0]})
    plan = make_plan(recipe, load_table("digits"), tiny_data)
    table = make_table(plan, results_of(plan, LAST), lambda _: None)
    assert "70.00 ± -" in table.text()
    assert "One seed ranks nothing." in table.blocks[0].caption
    assert "Teacher tinycnn_32 not made" in table.blocks[0].caption


def test_one_seed_of_three_is_in_part(plan: Plan) -> None:
    table = make_table(plan, results_of(plan, {row: {0: 70.0} for row in LAST}), lambda _: TEACHER)
    assert table.count == "0 of 4 cells are there, 4 in part (4 of 12 runs)."
    assert table.blocks[0].caption.endswith("n = 1 of 3 seeds. One seed ranks nothing.")
    assert "tiny recipe, n = 1 of 3 seeds: not" in table.caption


def test_cell_and_caption_name_the_seeds_that_diverged(plan: Plan) -> None:
    results = results_of(plan, LAST)
    ids = {(cell.row.name, cell.seed): cell.run.id for cell in plan.cells}
    gone = {"status": "diverged", "last_accuracy": None, "best_accuracy": 12.0}
    results |= {ids["kd", 1]: gone, ids["vid", 0]: gone, ids["vid", 2]: gone}
    table = make_table(plan, results, lambda _: None)
    lines = table.text().splitlines()
    assert lines[5].split("  ")[-1] == "2 of 3"
    assert "KD             73.00 ± 1.41 (seed 1 diverged)" in lines[5]
    assert "seeds 0 and 2 diverged" in lines[7]
    assert "KD: seed 1 diverged; VID: seeds 0 and 2 diverged; a mean of the other seeds flatters." in table.blocks[0].caption
    assert table.count == "1 of 4 cells are there, 2 in part (7 of 12 runs; 3 diverged)."
    row = {row["row"]: row for row in csv.DictReader(io.StringIO(table.csv()))}["kd"]
    assert [row[f"last_seed_{seed}"] for seed in (0, 1, 2)] == ["72", "diverged", "74"]


def test_a_row_of_one_seed_that_diverged(tiny_data: Load) -> None:
    plan = make_plan(make_recipe({**TINY, "seeds": [4]}), load_table("digits"), tiny_data)
    kd = next(cell.run.id for cell in plan.cells if cell.row.name == "kd")
    table = make_table(plan, {kd: {"status": "diverged", "last_accuracy": None}}, lambda _: None)
    assert table.text().splitlines()[5].split() == ["KD", "diverged", "-", "-", "0", "of", "1"]
    assert "KD: diverged" in table.blocks[0].caption


def test_unsupported_rows_say_so_and_lack_no_seeds(plan: Plan) -> None:
    vid = [cell.run.id for cell in plan.cells if cell.row.name == "vid"]
    last = {**LAST, "at": LAST["kd"]}
    table = make_table(plan, results_of(plan, last), lambda _: None, dict.fromkeys(vid, "VID cannot."))
    assert "not applicable" in table.text().splitlines()[7]
    assert "Not applicable: VID (VID cannot.)" in table.blocks[0].caption
    assert "n = 3 seeds." in table.blocks[0].caption
    assert table.count == ""


def test_markdown_and_csv(plan: Plan) -> None:
    table = make_table(plan, results_of(plan, LAST), lambda _: TEACHER)
    assert "| KD | 73.00 ± 1.00 | 74.00 ± 1.00 | - | 3 |" in table.markdown()
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(table.csv()))}
    assert list(rows) == ["vanilla", "kd", "at", "vid"]
    assert float(rows["vanilla"]["vs_kd_mean"]) == -2.0
    assert [rows["at"][f"last_seed_{seed}"] for seed in (0, 1, 2)] == ["75", "", "73"]
    assert rows["vid"]["n"] == "0"
    assert rows["vid"]["last_mean"] == ""


def test_published_figures_get_a_column(tiny_data: Load) -> None:
    recipe = make_recipe({**TINY, "pairs": ["resnet56:resnet20"], "seeds": [0]})
    plan = make_plan(recipe, load_table("cifar100"), tiny_data)
    lines = make_table(plan, {}, lambda _: None).text().splitlines()
    assert "published (CRD paper)" in lines[2]
    assert lines[5].rstrip().endswith("70.66")


def test_published_figures_stand_beside_ours_with_the_difference(tiny_data: Load) -> None:
    recipe = make_recipe({**TINY, "pairs": ["vgg13:mobilenetv2", "resnet50:mobilenetv2"], "methods": ["kd", "ofd"]})
    plan = make_plan(recipe, load_table("cifar100"), tiny_data)
    results = {
        cell.run.id: {"status": "done", "last_accuracy": 68.0 + cell.seed, "best_accuracy": 70.0}
        for cell in plan.cells
        if (str(cell.pair), cell.row.name) in {("vgg13:mobilenetv2", "kd"), ("vgg13:mobilenetv2", "ofd")}
    }
    table = make_table(plan, results, lambda _: None)
    first, second = (block.lines for block in table.blocks)
    assert [line.beside("CRD paper") for line in first] == ["67.37 (+1.13)", "-"]
    assert [line.beside("Yao et al.") for line in first] == ["-", "69.48* (-0.98)"]
    assert [line.beside("Yao et al.") for line in second] == ["-", "69.04*"], "no difference to what is not there"
    assert "* Yao et al.'s OFD: another protocol" in table.text().split("\n\n")[-1]
    assert "In brackets: ours less the published figure." in table.caption
    assert "2 of 4 cells are there (4 of 8 runs)." in table.text()
    assert table.text().count("paired over seeds") == 1, "what holds for all pairs is said once"
    rows = [*csv.DictReader(io.StringIO(table.csv()))]
    assert float(rows[0]["minus_CRD paper"]) == pytest.approx(1.13)
    assert rows[2]["minus_CRD paper"] == ""


def test_the_caption_names_where_settings_come_from(tiny_data: Load, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rows: {kd: {title: KD, source: 'held-out images: of 1 and 2'}, at: {source: held-out images}, vid: {}}")
    recipe = make_recipe({**TINY, "methods": ["kd", "at", "vid"]})
    caption = make_table(make_plan(recipe, load_table(str(path)), tiny_data), {}, lambda _: None).caption
    assert "Settings of KD, at: from held-out images." in caption


def test_an_empty_table_says_how_many_cells_it_lacks(tiny_data: Load) -> None:
    pairs = load_recipe(find_recipe("paper", "cifar100")).pairs
    recipe = make_recipe({**{key: value for key, value in TINY.items() if key != "methods"}, "pairs": pairs, "table": "cifar100"})
    text = make_table(make_plan(recipe, load_table("cifar100"), tiny_data), {}, lambda _: None).text()
    assert "0 of 60 cells are there (0 of 116 runs)." in text, "the student alone is one run in the pairs that share it"
    assert text.count("missing") == 60


def test_spread() -> None:
    assert Spread([1.0, 3.0]).text() == "2.00 ± 1.41"
    assert Spread([1.0]).text(signed=True) == "+1.00 ± -"
    assert Spread([]).text() == "-"


def test_columns_align_and_markdown_escapes() -> None:
    assert as_text(["a", "b"], [["xx", "1"], ["y", "22"]]).splitlines() == ["a    b", "--  --", "xx   1", "y   22"]
    assert "a\\|b" in as_markdown(["h"], [["a|b"]])


def test_a_plot_is_a_picture_that_shows_every_row(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "table.png"
    plot_table(make_table(plan, results_of(plan, LAST), lambda _: TEACHER), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.png"]


@pytest.mark.parametrize(
    ("values", "log"), [([1, 2, 4, 8], True), ([0.001, 0.01, 0.1], True), ([1, 2, 3], False), ([0, 1, 10], False), ([1, 8], False)]
)
def test_log_axis(values: list[float], log: bool) -> None:
    assert fits_log_axis(values) is log
