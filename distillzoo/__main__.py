"""``python -m distillzoo COMMAND``: the package's small commands.

A command is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, and a line in ``_COMMANDS``. Its module is
imported only when it is called.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from distillzoo.errors import DistillZooError

__all__: list[str] = []

_COMMANDS = {
    "pack": ("distillzoo.data.packing_cli", "decode a folder of images once, into one memory-mapped file"),
    "taps": ("distillzoo.taps_cli", "list a network's stages, their shapes and what they were before their activation"),
}
_WRONG_INPUT, _INTERRUPTED = 2, 130


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m distillzoo", description="The small commands of distillzoo.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((each for each in arguments if not each.startswith("-")), None)
    for name, (module, help_text) in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text[:1].upper() + help_text[1:] + ".")
        if name == named:
            importlib.import_module(module).add_arguments(command)
    given = parser.parse_args(arguments)
    try:
        return int(importlib.import_module(_COMMANDS[given.command][0]).run(given))
    except DistillZooError as error:
        sys.stderr.write(f"python -m distillzoo {given.command}: {' '.join(str(error).split())}\n")
        return _WRONG_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
