from __future__ import annotations

from pathlib import Path

import pytest

from distillzoo.bench.yamls import dump_yaml, load_yaml, parse_scalar, read_yaml
from distillzoo.errors import OptionError


def test_reads_plain_data() -> None:
    assert load_yaml("a: [1, 2.5, true, null, x]\nb: {c: d}", "it") == {"a": [1, 2.5, True, None, "x"], "b": {"c": "d"}}


@pytest.mark.parametrize(("text", "value"), [("5e-4", 5e-4), ("1e3", 1000.0), ("0.5", 0.5), ("4", 4), ("-1.", -1.0), ("e4", "e4")])
def test_numbers_as_everybody_reads_them(text: str, value: object) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x:\n  a: 1\n  a: 1", "- {k: 1, k: 2}"])
def test_refuses_a_key_that_stands_twice(text: str) -> None:
    with pytest.raises(OptionError, match=r"the key '[ak]' stands twice, in lines \d and \d"):
        load_yaml(text, "it")


def test_equal_keys_in_different_mappings_are_fine() -> None:
    assert load_yaml("x: {a: 1}\ny: {a: 2}", "it") == {"x": {"a": 1}, "y": {"a": 2}}


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch PWNED']", "!!python/name:os.system ''", "!custom {a: 1}", "!!python/tuple [1]"]
)
def test_refuses_tags_that_construct_objects(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="never tags that construct objects"):
        load_yaml(f"a: {tag}", "it")
    assert not list(tmp_path.iterdir())


def test_broken_yaml_names_the_line() -> None:
    with pytest.raises(OptionError, match="not valid YAML in line 2"):
        load_yaml("a: 1\nb: ]", "it")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.yaml", "missing.yaml"):
        with pytest.raises(OptionError, match="cannot be read"):
            read_yaml(tmp_path / name)


def test_dump_keeps_order_and_reads_back() -> None:
    value = {"method": "kd", "config": {"lr": 5e-4, "milestones": [1, 2]}, "a": None}
    text = dump_yaml(value)
    assert text.startswith("method: kd\n")
    assert load_yaml(text, "it") == value
