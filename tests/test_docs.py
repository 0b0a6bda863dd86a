"""The documentation tells the truth: its code runs, its commands stand once, every method names its source."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
from pathlib import Path

import pytest
from docutils.core import publish_doctree
from docutils.utils import SystemMessage

from distillzoo.bench.cli import main
from distillzoo.bench.recipe import Pair, load_recipe
from distillzoo.bench.rows import load_table, select_rows
from distillzoo.distiller import Distiller
from distillzoo.registry import DISTILLERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs" / "guide").glob("*.rst"))]
PLAIN = ["README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst"]
COMMANDS = (
    'pip install -e ".[benchmarks]" && python benchmarks/run_table.py',
    'pip install -e ".[test]" && python -m pytest',
)
OURS = {name: method for name, method in DISTILLERS.items() if method.__module__.startswith("distillzoo.")}


MACHINE = re.compile(r"(?<![\w.$}~/])/(?:work|home|root|Users|mnt)/\w")
BESIDE = re.compile(r"\.\./shared\b|(?<![\w/])shared/(?=[a-z])")


def matches(path: Path, pattern: re.Pattern[str]) -> list[str]:
    """The lines of a text file that match, as ``file:line: text``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []  # binary
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [f"{where}:{number}: {line.strip()[:120]}" for number, line in enumerate(lines, 1) if pattern.search(line)]


