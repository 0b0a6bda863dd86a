"""Two processes on one output folder: the second is refused in a sentence, and a dead one's lock is taken over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distillzoo.bench.lock import LOCK_NAME, folder_lock
from distillzoo.errors import OptionError
from tests.bench.conftest import Call

HOLD = """
import fcntl, json, sys
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
json.dump({"pid": 4242, "host": "elsewhere", "since": "yesterday"}, handle)
handle.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_held_once_and_let_go(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()
        with (
            pytest.raises(OptionError, match=r"is in use by process .* since .*; wait for its end, or name another"),
            folder_lock(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK_NAME).is_file(), "the refused one takes nothing away"
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        pass


def test_a_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ['{"pid": 1, "host": "here", "since": "yesterday"}', "", "no json"])
def test_the_lock_of_a_dead_process_is_taken_over(left: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text(left)
    with folder_lock(tmp_path):
        assert "yesterday" not in (tmp_path / LOCK_NAME).read_text()


def test_a_second_process_is_refused_and_its_end_frees_the_folder(call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    output.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output / LOCK_NAME)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    arguments = ["--recipe", recipe_file, "--methods", "vanilla", "--seeds", "0", "--epochs", "1", "--output", str(output)]
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        outcome = call(*arguments)
        assert outcome.code == 2
        assert "is in use by process 4242 on elsewhere since yesterday" in outcome.err
        assert outcome.err.count("\n") == 1
        assert [path.name for path in output.iterdir()] == [LOCK_NAME]
        assert call(*arguments, "--table-only").code == 0, "looking disturbs nobody"
    finally:
        holder.kill()
        holder.wait()
        for stream in (holder.stdin, holder.stdout):
            if stream is not None:
                stream.close()
    assert call(*arguments).code == 0
    assert not (output / LOCK_NAME).exists()
