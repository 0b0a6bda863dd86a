"""Which code a record names: of a checkout, of a copy without one, of neither."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distillzoo.bench import environment
from distillzoo.bench.environment import COMMIT_VARIABLE, describe_environment
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