def code_blocks(text: str, language: str = "python") -> list[tuple[int, str]]:
    """The code of a page with the line each block starts at."""
    pattern = re.compile(rf"^\.\. code(?:-block)?:: {language}\n\n((?:[ ]+.*\n|\n)+)", re.MULTILINE)
    return [(text[: match.start(1)].count("\n") + 1, inspect.cleandoc("\n" + match.group(1))) for match in pattern.finditer(text)]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_docutils_accepts(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    try:
        publish_doctree(text, settings_overrides={"report_level": 2, "halt_level": 2, "warning_stream": False})
    except SystemMessage as message:
        pytest.fail(f"{name}: {message}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, monkeypatch):
    monkeypatch.setattr(DISTILLERS, "_items", dict(DISTILLERS._items))  # what a page registers is gone after it
    names: dict[str, object] = {"__name__": "__page__"}
    for line, block in code_blocks(page.read_text(encoding="utf-8")):
        padded = "\n" * (line - 1) + block  # so that a traceback has the page's line
        exec(compile(padded, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_method_of_a_page_has_a_student_of_its_own(page):
    """build_distiller takes its student over: what one method did to it the next would train and export."""
    taken: set[str] = set()
    for line, block in code_blocks(page.read_text(encoding="utf-8")):
        for statement in ast.parse(block).body:
            parts = list(ast.walk(statement))
            calls = [part for part in parts if isinstance(part, ast.Call) and ast.unparse(part.func) == "build_distiller"]
            students = {call.args[1].id for call in calls if len(call.args) > 1 and isinstance(call.args[1], ast.Name)}
            assert not taken & students, f"the block at line {line} gives a second method the student of a first"
            taken |= students
            taken -= {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def test_the_contract_names_all_that_a_distiller_has():
    text = (ROOT / "docs" / "guide" / "contract.rst").read_text(encoding="utf-8")
    public = [name for name in vars(Distiller) if not name.startswith("_")]
    assert {"parts", "presets_with", "exempt_from_decay"} <= set(public)
    assert [name for name in public if not re.search(rf"\b{name}\b", text)] == []


def test_blocks_are_found():
    assert len(code_blocks((ROOT / "README.rst").read_text(encoding="utf-8"))) == 2
    text = "A\n\n.. code:: python\n\n    x = 1\n\n    y = 2\n\nB\n\n.. code-block:: bash\n\n    ls\n"
    assert code_blocks(text) == [(5, "x = 1\n\ny = 2")]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_gives_the_command_once(command):
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    assert text.count(command) == 1
    assert re.search(rf"^ +{re.escape(command)}$", text, re.MULTILINE)
    assert len(re.findall(r"pip install", text)) == len(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_the_command_line_exist(page, capsys):
    text = re.sub(r"sphinx .*", "", page.read_text(encoding="utf-8"))
    for command in re.findall(r"python (examples/\w+\.py) (.*)", text):
        script = (ROOT / command[0]).read_text(encoding="utf-8")
        assert set(options_in(command[1])) <= set(re.findall(r'"--([a-z][a-z-]*)"', script))
        text = text.replace(command[1], "")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert set(options_in(text)) <= set(options_in(capsys.readouterr().out))


def options_in(text):
    return re.findall(r"(?<![\w-])--([a-z][a-z-]*)(?![\w.-])", text)


def test_the_readme_names_every_method():
    section = (ROOT / "README.rst").read_text(encoding="utf-8").partition("\nMethods\n---")[2].partition("\nAdd a method\n---")[0]
    assert sorted(set(re.findall(r"``(\w+)``", section))) == sorted(OURS)


def test_recipes_and_tables_of_the_guide_are_such(tmp_path):
    text = (ROOT / "docs" / "guide" / "benchmarks.rst").read_text(encoding="utf-8")
    recipe_file, table_file = tmp_path / "recipe.yaml", tmp_path / "table.yaml"
    recipe_block, table_block = (block for _, block in code_blocks(text, "yaml"))
    recipe_file.write_text(recipe_block, encoding="utf-8")
    table_file.write_text(table_block, encoding="utf-8")
    recipe = load_recipe(recipe_file)
    select_rows(load_table(recipe.table or recipe.dataset), recipe)
    rows = [row.describe(Pair.parse(recipe.pairs[0])) for row in load_table(str(table_file)).rows]
    assert [row["options"]["temperature"] for row in rows] == [4.0, 8.0]


def test_every_table_of_the_readme_is_in_the_documentation():
    readme = (ROOT / "README.rst").read_text(encoding="utf-8")
    shown = (ROOT / "docs" / "tables.rst").read_text(encoding="utf-8")
    for end in ("begin", "end"):
        marked = re.findall(rf"^\.\. table: (\w+) {end}$", readme, re.MULTILINE)
        assert marked
        assert marked == re.findall(rf"\.\. table: (\w+) {end}$", shown, re.MULTILINE)


def test_changelog_has_an_unreleased_section_that_speaks_of_results():
    text = (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
    unreleased = text.partition("\nUnreleased\n---")[2]
    assert unreleased
    assert "\nResults changed\n~~~" in unreleased


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_method_names_its_source(name):
    text = inspect.getdoc(OURS[name]) or ""
    cited = re.search(r'"[^"]+",[^"]*\b(19|20)\d\d\b', text, flags=re.DOTALL)
    assert cited or "baseline" in text, f'{name} cites no paper (authors, "title", venue year) and is no baseline'


def test_the_page_of_a_method_counts_what_trains_beside_the_plain_student():
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "docs" / "_ext" / "method_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def count(name):
        return int(re.search(r"beside the plain student's\s+- ([\d,]+)", "\n".join(module.needs(name)))[1].replace(",", ""))

    assert count("kd") == 0
    assert count("kdiffusion") == 3 * (64 * 64 * 9 + 2 * 64) + 64 * 64 + 2 * 64  # three more branches, and the bridge
    plain = module.trained(module.create_model(module.STUDENT, num_classes=module.CLASSES))
    assert 2.5 * plain < count("gpd_reduced") < 3 * plain  # inner layers are twice as wide on either side


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_method_shows_how_it_is_used(name):
    text = inspect.getdoc(OURS[name]) or ""
    assert "\nExample:\n" in text, f"{name} has no Example"
    if OURS[name].__init__ is not Distiller.__init__:
        assert "\nArgs:\n" in text, f"{name} has no Args"


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_method_is_listed_where_it_belongs(name):
    """The file has the registered name, or what is before ``_`` in a variant's."""
    module = inspect.getmodule(OURS[name])
    assert module.__name__ in (f"distillzoo.methods.{name}", f"distillzoo.methods.{name.partition('_')[0]}")


def test_tracked_files_refer_to_no_document_that_is_not_there():
    """Names of working papers say nothing to whoever has only the repository: say the reason or cite the paper."""
    absent = re.compile(r"\bdossier\b|\bregister(?: row)? \d+\b|\b(?:design|style|classic|peers|performance)\.md\b")
    found = [hit for path in tracked_files() if path != Path(__file__) for hit in matches(path, absent)]
    assert not found, "\n".join(found)


def test_tracked_files_name_nothing_outside_the_checkout():
    """Neither absolute paths of somebody's machine nor a folder beside the checkout; one script may look for data there."""
    found = [hit for path in tracked_files() if path != Path(__file__) for hit in matches(path, MACHINE)]
    elsewhere = [path for path in tracked_files() if path not in (Path(__file__), ROOT / ".ci" / "run")]
    found += [hit for path in elsewhere for hit in matches(path, BESIDE)]
    assert not found, "\n".join(found)


def test_a_path_of_a_machine_is_seen(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("see /home/" + "somebody/data\nand a/home/page\n")
    assert [hit.rpartition(":")[0].rpartition(":")[2] for hit in matches(note, MACHINE)] == ["1"]
