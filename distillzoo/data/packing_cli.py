"""``python -m distillzoo pack SRC DST``."""

from __future__ import annotations

import argparse
import sys
import warnings

from tqdm import tqdm

from distillzoo.data.class_lists import CLASS_LISTS, find_class_list
from distillzoo.data.imagenet100 import present_classes
from distillzoo.data.packing import pack_folder

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument("source", metavar="SRC", help="folder of images: train/ and val/ with a folder for each class, or one tree")
    parser.add_argument("target", metavar="DST", help="folder to write; must not exist yet")
    parser.add_argument(
        "--short-side", type=int, default=256, metavar="PIXELS", help="short side of the packed images (default: 256)"
    )
    parser.add_argument(
        "--class-list", metavar="NAME|FILE", help=f"pack these classes of ImageNet: {', '.join(CLASS_LISTS)}, or a file"
    )
    parser.add_argument("--allow-missing-classes", action="store_true", help="go on with a copy that lacks classes of the list")
    parser.add_argument("--skip-bad", action="store_true", help="leave out image files that cannot be used, and name them")
    parser.add_argument("--restart", action="store_true", help="throw away what an interrupted call has left, and begin anew")


def run(arguments: argparse.Namespace) -> int:
    """Pack, with a progress bar.

    Args:
        arguments: What :func:`add_arguments` declared.
    Returns:
        0.
    """
    classes = None
    with tqdm(unit=" images", dynamic_ncols=True, disable=None) as bar, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: bar.write(f"Note: {message}", file=sys.stderr)

        if arguments.class_list is not None:
            wanted = find_class_list(arguments.class_list)
            classes = present_classes(arguments.source, wanted, allow_missing=arguments.allow_missing_classes).wnids

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = pack_folder(
            arguments.source,
            arguments.target,
            short_side=arguments.short_side,
            classes=classes,
            skip_bad=arguments.skip_bad,
            restart=arguments.restart,
            advance=advance,
        )
    sys.stdout.write(f"{done.summary}\n")
    return 0
