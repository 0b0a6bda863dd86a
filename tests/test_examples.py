"""Every example runs, in seconds, and prints what it promises."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from distillzoo.registry import DISTILLERS

FOLDER = Path(__file__).resolve().parents[1] / "examples"
ELSEWHERE = {"distill_timm"}  # it has a test file of its own


@pytest.fixture
def example(monkeypatch):
    """Load an example afresh; what it registers is gone after the test."""
    monkeypatch.setattr(DISTILLERS, "_items", dict(DISTILLERS._items))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_quickstart_compares_a_teacher_and_two_students(example, capsys):
    assert example("quickstart").main(["--epochs", "1", "--images", "128"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"teacher +\d+\.\d %", out)
    accuracies = dict(re.findall(r"student, (\w+) +(\d+\.\d) %", out))
    assert set(accuracies) == {"vanilla", "kd"}
    assert re.search(r"exported is right +(\d+\.\d) %", out).group(1) == accuracies["kd"]


def test_quickstart_says_what_is_wrong_with_a_method(example, capsys):
    assert example("quickstart").main(["--method", "kdd"]) == 2
    assert "Did you mean 'kd'" in capsys.readouterr().err


def test_a_distiller_of_ones_own_passes_the_battery(example, capsys):
    assert example("custom_distiller").main(["--skip-compile"]) == 0
    assert capsys.readouterr().out.endswith("the contract holds\n")


def test_losses_alone_train(example, capsys):
    assert example("loss_only").main(["--steps", "12"]) == 0
    first, last = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert last < first


@pytest.mark.parametrize("method", ["fitnet", "crd"])
@pytest.mark.filterwarnings("ignore:CRD was asked for")
def test_a_run_that_was_stopped_ends_bit_equal(example, capsys, method):
    assert example("resume").main(["--method", method, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "stopped after epoch 1 of 2" in out
    assert "bit-equal" in out


def test_a_student_of_two_teachers(example, capsys, monkeypatch):
    module, teachers = example("ensemble"), []
    build = module.build_distiller
    monkeypatch.setattr(
        module,
        "build_distiller",
        lambda name, student, given=(), **options: teachers.extend(given) or build(name, student, given or None, **options),
    )
    assert module.main(["--steps", "3"]) == 0
    one, other = (teacher.pretrained_cfg for teacher in teachers[:2])
    assert all(one[what] != other[what] for what in ("input_size", "mean", "std")), "the second wants other images"
    out = capsys.readouterr().out
    assert re.search(r"student of two teachers: \d+\.\d %", out)
    assert "reviewkd: ReviewKD reads feature maps" in out


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    missing = [path.stem for path in FOLDER.glob("*.py") if path.stem not in ELSEWHERE and f'example("{path.stem}")' not in tests]
    assert not missing
    assert all((Path(__file__).parent / f"test_{name}.py").is_file() for name in ELSEWHERE if (FOLDER / f"{name}.py").is_file())
