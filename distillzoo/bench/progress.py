"""What the user sees while it runs: lines, and one bar over the whole plan with the time that is left."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from tqdm import tqdm

from distillzoo.engine import StepReport

__all__ = ["Console", "GroupProgress", "Meter", "TimeIsUp"]

_PATIENCE = 30.0  # seconds of silence before a wait is explained
_LINE_SECONDS = 30.0  # between two lines of progress where no terminal shows a bar


class TimeIsUp(KeyboardInterrupt):
    """The time that was given is over: an interruption like the user's own, at the end of an epoch."""


class Console:
    """Writes lines so that they do not tear the bar.

    Args:
        out: Where lines go; ``None`` is standard output.
        err: Where the bar and warnings go; ``None`` is standard error.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr

    def say(self, text: str = "") -> None:
        """Write a line to the output."""
        self._write(self.out, text)

    def warn(self, text: str) -> None:
        """Write a line to the error output."""
        self._write(self.err, text)

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        try:
            with tqdm.external_write_mode(file=stream):
                stream.write(text + "\n")
                stream.flush()
        except BrokenPipeError:  # the reader has left (| head): training goes on without one
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    @contextmanager
    def explained(self, text: str) -> Iterator[None]:
        """Say what is being done, if it takes long.

        Args:
            text: What is said after some seconds.
        """
        timer = threading.Timer(_PATIENCE, self.warn, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class Meter:
    """Progress over a whole plan, in estimated seconds of work, so that cheap and dear steps weigh what they cost.

    On a terminal it is a live bar; elsewhere a plain line now and then.

    Args:
        console: Where it is shown.
        total: Work of the plan.
        deadline: When time is up, in seconds of the monotonic clock.
    """

    def __init__(self, console: Console, total: float, deadline: float = math.inf) -> None:
        self._console = console
        self._deadline = deadline
        self._total = max(total, 1e-9)
        self._done = self._before = 0.0
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        if console.err.isatty():
            wide = os.get_terminal_size(console.err.fileno()).columns > 0  # some terminals do not know; tqdm would draw nothing
            self._bar = tqdm(
                total=self._total,
                file=console.err,
                mininterval=0.5,
                smoothing=0.05,
                dynamic_ncols=wide,
                ncols=None if wide else 80,
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}",
            )

    def advance(self, work: float, text: str) -> None:
        """Count work as done and say what is being done."""
        self._done = min(self._done + work, self._total)
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(min(work, self._total - self._bar.n))
        elif time.monotonic() - self._last_line > _LINE_SECONDS:
            self._line(text)

    def skip(self, work: float) -> None:
        """Count work that an earlier call did; it says nothing about the speed of this one."""
        self._done = min(self._done + work, self._total)
        self._before += work
        if self._bar is not None:
            self._bar.initial += work
            self._bar.n = self._done
            self._bar.refresh()

    def time_is_up(self) -> bool:
        """Return whether the deadline is over."""
        return time.monotonic() > self._deadline

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        worked = self._done - self._before
        left = elapsed * (self._total - self._done) / worked if worked > 0 else float("nan")
        self._console.warn(
            f"{100 * self._done / self._total:3.0f}% {tqdm.format_interval(elapsed)}<"
            f"{tqdm.format_interval(left) if left == left else '?'} {text}"
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class GroupProgress:
    """Turns what a trainer reports of a group into work on the bar.

    Args:
        meter: The bar.
        label: What is trained.
        shared: Work of a step that the group shares (the teacher's pass).
        member: Work of a step of each member.
    """

    def __init__(self, meter: Meter, label: str, shared: float, member: float) -> None:
        self._meter = meter
        self._label = label
        self._shared = shared
        self._member = member

    def resumed(self, epochs: Sequence[int], steps: int) -> None:
        """Count what earlier calls trained.

        Args:
            epochs: Epochs of the main phase that every member has behind it.
            steps: Steps of an epoch.
        """
        self._meter.skip(steps * (min(epochs) * self._shared + sum(epochs) * self._member))

    def time_is_up(self) -> bool:
        """Return whether the plan's time is over."""
        return self._meter.time_is_up()

    def step(self, report: StepReport) -> None:
        """Count a step; first phases are shown and not counted, as the plan does not know their length."""
        work = self._shared + report.active * self._member if report.phase == "main" else 0.0
        phase = "" if report.phase == "main" else f"{report.phase} "
        self._meter.advance(work, f"{self._label}: {phase}epoch {report.epoch + 1}/{report.epochs}")
