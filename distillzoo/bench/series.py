"""What commands share: how they end; and of those that make several tables, their options and what they keep."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from distillzoo.bench.progress import Console, TimeIsUp
from distillzoo.bench.records import atomic
from distillzoo.errors import DistillZooError

__all__ = ["copy_records", "exit_code", "series_options", "series_parser", "write_text"]

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def series_parser(text: str, results: Path) -> argparse.ArgumentParser:
    """Return the options that such commands share.

    Args:
        text: Docstring of the command.
        results: Folder of the records that are kept.
    """
    made = argparse.ArgumentParser(description=text.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--data-root", metavar="DIR", help="folder of the data set")
    made.add_argument("--download", action="store_true", help="fetch a missing data set")
    made.add_argument("--output", metavar="DIR", type=Path, default=Path("runs"), help="folder of the records (default: runs)")
    made.add_argument("--threads", metavar="N", help="threads of torch on the CPU")
    made.add_argument("--device", metavar="auto|cpu|cuda", help="where to train")
    made.add_argument("--table-only", action="store_true", help="train nothing")
    made.add_argument("--results", metavar="DIR", type=Path, default=results, help=argparse.SUPPRESS)
    return made


def series_options(given: argparse.Namespace) -> list[str]:
    """Return what :func:`series_parser` has read as options of ``run_table.py``.

    Args:
        given: What it has read.
    """
    options = ["--output", str(given.output)]
    for name in ("data_root", "threads", "device"):
        if getattr(given, name) is not None:
            options += [f"--{name.replace('_', '-')}", getattr(given, name)]
    flags = {"--table-only": given.table_only, "--download": given.download}
    return [*options, *(flag for flag, wanted in flags.items() if wanted)]


def exit_code(name: str, work: Callable[[], int], console: Console) -> int:
    """Run a command and return its exit code; an error is a sentence.

    Args:
        name: Name of the command's file.
        work: The command.
        console: What the user sees.
    """
    try:
        return work()
    except DistillZooError as error:
        console.warn(f"{name}: {' '.join(str(error).split())}")
        return WRONG_INPUT
    except OSError as error:  # a full disk, a file without permission: finished records stand
        which = "a file" if error.filename is None else repr(str(error.filename))
        console.warn(
            f"{name}: {which} could not be read or written ({error.strerror or error}); finished records stand, and the same "
            "command goes on once there is room and permission."
        )
        return FAILED
    except TimeIsUp:
        console.warn("The minutes are over. The same command again goes on from the last checkpoints.")
        return INTERRUPTED
    except KeyboardInterrupt:
        console.warn("Interrupted. The same command again goes on from the last checkpoints.")
        return INTERRUPTED


def copy_records(ids: Sequence[str], source: Path, target: Path) -> None:
    """Copy records without the students' weights.

    Args:
        ids: Which.
        source: Folder of the records.
        target: Folder to keep them in; where it is the source nothing is done.
    """
    for run_id in ids if source.resolve() != target.resolve() else ():
        left_out = shutil.ignore_patterns("*.safetensors", "last.pt", ".*")
        shutil.copytree(source / run_id, target / run_id, ignore=left_out, dirs_exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as handle:
        handle.write(text.encode())
