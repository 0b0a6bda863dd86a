"""Which code a record names: of a checkout, of a copy without one, of neither."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distillzoo.bench import environment
from distillzoo.bench.environment import COMMIT_VARIABLE, begun, describe_environment, ended
from distillzoo.errors import OptionError
from tests.bench.conftest import Call

SHA = "0123456789abcdef0123456789abcdef01234567"


def _git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(root), *who, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package in a folder of its own, without a checkout and without the variable."""
    module = tmp_path / "copy" / "distillzoo" / "bench" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (tmp_path / "copy" / "README.rst").write_text("")
    monkeypatch.setattr(environment, "__file__", str(module))
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    environment._commit.cache_clear()
    yield tmp_path / "copy"
    environment._commit.cache_clear()


@pytest.fixture
def told(place: Path) -> Callable[[], tuple[object, object]]:
    def ask() -> tuple[object, object]:
        environment._commit.cache_clear()
        found = describe_environment(torch.device("cpu"))
        return found["commit"], found["dirty"]

    return ask


def test_of_a_checkout_the_commit_and_whether_the_package_differs(place: Path, told: Callable[[], tuple[object, object]]) -> None:
    _git(place, "init", "--quiet")
    _git(place, "add", ".")
    _git(place, "commit", "--quiet", "-m", "all")
    head = _git(place, "rev-parse", "HEAD")
    assert told() == (head, False)
    (place / "README.rst").write_text("what makes no numbers")
    assert told() == (head, False)
    (place / "distillzoo" / "more.py").write_text("")
    assert told() == (head, True), "a file that git does not know yet"
    (place / "distillzoo" / "more.py").unlink()
    (place / "distillzoo" / "bench" / "environment.py").write_text("changed")
    assert told() == (head, True)


def test_a_checkout_is_believed_before_the_variable(
    place: Path, told: Callable[[], tuple[object, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, SHA)
    assert told() == (SHA, None), "whether the copy differs nobody can tell"
    _git(place, "init", "--quiet")
    assert told() == (SHA, None), "a checkout without a commit tells nothing"
    _git(place, "add", ".")
    _git(place, "commit", "--quiet", "-m", "all")
    assert told() == (_git(place, "rev-parse", "HEAD"), False)


def test_a_copy_names_no_commit_but_what_it_is_told(
    told: Callable[[], tuple[object, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told() == (None, None)
    monkeypatch.setenv(COMMIT_VARIABLE, f"{SHA}-dirty")
    assert told() == (SHA, True)
    monkeypatch.setenv(COMMIT_VARIABLE, "")
    assert told() == (None, None)


@pytest.mark.parametrize("wrong", ["main", "0.1.0", SHA[:6], f"{SHA}-changed", SHA.upper()])
@pytest.mark.usefixtures("place")
def test_a_variable_that_names_no_commit_is_a_sentence(
    wrong: str, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, wrong)
    with pytest.raises(OptionError, match="git rev-parse"):
        describe_environment(torch.device("cpu"))
    outcome = call("--recipe", recipe_file, "--output", str(tmp_path / "runs"))
    assert (outcome.code, outcome.err.count("\n"), wrong in outcome.err) == (2, 1, True)
    assert not (tmp_path / "runs").exists()


def test_calls_are_kept_with_the_epochs_that_each_trained() -> None:
    def told(environment: dict[str, object]) -> list[tuple[object, object]]:
        return [(call["threads"], call["epochs"]) for call in environment["calls"]]  # type: ignore[attr-defined]

    first = begun({"threads": 1, "versions": {}}, {}, 0)
    assert told(first) == [(1, None)]
    assert "versions" not in first["calls"][0]
    assert told(ended({"threads": 1}, first, 8)) == [(1, 8)]
    second = begun({"threads": 2}, first, 3)
    assert told(second) == [(1, 3), (2, None)]
    third = begun({"threads": 4}, second, 5)
    assert told(third) == [(1, 3), (2, 2), (4, None)]
    assert told(ended({"threads": 4}, third, 8)) == [(1, 3), (2, 2), (4, 3)]
    assert told(ended({"threads": 4}, third, 5)) == [(1, 3), (2, 2)], "it wrote the result and trained nothing"
    assert told(begun({"threads": 4}, second, 3)) == [(1, 3), (4, None)], "what the second call trained is lost"
    assert told(begun({"threads": 4}, third, 2)) == [(1, 2), (4, None)], "an older checkpoint was put back"
    assert told(begun({"threads": 4}, third, 0)) == [(4, None)], "all of it is lost"


def test_a_record_from_before_calls_were_written_counts_as_one() -> None:
    calls = begun({"threads": 2}, {"threads": 1, "commit": SHA, "group_seconds": 3.0}, 4)["calls"]
    assert [(call["threads"], call["commit"], call["epochs"]) for call in calls] == [(1, SHA, 4), (2, None, None)]
    assert [call["epochs"] for call in begun({}, {"calls": [3, {"epochs": "x"}]}, 4)["calls"]] == [4, None]
    assert [call["epochs"] for call in begun({}, {"calls": "junk"}, 4)["calls"]] == [None]
