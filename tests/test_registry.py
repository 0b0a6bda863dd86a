from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from distillzoo import register_distiller, registry
from distillzoo.errors import DistillZooError, OptionError, UnknownNameError
from distillzoo.registry import DISTILLERS, Registry


class Thing:
    pass


class Other:
    pass


def test_names_are_found_sorted_and_by_pattern():
    things: Registry[type] = Registry("thing")
    things.register("zeta")(Thing)
    assert things.register("alpha")(Other) is Other
    assert list(things) == things.names() == ["alpha", "zeta"]
    assert things.names("z*") == ["zeta"]
    assert things["zeta"] is Thing
    assert "zeta" in things
    assert len(things) == 2
    assert things.get("omega") is None


def test_an_unknown_name_lists_near_matches_and_everything():
    things: Registry[type] = Registry("thing")
    things.register("reviewkd")(Thing)
    things.register("at")(Other)
    with pytest.raises(
        UnknownNameError, match=r"Unknown thing 'revewkd'\. Did you mean 'reviewkd'\? Registered: at, reviewkd\."
    ) as caught:
        things["revewkd"]
    assert isinstance(caught.value, KeyError)


def test_a_taken_name_is_refused_and_the_same_thing_again_is_not():
    things: Registry[type] = Registry("thing")
    things.register("one")(Thing)
    things.register("one")(Thing)
    with pytest.raises(OptionError, match=r"'one' is taken by tests\.test_registry\.Thing.*Other"):
        things.register("one")(Other)
    assert things["one"] is Thing


@pytest.mark.parametrize("name", ["", "KD", "1st", "a-b", "a+b", "a.b", " kd", "kd\n", "_kd"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(OptionError, match="lower-case letters"):
        Registry("thing").register(name)


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "some.group")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages ship these entry points."""
    entries: list[EntryPoint] = []
    asked: list[str] = []

    def entry_points(*, group):
        asked.append(group)
        return entries

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return entries, asked


def test_entry_points_are_read_once_and_late(installed):
    entries, asked = installed
    things: Registry[type] = Registry("thing", group="some.group")
    entries.append(entry("shipped", f"{__name__}:Thing"))
    assert asked == []
    assert things["shipped"].__name__ == "Thing"
    assert "shipped" in things
    assert things.names() == ["shipped"]
    assert asked == ["some.group"]


def test_an_entry_point_that_cannot_be_loaded_names_itself(installed):
    entries, _ = installed
    entries.append(entry("shipped", "no_such_package.module:Thing"))
    with pytest.raises(OptionError, match=r"'shipped' = 'no_such_package\.module:Thing'.*ModuleNotFoundError.*uninstall"):
        Registry("thing", group="some.group").names()


def test_a_broken_entry_point_is_reported_every_time(installed):
    entries, _ = installed
    entries.append(entry("shipped", "no_such_package.module:Thing"))
    things: Registry[type] = Registry("thing", group="some.group")
    for _ in range(2):
        with pytest.raises(OptionError, match="shipped"):
            things.names()


def test_an_entry_point_does_not_take_a_name(installed):
    entries, _ = installed
    entries.append(entry("one", f"{__name__}:Thing"))
    things: Registry[type] = Registry("thing", group="some.group")
    things.register("one")(Other)
    with pytest.raises(OptionError, match="'one' is taken"):
        things.names()


def test_distillers_come_from_their_group_and_the_decorator():
    assert DISTILLERS.kind == "distiller"
    assert DISTILLERS._group == "distillzoo.distillers"
    with pytest.raises(DistillZooError, match="'kd' is taken"):
        register_distiller("kd")(Thing)
