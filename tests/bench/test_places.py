"""What captions say of time and place: one figure a group, every place, and rows of one seed that trained at several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distillzoo.bench.choice import Choice, Search, Swept
from distillzoo.bench.choice_text import table_text
from distillzoo.bench.places import cost_sentence, places, places_sentence
from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.recipe import Recipe, make_recipe
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import make_table
from distillzoo.data import DataSet
from tests.bench.conftest import TINY

WHERE = {
    "commit": "0" * 40,
    "group_seconds": 90.0,
    "group_size": 4,
    "group_images_per_second": 128.4,
    "threads": 1,
    "cpu": "A CPU",
    "gpu": None,
}
COST = (
    "Training took {} minutes for a group of 4 rows on one teacher pass, 128 images/s for each row, all rows taking turns, "
    "on 1 thread of A CPU; evaluation, checkpoints and epochs that were interrupted come on top."
)


@pytest.fixture
def plan(tiny_data: Callable[[Recipe], DataSet]) -> Plan:
    return make_plan(make_recipe({**TINY, "methods": ["vanilla", "kd", "at", "vid"]}), load_table("digits"), tiny_data)


def results_of(plan: Plan, **environment: Any) -> dict[str, dict[str, Any]]:
    there = {"status": "done", "last_accuracy": 50.0, "best_accuracy": 50.0, "environment": {**WHERE, **environment}}
    return {run_id: dict(there) for run_id in plan.runs}


def change(results: dict[str, dict[str, Any]], plan: Plan, row: str, seed: int, status: str = "done", **environment: Any) -> None:
    for cell in plan.cells:
        if (cell.row.name, cell.seed) == (row, seed):
            old = results[cell.run.id]
            results[cell.run.id] = {**old, "status": status, "environment": {**old["environment"], **environment}}


def test_the_cost_of_the_groups(plan: Plan) -> None:
    results = results_of(plan)
    assert cost_sentence(plan.cells, {run_id: {"last_accuracy": 50.0} for run_id in results}) == "", "records that do not tell"
    assert cost_sentence(plan.cells, results) == COST.format("1.5")
    for row in ("vanilla", "kd", "at", "vid"):
        change(results, plan, row, 1, group_seconds=210.0)
    assert cost_sentence(plan.cells, results) == COST.format("1.5 to 3.5")
    gpu = results_of(plan, gpu="A GPU", group_size=1)
    assert "1.5 minutes for a group of 1 row on one teacher pass, 128 images/s for each row, on A GPU;" in cost_sentence(
        plan.cells, gpu
    )


@pytest.mark.parametrize("group", [{}, {"group": "0123"}])
def test_a_group_has_one_figure_that_of_its_longest_member(group: dict[str, str], plan: Plan) -> None:
    results = results_of(plan, **group)
    change(results, plan, "at", 0, group_seconds=60.0)  # resumed at another epoch
    assert cost_sentence(plan.cells, results) == COST.format("1.5")
    change(results, plan, "kd", 0, status="diverged", group_seconds=5.0)
    change(results, plan, "vid", 1, status="diverged", group_seconds=500.0)
    assert cost_sentence(plan.cells, results) == COST.format("1.5"), "what did not train to its end says nothing"


def test_groups_that_are_told_apart_have_a_figure_each(plan: Plan) -> None:
    results = results_of(plan, group="a")
    change(results, plan, "vid", 0, group="b", group_seconds=30.0)
    assert cost_sentence(plan.cells, results) == COST.format("0.5 to 1.5")


def test_a_run_that_pairs_share_says_nothing_of_the_others_group(tiny_data: Callable[[Recipe], DataSet]) -> None:
    recipe = make_recipe({**TINY, "seeds": [0], "pairs": ["tinycnn_32:tinycnn_8", "tinycnn_16:tinycnn_8"]})
    plan = make_plan(recipe, load_table("digits"), tiny_data)
    second = [cell for cell in plan.cells if cell.pair.teacher == "tinycnn_16"]
    results = results_of(plan, group="first", group_size=2)
    for cell in second:
        if cell.row.name == "kd":
            results[cell.run.id]["environment"] = {**WHERE, "group": "second", "group_size": 1, "group_seconds": 60.0}
    for cell in plan.cells:
        if cell.row.name == "kd":
            results[cell.run.id]["teacher"] = {"id": cell.teacher.id}
    assert "1.0 minutes for a group of 1 row on" in cost_sentence(second, results)
    alone = [cell for cell in second if cell.row.name == "vanilla"]
    assert "1.5 minutes for a group of 2 rows on" in cost_sentence(alone, results), "where nothing was taught it is all there is"


def test_every_place_of_a_resumed_run_is_named(plan: Plan) -> None:
    calls = [{"threads": 2, "cpu": "A CPU", "gpu": None, "epochs": 1}, {"gpu": "A GPU", "epochs": 2}]
    assert places({**WHERE, "calls": calls}) == ("2 threads of A CPU", "A GPU")
    assert places(WHERE) == ("1 thread of A CPU",), "a record of before"
    assert places({**WHERE, "calls": "junk"}) == ("1 thread of A CPU",)
    assert places({}) == places({"calls": [3]}) == ()
    assert "on 2 threads of A CPU, A GPU; evaluation" in cost_sentence(plan.cells, results_of(plan, calls=calls))


def test_what_was_set_for_speed_is_said(plan: Plan) -> None:
    results = results_of(plan, settings={"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"})
    assert "on 1 thread of A CPU with GLIBC_TUNABLES=glibc.malloc.mmap_max=0; evaluation" in cost_sentence(plan.cells, results)
    for cell in plan.cells:
        if cell.seed == 0:
            change(results, plan, cell.row.name, 0, settings={})
    assert "with GLIBC_TUNABLES=glibc.malloc.mmap_max=0 in 1 of 2 groups; evaluation" in cost_sentence(plan.cells, results)


def test_rows_of_one_seed_that_trained_at_different_places_are_named(plan: Plan) -> None:
    results = results_of(plan)
    assert places_sentence(plan.cells, results) == ""
    for row in ("vanilla", "kd", "at", "vid"):
        change(results, plan, row, 1, threads=2)
    assert places_sentence(plan.cells, results) == "", "each seed is paired in itself"
    change(results, plan, "vid", 0, threads=2)
    said = (
        "Runs of one seed trained on different devices or numbers of threads, which moves figures, so that differences between "
        "them are not paired: "
        "student alone seed 0, KD seed 0, AT seed 0 on 1 thread of A CPU; VID seed 0 on 2 threads of A CPU."
    )
    assert places_sentence(plan.cells, results) == said
    assert said in make_table(plan, results, lambda _: None).text()
    change(results, plan, "vid", 0, status="diverged")
    assert places_sentence(plan.cells, results) == "", "it has no figure to compare"
    change(results, plan, "kd", 0, calls=[{"threads": 2, "cpu": "A CPU"}, {"threads": 1, "cpu": "A CPU"}])
    assert "KD seed 0 on 2 threads of A CPU and then 1 thread of A CPU." in places_sentence(plan.cells, results)


def test_a_search_says_how_long_and_where(plan: Plan) -> None:
    results = results_of(plan)
    change(results, plan, "kd", 0, threads=2)
    choice = Choice(Swept("kd", "kd", (0.5, 1.0)), 0.9, {0.5: 50.0}, {}, {}, plan.cells, results)
    search = Search("mine", "synthetic", "tiny", "digits", "mine", 1, 0, (choice.swept,))
    text = " ".join(table_text(search, [choice]).split())
    assert "KD seed 0 on 2 threads of A CPU" in text
    cost = COST.format("1.5").replace("on 1 thread of A CPU", "on 1 thread of A CPU, 2 threads of A CPU")
    assert f" {cost} " in text
    assert text.endswith("records name no accuracy of the exported student.")
