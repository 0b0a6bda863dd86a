"""What captions say of exported students and of records that do not tell everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.provenance import commits_sentence, exports_sentence, untold_sentence
from distillzoo.bench.recipe import Recipe, make_recipe
from distillzoo.bench.records import RecordStore
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import make_table
from distillzoo.data import DataSet
from tests.bench.conftest import TINY, records


@pytest.fixture
def plan(tiny_data: Callable[[Recipe], DataSet]) -> Plan:
    return make_plan(make_recipe({**TINY, "methods": ["vanilla", "kd"], "seeds": [0, 1]}), load_table("digits"), tiny_data)


def results_of(plan: Plan, **more: Any) -> dict[str, dict[str, Any]]:
    there = {"status": "done", "last_accuracy": 50.0, "best_accuracy": 50.0, **more}
    return {run_id: dict(there) for run_id in plan.runs}


def test_exports_that_score_otherwise_are_named(plan: Plan) -> None:
    results = results_of(plan, exported_accuracy=50.0)
    assert exports_sentence(plan.cells, results) == exports_sentence(plan.cells, results_of(plan)) == ""
    last = next(cell for cell in plan.cells if (cell.row.name, cell.seed) == ("kd", 1))
    results[last.run.id]["exported_accuracy"] = 50.25
    said = "Accuracies are of the networks as they trained; exported, those of KD seed 1 differ by up to 0.25 points."
    assert exports_sentence(plan.cells, results) == said
    assert said in make_table(plan, results, lambda _: None).text()


def test_what_records_do_not_tell_is_counted(plan: Plan) -> None:
    taught = {"id": "t", "name": "tinycnn_32", "accuracy": 90.0}
    told = {"commit": "abc"}
    whole = results_of(plan, environment=told, teacher={**taught, "sha256": "d"}, exported_accuracy=50.0)
    assert untold_sentence(plan.cells, whole) == ""
    assert untold_sentence(plan.cells, {}) == ""
    assert untold_sentence(plan.cells, {**whole, next(iter(whole)): {}}).startswith("1 of 4 records name no commit of their code;")
    first = next(iter(whole.values()))
    first["environment"] = {"commit": None}
    assert untold_sentence(plan.cells, whole) == "1 of 4 records name no commit of their code."
    first["teacher"] = taught
    said = "1 of 4 records name no commit of their code; 1 of 4 records name no digest of their teacher's weights."
    assert untold_sentence(plan.cells, whole) == said
    assert said in make_table(plan, whole, lambda _: None).text()
    for result in whole.values():
        result |= {"environment": told, "teacher": {**taught, "sha256": "d"}}
    del first["exported_accuracy"]
    assert untold_sentence(plan.cells, whole) == "1 of 4 records name no accuracy of the exported student."
    first["status"] = "diverged"
    assert untold_sentence(plan.cells, whole) == "", "what diverged exports nothing"


def test_a_record_holds_the_accuracy_of_what_is_exported(finished: Path) -> None:
    store = RecordStore(finished, pytest.fail, readonly=True)
    for folder in records(finished).values():
        result = store.result(store.record(folder.name))
        assert result is not None
        assert result["exported_accuracy"] == result["last_accuracy"], "nothing is folded away here"


def test_several_commits_and_changed_code_are_said(plan: Plan) -> None:
    results = results_of(plan, environment={"commit": "a" * 40})
    assert commits_sentence(plan.cells, results) == commits_sentence(plan.cells, results_of(plan)) == ""
    first, second, *_ = results.values()
    first["environment"] = {"commit": "b" * 40, "calls": [{"commit": "a" * 40}, {"commit": "b" * 40, "dirty": True}]}
    second["environment"] = {"commit": None}
    assert commits_sentence(plan.cells, results) == (
        "The code is of 2 commits (aaaaaaa, bbbbbbb), 1 of the 4 runs by more than one of them. "
        "In 1 of 4 runs it differed from its commit."
    )
    assert commits_sentence(plan.cells, results) in make_table(plan, results, lambda _: None).text()
