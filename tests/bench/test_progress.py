from __future__ import annotations

import io
import os
import time

import pytest

from distillzoo.bench import progress
from distillzoo.bench.progress import Console, Meter


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_plain_lines_where_there_is_no_terminal(clock: _Clock) -> None:
    err = io.StringIO()
    meter = Meter(Console(io.StringIO(), err), 100.0)
    for _ in range(25):
        clock.now += 2
        meter.advance(1.0, "group a")
    meter.close()
    assert err.getvalue() == " 16% 00:32<02:48 group a\n", "one line in 50 seconds, and the time that is left"


def test_work_of_an_earlier_call_says_nothing_about_the_speed(clock: _Clock) -> None:
    err = io.StringIO()
    meter = Meter(Console(io.StringIO(), err), 100.0)
    meter.skip(50.0)
    clock.now += 40
    meter.advance(10.0, "on")
    assert err.getvalue() == " 60% 00:40<02:40 on\n"


def test_lines_go_where_they_belong() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    console.say("figure")
    console.warn("note")
    assert (out.getvalue(), err.getvalue()) == ("figure\n", "note\n")


def test_a_reader_that_leaves_does_not_stop_a_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        console = Console(pipe, io.StringIO())
        console.say("nobody reads this")
        console.say("nor this")


def test_a_long_wait_is_explained_once_and_a_short_one_not(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    console = Console(io.StringIO(), err)
    with console.explained("Reading ..."):
        pass
    assert err.getvalue() == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    with console.explained("Reading ..."):
        for _ in range(1000):
            if err.getvalue():
                break
            time.sleep(0.01)
    assert err.getvalue() == "Reading ...\n"
