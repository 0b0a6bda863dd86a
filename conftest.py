"""Tests are shared out over the cores; measurements have the machine to themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core, so a thread a process; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_MOST = 8  # processes: each holds torch


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return for ``-n auto`` a process a core; none where a benchmark is among what is run, which would be timed with others."""
    measured = any("benchmarks" in Path(argument.split("::")[0]).parts for argument in config.args)
    return 0 if measured else min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST)
