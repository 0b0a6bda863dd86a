"""The tables of README.rst are what the committed records make."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.publish import Shelf, make_view, section_text

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.rst").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^\.\. table: (\w+) begin\n(.*?)^\.\. table: \1 end$", README, re.DOTALL | re.MULTILINE))


def test_every_table_is_looked_at() -> None:
    assert len(SECTIONS) == len(re.findall(r"^\.\. table:", README, re.MULTILINE)) / 2 > 0


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_what_the_committed_records_make(name: str) -> None:
    command = re.match(r"\n``python benchmarks/run_table\.py(.*?)``::", SECTIONS[name])
    assert command is not None
    options = shlex.split(command[1])
    place = options.index("--data-root") if "--data-root" in options else len(options)
    threads = torch.get_num_threads()
    try:  # without the images: the records are enough
        _, view = make_view(ROOT / "benchmarks" / "results" / name, options[:place] + options[place + 2 :], Shelf(), {}, show=False)
    finally:
        torch.set_num_threads(threads)
    assert section_text(options, view) == SECTIONS[name]
