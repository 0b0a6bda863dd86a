"""``python -m distillzoo taps MODEL``: what a network offers to methods that read its features."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

from distillzoo.errors import DistillZooError, OptionError, ShapeError, failure_of
from distillzoo.models import create_model
from distillzoo.taps import Tapped
from distillzoo.taps.teacher import declared_data
from distillzoo.types import DataSpec

__all__: list[str] = []

_GUESS = (224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument("model", metavar="MODEL", help="as create_model takes it: resnet8, timm/resnet18, torchvision/swin_t")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N", help="classes of the network (default: 1000)")
    parser.add_argument(
        "--input-size", type=int, metavar="PIXELS", help="height and width of the images (default: what the network declares)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Build the network with fresh weights and list its taps.

    Args:
        arguments: What :func:`add_arguments` declared.
    Returns:
        0.
    Raises:
        ShapeError: If the network does not run at the size.
    """
    network = create_model(arguments.model, num_classes=arguments.num_classes)
    data = DataSpec(arguments.num_classes, _GUESS)
    if arguments.input_size is not None:
        data = DataSpec(arguments.num_classes, (arguments.input_size, arguments.input_size))
    else:
        with suppress(OptionError):  # it declares nothing: the guess stands
            data = DataSpec(arguments.num_classes, declared_data(network, data).input_size)
    try:
        tapped = Tapped(network, data, role="network")
    except DistillZooError:
        raise
    except Exception as error:  # a network may raise anything at a size that it cannot take
        raise ShapeError(
            f"{arguments.model} does not run on images of {data.input_size[0]}x{data.input_size[1]} ({failure_of(error)}); "
            "give --input-size in pixels."
        ) from error
    sys.stdout.write(f"{arguments.model}, {data.input_size[0]}x{data.input_size[1]} pixels, {tapped.num_classes} classes\n\n")
    for line in _table(_rows(tapped)):
        sys.stdout.write(f"{line}\n")
    return 0


def _rows(tapped: Tapped) -> list[tuple[str, ...]]:
    """One row a tap; stages first."""
    rows: list[tuple[str, ...]] = [("tap", "path", "shape", "before its activation", "norm before it")]
    for number, stage in enumerate(tapped.stages, 1):
        name = f"stage{number}"
        rows.append((name, stage.path, _shape(tapped, name), stage.pre or "ends without one: the same tensor", stage.norm or "-"))
    if "pooled" in tapped.shapes:
        rows.append(("pooled", tapped.path("pooled"), _shape(tapped, "pooled"), "-", "-"))
    else:
        rows.append(("pooled", "none found", "-", "-", "-"))
    return rows


def _shape(tapped: Tapped, name: str) -> str:
    return " x ".join(map(str, tapped.shapes[name]))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
