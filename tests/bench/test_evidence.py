"""The experiments that a default rests on: run part by part, kept as records and as the tables that these make."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.evidence import load_parts, main
from distillzoo.bench.options import parse_options
from distillzoo.bench.progress import Console
from distillzoo.errors import OptionError
from tests.bench.conftest import TINY_YAML

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("evidence_*.yaml")), ids=lambda path: path.stem)
def test_every_committed_part_is_a_command_on_held_out_images(path: Path) -> None:
    name, parts = load_parts(path)
    assert path.stem == f"evidence_{name}"
    for part in parts:
        options = parse_options(part.options.split())
        assert options.recipe is not None
        assert options.recipe.split == "heldout", part.title


def test_parts_run_once_and_are_kept_as_records_and_tables(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    parts = {"How much": "--methods kd --sweep kd.weights.kd=0.3,3", "Which": "--methods vanilla,kd"}
    listed = {
        "name": "mine",
        "common": f"--dataset synthetic --recipe {tmp_path / 'tiny.yaml'} --split heldout --epochs 1 --seeds 0",
        "parts": parts,
    }
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(listed, sort_keys=False))

    def run(output: Path, *more: str) -> tuple[int, str]:
        out = io.StringIO()
        options = ["--list", str(tmp_path / "list.yaml"), "--results", str(tmp_path / "results"), "--output", str(output), *more]
        return main(options, Console(out, io.StringIO())), out.getvalue()

    assert run(tmp_path / "runs")[0] == 0
    text = (tmp_path / "results" / "mine" / "evidence.txt").read_text()
    assert text.index("How much\n--------\n\npython benchmarks/run_table.py --dataset synthetic") < text.index("Which\n")
    assert "missing" not in text
    records = sorted((tmp_path / "results" / "mine").glob("*/result.json"))
    assert len(records) == 3, "kd at its own weight of 3 belongs to both parts"
    assert not list((tmp_path / "results").rglob("*.safetensors"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert run(tmp_path / "runs")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made, "a second call trains nothing"
    assert run(tmp_path / "results" / "mine", "--table-only")[0] == 0
    assert (tmp_path / "results" / "mine" / "evidence.txt").read_text() == text, "the records that are kept are enough"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("evidence_*.yaml")), ids=lambda path: path.stem)
def test_the_committed_evidence_is_what_its_records_make(path: Path, tmp_path: Path) -> None:
    name, _ = load_parts(path)
    kept = ROOT / "benchmarks" / "results" / name
    options = ["--list", str(path), "--table-only", "--output", str(kept), "--results", str(tmp_path)]
    assert main(options, Console(io.StringIO(), io.StringIO())) == 0
    assert (tmp_path / name / "evidence.txt").read_text() == (kept / "evidence.txt").read_text()


def test_kept_evidence_is_never_overwritten_by_gaps(tmp_path: Path) -> None:
    results, empty, err = tmp_path / "results", tmp_path / "runs", io.StringIO()
    shutil.copytree(ROOT / "benchmarks" / "results" / "kdiffusion", results / "kdiffusion")
    shutil.copytree(ROOT / "benchmarks" / "results" / "kdiffusion" / "94ffa413acdcaa3b", empty / "94ffa413acdcaa3b")
    before = (results / "kdiffusion" / "evidence.txt").read_text()
    assert main(["--table-only", "--output", str(empty), "--results", str(results)], Console(io.StringIO(), err)) == 2
    assert f"were not found in {str(empty)!r}, so nothing was written" in err.getvalue()
    assert (results / "kdiffusion" / "evidence.txt").read_text() == before


@pytest.mark.parametrize("change", [{"parts": []}, {"name": 3}, {"more": 1}, {"parts": {"a": "--methods nosuch"}}])
def test_a_wrong_list_is_a_sentence(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"name": "mine", "parts": {"a": "--dataset digits"}} | change))
    err = io.StringIO()
    assert main(["--list", str(tmp_path / "list.yaml"), "--output", str(tmp_path)], Console(io.StringIO(), err)) == 2
    assert err.getvalue().startswith("evidence.py: ")
    assert err.getvalue().count("\n") == 1
    assert not list(tmp_path.glob("results*"))
    if change != {"parts": {"a": "--methods nosuch"}}:
        with pytest.raises(OptionError):
            load_parts(tmp_path / "list.yaml")
