"""The choice of weights: sweeps of one budget, the highest held-out accuracy, and the table file that follows from the records."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.choose_weights import main
from distillzoo.bench.choice import Choice, Search, Swept, arguments, load_search
from distillzoo.bench.choice_text import check_kept, table_file
from distillzoo.bench.options import parse_options
from distillzoo.bench.progress import Console
from distillzoo.bench.recipe import Pair
from distillzoo.bench.rows import TABLES, load_table, select_rows
from distillzoo.errors import OptionError
from tests.bench.conftest import TINY_YAML, Call

ROOT = Path(__file__).resolve().parents[2]
SEARCH = ROOT / "benchmarks" / "weights_cifar100_cpu.yaml"


def choice(**accuracies: float | None) -> Choice:
    found = {float(key.removeprefix("w").replace("_", ".")): value for key, value in accuracies.items()}
    values = (0.1, 0.3, 1.0, 3.0, 10.0)
    return Choice(Swept("kd", "kd", values), 1.0, found, {value: f"id{value}" for value in values}, {})


def test_the_highest_is_chosen_and_ties_go_to_the_smallest() -> None:
    assert choice(w0_1=50.0, w0_3=52.0, w1=51.0, w3=50.0, w10=None).chosen == 0.3
    assert choice(w0_1=51.0, w0_3=51.0, w1=50.0, w3=52.0, w10=52.0).chosen == 3.0
    assert choice(w0_1=50.0, w0_3=51.0, w1=50.0, w3=52.0).chosen is None, "one is missing"
    assert choice(w0_1=None, w0_3=None, w1=None, w3=None, w10=None).chosen is None
    assert choice(w0_1=53.0, w0_3=52.0, w1=51.0, w3=50.0, w10=None).at_end
    assert not choice(w0_1=50.0, w0_3=52.0, w1=51.0, w3=50.0, w10=None).at_end


def test_the_search_of_the_cpu_recipe_gives_every_method_the_same_budget() -> None:
    search = load_search(SEARCH)
    table = load_table(search.base)
    shown = [row.name for row in table.rows if not row.extra and row.name != "vanilla"]
    assert [row.row for row in search.rows] == shown, "every row that has a weight, once"
    assert {len(row.values) for row in search.rows} <= {5, 6, 7}, "five, and at most two past an end"
    assert "KDiffusion" in search.note, "what differs all the same is said"
    for swept in search.rows:
        row = next(row for row in table.rows if row.name == swept.row)
        weight = row.describe(Pair("", ""))["weights"][swept.term]
        final = weight if isinstance(weight, float) else weight["value"]
        ratios = [value / final for value in swept.values]
        assert min(ratios) < 1 <= max(ratios) or swept.row == "reviewkd", swept


def test_a_sweep_is_the_run_that_the_plain_command_makes() -> None:
    """The plain name of a method is its default options, so records of earlier sweeps by that name are found."""
    search = load_search(SEARCH)
    swept = next(row for row in search.rows if row.row == "kdiffusion")
    options = parse_options(arguments(search, swept, {}))
    assert options.recipe is not None
    assert (options.recipe.split, options.recipe.student.epochs, options.recipe.seeds) == ("heldout", 3, (0,))
    (plain,) = select_rows(load_table("digits"), options.recipe)
    (named,) = select_rows(load_table("cifar100"), options.recipe)
    assert plain.describe(Pair("", "")) == named.describe(Pair("", ""))


def test_what_is_taken_over_is_set_beside_the_sweep() -> None:
    search = load_search(SEARCH)
    options = parse_options(arguments(search, search.rows[-1], {"progressive": 0.3}))
    assert options.recipe is not None
    assert options.recipe.weights == {"kdiffusion_guide": {"progressive": 0.3}}
    assert [axis.path for axis in options.axes] == ["kdiffusion_guide.weights.guide"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": {"kdd": {"term": "kd", "values": [1]}}}, "Did you mean 'kd'"),
        ({"rows": {"kd": {"term": "kd", "values": [0, 1]}}}, "above 0"),
        ({"rows": {"kd": {"term": "kd", "values": [True]}}}, "above 0"),
        ({"rows": {"kd": {"term": "kd", "values": [math.nan]}}}, "above 0"),
        ({"rows": {"kd": {"term": "kd", "values": [1, 1]}}}, "twice"),
        ({"rows": {"kd": {"values": [1]}}}, "needs a term"),
        ({"rows": {"kd": {"term": "kd", "values": [1], "like": "at"}}}, "a row before it"),
        ({"epoch": 3}, "Did you mean 'epochs'"),
        ({"rows": None}, "mapping"),
    ],
)
def test_a_wrong_search_is_a_sentence(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SEARCH.read_text()), **change}))
    with pytest.raises(OptionError, match=words):
        load_search(path)


def test_from_nothing_to_the_table_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    search = {
        "dataset": "synthetic",
        "recipe": str(tmp_path / "tiny.yaml"),
        "base": "cifar100",
        "table": "mine",
        "epochs": 1,
        "seed": 0,
    }
    rows = {
        "kd": {"term": "kd", "values": [0.3, 0.9]},
        "kdiffusion_multi": {"term": "progressive", "values": [1, 3]},
        "kdiffusion_guide": {"term": "guide", "values": [0.5, 1], "like": "kdiffusion_multi"},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({**search, "rows": rows}, sort_keys=False))

    def run(*more: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        places = [
            *([] if "--output" in more else ["--output", str(tmp_path / "runs")]),
            "--results",
            str(tmp_path / "results"),
            "--tables",
            str(tmp_path),
        ]
        return main(["--search", str(tmp_path / "search.yaml"), *places, *more], Console(out, err)), out.getvalue(), err.getvalue()

    (tmp_path / "runs").mkdir()
    code, out, err = run("--table-only")
    assert (code, err) == (0, "")
    assert "0 of 6 runs are there" in " ".join(out.split())
    assert "kdiffusion_guide waits" in out
    rows_of = {row.name: row for row in load_table(str(tmp_path / "mine.yaml")).rows}
    assert rows_of["kd"].weights is None, "the default stays until there is a choice"

    assert run()[0] == 0
    text = (tmp_path / "mine.yaml").read_text()
    table = load_table(str(tmp_path / "mine.yaml"))
    rows_of = {row.name: row for row in table.rows}
    weights = rows_of["kdiffusion_guide"].weights
    assert isinstance(weights, dict)
    assert weights["progressive"] == rows_of["kdiffusion_multi"].weights["progressive"]  # type: ignore[index, call-overload]
    assert set(weights) == {"progressive", "guide"}
    assert "record " in rows_of["kd"].source
    reached: dict[float, float] = {}
    for path in (tmp_path / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        if result["identity"]["method"] == "kd":
            reached[result["identity"]["weights"]["kd"]] = result["last_accuracy"]
    assert rows_of["kd"].weights == {"kd": max(sorted(reached), key=lambda value: reached[value])}, "the best of the records"
    assert len(reached) == 2
    kept = sorted(path.parent.name for path in (tmp_path / "results" / "mine_weights").glob("*/result.json"))
    assert len(kept) == 6
    assert not list((tmp_path / "results").rglob("*.safetensors"))

    (tmp_path / "empty").mkdir()
    code, _, err = run("--table-only", "--output", str(tmp_path / "empty"))
    assert code == 2
    assert "do not make the choices of kd, kdiffusion_multi, kdiffusion_guide" in err
    assert (tmp_path / "mine.yaml").read_text() == text, "a choice is never taken back by records that are not there"

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert run()[0] == 0, "a second call trains nothing"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")} == made
    assert (tmp_path / "mine.yaml").read_text() == text
    for path in (tmp_path / "runs").glob("*/result.json"):
        path.unlink()
    (tmp_path / "runs").rename(tmp_path / "gone")
    (tmp_path / "results" / "mine_weights").rename(tmp_path / "runs")
    assert run("--table-only")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == text, "the records that are kept are enough"


def test_a_choice_that_the_search_does_not_ask_for_is_not_dropped(tmp_path: Path) -> None:
    table = {"rows": {"kd": {}, "at": {"weights": {"attention": 3.0}, "source": "held-out images: the best of 1, 3"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(table))
    made = choice(w0_1=50.0, w0_3=52.0, w1=51.0, w3=50.0, w10=49.0)
    search = Search("mine", "cifar100", "cpu", "cifar100", "mine", 3, 0, (made.swept,))
    text = table_file(search, [made], "a command")
    with pytest.raises(OptionError, match=r"do not make the choices of at that stand in mine\.yaml"):
        check_kept(text, tmp_path / "mine.yaml")
    check_kept(text, tmp_path / "none.yaml")
    later = table_file(replace(search, base="cifar100_cpu"), [made], "a command")
    check_kept(later, tmp_path / "mine.yaml")  # what was chosen before comes along with the base


def test_a_chosen_weight_holds_for_every_pair_of_the_table(tmp_path: Path) -> None:
    """The published weight of a pair would win over the one that was chosen, under a caption that names the choice."""
    swept = Swept("reviewkd", "review", (1.0, 5.0))
    made = Choice(swept, 5.0, {1.0: 50.0, 5.0: 60.0}, {1.0: "a", 5.0: "b"}, {})
    search = Search("mine", "cifar100", "cpu", "cifar100", "mine", 3, 0, (swept,))
    (tmp_path / "mine.yaml").write_text(table_file(search, [made], "a command"))
    row = next(row for row in load_table(str(tmp_path / "mine.yaml")).rows if row.name == "reviewkd")
    assert {row.describe(Pair.parse(pair))["weights"]["review"] for pair in ("resnet56:resnet20", "vgg13:vgg8")} == {5.0}
    assert not row.pairs
    preset = Swept("kd", "kd", (0.7,))
    (tmp_path / "photos.yaml").write_text(
        table_file(
            Search("mine", "folder", "folder", "folder", "mine", 3, 0, (preset,)),
            [Choice(preset, 0.5, {0.7: 50.0}, {0.7: "c"}, {})],
            "it",
        )
    )
    row = next(row for row in load_table(str(tmp_path / "photos.yaml")).rows if row.name == "kd")
    assert row.weights == {"ce": 0.5, "kd": 0.7}, "the other terms of the preset stay"


def test_how_even_the_effort_was_is_said_under_every_table_with_these_weights() -> None:
    note = load_table("cifar100_cpu").note
    assert note == load_search(SEARCH).note.strip()
    assert "screened on the same held-out images" in note


def test_the_committed_choice_is_what_its_records_make(tmp_path: Path) -> None:
    kept = ROOT / "benchmarks" / "results" / "cifar100_cpu_weights"
    options = ["--table-only", "--output", str(kept), "--results", str(tmp_path), "--tables", str(tmp_path)]
    assert main(options, Console(io.StringIO(), io.StringIO())) == 0
    assert (tmp_path / kept.name / "choice.txt").read_text() == (kept / "choice.txt").read_text()
    assert (tmp_path / "cifar100_cpu.yaml").read_text() == (TABLES / "cifar100_cpu.yaml").read_text()


def test_wrong_input_is_a_sentence(tmp_path: Path) -> None:
    err = io.StringIO()
    assert main(["--search", str(tmp_path / "missing.yaml")], Console(io.StringIO(), err)) == 2
    assert err.getvalue().startswith("choose_weights.py: ")
    assert err.getvalue().count("\n") == 1
