"""Where a run took place: what may change its speed and never its id."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distillzoo.errors import OptionError

__all__ = ["COMMIT_VARIABLE", "begun", "check_commit", "describe_environment", "ended"]

COMMIT_VARIABLE = "DISTILLZOO_COMMIT"
"""Environment variable that names the commit where git cannot tell."""

_OF_A_CALL = ("date", "commit", "dirty", "device", "gpu", "cpu", "threads", "settings", "nice")
_SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF", "OMP_PROC_BIND", "KMP_AFFINITY")
_PACKAGES = ("distillzoo", "torch", "torchvision", "timm", "numpy", "scikit-learn")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device, threads, processor, what else decides speed, commit and date as plain data.

    Args:
        device: Where is trained.
    Raises:
        OptionError: If the environment variable that names the commit holds something else.
    """
    commit, dirty = _commit()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "nice": os.nice(0) if hasattr(os, "nice") else None,
        "commit": commit,
        "dirty": dirty,
    }


def begun(environment: Mapping[str, Any], before: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Return the environment of a call with all calls that have trained a run: those before it, and itself.

    Args:
        environment: That of the call.
        before: What the record tells of earlier calls; a record from before calls were written counts as one.
        epochs: Epochs that earlier calls trained and this one takes up. What was trained beyond them is lost and not told.
    """
    earlier = before.get("calls", [before])
    calls, left = [], epochs
    for call in earlier if isinstance(earlier, list) else []:
        took = min(left, call["epochs"] if isinstance(call.get("epochs"), int) else left) if isinstance(call, Mapping) else 0
        if took > 0:
            calls.append({**_call(call), "epochs": took})
            left -= took
    return {**environment, "calls": [*calls, {**_call(environment), "epochs": None}]}


def ended(environment: Mapping[str, Any], begun_as: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Return the environment at the end of a run's last call, with the epochs that this call trained.

    Args:
        environment: That of the call.
        begun_as: What :func:`begun` returned when it began.
        epochs: Epochs of the whole run.
    """
    *earlier, last = begun_as["calls"]
    took = epochs - sum(call["epochs"] for call in earlier)
    return {**environment, "calls": [*earlier, *([{**last, "epochs": took}] if took > 0 or not earlier else [])]}


def _call(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment.get(key) for key in _OF_A_CALL}


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def check_commit() -> None:
    """Refuse a commit that is none, before anything is trained.

    Raises:
        OptionError: If the environment variable that names the commit holds something else.
    """
    _commit()


@functools.cache
def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the code as this process first asks, and whether the package differed from it; ``None``: not known.

    Of a checkout git is asked; where it cannot tell ``DISTILLZOO_COMMIT`` may, with ``-dirty`` behind it.
    """
    root = Path(__file__).parents[2]
    head = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if head is not None:
        changed = _git(root, "status", "--porcelain", "--", Path(__file__).parents[1].name)
        return head, None if changed is None else bool(changed)
    given = os.environ.get(COMMIT_VARIABLE, "").strip()
    if not given:
        return None, None
    named = re.fullmatch(r"([0-9a-f]{7,64})(-dirty)?", given)
    if named is None:
        raise OptionError(
            f"{COMMIT_VARIABLE} is {given!r}, but must be a commit in 7 to 64 hexadecimal digits, then -dirty if the code "
            "differed; set it to what git rev-parse HEAD prints, or unset it."
        )
    return named[1], True if named[2] else None


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
